#include "fastattn/plan_builder.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "fastattn/parallel.h"

namespace fastattn {
namespace {

FASTATTN_INLINE uint64_t low_bits(int64_t n) { return n >= kTile ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

uint64_t hash_of(const uint64_t* tile) {
    uint64_t hash = 0;
    for (int64_t r = 0; r < kTile; ++r) hash = (hash ^ tile[r]) * 0x9e3779b97f4a7c15u + (hash >> 29);
    return hash;
}

// Stores equal partial tiles once.
class TileTable {
   public:
    int32_t add(const uint64_t* tile, uint64_t hash) {
        const auto range = known_.equal_range(hash);
        for (auto it = range.first; it != range.second; ++it) {
            if (!std::memcmp(words.data() + it->second * kTile, tile, kTile * 8)) return it->second;
        }
        const size_t at = words.size() / kTile;
        if (at >= std::numeric_limits<int32_t>::max()) throw std::length_error("the plan has over 2^31 bit tiles");
        words.insert(words.end(), tile, tile + kTile);
        known_.emplace(hash, static_cast<int32_t>(at));
        return static_cast<int32_t>(at);
    }
    std::vector<uint64_t> words;

   private:
    std::unordered_multimap<uint64_t, int32_t> known_;
};

enum Kind : uint8_t { kEmpty, kPartial, kFull };

// Rows past Lq repeat the last one: they make no tile partial. Keys past Lk are 0 in `all` as in the words.
Kind classify(uint64_t* tile, int64_t rows, uint64_t all) {
    for (int64_t r = rows; r < kTile; ++r) tile[r] = tile[rows - 1];
    uint64_t any = 0, every = all;
    for (int64_t r = 0; r < kTile; ++r) {
        tile[r] &= all;
        any |= tile[r];
        every &= tile[r];
    }
    return !any ? kEmpty : every == all ? kFull : kPartial;
}

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

// Key tiles one row's interval touches and covers whole.
struct Extent {
    int32_t touch, touch_end, cover, cover_end;
    bool operator==(const Extent& o) const {
        return touch == o.touch && touch_end == o.touch_end && cover == o.cover && cover_end == o.cover_end;
    }
};

// From key tile `tile` on, this many more rows touch it and cover it whole.
struct Change {
    int32_t tile, touch, cover;
};

void push_changes(std::vector<Change>* changes, const Extent& e, int32_t rows) {
    changes->push_back({e.touch, rows, 0});
    changes->push_back({e.touch_end, -rows, 0});
    if (e.cover >= e.cover_end) return;
    changes->push_back({e.cover, 0, rows});
    changes->push_back({e.cover_end, 0, -rows});
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
    std::vector<int32_t> lo, hi;  // [rows][R] of one query tile
    std::vector<Change> changes;
    int64_t behind[kTile];

    uint64_t all(int64_t tile) const { return low_bits(Lk - tile * kTile); }
    int64_t rows(int64_t t) const { return std::min(kTile, Lq - t * kTile); }

    void begin(int64_t i0, int64_t i1) {
        if (i0 != next || i1 < i0 || i1 > Lq || (i1 % kTile && i1 != Lq)) {
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

    void read_intervals(const TensorView& lo_view, const TensorView& hi_view, int64_t b, int64_t h, int64_t i,
                        int64_t rows);
    void add_partial(Slice* slice, int64_t rows, int64_t R, int64_t k);
    void add_interval_tile(Slice* slice, int64_t rows, int64_t R);
    void number_in_order();
};

// Fills lo and hi and sorts out what begins and ends where, after the checks that keep every index in range.
void PlanBuilder::State::read_intervals(const TensorView& lo_view, const TensorView& hi_view, int64_t b, int64_t h,
                                        int64_t i, int64_t rows) {
    const int64_t R = lo_view.size[3];
    const int64_t distinct = lo_view.size[2] == 1 && hi_view.size[2] == 1 ? 1 : rows;
    lo.resize(static_cast<size_t>(rows * R));
    hi.resize(lo.size());
    for (int64_t r = 0; r < rows; ++r) {
        const auto* from = reinterpret_cast<const int32_t*>(lo_view.row(b, h, i + r));
        const auto* to = reinterpret_cast<const int32_t*>(hi_view.row(b, h, i + r));
        int64_t end = 0;
        for (int64_t c = 0; c < R; ++c) {
            const int32_t first = from[c * lo_view.last_stride()], last = to[c * hi_view.last_stride()];
            if (first < end || last < first || last > Lk) {
                throw std::invalid_argument("intervals must be sorted, disjoint and within the keys");
            }
            end = last;
            lo[r * R + c] = first;
            hi[r * R + c] = last;
        }
    }
    changes.clear();
    for (int64_t c = 0; c < R; ++c) {
        Extent current{};
        int32_t same = 0;
        for (int64_t r = 0; r < distinct; ++r) {
            const int32_t first = lo[r * R + c], last = hi[r * R + c];
            if (first == last) continue;
            const Extent e{static_cast<int32_t>(first / kTile), static_cast<int32_t>(tile_count(last)),
                           static_cast<int32_t>(tile_count(first)),
                           static_cast<int32_t>(last == Lk ? k_tiles : last / kTile)};
            const int32_t weight = static_cast<int32_t>(rows / distinct);
            if (same && e == current) {
                same += weight;
                continue;
            }
            if (same) push_changes(&changes, current, same);
            current = e;
            same = weight;
        }
        if (same) push_changes(&changes, current, same);
    }
    std::sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) { return a.tile < b.tile; });
}

// Called for increasing k: each row remembers how many of its intervals lie behind.
void PlanBuilder::State::add_partial(Slice* slice, int64_t rows, int64_t R, int64_t k) {
    uint64_t tile[kTile];
    const int64_t j0 = k * kTile;
    for (int64_t r = 0; r < rows; ++r) {
        const int32_t *from = lo.data() + r * R, *to = hi.data() + r * R;
        int64_t& c = behind[r];
        while (c < R && to[c] <= j0) ++c;
        uint64_t word = 0;
        for (int64_t at = c; at < R && from[at] < j0 + kTile; ++at) {
            word |= low_bits(to[at] - j0) & ~low_bits(std::max<int64_t>(from[at] - j0, 0));
        }
        tile[r] = word;
    }
    const Kind kind = classify(tile, rows, all(k));
    add(slice, k, tile, kind, kind == kPartial ? hash_of(tile) : 0);
}

// Between two changes all key tiles are touched and covered by the same number of rows.
void PlanBuilder::State::add_interval_tile(Slice* slice, int64_t rows, int64_t R) {
    int64_t touching = 0, covering = 0;
    std::fill(behind, behind + kTile, 0);
    for (size_t at = 0; at < changes.size();) {
        const int32_t first = changes[at].tile;
        for (; at < changes.size() && changes[at].tile == first; ++at) {
            touching += changes[at].touch;
            covering += changes[at].cover;
        }
        if (!touching) continue;
        const int32_t end = changes[at].tile;
        if (covering == rows) {
            append(&slice->runs, list_begin(*slice), first, end - first, -1);
            continue;
        }
        for (int32_t k = first; k < end; ++k) add_partial(slice, rows, R, k);
    }
}

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

void PlanBuilder::add_intervals(const TensorView& lo, const TensorView& hi, int64_t i0, int64_t i1) {
    State& s = *state_;
    s.begin(i0, i1);
    s.for_tiles(i0, i1, [&](State::Slice& slice, int64_t b, int64_t h, int64_t t) {
        s.read_intervals(lo, hi, b, h, t * kTile - i0, s.rows(t));
        s.add_interval_tile(&slice, s.rows(t), lo.size[3]);
    });
}

void PlanBuilder::add_words(const TensorView& words, int64_t i0, int64_t i1) {
    State& s = *state_;
    s.begin(i0, i1);
    uint64_t tile[kTile];
    s.for_tiles(i0, i1, [&](State::Slice& slice, int64_t b, int64_t h, int64_t t) {
        const int64_t rows = s.rows(t), stride = words.last_stride();
        for (int64_t k = 0; k < s.k_tiles; ++k) {
            for (int64_t r = 0; r < rows; ++r) {
                tile[r] = reinterpret_cast<const uint64_t*>(words.row(b, h, t * kTile - i0 + r))[k * stride];
            }
            const Kind kind = classify(tile, rows, s.all(k));
            s.add(&slice, k, tile, kind, kind == kPartial ? hash_of(tile) : 0);
        }
    });
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
