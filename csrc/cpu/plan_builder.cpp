#include "fastattn/plan_builder.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <stdexcept>

#include "fastattn/parallel.h"
#include "plan_rows.h"

namespace fastattn {
namespace {

uint64_t hash_of(const uint64_t* tile) {
    uint64_t lane[4] = {1, 2, 3, 4};  // four chains of products at once
    const auto mix = [](uint64_t hash, uint64_t x) { return (hash ^ x) * 0x9e3779b97f4a7c15u + (hash >> 29); };
    for (int64_t r = 0; r < kTile; ++r) lane[r % 4] = mix(lane[r % 4], tile[r]);
    const uint64_t hash = mix(mix(mix(lane[0], lane[1]), lane[2]), lane[3]);
    // A product carries bits upwards alone, and slots are low bits: folded twice, they depend on the last row as well.
    const uint64_t folded = mix(hash ^ hash >> 32, 0);
    return folded ^ folded >> 32;
}

// Stores equal partial tiles once.
class TileTable {
   public:
    int32_t add(const uint64_t* tile, uint64_t hash) {
        const size_t count = words.size() / kTile;
        if (2 * count >= slots_.size()) grow();
        Slot* slot = find(hash, [&](const Slot& s) {
            return s.hash == hash && !std::memcmp(words.data() + s.number * kTile, tile, kTile * 8);
        });
        if (slot->number < 0) {
            if (count >= std::numeric_limits<int32_t>::max())
                throw std::length_error("the plan has over 2^31 bit tiles");
            words.insert(words.end(), tile, tile + kTile);
            *slot = {hash, static_cast<int32_t>(count)};
        }
        return slot->number;
    }
    std::vector<uint64_t> words;

   private:
    struct Slot {
        uint64_t hash = 0;
        int32_t number = -1;
    };

    // The first slot from that of `hash` on that is free or `wanted`.
    template <class F>
    Slot* find(uint64_t hash, F&& wanted) {
        size_t at = hash & (slots_.size() - 1);
        while (slots_[at].number >= 0 && !wanted(slots_[at])) at = (at + 1) & (slots_.size() - 1);
        return &slots_[at];
    }

    void grow() {
        std::vector<Slot> old(std::max<size_t>(64, 2 * slots_.size()));
        old.swap(slots_);
        for (const Slot& slot : old) {
            if (slot.number >= 0) *find(slot.hash, [](const Slot&) { return false; }) = slot;
        }
    }

    std::vector<Slot> slots_;
};

void append(std::vector<TileRun>* runs, size_t first_of_list, int32_t tile, int32_t count, int32_t bits) {
    if (bits < 0 && runs->size() > first_of_list) {
        TileRun& last = runs->back();
        if (last.bits < 0 && last.first + last.count == tile) {
            last.count += count;
            return;
        }
    }
    runs->push_back({tile, count, bits});
}

}  // namespace

struct PlanBuilder::State {
    struct Slice {
        std::vector<TileRun> runs;
        std::vector<int32_t> ends;  // of each query tile's list
    };

    int64_t batches, heads, Lq, Lk, q_tiles, k_tiles, next = 0;
    std::vector<Slice> slices;
    TileTable table;
    std::vector<uint64_t> block;

    uint64_t all(int64_t tile) const { return low_bits(Lk - tile * kTile); }
    int64_t rows(int64_t t) const { return std::min(kTile, Lq - t * kTile); }

    bool whole_tiles(int64_t i0, int64_t i1) const {
        return 0 <= i0 && i0 <= i1 && i1 <= Lq && i0 % kTile == 0 && (i1 % kTile == 0 || i1 == Lq);
    }
    void begin(int64_t i0, int64_t i1) {
        if (i0 != next || !whole_tiles(i0, i1)) {
            throw std::invalid_argument("rows must be added in order, in whole tiles");
        }
        next = i1;
    }

