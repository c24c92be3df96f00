// Reads a call of softmax attention as Python gives it: every tensor checked against every other.
#pragma once
#include "fastattn/tile_plan.h"
#include "tensor.h"

namespace fastattn {

// Of q, k, v and out.
void check_softmax_shapes(const SoftmaxParams& p);

// What a fastattn.params.SoftmaxTensors and options say, but for threads, lse and lse_parts; `plan` outlives it.
SoftmaxParams softmax_params(pybind11::handle tensors, pybind11::handle out, double scale, pybind11::handle lo,
                             pybind11::handle hi, double softcap, double dropout_p, TilePlanView* plan,
                             int device = kCpu);

// The cotangents of a call and where its gradients go; `dense` keeps a copy of dlse alive.
SoftmaxGradients softmax_gradients(pybind11::handle dout, pybind11::handle dlse, pybind11::handle tensors,
                                   const SoftmaxParams& p, pybind11::handle dq, pybind11::handle dk,
                                   pybind11::handle dv, pybind11::handle dbias, pybind11::handle dslopes,
                                   pybind11::object* dense, int device = kCpu);

}  // namespace fastattn
