// Builds tile plans from what rows of queries see, never forming Lq x Lk; checks plans that come from outside.
#pragma once
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "fastattn/tile_plan.h"

namespace fastattn {

// What query rows see: a leaf, or what follows from the one or two steps before that are not yet used (postfix).
// Tensors are [batches|1, heads|1, rows|1, ...]: a dimension of size 1 holds for all.
struct RowStep {
    enum Op { kIntervals, kWords, kMultiples, kComplement, kIntersect, kUnite };
    Op op;
    // kIntervals: int32 [.., R], row i sees the keys of [lo, hi), sorted and disjoint; lo == hi is an unused slot.
    // With start and end, int32 [.., 1]: row i has the intervals start .. end - 1 of lo and hi [n].
    TensorView lo, hi, start, end;
    TensorView words;  // kWords: int64 [.., ceil(Lk / 64)], bit j of word w is key 64 w + j; bits past Lk are ignored
    int64_t step = 1, shift = 0;  // kMultiples: row i sees the keys j where j - i - shift is a multiple of step
};

class PlanBuilder {
   public:
    PlanBuilder(int64_t batches, int64_t heads, int64_t Lq, int64_t Lk);
    ~PlanBuilder();

    // Rows are added from query 0 on, in stretches [i0, i1) that begin and end at tiles (or at Lq), each for all
    // slices.
    void add_rows(const std::vector<RowStep>& steps, int64_t i0, int64_t i1);
    // Visible pairs of such rows, which are not added; in any order.
    int64_t count_pairs(const std::vector<RowStep>& steps, int64_t i0, int64_t i1) const;
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