    // f(slice, b, h, t) for the query tiles of rows [i0, i1).
    template <class F>
    void for_tiles(int64_t i0, int64_t i1, F&& f) {
        for (int64_t b = 0; b < batches; ++b) {
            for (int64_t h = 0; h < heads; ++h) {
                Slice& slice = slices[static_cast<size_t>(b * heads + h)];
                for (int64_t t = i0 / kTile; t < tile_count(i1); ++t) {
                    f(slice, b, h, t);
                    refuse_over_int32(slice.runs.size());
                    slice.ends.push_back(static_cast<int32_t>(slice.runs.size()));
                }
            }
        }
    }

    static size_t list_begin(const Slice& slice) { return slice.ends.empty() ? 0 : slice.ends.back(); }

    void add(Slice* slice, int64_t k, const uint64_t* tile, Kind kind, uint64_t hash) {
        if (kind == kEmpty) return;
        const int32_t bits = kind == kFull ? -1 : table.add(tile, hash);
        append(&slice->runs, list_begin(*slice), static_cast<int32_t>(k), 1, bits);
    }

    void number_in_order();
};

PlanBuilder::PlanBuilder(int64_t batches, int64_t heads, int64_t Lq, int64_t Lk) : state_(new State) {
    constexpr int64_t kLongest = std::numeric_limits<int32_t>::max() - kTile;
    for (const int64_t size : {batches, heads, Lq, Lk}) {
        if (size < 0 || size > kLongest) throw std::invalid_argument("a plan needs sizes from 0 to 2^31 - 65");
    }
    refuse_over_int32(static_cast<size_t>(batches) * static_cast<size_t>(heads));
    State& s = *state_;
    s.batches = batches;
    s.heads = heads;
    s.Lq = Lq;
    s.Lk = Lk;
    s.q_tiles = tile_count(Lq);
    s.k_tiles = tile_count(Lk);
    s.slices.resize(static_cast<size_t>(batches * heads));
}

PlanBuilder::~PlanBuilder() = default;

void PlanBuilder::add_rows(const std::vector<RowStep>& steps, int64_t i0, int64_t i1) {
    State& s = *state_;
    RowProgram program(steps, i0, s.Lq, s.Lk);
    s.begin(i0, i1);
    s.for_tiles(i0, i1, [&](State::Slice& slice, int64_t b, int64_t h, int64_t t) {
        const size_t first_of_list = State::list_begin(slice);
        for (const Span& span : program.of(b, h, t)) {
            BitTile* tile = span.partial;
            if (tile && tile->number < 0) tile->number = s.table.add(tile->row, hash_of(tile->row));
            append(&slice.runs, first_of_list, span.first, span.count, tile ? tile->number : -1);
        }
    });
}

int64_t PlanBuilder::count_pairs(const std::vector<RowStep>& steps, int64_t i0, int64_t i1) const {
    const State& s = *state_;
    if (!s.whole_tiles(i0, i1)) throw std::invalid_argument("rows must be counted in whole tiles");
    RowProgram program(steps, i0, s.Lq, s.Lk);
    int64_t pairs = 0;
    for (int64_t list = 0, tiles = tile_count(i1) - i0 / kTile; list < s.batches * s.heads * tiles; ++list) {
        const int64_t b = list / tiles / s.heads, h = list / tiles % s.heads, t = i0 / kTile + list % tiles;
        const int64_t rows = std::min(kTile, i1 - t * kTile);
        for (const Span& span : program.of(b, h, t)) {
            if (!span.partial) pairs += rows * (std::min((span.first + span.count) * kTile, s.Lk) - span.first * kTile);
            for (int64_t r = 0; span.partial && r < rows; ++r) pairs += __builtin_popcountll(span.partial->row[r]);
        }
    }
    return pairs;
}

void PlanBuilder::add_mask(const TensorView& mask, int threads) {
    State& s = *state_;
    s.begin(0, s.Lq);
    constexpr int64_t kChunk = 16, kBlockTiles = 4096;  // tiles of one task, and of the block that is packed at once
    const int64_t lists = s.batches * s.heads * s.q_tiles, chunks = (s.k_tiles + kChunk - 1) / kChunk;
    const int64_t at_once = std::max<int64_t>(1, std::min(lists, kBlockTiles / std::max<int64_t>(s.k_tiles, 1)));
    s.block.resize(static_cast<size_t>(at_once * s.k_tiles * kTile));
    std::vector<Kind> kinds(static_cast<size_t>(at_once * s.k_tiles));
    std::vector<uint64_t> hashes(kinds.size());
    int64_t list = 0, first = 0, end = 0;  // lists [first, end) are packed
    s.for_tiles(0, s.Lq, [&](State::Slice& slice, int64_t, int64_t, int64_t) {
        if (list == end) {
            const int64_t count = std::min(at_once, lists - end);
            first = end;
            end += count;
            parallel_for(count * s.k_tiles > 64 ? threads : 1, count * chunks, [&](int64_t task) {
                const int64_t n = task / chunks, at = first + n, t = at % s.q_tiles, rows = s.rows(t);
                const int64_t b = at / s.q_tiles / s.heads, h = at / s.q_tiles % s.heads;
                const int64_t k0 = task % chunks * kChunk, k1 = std::min(k0 + kChunk, s.k_tiles);
                uint64_t* block = s.block.data() + n * s.k_tiles * kTile;
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t k = k0; k < k1; ++k)
                        block[k * kTile + r] = mask_word(mask, b, h, t * kTile + r, k, s.Lk);
                }
                for (int64_t k = k0; k < k1; ++k) {
                    const Kind kind = classify(block + k * kTile, rows, s.all(k));
                    kinds[n * s.k_tiles + k] = kind;
                    if (kind == kPartial) hashes[n * s.k_tiles + k] = hash_of(block + k * kTile);
                }
            });
        }
        for (int64_t k = 0; k < s.k_tiles; ++k) {
            const int64_t at = (list - first) * s.k_tiles + k;
            s.add(&slice, k, s.block.data() + at * kTile, kinds[at], hashes[at]);
        }
        ++list;
    });
}

