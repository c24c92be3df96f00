// Chooses the ISA once per process and forwards each entry point to it.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fastattn/isa.h"
#include "fastattn/linear.h"
#include "fastattn/softmax.h"

#ifdef FASTATTN_WITH_AMX  // on Linux
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {

static const char* const kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

// Whether the CPU multiplies bf16 tiles and Linux lets this process use them: their registers must be asked for.
[[maybe_unused]] static bool has_amx() {
#ifdef FASTATTN_WITH_AMX                                    // on Linux
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of CPUID leaf 7, EDX
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Isa best_isa() {
#if defined(__x86_64__) && !defined(FASTATTN_SCALAR_ONLY)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
        static const bool amx = has_amx();
        return amx ? Isa::amx : Isa::avx512_bf16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return Isa::avx2;
    }
#endif
    return Isa::scalar;
}

static Isa choose() {
    const Isa best = best_isa();
    const char* forced = std::getenv("FASTATTN_ISA");
    if (!forced || !*forced) return best;
    std::string names;
    for (int i = 0; i <= static_cast<int>(best); ++i) {
        if (!std::strcmp(forced, kNames[i])) return static_cast<Isa>(i);
        names += std::string(i ? ", " : "") + kNames[i];
    }
    throw std::runtime_error(std::string("FASTATTN_ISA=") + forced + " is not one of those this CPU has: " + names +
                             "; unset it or name one of these");
}

Isa current_isa() {
    static const Isa isa = choose();
    return isa;
}

Isa common_isa() { return current_isa() < Isa::avx512_bf16 ? current_isa() : Isa::avx512; }

#define FASTATTN_CASE_FORWARD(isa) \
    case Isa::isa:                 \
        return isa::softmax_forward(p);
#define FASTATTN_CASE_BACKWARD(isa) \
    case Isa::isa:                  \
        return isa::softmax_backward(p, g);

void softmax_forward(const SoftmaxParams& p) {
    if (p.B() == 0 || p.Hq() == 0 || p.Lq() == 0) return;
    switch (current_isa()) {
        FASTATTN_FOR_EACH_BF16_ISA(FASTATTN_CASE_FORWARD)
        default:
            return;
    }
}

void softmax_backward(const SoftmaxParams& p, const SoftmaxGradients& g) {
    switch (current_isa()) {
        FASTATTN_FOR_EACH_BF16_ISA(FASTATTN_CASE_BACKWARD)
        default:
            return;
    }
}

#define FASTATTN_CASE_LINEAR_FORWARD(isa) \
    case Isa::isa:                        \
        return isa::linear_forward(p);
#define FASTATTN_CASE_LINEAR_BACKWARD(isa) \
    case Isa::isa:                         \
        return isa::linear_backward(p, g);
#define FASTATTN_CASE_LINEAR_STEP(isa) \
    case Isa::isa:                     \
        return isa::linear_step(p);

void linear_forward(const LinearParams& p) {
    if (p.sequences == 0 || p.H() == 0) return;
    switch (common_isa()) {
        FASTATTN_FOR_EACH_ISA(FASTATTN_CASE_LINEAR_FORWARD)
        default:
            return;
    }
}

void linear_backward(const LinearParams& p, const LinearGradients& g) {
    if (p.sequences == 0 || p.H() == 0) return;
    switch (common_isa()) {
        FASTATTN_FOR_EACH_ISA(FASTATTN_CASE_LINEAR_BACKWARD)
        default:
            return;
    }
}

void linear_step(const LinearParams& p) {
    if (p.sequences == 0 || p.H() == 0) return;
    switch (common_isa()) {
        FASTATTN_FOR_EACH_ISA(FASTATTN_CASE_LINEAR_STEP)
        default:
            return;
    }
}

}  // namespace fastattn
