// Which instruction set the kernels run on: the best the CPU has, or a lower one named by FASTATTN_ISA.
#pragma once

#if defined(__x86_64__) && !defined(FASTATTN_SCALAR_ONLY)
#define FASTATTN_FOR_EACH_ISA(F) F(scalar) F(avx2) F(avx512) F(avx512_bf16)
#else
#define FASTATTN_FOR_EACH_ISA(F) F(scalar)
#endif

namespace fastattn {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa best_isa();     // what the CPU and the operating system allow
Isa current_isa();  // best_isa, or lower by FASTATTN_ISA (read once)
const char* isa_name(Isa isa);

}  // namespace fastattn
