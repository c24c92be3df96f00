// Reads a plan of fastattn.masks: a tuple in the order of TilePlan's fields.
#pragma once
#include <pybind11/pybind11.h>

#include "fastattn/tile_plan.h"

namespace fastattn {

// Views the tensors of a plan after checking that every index in them stays inside; refuses others. The plan must
// outlive the view.
TilePlanView plan_view(pybind11::handle plan);

}  // namespace fastattn
