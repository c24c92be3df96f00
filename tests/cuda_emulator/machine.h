// One thread block at a time: every CUDA thread is a fiber, and threads meet where the PTX ISA says they do.
//
// Adding an instruction, in the emulator's twin of the header that has the PTX:
// - of one thread: a plain function. Shared memory only through shared<T>(address), which checks range and alignment.
// - of threads that act together (mma, shuffles, wgmma): every thread calls `collective(name, group, slot, action)`
// with
//   its own operands and results in `slot`; the last to arrive runs `action(slots)` over all of them, indexed by place
//   in the group. Another name, or a thread that never comes, is an error that says who waits where.
// - that waits (mbarrier, named barrier): `wait_until(name, condition)`.
// - that lands later (cp.async, TMA, wgmma results): either keep it in `thread_state<T>()` / `block_state<T>()` and
// land
//   it in the instruction that waits for it, or give it to `land_later(action)`: it runs only when no thread can go on
//   without it. Poison what it will write with `poison` when it is issued.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

// Threads [first, first + count) of the block.
struct Group {
    int first, count;
};

int thread_index();
int block_threads();
int64_t block_index();
int64_t grid_blocks();
inline Group warp() { return {thread_index() / 32 * 32, 32}; }
inline Group warpgroup() { return {thread_index() / 128 * 128, 128}; }
inline Group block() { return {0, block_threads()}; }

// Ends the launch with a std::runtime_error that names the block and thread.
[[noreturn]] void fail(const std::string& what);

// Shared memory has addresses kSharedBase and up, as on a device where 0 is not null; fresh it is all NaN.
constexpr uint32_t kSharedBase = 1024;
char* shared_bytes(uint32_t address, size_t bytes, size_t alignment, const char* what);

template <class T>
T& shared(uint32_t address, const char* what) {
    return *reinterpret_cast<T*>(shared_bytes(address, sizeof(T), alignof(T), what));
}

void count_bank_conflict();
int shared_memory_of_processor();

// All bits set are NaN in every float format.
inline void poison(void* to, size_t bytes) { std::memset(to, 0xFF, bytes); }

// True for the thread that completes the meeting; the others return false once `release` was called by that thread.
bool arrive(const char* what, Group group, void* slot);
void** slots(Group group);
void release(Group group);

template <class Slot, class Action>
void collective(const char* what, Group group, Slot& mine, Action&& action) {
    if (!arrive(what, group, &mine)) return;
    action(reinterpret_cast<Slot**>(slots(group)));
    release(group);
}

inline void meet(const char* what, Group group) {
    char nothing = 0;
    collective(what, group, nothing, [](char**) {});
}

void wait_until(const char* what, std::function<bool()> condition);
void land_later(std::function<void()> action);

// State of a kind T that lives as long as the block: one per block, or one per thread.
using States = std::vector<std::shared_ptr<void>>;
States& block_states();
size_t new_state();

template <class T>
T& block_state() {
    static const size_t id = new_state();
    States& states = block_states();
    if (states.size() <= id) states.resize(id + 1);
    if (!states[id]) states[id] = std::make_shared<T>();
    return *static_cast<T*>(states[id].get());
}

template <class T>
T& thread_state() {
    std::vector<T>& all = block_state<std::vector<T>>();
    if (all.empty()) all.resize(block_threads());
    return all[thread_index()];
}

// Runs `body` in every thread of every block. Throws what went wrong, naming `kernel`.
void run(const char* kernel, int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulator

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// Which thread runs first of those that can: the lowest (0) or the highest (1). Results must not depend on it.
EMULATOR_EXPORT void emulator_set_order(int highest_first);

// Rows of 8 x 8 matrices that shared the banks of an earlier row of their matrix, since the library was loaded.
EMULATOR_EXPORT int64_t emulator_bank_conflicts();

// Bytes of shared memory of one multiprocessor, from which kernels choose their tiles.
EMULATOR_EXPORT void emulator_set_shared_memory(int bytes);
