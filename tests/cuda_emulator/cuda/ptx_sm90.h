// Emulated twin of csrc/cuda/ptx_sm90.h, from the PTX ISA's definitions of each instruction.
#pragma once
#include <algorithm>
#include <map>

#include "cuda/ptx.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"

namespace fastattn {
namespace cuda {

inline int grid_blocks() { return static_cast<int>(emulator::grid_blocks()); }
inline int atomic_increment(int* counter) { return (*counter)++; }

// Registers per thread of each warpgroup. A block gets what its threads can have equally, in steps of 8, and no more
// later.
struct Registers {
    int at_launch = 0;
    std::vector<int> of_warpgroup;

    int total() const {
        int sum = 0;
        for (const int n : of_warpgroup) sum += n;
        return sum;
    }
};

inline void set_registers(const char* what, int n, bool up) {
    auto& all = emulator::block_state<Registers>();
    if (all.of_warpgroup.empty()) {
        all.at_launch = std::min(65536 / emulator::block_threads() / 8 * 8, 248);
        all.of_warpgroup.assign(emulator::block_threads() / 128, all.at_launch);
    }
    emulator::meet(what, emulator::warpgroup());
    int& mine = all.of_warpgroup[emulator::thread_index() / 128];
    if (up ? n < mine : n > mine) emulator::fail(std::string(what) + " in the wrong direction");
    const int most = all.at_launch * static_cast<int>(all.of_warpgroup.size());
    const Registers* registers = &all;
    int* target = &mine;
    emulator::wait_until(what, [=] {
        if (registers->total() - *target + n > most) return false;
        *target = n;
        return true;
    });
}

template <int n>
void raise_registers() {
    static_assert(n % 8 == 0 && n >= 24 && n <= 256);
    set_registers("setmaxnreg.inc", n, true);
}
template <int n>
void lower_registers() {
    static_assert(n % 8 == 0 && n >= 24 && n <= 256);
    set_registers("setmaxnreg.dec", n, false);
}

struct Barrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;  // expected and not yet there
    uint32_t phase = 0;

    void end_phase_if_complete() {
        if (pending || bytes) return;
        pending = count;
        ++phase;
    }
};

inline Barrier& barrier_at(uint32_t address, const char* what) {
    emulator::shared_bytes(address, 8, 8, what);
    auto& all = emulator::block_state<std::map<uint32_t, Barrier>>();
    const auto found = all.find(address);
    if (found == all.end()) emulator::fail(std::string(what) + " before mbarrier.init");
    return found->second;
}

inline void barrier_init(uint32_t barrier, int count) {
    emulator::shared_bytes(barrier, 8, 8, "mbarrier.init");
    Barrier& made = emulator::block_state<std::map<uint32_t, Barrier>>()[barrier];
    if (made.count) emulator::fail("mbarrier.init of a live barrier");
    made.count = made.pending = count;
}
inline void barrier_init_fence() {}

inline void arrive_at(Barrier& barrier, const char* what) {
    if (--barrier.pending < 0) emulator::fail(std::string(what) + ": more arrivals than the phase counts");
    barrier.end_phase_if_complete();
}
inline void barrier_arrive(uint32_t barrier) { arrive_at(barrier_at(barrier, "mbarrier.arrive"), "mbarrier.arrive"); }
inline void barrier_arrive_if(uint32_t barrier, bool wanted) {
    if (wanted) barrier_arrive(barrier);
}
inline void barrier_expect(uint32_t barrier, int bytes) {
    Barrier& expecting = barrier_at(barrier, "mbarrier.arrive.expect_tx");
    expecting.bytes += bytes;
    arrive_at(expecting, "mbarrier.arrive.expect_tx");
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    const Barrier* waiting = &barrier_at(barrier, "mbarrier.try_wait");
    emulator::wait_until("mbarrier.try_wait", [=] { return (waiting->phase & 1) != (parity & 1); });
}

// The 128-byte swizzle: 16-byte units of a row of 128 bytes trade places by the row's number in its group of 8.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// What it will overwrite is lost from its issue on; what it brings is there when nobody can go on without it.
inline void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x0, int x1, int x2, int x3) {
    const int64_t first[4] = {x0, x1, x2, x3};
    const int64_t row_bytes = int64_t{map.box[0]} * 2;
    const int64_t bytes = row_bytes * map.box[1] * map.box[2] * map.box[3];
    need_fenced(to, bytes, "cp.async.bulk.tensor");
    emulator::poison(emulator::shared_bytes(to, bytes, 128, "cp.async.bulk.tensor"), bytes);
    Barrier* arriving = &barrier_at(barrier, "cp.async.bulk.tensor");
    emulator::land_later([=] {
        uint32_t at = to;
        const auto copy_row = [&](int64_t i1, int64_t i2, int64_t i3) {
            const uint64_t x[3] = {uint64_t(first[1] + i1), uint64_t(first[2] + i2), uint64_t(first[3] + i3)};
            const bool inside = x[0] < map.size[1] && x[1] < map.size[2] && x[2] < map.size[3];
            for (int64_t i0 = 0; i0 < map.box[0]; ++i0, at += 2) {
                const uint64_t column = uint64_t(first[0] + i0);
                char* target = emulator::shared_bytes(swizzled(at), 2, 2, "cp.async.bulk.tensor");
                std::memset(target, 0, 2);
                if (inside && column < map.size[0])
                    std::memcpy(
                        target,
                        map.data + column * 2 + x[0] * map.stride[1] + x[1] * map.stride[2] + x[2] * map.stride[3], 2);
            }
        };
        for (int64_t i3 = 0; i3 < map.box[3]; ++i3)
            for (int64_t i2 = 0; i2 < map.box[2]; ++i2)
                for (int64_t i1 = 0; i1 < map.box[1]; ++i1) copy_row(i1, i2, i3);
        arriving->bytes -= bytes;
        arriving->end_phase_if_complete();
    });
}

