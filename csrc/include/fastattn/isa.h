// Which instruction set the kernels run on: the best the CPU has, or a lower one named by FASTATTN_ISA.
#pragma once

// Kernels that multiply by matrix tiles are also compiled for amx; the others run there as compiled for avx512_bf16.
#if defined(__x86_64__) && !defined(FASTATTN_SCALAR_ONLY)
#define FASTATTN_FOR_EACH_ISA(F) F(scalar) F(avx2) F(avx512) F(avx512_bf16)
#else
#define FASTATTN_FOR_EACH_ISA(F) F(scalar)
#endif
#ifdef FASTATTN_WITH_AMX
#define FASTATTN_FOR_EACH_TILE_ISA(F) FASTATTN_FOR_EACH_ISA(F) F(amx)
#else
#define FASTATTN_FOR_EACH_TILE_ISA(F) FASTATTN_FOR_EACH_ISA(F)
#endif

namespace fastattn {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa best_isa();     // what the CPU and the operating system allow
Isa current_isa();  // best_isa, or lower by FASTATTN_ISA (read once)
Isa vector_isa();   // the same for kernels without matrix tiles: avx512_bf16 in place of amx
const char* isa_name(Isa isa);

}  // namespace fastattn
