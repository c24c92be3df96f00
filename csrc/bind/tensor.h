// Reads a torch tensor through its Python methods: no torch header, so one build serves every torch version.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "fastattn/params.h"

namespace fastattn {

// Shape, strides, dtype and address of `tensor`, right-aligned in four dimensions; its spans checked in 64 bits.
// None gives an empty view where `optional`.
TensorView view_of(pybind11::handle tensor, const char* name, int dims, bool optional = false);

// The same for a tensor that must have this dtype.
TensorView view_as(pybind11::handle tensor, const char* name, int dims, DType dtype);

[[noreturn]] inline void refuse(const std::string& why) { throw pybind11::value_error(why); }

}  // namespace fastattn
