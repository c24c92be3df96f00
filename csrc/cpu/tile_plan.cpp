#include "fastattn/tile_plan.h"

#include <cmath>
#include <cstring>

#include "fastattn/parallel.h"
#include "fastattn/plan_builder.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fastattn {

TilePlanView::TilePlanView(const TilePlan& plan)
    : row_start(plan.row_start.data()),
      column_start(plan.column_start.data()),
      rows(plan.rows.data()),
      columns(plan.columns.data()),
      words(plan.words.data()),
      row_order(plan.row_order.empty() ? nullptr : plan.row_order.data()),
      column_order(plan.column_order.empty() ? nullptr : plan.column_order.data()),
      batches(plan.batches),
      heads(plan.heads),
      q_tiles(plan.q_tiles),
      k_tiles(plan.k_tiles) {}

// Bits of n <= 64 neighbouring elements that are `value`, as many as whole vectors hold; `j` moves past them.
static uint64_t equal_bits(const uint16_t* row, uint16_t value, int64_t n, int64_t* j) {
    uint64_t found = 0;
#ifdef __SSE2__
    const __m128i wanted = _mm_set1_epi16(static_cast<int16_t>(value));
    for (; *j + 16 <= n; *j += 16) {
        const __m128i* at = reinterpret_cast<const __m128i*>(row + *j);
        const __m128i low = _mm_cmpeq_epi16(_mm_loadu_si128(at), wanted),
                      high = _mm_cmpeq_epi16(_mm_loadu_si128(at + 1), wanted);
        found |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high))) << *j;
    }
#else
    (void)row, (void)value, (void)n, (void)j;
#endif
    return found;
}

static uint64_t equal_bits(const uint32_t* row, uint32_t value, int64_t n, int64_t* j) {
    uint64_t found = 0;
#ifdef __SSE2__
    const __m128i wanted = _mm_set1_epi32(static_cast<int32_t>(value));
    for (; *j + 16 <= n; *j += 16) {
        __m128i equal[4];
        for (int i = 0; i < 4; ++i) {
            const __m128i* at = reinterpret_cast<const __m128i*>(row + *j) + i;
            equal[i] = _mm_cmpeq_epi32(_mm_loadu_si128(at), wanted);
        }
        const __m128i low = _mm_packs_epi32(equal[0], equal[1]), high = _mm_packs_epi32(equal[2], equal[3]);
        found |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high))) << *j;
    }
#else
    (void)row, (void)value, (void)n, (void)j;
#endif
    return found;
}

template <class Unit>
static uint64_t hidden_by_bias(const char* data, Unit minus_infinity, int64_t j0, int64_t n, int64_t stride) {
    const Unit* row = reinterpret_cast<const Unit*>(data) + j0 * stride;
    if (stride == 0) return *row == minus_infinity ? ~uint64_t{0} : 0;
    int64_t j = 0;
    uint64_t hidden = stride == 1 ? equal_bits(row, minus_infinity, n, &j) : 0;
    for (; j < n; ++j) hidden |= static_cast<uint64_t>(row[j * stride] == minus_infinity) << j;
    return hidden;
}

// Keys of a tile that row i of a bias hides.
static uint64_t hidden_by_bias(const TensorView& bias, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n) {
    const char* row = bias.row(b, h, i);
    const int64_t stride = bias.last_stride();
    if (bias.dtype == DType::kFloat32) return hidden_by_bias<uint32_t>(row, 0xff800000u, j0, n, stride);
    return hidden_by_bias<uint16_t>(row, bias.dtype == DType::kBFloat16 ? 0xff80 : 0xfc00, j0, n, stride);
}

uint64_t mask_word(const TensorView& mask, int64_t b, int64_t h, int64_t i, int64_t tile, int64_t Lk) {
    const int64_t j0 = tile * kTile, n = Lk - j0 < kTile ? Lk - j0 : kTile, stride = mask.last_stride();
    const char* row = mask.row(b, h, i);
    const uint64_t all = n == kTile ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    if (mask.dtype != DType::kBool) return all & ~hidden_by_bias(mask, b, h, i, j0, n);
    if (stride == 0) return *row ? all : 0;
    uint64_t hidden = 0;  // any byte but 0 is true
    if (stride == 1) {
        int64_t j = 0;
#ifdef __SSE2__
        for (; j + 16 <= n; j += 16) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j0 + j));
            const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
            hidden |= static_cast<uint64_t>(zeros) << j;
        }
