// What the kernels use of sm_80: who a thread is, warps, shared memory, cp.async, ldmatrix, mma.sync, conversions.
// tests/cuda_emulator/cuda/ptx.h is its twin for a host; shared memory is named by 32-bit addresses in both.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fastattn/params.h"

namespace fastattn {
namespace cuda {

extern __shared__ __align__(1024) char dynamic_shared[];

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
// x; what follows from it is computed anew rather than kept in registers through a loop.
__device__ __forceinline__ int volatile_copy(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
// Of lane `lane`, the same value in every lane: what depends on it is uniform to the compiler.
__device__ __forceinline__ int from_lane(int x, int lane) { return __shfl_sync(~0u, x, lane); }
__device__ __forceinline__ bool warp_any(bool x) { return __any_sync(~0u, x); }

// Address of the dynamic shared memory, a multiple of 1024.
__device__ __forceinline__ uint32_t shared_memory() {
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

template <class T>
__device__ __forceinline__ T load_shared(uint32_t address) {
    return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <class T>
__device__ __forceinline__ void store_shared(uint32_t address, T x) {
    *static_cast<T*>(__cvta_shared_to_generic(address)) = x;
}

// 16 bytes; zeros without reading `from` where not `wanted`.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most `pending` of this thread's groups are under way; other threads' copies need a barrier on top.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8].
template <DType dtype>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (dtype == DType::kBFloat16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even, `low` in the low half.
template <DType dtype>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    if constexpr (dtype == DType::kBFloat16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// The low or high half of two packed numbers.
template <DType dtype>
__device__ __forceinline__ float unpack_low(uint32_t x) {
    if constexpr (dtype == DType::kBFloat16) return __uint_as_float(x << 16);
    float r;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}\n" : "=f"(r) : "r"(x));
    return r;
}

template <DType dtype>
__device__ __forceinline__ float unpack_high(uint32_t x) {
    if constexpr (dtype == DType::kBFloat16) return __uint_as_float(x & 0xFFFF0000u);
    float r;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}\n" : "=f"(r) : "r"(x));
    return r;
}

// 2^x within 2 ulp, results below 2^-126 as 0; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
    return r;
}

// 1 / x within 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float log2_approx(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
    return r;
}

// Rounded by themselves: the compiler fuses neither with what follows.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace cuda
}  // namespace fastattn
