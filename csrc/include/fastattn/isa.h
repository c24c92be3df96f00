// Which instruction set the kernels run on: the best the CPU has, or a lower one named by FASTATTN_ISA.
#pragma once

// Instruction sets that every kernel is compiled for, and those of kernels that multiply bf16. The others run there as
// compiled for avx512, and so does what bf16 instructions do not help.
#if defined(__x86_64__) && !defined(FASTATTN_SCALAR_ONLY)
#define FASTATTN_FOR_EACH_ISA(F) F(scalar) F(avx2) F(avx512)
#ifdef FASTATTN_WITH_AMX
#define FASTATTN_FOR_EACH_BF16_ISA(F) FASTATTN_FOR_EACH_ISA(F) F(avx512_bf16) F(amx)
#else
#define FASTATTN_FOR_EACH_BF16_ISA(F) FASTATTN_FOR_EACH_ISA(F) F(avx512_bf16)
#endif
#else
#define FASTATTN_FOR_EACH_ISA(F) F(scalar)
#define FASTATTN_FOR_EACH_BF16_ISA(F) F(scalar)
#endif

namespace fastattn {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa best_isa();     // what the CPU and the operating system allow
Isa current_isa();  // best_isa, or lower by FASTATTN_ISA (read once)
Isa common_isa();   // the same for kernels that do not multiply bf16: at most avx512
const char* isa_name(Isa isa);

}  // namespace fastattn
