// The other half of a plan, made from its rows: columns for dK and dV, and the order that visits heavy tiles first.
#include <algorithm>

#include "fastattn/plan_builder.h"

namespace fastattn {
namespace {

// f(k) for the key tiles that are full in list a but not in list b.
template <class F>
void for_full_only_in(const TileRun* a, const TileRun* a_end, const TileRun* b, const TileRun* b_end, F&& f) {
    for (; a != a_end; ++a) {
        if (a->bits >= 0) continue;
        int32_t at = a->first;
        const int32_t end = a->first + a->count;
        while (at < end) {
            while (b != b_end && (b->bits >= 0 || b->first + b->count <= at)) ++b;
            const int32_t stop = b == b_end ? end : std::min(end, b->first);
            for (int32_t k = at; k < stop; ++k) f(k);
            at = b == b_end ? end : std::max(stop, b->first + b->count);
        }
    }
}

// A run of query tiles in the list of key tile `column`.
struct ColumnRun {
    int32_t column;
    TileRun run;
};

// Columns of one slice: only where neighbouring rows differ does a run of full tiles begin or end.
void transpose_slice(TilePlan* plan, int64_t slice) {
    std::vector<int32_t> begin(static_cast<size_t>(plan->k_tiles));
    std::vector<int32_t> count(static_cast<size_t>(plan->k_tiles) + 1);
    std::vector<ColumnRun> found;
    const int32_t* start = plan->row_start.data() + slice * plan->q_tiles;
    const TileRun *runs = plan->rows.data(), *last = runs, *last_end = runs;
    for (int32_t t = 0; t <= plan->q_tiles; ++t) {
        const TileRun* now = t < plan->q_tiles ? runs + start[t] : runs;
        const TileRun* now_end = t < plan->q_tiles ? runs + start[t + 1] : runs;
        for_full_only_in(last, last_end, now, now_end,
                         [&](int32_t k) { found.push_back({k, {begin[k], t - begin[k], -1}}); });
        for_full_only_in(now, now_end, last, last_end, [&](int32_t k) { begin[k] = t; });
        for (const TileRun* run = now; run != now_end; ++run) {
            if (run->bits >= 0) found.push_back({run->first, {t, 1, run->bits}});
        }
        last = now;
        last_end = now_end;
    }
    for (const ColumnRun& f : found) ++count[f.column + 1];
    for (int64_t k = 0; k < plan->k_tiles; ++k) count[k + 1] += count[k];
    const size_t base = plan->columns.size();
    refuse_over_int32(base + found.size());
    plan->columns.resize(base + found.size());
    for (int64_t k = 0; k < plan->k_tiles; ++k) {
        plan->column_start.push_back(static_cast<int32_t>(base) + count[k + 1]);
    }
    for (const ColumnRun& f : found) plan->columns[base + count[f.column]++] = f.run;
}

std::vector<int32_t> heaviest_first(const std::vector<TileRun>& runs, const std::vector<int32_t>& start, int64_t slices,
                                    int64_t tiles) {
    std::vector<int32_t> order(static_cast<size_t>(slices * tiles));
    std::vector<int64_t> weight(static_cast<size_t>(tiles));
    for (int64_t slice = 0; slice < slices; ++slice) {
        int32_t* first = order.data() + slice * tiles;
        for (int64_t t = 0; t < tiles; ++t) {
            weight[t] = 0;
            for (int32_t at = start[slice * tiles + t]; at < start[slice * tiles + t + 1]; ++at) {
                weight[t] += runs[at].count;
            }
            first[t] = static_cast<int32_t>(t);
        }
        std::stable_sort(first, first + tiles, [&](int32_t a, int32_t b) { return weight[a] > weight[b]; });
    }
    return order;
}

}  // namespace

void add_columns_and_orders(TilePlan* plan) {
    const int64_t slices = plan->batches * plan->heads;
    plan->column_start.assign(1, 0);
    for (int64_t slice = 0; slice < slices; ++slice) transpose_slice(plan, slice);
    plan->row_order = heaviest_first(plan->rows, plan->row_start, slices, plan->q_tiles);
    plan->column_order = heaviest_first(plan->columns, plan->column_start, slices, plan->k_tiles);
}

}  // namespace fastattn
