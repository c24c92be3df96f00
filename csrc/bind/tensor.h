// Reads a torch tensor through DLPack, or its Python methods: no torch header, so one build serves every torch version.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>
#include <string>

#include "fastattn/params.h"

namespace fastattn {

constexpr int kCpu = -1;  // in place of the number of a CUDA device

// Shape, strides, dtype and address of `tensor`, right-aligned in four dimensions; its spans checked in 64 bits.
// None gives an empty view where `optional`.
TensorView view_of(pybind11::handle tensor, const char* name, int dims, bool optional = false, int device = kCpu);

// The same for a tensor that must have this dtype.
TensorView view_as(pybind11::handle tensor, const char* name, int dims, DType dtype, int device = kCpu);

bool is_plain(pybind11::handle tensor);  // of torch's own class, or a parameter
bool is_on_cpu(pybind11::handle tensor);
bool requires_grad(pybind11::handle tensor);

// torch.empty_like, and uninitialised float32 on the same device.
pybind11::object empty_like(pybind11::handle tensor);
pybind11::object empty_floats(pybind11::handle tensor, const std::array<int64_t, 4>& sizes);

[[noreturn]] inline void refuse(const std::string& why) { throw pybind11::value_error(why); }

std::string text(const TensorView& t);  // its shape

// Refuses other sizes; `broadcast` lets any of them be 1.
void expect(const TensorView& t, const char* name, const int64_t (&sizes)[4], bool broadcast = false);

void refuse_unless_contiguous(const TensorView& t, const char* name);

bool is_expanded(const TensorView& t);       // some of its elements are one
inline bool is_usual(const TensorView& t) {  // torch.empty_like lays its result out as `empty_like_layout` does
    return t.last_stride() == 1 && !is_expanded(t);
}

// A tensor that is written must have one place for each element, and share none with what is read or written beside it.
void refuse_overlap(const TensorView& t, const char* name, std::initializer_list<const TensorView*> others);

// Fresh memory is zeroed page by page where it is first written: asks for large pages under a large output, where the
// system leaves the choice to programs.
void ask_for_large_pages(const TensorView& t);

// The values of a dense float32 tensor; null stays null.
float* floats(const TensorView& t, const char* name, const int64_t (&sizes)[4]);

}  // namespace fastattn
