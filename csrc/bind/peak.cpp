// _C.peak_fma, _C.peak_bf16_dot, _C.read_bandwidth: the bench's denominators, in the instruction set of the kernels.
#include "fastattn/peak.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fastattn {
namespace {

struct Peaks {
    double (*fma)(int, double);
    double (*bf16_dot)(int, double);
    double (*read)(int, size_t);
};

Peaks peaks() {
#define FASTATTN_CASE_PEAK(isa) \
    case Isa::isa:              \
        return {isa::fma_peak, isa::bf16_dot_peak, isa::read_bandwidth};
    switch (current_isa()) {
        FASTATTN_FOR_EACH_BF16_ISA(FASTATTN_CASE_PEAK)
        default:
            return {scalar::fma_peak, scalar::bf16_dot_peak, scalar::read_bandwidth};
    }
#undef FASTATTN_CASE_PEAK
}

void check_threads(int threads) {
    if (threads < 1) throw py::value_error("threads must be positive");
}

}  // namespace

void register_peak(py::module_& m) {
    m.def(
        "peak_fma",
        [](int threads, double seconds) {
            check_threads(threads);
            py::gil_scoped_release release;
            return peaks().fma(threads, seconds);
        },
        py::arg("threads"), py::arg("seconds"), "Best fp32 GFLOP/s.");
    m.def(
        "peak_bf16_dot",
        [](int threads, double seconds) {
            check_threads(threads);
            py::gil_scoped_release release;
            return peaks().bf16_dot(threads, seconds);
        },
        py::arg("threads"), py::arg("seconds"), "Best bf16 dot-product GFLOP/s, 0 without such an instruction.");
    m.def(
        "read_bandwidth",
        [](int threads, size_t bytes) {
            check_threads(threads);
            py::gil_scoped_release release;
            return peaks().read(threads, bytes);
        },
        py::arg("threads"), py::arg("bytes"), "Best GB/s of reading a buffer of that size.");
}

}  // namespace fastattn
