#include "fastattn/tile_plan.h"

#include <cmath>
#include <cstring>
#include <unordered_map>

#include "fastattn/parallel.h"

namespace fastattn {

static int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

TilePlanView::TilePlanView(const TilePlan& plan)
    : row_start(plan.row_start.data()),
      column_start(plan.column_start.empty() ? nullptr : plan.column_start.data()),
      rows(plan.rows.data()),
      columns(plan.columns.data()),
      words(plan.words.data()),
      batches(plan.batches),
      heads(plan.heads),
      q_tiles(plan.q_tiles),
      k_tiles(plan.k_tiles) {}

// 64 bools of row (b, h, i) as bits; bools past Lk are 0.
static uint64_t mask_word(const TensorView& mask, int64_t b, int64_t h, int64_t i, int64_t tile, int64_t Lk) {
    const int64_t j0 = tile * kTile, n = Lk - j0 < kTile ? Lk - j0 : kTile, stride = mask.last_stride();
    const char* row = mask.row(b, h, i);
    const uint64_t all = n == kTile ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    if (stride == 0) return *row ? all : 0;
    uint64_t word = 0;
    if (stride == 1) {
        int64_t j = 0;
        for (; j + 8 <= n; j += 8) {
            uint64_t bytes;
            std::memcpy(&bytes, row + j0 + j, 8);
            // Bools are 0 or 1: the product collects bit 0 of each byte in the top byte.
            word |= (bytes * 0x0102040810204080u >> 56) << j;
        }
        for (; j < n; ++j) word |= static_cast<uint64_t>(row[j0 + j] != 0) << j;
        return word;
    }
    for (int64_t j = 0; j < n; ++j) word |= static_cast<uint64_t>(row[(j0 + j) * stride] != 0) << j;
    return word;
}

uint64_t visible_word(const SoftmaxParams& p, int64_t b, int64_t h, int64_t i, int64_t tile) {
    const uint64_t band = band_word(p.lo, p.hi, p.Lk(), i, tile);
    return band && p.mask ? band & mask_word(p.mask, b, h, i, tile, p.Lk()) : band;
}

namespace {

// Stores equal partial tiles once.
class TileTable {
   public:
    explicit TileTable(std::vector<uint64_t>* words) : words_(words) {}
    int64_t add(const uint64_t* tile) {
        uint64_t hash = 0;
        for (int64_t r = 0; r < kTile; ++r) hash = (hash ^ tile[r]) * 0x9e3779b97f4a7c15u + (hash >> 29);
        const auto range = known_.equal_range(hash);
        for (auto it = range.first; it != range.second; ++it) {
            if (!std::memcmp(words_->data() + it->second, tile, kTile * 8)) return it->second;
        }
        const int64_t at = static_cast<int64_t>(words_->size());
        words_->insert(words_->end(), tile, tile + kTile);
        known_.emplace(hash, at);
        return at;
    }

