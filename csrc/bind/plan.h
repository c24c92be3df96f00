// Reads a plan of fastattn.masks: a tuple in the order of TilePlan's fields.
#pragma once
#include <pybind11/pybind11.h>

#include "fastattn/tile_plan.h"
#include "tensor.h"

namespace fastattn {

// Views the tensors of a plan after checking that every index in them stays inside; refuses others. Of a plan on a GPU
// only the sizes are checked: its indices were when it was built. The plan must outlive the view.
TilePlanView plan_view(pybind11::handle plan, int device = kCpu);

}  // namespace fastattn
