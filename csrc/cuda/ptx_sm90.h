// What the kernels use of sm_90a besides ptx.h: mbarriers, named barriers, TMA loads, bulk copies, wgmma, registers
// moved between warpgroups. tests/cuda_emulator/cuda/ptx_sm90.h is its twin for a host.
#pragma once
#include <cuda.h>

#include "cuda/ptx.h"

namespace fastattn {
namespace cuda {

using TensorMap = CUtensorMap;

__device__ __forceinline__ int grid_blocks() { return static_cast<int>(gridDim.x); }
// The value before.
__device__ __forceinline__ int atomic_increment(int* counter) { return atomicAdd(counter, 1); }

// Registers of each thread of the calling warpgroup.
template <int n>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(n));
}
template <int n>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(n));
}

// An mbarrier is 8 bytes of shared memory. A phase ends after `count` arrivals and all bytes that were expected.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialised barriers known to the copy engine; other threads need a block barrier on top.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Predicated, not branched around.
__device__ __forceinline__ void barrier_arrive_if(uint32_t barrier, bool wanted) {
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %1, 0;\n"
        "@wanted mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(barrier),
        "r"(static_cast<int>(wanted))
        : "memory");
}
// Arrives, and announces `bytes` of copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; the one before the first has parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra AGAIN;\nDONE:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// The map's box at (x0, x1, x2, x3), innermost first, to shared memory; zeros where it is outside the tensor.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x0, int x1, int x2,
                                         int x3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
        : "memory");
}

// Bytes as they are, a multiple of 16, at addresses that are.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Adds floats of shared memory to global memory, in an order of its own. `from` is free to be written again after
// bulk_wait_read() by the same thread.
__device__ __forceinline__ void bulk_add(float* to, uint32_t from, int bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;\n" ::"l"(__cvta_generic_to_global(to)),
        "r"(from), "r"(bytes)
        : "memory");
}
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }

// Whole warps meet, `threads` threads in all; 0 is the barrier of sync_threads.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread wrote to shared memory is seen by wgmma and the copy engine from here on.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Descriptor of 16-bit numbers in rows of 128 bytes, swizzled by 128 bytes, in atoms of 8 rows that follow each other.
// K-major: rows are m (or n), `leading` is ignored. MN-major: rows are k, the next 64 of m (or n) are `leading` bytes
// on.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, int leading = 16) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
// The descriptor of what lies `bytes` further.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

// Registers written before it may be operands and accumulators of the wgmma after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Until at most `pending` groups are under way. The compiler moves no use of `results` to before it.
template <int pending, int... n>
__device__ __forceinline__ void wgmma_wait(float (&... results)[n]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
    const auto pin = [](float& x) { asm volatile("" : "+f"(x)::"memory"); };
    const auto pin_all = [&](float* x, int count) {
#pragma unroll
        for (int i = 0; i < count; ++i) pin(x[i]);
    };
    (pin_all(results, n), ...);
}

#define FASTATTN_F8(d, i)                                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FASTATTN_F32(d, i) FASTATTN_F8(d, i), FASTATTN_F8(d, i + 8), FASTATTN_F8(d, i + 16), FASTATTN_F8(d, i + 24)
#define FASTATTN_F64(d, i) FASTATTN_F32(d, i), FASTATTN_F32(d, i + 32)
#define FASTATTN_F128(d, i) FASTATTN_F64(d, i), FASTATTN_F64(d, i + 64)
#define FASTATTN_R32                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_R64                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
    "%62, %63"
#define FASTATTN_R128                                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "   \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
    "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "   \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
    "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
    "%119, %120, %121, %122, %123, %124, %125, %126, %127"
// `d` lists the accumulators, `registers` names them; i0 on are the numbers of the operands after them.
#define FASTATTN_WGMMA_SS(type, n, registers, d, i0, i1, i2, i3, i4)                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n            \
                 "k16.f32." type "." type " {" registers "}, %" #i0 ", %" #i1 ", add, 1, 1, %" #i3 ", %" #i4 ";\n}\n" \
                 : d                                                                                                  \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(a_mn_major), "n"(b_mn_major))
#define FASTATTN_WGMMA_RS(type, n, registers, d, i0, i1, i2, i3, i4, i5, i6)                                       \
    asm volatile(                                                                                                  \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type  \
        "." type " {" registers "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", add, 1, 1, %" #i6 ";\n}\n" \
        : d                                                                                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(b_mn_major))
#define FASTATTN_PASS(...) __VA_ARGS__
#define FASTATTN_WGMMA(form, n, registers, d, ...)                 \
    if constexpr (dtype == DType::kBFloat16)                       \
        form("bf16", n, registers, FASTATTN_PASS(d), __VA_ARGS__); \
    else                                                           \
        form("f16", n, registers, FASTATTN_PASS(d), __VA_ARGS__)

// d [64, n] (+)= a [64, 16] b [16, n] by a warpgroup, asynchronously. Thread t of it holds row 16 (t / 32) + t % 32 / 4
// (+ 8), column 8 c + 2 (t % 4) (+ 1) in d[4 c + 2 (.. + 8) + (.. + 1)].
template <DType dtype, int n, bool a_mn_major, bool b_mn_major>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(n == 64 || n == 128 || n == 256);
    if constexpr (n == 64)
        FASTATTN_WGMMA(FASTATTN_WGMMA_SS, 64, FASTATTN_R32, FASTATTN_F32(d, 0), 32, 33, 34, 35, 36);
    else if constexpr (n == 128)
        FASTATTN_WGMMA(FASTATTN_WGMMA_SS, 128, FASTATTN_R64, FASTATTN_F64(d, 0), 64, 65, 66, 67, 68);
    else
        FASTATTN_WGMMA(FASTATTN_WGMMA_SS, 256, FASTATTN_R128, FASTATTN_F128(d, 0), 128, 129, 130, 131, 132);
}

// The same with a in registers: rows as in d, columns 2 (t % 4) (+ 1) in a[0] and a[1] (row + 8), those 8 further in
// a[2] and a[3].
template <DType dtype, int n, bool b_mn_major>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(n == 64 || n == 128 || n == 256);
    if constexpr (n == 64)
        FASTATTN_WGMMA(FASTATTN_WGMMA_RS, 64, FASTATTN_R32, FASTATTN_F32(d, 0), 32, 33, 34, 35, 36, 37, 38);
    else if constexpr (n == 128)
        FASTATTN_WGMMA(FASTATTN_WGMMA_RS, 128, FASTATTN_R64, FASTATTN_F64(d, 0), 64, 65, 66, 67, 68, 69, 70);
    else
        FASTATTN_WGMMA(FASTATTN_WGMMA_RS, 256, FASTATTN_R128, FASTATTN_F128(d, 0), 128, 129, 130, 131, 132, 133, 134);
}

#undef FASTATTN_F8
#undef FASTATTN_F32
#undef FASTATTN_F64
#undef FASTATTN_F128
#undef FASTATTN_R32
#undef FASTATTN_R64
#undef FASTATTN_R128
#undef FASTATTN_WGMMA_SS
#undef FASTATTN_WGMMA_RS
#undef FASTATTN_WGMMA
#undef FASTATTN_PASS

}  // namespace cuda
}  // namespace fastattn
