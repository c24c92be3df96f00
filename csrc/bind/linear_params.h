// Reads a call of linear attention as Python gives it: every tensor checked against every other.
#pragma once
#include "fastattn/linear.h"
#include "tensor.h"

namespace fastattn {

// Order of the fields of LinearTensors; its first seven are those of the gradients.
enum LinearField { kQ, kK, kV, kDecay, kBeta, kKv, kZ, kKeyMask, kCuSeqlens, kLinearFields };

pybind11::tuple tuple_of(pybind11::handle fields, size_t size, const char* what);

// [.., n] as [.., n, 1].
TensorView lifted(TensorView t);

// A tensor of numbers for each token, [B, Hs, L] or [B, Hs, L, D], as [B, Hs, L, 1 | D].
TensorView token_view(pybind11::handle tensor, const char* name);

// What a fastattn.params.LinearTensors and options say, but for the state and what is written.
LinearParams linear_params(const pybind11::tuple& x, const std::string& map, bool causal, bool normalize, double scale,
                           int threads);

// The two parts of a state; z is there with kv, where normalised.
struct LinearState {
    TensorView kv, z;

    LinearState(pybind11::handle kv_of, pybind11::handle z_of, const char* name, bool required);
    float* kv_floats(const LinearParams& p, const char* name) const;
    float* z_floats(const LinearParams& p, const char* name, bool required) const;
};

void check_linear_out(const LinearParams& p, const TensorView& t, const char* name);

// Whether decay and beta are gates: finite logarithms <= 0, and numbers in [0, 2].
void refuse_wrong_gates(const LinearParams& p);

// The rest of a step: its state, which it advances, and where it writes.
void set_step(LinearParams& p, const pybind11::tuple& x, pybind11::handle out);

}  // namespace fastattn