inline void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async.bulk: not 16-byte aligned");
    need_fenced(to, bytes, "cp.async.bulk");
    emulator::poison(emulator::shared_bytes(to, bytes, 16, "cp.async.bulk"), bytes);
    Barrier* arriving = &barrier_at(barrier, "cp.async.bulk");
    emulator::land_later([=] {
        std::memcpy(emulator::shared_bytes(to, bytes, 16, "cp.async.bulk"), from, bytes);
        arriving->bytes -= bytes;
        arriving->end_phase_if_complete();
    });
}

// Reads its source when nobody can go on without it; what nobody waited for has read nothing and is lost.
struct BulkAdds {
    int under_way = 0;
};

inline void bulk_add(float* to, uint32_t from, int bytes) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("cp.reduce.async.bulk: not 16-byte aligned");
    need_fenced(from, bytes, "cp.reduce.async.bulk");
    BulkAdds* mine = &emulator::thread_state<BulkAdds>();
    ++mine->under_way;
    emulator::land_later([=] {
        const char* source = emulator::shared_bytes(from, bytes, 16, "cp.reduce.async.bulk");
        for (int i = 0; i < bytes / 4; ++i) {
            float x;
            std::memcpy(&x, source + 4 * i, 4);
            to[i] += x;
        }
        --mine->under_way;
    });
}

inline void bulk_wait_read() {
    const BulkAdds* mine = &emulator::thread_state<BulkAdds>();
    emulator::wait_until("cp.async.bulk.wait_group.read", [=] { return mine->under_way == 0; });
}

struct NamedBarrier {
    int arrived = 0;
    uint32_t phase = 0;
};

inline void named_barrier(int barrier, int threads) {
    if (barrier < 1 || barrier > 15 || threads % 32) emulator::fail("bar.sync: barrier or number of threads");
    NamedBarrier* here = &emulator::block_state<std::map<int, NamedBarrier>>()[barrier];
    const uint32_t phase = here->phase;
    if (++here->arrived == threads) {
        here->arrived = 0;
        ++here->phase;
        return;
    }
    emulator::wait_until("bar.sync", [=] { return here->phase != phase; });
}

inline void fence_async_proxy() { fence_stores(); }

}  // namespace cuda
}  // namespace fastattn
