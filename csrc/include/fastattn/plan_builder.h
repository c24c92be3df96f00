// Builds tile plans from what rows of queries see, never forming Lq x Lk; checks plans that come from outside.
#pragma once
#include <limits>
#include <memory>
#include <stdexcept>

#include "fastattn/tile_plan.h"

namespace fastattn {

// Rows are added from query 0 on, in stretches [i0, i1) that begin and end at tiles (or at Lq), each for all slices.
// Tensors are [batches|1, heads|1, i1 - i0 | 1, ...]: a dimension of size 1 holds for all.
class PlanBuilder {
   public:
    PlanBuilder(int64_t batches, int64_t heads, int64_t Lq, int64_t Lk);
    ~PlanBuilder();

    // int32 [.., R]: row i sees the keys of [lo, hi), sorted and disjoint; lo == hi is an unused slot.
    void add_intervals(const TensorView& lo, const TensorView& hi, int64_t i0, int64_t i1);
    // int64 [.., ceil(Lk / 64)]: bit j of word w is key 64 w + j. Bits past Lk are ignored.
    void add_words(const TensorView& words, int64_t i0, int64_t i1);
    // bool [.., Lk|1], all rows at once.
    void add_mask(const TensorView& mask, int threads);
    // With its transpose and orders where `complete`. Bit tiles are numbered as they first appear in rows.
    TilePlan finish(bool complete);

   private:
    struct State;
    std::unique_ptr<State> state_;
};

// Fills columns, column_start and both orders from rows and row_start.
void add_columns_and_orders(TilePlan* plan);

inline void refuse_over_int32(size_t n) {
    if (n > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
        throw std::length_error("the plan has over 2^31 entries");
    }
}

// Throws std::invalid_argument unless every index of the plan stays inside its tensors: starts monotone, tiles in range
// and sorted, bits below `partial`, orders permutations, and as many tiles in columns as in rows.
void check_plan(const TilePlanView& plan, int64_t row_runs, int64_t column_runs, int64_t partial);

}  // namespace fastattn
