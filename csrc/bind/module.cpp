#include <pybind11/pybind11.h>

#include "fastattn/isa.h"
#include "fastattn/parallel.h"

namespace py = pybind11;

namespace fastattn {
void register_cuda(py::module_& m);
void register_softmax(py::module_& m);
void register_softmax_plain(py::module_& m);
void register_linear(py::module_& m);
void register_linear_plain(py::module_& m);
void register_peak(py::module_& m);
void register_plan(py::module_& m);
}  // namespace fastattn

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    try {
        fastattn::current_isa();
    } catch (const std::exception& error) {
        throw py::import_error(error.what());
    }
    m.doc() = "Native kernels of fastattn: no torch inside, tensors are read through DLPack or their Python methods.";
    m.attr("version") = FASTATTN_VERSION;
    m.def("isa", [] { return fastattn::isa_name(fastattn::current_isa()); }, "instruction set in use");
    m.def(
        "common_isa", [] { return fastattn::isa_name(fastattn::common_isa()); },
        "that of kernels without bf16 products");
    m.def("best_isa", [] { return fastattn::isa_name(fastattn::best_isa()); }, "best instruction set of this machine");
    m.def("poison_scratch", &fastattn::poison_scratch, "for tests: new scratch memory holds NaN");
    fastattn::register_cuda(m);
    fastattn::register_softmax(m);
    fastattn::register_softmax_plain(m);
    fastattn::register_linear(m);
    fastattn::register_linear_plain(m);
    fastattn::register_plan(m);
    fastattn::register_peak(m);
}