#endif
        for (; j + 8 <= n; j += 8) {
            uint64_t bytes;
            std::memcpy(&bytes, row + j0 + j, 8);
            const uint64_t low = 0x7f7f7f7f7f7f7f7fu, zeros = ~(((bytes & low) + low) | bytes | low) >> 7;
            // The product collects bit 0 of each byte in the top byte.
            hidden |= (zeros * 0x0102040810204080u >> 56) << j;
        }
        for (; j < n; ++j) hidden |= static_cast<uint64_t>(row[j0 + j] == 0) << j;
        return all & ~hidden;
    }
    for (int64_t j = 0; j < n; ++j) hidden |= static_cast<uint64_t>(row[(j0 + j) * stride] == 0) << j;
    return all & ~hidden;
}

const TileRun* find_run(const TilePlanView& plan, int64_t b, int64_t h, int64_t q_tile, int64_t tile) {
    const int32_t* start = plan.row_start + plan.slice(b, h) * plan.q_tiles + q_tile;
    int64_t low = start[0], high = start[1];
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        const TileRun& run = plan.rows[middle];
        if (run.first + run.count > tile) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low < start[1] ? plan.rows + low : nullptr;
}

uint64_t visible_word(const SoftmaxParams& p, int64_t b, int64_t h, int64_t i, int64_t tile) {
    const uint64_t band = band_word(p.lo, p.hi, p.Lk(), i, tile);
    if (!band) return 0;
    if (p.mask) return band & mask_word(p.mask, b, h, i, tile, p.Lk());
    if (!p.plan) return band;
    const TileRun* run = find_run(*p.plan, b, h, i / kTile, tile);
    if (!run || run->first > tile) return 0;
    return run->bits < 0 ? band : band & p.plan->words[run->bits * kTile + i % kTile];
}

TilePlan plan_from_mask(const TensorView& mask, int64_t Lq, int64_t Lk, int threads) {
    PlanBuilder builder(mask.stride[0] == 0 ? 1 : mask.size[0], mask.stride[1] == 0 ? 1 : mask.size[1], Lq, Lk);
    builder.add_mask(mask, threads);
    return builder.finish(false);
}

// Keys of `tile` that a run of query tiles sees through plan and band.
static uint64_t seen_by(const SoftmaxParams& p, const uint64_t* words, const TileRun& run, int64_t tile) {
    const int64_t i0 = run.first * kTile, end = i0 + run.count * kTile, i1 = end < p.Lq() ? end : p.Lq();
    // Bands of neighbouring rows overlap: together they are one band.
    if (run.bits < 0) return p.lo > p.hi ? 0 : band_word(p.lo, p.hi + i1 - 1 - i0, p.Lk(), i0, tile);
    uint64_t found = 0;
    for (int64_t i = i0; i < i1; ++i) {
        found |= band_word(p.lo, p.hi, p.Lk(), i, tile) & words[run.bits * kTile + i - i0];
    }
    return found;
}

