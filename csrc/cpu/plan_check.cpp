#include <stdexcept>
#include <string>
#include <vector>

#include "fastattn/plan_builder.h"

namespace fastattn {
namespace {

// Either half of a plan: lists of runs over `tiles`, one for each of `count` tiles of `slices` slices.
struct Half {
    const char* name;
    const int32_t* start;
    const TileRun* runs;
    const int32_t* order;
    int64_t run_count, count, tiles;

    [[noreturn]] void refuse(const char* what, int64_t at) const {
        throw std::invalid_argument("malformed plan: " + std::string(name) + what + " at " + std::to_string(at));
    }

    // Returns how many tiles the lists hold.
    int64_t check(int64_t slices, int64_t partial) const {
        const int64_t lists = slices * count;
        int64_t total = 0;
        if (start[0] != 0) refuse("_start does not begin with 0", 0);
        for (int64_t list = 0; list < lists; ++list) {
            if (start[list] > start[list + 1]) refuse("_start decreases", list + 1);
            if (start[list + 1] > run_count) refuse("_start points past its runs", list + 1);
            int64_t end = 0;
            for (int64_t at = start[list]; at < start[list + 1]; ++at) {
                const TileRun& run = runs[at];
                if (run.first < end) refuse("s are not sorted by tile, or overlap,", at);
                if (run.count < 1 || (run.bits >= 0 && run.count != 1)) refuse("s have a wrong count", at);
                end = int64_t{run.first} + run.count;
                if (end > tiles) refuse("s point past the last tile", at);
                if (run.bits < -1 || run.bits >= partial) refuse("s point past the bit tiles", at);
                total += run.count;
            }
        }
        if (start[lists] != run_count) refuse("_start does not end with the number of runs", lists);
        check_order(slices);
        return total;
    }

    void check_order(int64_t slices) const {
        std::vector<int64_t> seen(static_cast<size_t>(count), -1);
        for (int64_t at = 0; at < slices * count; ++at) {
            const int32_t tile = order[at];
            if (tile < 0 || tile >= count || seen[tile] == at / count) refuse("_order is not a permutation", at);
            seen[tile] = at / count;
        }
    }
};

}  // namespace

void check_plan(const TilePlanView& p, int64_t row_runs, int64_t column_runs, int64_t partial) {
    const int64_t slices = p.batches * p.heads;
    const Half rows{"row", p.row_start, p.rows, p.row_order, row_runs, p.q_tiles, p.k_tiles};
    const Half columns{"column", p.column_start, p.columns, p.column_order, column_runs, p.k_tiles, p.q_tiles};
    if (rows.check(slices, partial) != columns.check(slices, partial)) {
        throw std::invalid_argument("malformed plan: rows and columns hold different numbers of tiles");
    }
}

}  // namespace fastattn