// Stretches of several slices number their tiles stretch by stretch; the order of rows does not depend on them.
void PlanBuilder::State::number_in_order() {
    std::vector<int32_t> renamed(table.words.size() / kTile, -1);
    int32_t next_number = 0;
    bool moved = false;
    for (const Slice& slice : slices) {
        for (const TileRun& run : slice.runs) {
            if (run.bits < 0 || renamed[run.bits] >= 0) continue;
            moved |= run.bits != next_number;
            renamed[run.bits] = next_number++;
        }
    }
    if (!moved) return;
    std::vector<uint64_t> words(table.words.size());
    for (size_t at = 0; at < renamed.size(); ++at) {
        std::memcpy(words.data() + renamed[at] * kTile, table.words.data() + at * kTile, kTile * 8);
    }
    table.words.swap(words);
    for (Slice& slice : slices) {
        for (TileRun& run : slice.runs) run.bits = run.bits < 0 ? -1 : renamed[run.bits];
    }
}

TilePlan PlanBuilder::finish(bool complete) {
    State& s = *state_;
    for (const State::Slice& slice : s.slices) {
        // Also after rows that were refused, or a first finish.
        if (static_cast<int64_t>(slice.ends.size()) != s.q_tiles) throw std::invalid_argument("rows are missing");
    }
    s.number_in_order();
    TilePlan plan;
    plan.batches = s.batches;
    plan.heads = s.heads;
    plan.q_tiles = s.q_tiles;
    plan.k_tiles = s.k_tiles;
    plan.words = std::move(s.table.words);
    plan.row_start.push_back(0);
    for (State::Slice& slice : s.slices) {
        const size_t base = plan.rows.size();
        refuse_over_int32(base + slice.runs.size());
        plan.rows.insert(plan.rows.end(), slice.runs.begin(), slice.runs.end());
        for (const int32_t end : slice.ends) plan.row_start.push_back(static_cast<int32_t>(base) + end);
        slice = State::Slice();
    }
    if (complete) add_columns_and_orders(&plan);
    return plan;
}

}  // namespace fastattn