std::unique_ptr<uint64_t[]> seen_keys(const SoftmaxParams& p) {
    if (!p.mask && !p.bias && !p.plan) return nullptr;
    const int64_t words = tile_count(p.Lk()), group = p.group();
    std::unique_ptr<uint64_t[]> seen(new uint64_t[static_cast<size_t>(p.B() * p.Hk() * words)]());
    parallel_for(p.threads, p.B() * p.Hk() * words, [&](int64_t task) {
        const int64_t b = task / words / p.Hk(), hk = task / words % p.Hk(), tile = task % words;
        const int64_t j0 = tile * kTile, keys = p.Lk() - j0 < kTile ? p.Lk() - j0 : kTile;
        const uint64_t all = keys == kTile ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
        uint64_t found = 0;
        if (p.plan && !p.bias) {
            for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
                const int32_t* start = p.plan->column_start + p.plan->slice(b, h) * words + tile;
                for (int64_t run = start[0]; run < start[1] && found != all; ++run) {
                    found |= seen_by(p, p.plan->words, p.plan->columns[run], tile);
                }
            }
            seen[task] = found;
            return;
        }
        // Rows that can reach this tile, the last first: under a causal band it sees the most.
        const int64_t top = j0 + kTile - 1 - p.lo < p.Lq() - 1 ? j0 + kTile - 1 - p.lo : p.Lq() - 1;
        const int64_t bottom = j0 - p.hi > 0 ? j0 - p.hi : 0;
        for (int64_t i = top; i >= bottom && found != all; --i) {
            for (int64_t h = hk * group; h < (hk + 1) * group && found != all; ++h) {
                uint64_t word = visible_word(p, b, h, i, tile);
                if (p.bias && (word & ~found)) word &= mask_word(p.bias, b, h, i, tile, p.Lk());
                found |= word;
            }
        }
        seen[task] = found;
    });
    return seen;
}

// The same of a mask without bias, or a bias without mask, by the rows of its plan.
static std::unique_ptr<uint64_t[]> seen_by_rows(const SoftmaxParams& p, const TilePlanView& plan) {
    const int64_t words = tile_count(p.Lk()), group = p.group();
    std::unique_ptr<uint64_t[]> seen(new uint64_t[static_cast<size_t>(p.B() * p.Hk() * words)]());
    parallel_for(p.threads, p.B() * p.Hk(), [&](int64_t task) {
        const int64_t b = task / p.Hk(), first = task % p.Hk() * group;
        uint64_t* found = seen.get() + task * words;
        for (int64_t h = first; h < (plan.heads == 1 ? first + 1 : first + group); ++h) {
            const int32_t* start = plan.row_start + plan.slice(b, h) * plan.q_tiles;
            for (int64_t t = 0; t < plan.q_tiles; ++t) {
                for (const TileRun* run = plan.rows + start[t]; run < plan.rows + start[t + 1]; ++run) {
                    const TileRun rows{static_cast<int32_t>(t), 1, run->bits};
                    for (int64_t tile = run->first; tile < run->first + run->count; ++tile) {
                        if (~found[tile]) found[tile] |= seen_by(p, plan.words, rows, tile);
                    }
                }
            }
        }
    });
    return seen;
}

// Whether a row of a bias, of a few, hides 64 neighbouring keys: then it is worth to look for tiles that all rows hide.
static bool hides_tiles(const TensorView& bias, int64_t Lq, int64_t Lk) {
    const int64_t batches = bias.stride[0] == 0 ? 1 : bias.size[0], heads = bias.stride[1] == 0 ? 1 : bias.size[1];
    for (int64_t b = 0; b < batches; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
            for (const int64_t i : {int64_t{0}, Lq / 2, Lq - 1}) {
                for (int64_t tile = 0; tile < tile_count(Lk); ++tile) {
                    if (!mask_word(bias, b, h, i, tile, Lk)) return true;
                }
            }
        }
    }
    return false;
}

struct Sight::Owned {
    TilePlan plan;
    std::unique_ptr<uint64_t[]> seen;
};

Sight::Sight(const SoftmaxParams& p, int what) : words(tile_count(p.Lk())), owned_(new Owned) {
    bool complete = false;  // the plan knows of everything hidden but the band
    if (p.plan) {
        plan = *p.plan;
    } else if ((what & kRows) && (p.mask || (p.bias && p.Lq() && hides_tiles(p.bias, p.Lq(), p.Lk())))) {
        owned_->plan = plan_from_mask(p.mask ? p.mask : p.bias, p.Lq(), p.Lk(), p.threads);
        plan = TilePlanView(owned_->plan);
        complete = !p.mask || !p.bias;
    }
    if (what & kSeen) owned_->seen = complete ? seen_by_rows(p, plan) : seen_keys(p);
    seen = owned_->seen.get();
    seen_range(p, &first, &last);
}

Sight::~Sight() { delete owned_; }

}  // namespace fastattn