   private:
    std::vector<uint64_t>* words_;
    std::unordered_multimap<uint64_t, int64_t> known_;
};

void append(std::vector<TileRun>* runs, int64_t first_of_list, int32_t tile, int64_t bits) {
    if (bits < 0 && static_cast<int64_t>(runs->size()) > first_of_list) {
        TileRun& last = runs->back();
        if (last.bits < 0 && last.first + last.count == tile) {
            ++last.count;
            return;
        }
    }
    runs->push_back({tile, 1, bits});
}

// Columns of one slice from its rows: a counting pass per key tile over the expanded list.
void transpose_slice(const TilePlan& plan, int64_t slice, std::vector<TileRun>* columns,
                     std::vector<int64_t>* column_start) {
    std::vector<std::vector<TileRun>> lists(static_cast<size_t>(plan.k_tiles));
    for (int64_t t = 0; t < plan.q_tiles; ++t) {
        const int64_t at = slice * plan.q_tiles + t;
        for (int64_t run = plan.row_start[at]; run < plan.row_start[at + 1]; ++run) {
            const TileRun& r = plan.rows[run];
            for (int32_t k = r.first; k < r.first + r.count; ++k) append(&lists[k], 0, static_cast<int32_t>(t), r.bits);
        }
    }
    for (const auto& list : lists) {
        columns->insert(columns->end(), list.begin(), list.end());
        column_start->push_back(static_cast<int64_t>(columns->size()));
    }
}

}  // namespace

TilePlan plan_from_mask(const TensorView& mask, int64_t Lq, int64_t Lk, bool with_columns, int threads) {
    TilePlan plan;
    plan.batches = mask.stride[0] == 0 ? 1 : mask.size[0];
    plan.heads = mask.stride[1] == 0 ? 1 : mask.size[1];
    plan.q_tiles = tiles(Lq);
    plan.k_tiles = tiles(Lk);
    const int64_t slices = plan.batches * plan.heads;
    plan.row_start.push_back(0);
    TileTable table(&plan.words);
    std::vector<uint64_t> block(static_cast<size_t>(plan.k_tiles * kTile));
    for (int64_t at = 0; at < slices * plan.q_tiles; ++at) {
        const int64_t b = at / plan.q_tiles / plan.heads, h = at / plan.q_tiles % plan.heads, t = at % plan.q_tiles;
        const int64_t rows = Lq - t * kTile < kTile ? Lq - t * kTile : kTile;
        parallel_for(plan.k_tiles * rows > (1 << 12) ? threads : 1, rows, [&](int64_t r) {
            for (int64_t k = 0; k < plan.k_tiles; ++k)
                block[k * kTile + r] = mask_word(mask, b, h, t * kTile + r, k, Lk);
        });
        const int64_t first = static_cast<int64_t>(plan.rows.size());
        for (int64_t k = 0; k < plan.k_tiles; ++k) {
            uint64_t* tile = block.data() + k * kTile;
            // Rows past Lq repeat the last one, keys past Lk count as seen: neither may make a tile partial.
            for (int64_t r = rows; r < kTile; ++r) tile[r] = tile[rows - 1];
            const int64_t keys = Lk - k * kTile < kTile ? Lk - k * kTile : kTile;
            const uint64_t all = keys == kTile ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
            uint64_t any = 0, every = all;
            for (int64_t r = 0; r < kTile; ++r) {
                any |= tile[r];
                every &= tile[r];
            }
            if (any) append(&plan.rows, first, static_cast<int32_t>(k), every == all ? -1 : table.add(tile));
        }
        plan.row_start.push_back(static_cast<int64_t>(plan.rows.size()));
    }
    if (with_columns) {
        plan.column_start.push_back(0);
        for (int64_t slice = 0; slice < slices; ++slice) {
            transpose_slice(plan, slice, &plan.columns, &plan.column_start);
        }
    }
    return plan;
}

// Bits of the keys whose bias is not -inf.
static uint64_t finite_word(const TensorView& bias, int64_t b, int64_t h, int64_t i, int64_t tile, int64_t Lk) {
    const int64_t j0 = tile * kTile, n = Lk - j0 < kTile ? Lk - j0 : kTile, stride = bias.last_stride();
    const char* row = bias.row(b, h, i);
    uint64_t word = 0;
    for (int64_t j = 0; j < n; ++j) {
        const int64_t at = (j0 + j) * stride;
        bool hidden;
        if (bias.dtype == DType::kFloat32) {
            hidden = reinterpret_cast<const float*>(row)[at] == -HUGE_VALF;
        } else {
            hidden = reinterpret_cast<const uint16_t*>(row)[at] == (bias.dtype == DType::kBFloat16 ? 0xff80 : 0xfc00);
        }
        word |= static_cast<uint64_t>(!hidden) << j;
    }
    return word;
}

std::unique_ptr<uint64_t[]> seen_keys(const SoftmaxParams& p) {
    if (!p.mask && !p.bias) return nullptr;
    const int64_t words = tiles(p.Lk()), group = p.group();
    std::unique_ptr<uint64_t[]> seen(new uint64_t[static_cast<size_t>(p.B() * p.Hk() * words)]());
    parallel_for(p.threads, p.B() * p.Hk() * words, [&](int64_t task) {
        const int64_t b = task / words / p.Hk(), hk = task / words % p.Hk(), tile = task % words;
        // Rows that can reach this tile, the last first: under a causal band it sees the most.
        const int64_t j0 = tile * kTile;
        const int64_t top = j0 + kTile - 1 - p.lo < p.Lq() - 1 ? j0 + kTile - 1 - p.lo : p.Lq() - 1;
        const int64_t bottom = j0 - p.hi > 0 ? j0 - p.hi : 0;
        const int64_t keys = p.Lk() - j0 < kTile ? p.Lk() - j0 : kTile;
        const uint64_t all = keys == kTile ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
        uint64_t found = 0;
        for (int64_t i = top; i >= bottom && found != all; --i) {
            for (int64_t h = hk * group; h < (hk + 1) * group && found != all; ++h) {
                uint64_t word = visible_word(p, b, h, i, tile);
                if (p.bias && (word & ~found)) word &= finite_word(p.bias, b, h, i, tile, p.Lk());
                found |= word;
            }
        }
        seen[task] = found;
    });
    return seen;
}

struct Sight::Owned {
    TilePlan plan;
    std::unique_ptr<uint64_t[]> seen;
};

Sight::Sight(const SoftmaxParams& p, int what) : words(tiles(p.Lk())), owned_(new Owned) {
    if (p.mask && (what & (kRows | kColumns))) {
        owned_->plan = plan_from_mask(p.mask, p.Lq(), p.Lk(), what & kColumns, p.threads);
        plan = TilePlanView(owned_->plan);
    }
    if (what & kSeen) owned_->seen = seen_keys(p);
    seen = owned_->seen.get();
    seen_range(p, &first, &last);
}

Sight::~Sight() { delete owned_; }

}  // namespace fastattn
