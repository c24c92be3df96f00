// Few queries (decoding): keys are split into chunks that run in parallel and are merged in order.
#pragma once
#include "fastattn/parallel.h"
#include "fastattn/softmax.h"
#include "softmax_direct.h"
#include "softmax_forward_operands.h"
#include "softmax_group.h"
#include "softmax_stream.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kChunkKeys = 512;    // keys of a decoding task
constexpr int64_t kDirectKeyRows = 8;  // rows up to which keys, or values, are not packed: it would cost more
constexpr int64_t kDirectValueRows = 2;
constexpr double kSerialWork = 1 << 17;  // multiply-adds under which waking a team costs more than it saves

// Decoding: the rows of all heads of a group are rows of one product, so K and V are read once.
template <class Math>
class Split {
   public:
    Split(const SoftmaxParams& p)
        : p_(p),
          terms_(p),
          layout_(p),
          sight_(p, 0),
          rows_(p.Lq() * p.group()),
          chunks_(ceil_div(p.Lk(), kChunkKeys)),
          // The backward pass sums packed keys, and its scores must be the very ones whose top it is given.
          direct_keys_(!Math::kTiles && rows_ <= kDirectKeyRows && !p.lse_parts && p.k.stride[3] == 1 &&
                       element_size(p.k.dtype) * Math::kPair == 4),
          direct_values_(!Math::kTiles && rows_ <= kDirectValueRows && p.v.stride[3] == 1),
          unpacked_values_(Math::kPair == 1 && p.v.dtype == DType::kFloat32 && p.v.stride[3] == 1 && p.Dv() % W == 0),
          streamed_(Math::kTiles && Math::kParts == 1 && !p.lse_parts && p.k.stride[3] == 1 && p.k.stride[2] % 2 == 0 &&
                    p.D() > 0 && p.D() % 32 == 0),
          grouped_(direct_keys_ && rows_ > kDirectValueRows && p.D() % Math::kPair == 0 && p.v.stride[3] == 1 &&
                   p.Dv() % kPanel == 0) {}

    // As of Tiled.
    bool run() {
        work();
        return !large_;
    }

   private:
    void work() {
        const int64_t heads = p_.B() * p_.Hk(), scratch = chunk_scratch();
        const double work = static_cast<double>(heads * rows_ * p_.Lk()) * static_cast<double>(p_.D() + p_.Dv());
        const int threads = work < kSerialWork ? 1 : p_.threads;
        const int64_t partial = chunks_ > 1 ? rows_ * (layout_.ldo + 2) : 0;
        const Scratch partials(heads * chunks_ * partial * 4), blocks(threads * scratch * 4);
        std::atomic<int> members{0};
        std::atomic<int64_t> next{0};
        run_team(threads, [&] {
            const MatrixUnit<Math::kTiles> unit;
            float* mine = blocks.as<float>() + members.fetch_add(1) * scratch;
            // The task after this one is taken early: its first keys are asked for during this one's last product.
            for (int64_t task = next.fetch_add(1), after; task < heads * chunks_; task = after) {
                after = next.fetch_add(1);
                attend(task, after, mine, partials.as<float>() + task * partial);
            }
        });
        if (chunks_ == 1) return;
        parallel_for(threads, heads,
                     [&](int64_t head) { merge(head, partials.as<float>() + head * chunks_ * partial); });
    }

    // No more than is used: beyond 128 KiB an allocation costs page faults, longer than a small call takes.
    int64_t chunk_scratch() const {
        const int64_t keys = direct_keys_ ? 0 : kSlots * layout_.k_tile;
        const int64_t values = direct_values_ ? 0 : kGroupKeys / Math::kPair * Math::kParts * layout_.ldo;
        const int64_t lanes = grouped_ ? 8 * layout_.d_units : streamed_ ? round_up(rows_, kRows) * layout_.d_units : 0;
        return round_up(rows_ * (layout_.ldq + layout_.ldo) + Scores<Math>::kFloats + keys + values + lanes + 64, 16);
    }

    void place(Panel& x, int64_t b, int64_t hk, int64_t row) const {
        x.rows = static_cast<int>(least<int64_t>(kRows, rows_ - row));
        x.b = b;
        for (int r = 0; r < x.rows; ++r) {
            x.head[r] = hk * p_.group() + (row + r) / p_.Lq();
            x.i[r] = (row + r) % p_.Lq();
        }
    }

    // Chunk `task % chunks` of key-value head `task / chunks`; `after` is the task that follows on this thread.
    void attend(int64_t task, int64_t after, float* scratch, float* partial) const {
        const int64_t chunk = task % chunks_, b = task / chunks_ / p_.Hk(), hk = task / chunks_ % p_.Hk();
        float* q = scratch;
        float* out = q + rows_ * layout_.ldq;
        float* scores = out + rows_ * layout_.ldo;
        float* keys = scores + Scores<Math>::kFloats;
        float* values = keys + (direct_keys_ ? 0 : kSlots * layout_.k_tile);
        float* q_lanes = values + (direct_values_ ? 0 : kGroupKeys / Math::kPair * Math::kParts * layout_.ldo);
        Panel panels[kDecodeRows / kRows];
        int count = 0;
        for (int64_t row = 0; row < rows_; row += kRows, ++count) {
            Panel& x = panels[count];
            place(x, b, hk, row);
            x.q = q + row * layout_.ldq;
            x.ldq = layout_.ldq;
            x.out = out + row * layout_.ldo;
            x.ldo = layout_.ldo;
            x.reset(chunk == 0 ? p_.sinks : nullptr);
            x.clear_out();
        }
        for (int64_t g = 0; g < p_.group(); ++g) {
            float* rows = q + g * p_.Lq() * layout_.ldq;
            if (terms_.zero_logits) {
                memset(rows, 0, sizeof(float) * static_cast<size_t>(p_.Lq() * layout_.ldq));
            } else {
                pack_rows<Math>(source_of(p_.q, b, hk * p_.group() + g, &large_), 0, p_.Lq(), p_.D(), terms_.sign,
                                rows);
            }
        }
        if (grouped_) pack_lanes(q, static_cast<int>(rows_), layout_.ldq, layout_.d_units, q_lanes);
        for (int n = 0; n < count && streamed_; ++n) {
            pack_query_columns(panels[n].q, panels[n].rows, layout_.ldq, layout_.d_units,
                               q_lanes + n * kRows * layout_.d_units);
        }
        Source key_rows = key_source(p_, sight_, p_.k, b, hk, &large_),
               value_rows = key_source(p_, sight_, p_.v, b, hk, &large_);
        const int64_t last = least((chunk + 1) * kChunkKeys, p_.Lk());
        uint64_t seen[kSlots];
        for (int64_t j0 = chunk * kChunkKeys; j0 < last; j0 += kGroupKeys) {
            const int slots = static_cast<int>(ceil_div(least<int64_t>(kGroupKeys, last - j0), 64));
            for (int n = 0; n < count; ++n) panels[n].count = 0;
            int64_t packed[kSlots];
            int used = 0;
            for (int slot = 0; slot < slots; ++slot) {
                const int64_t tile = j0 / 64 + slot;
                if ((seen[used] = look(panels, count, tile, used)) != 0) packed[used++] = tile;
            }
            if (!used) continue;
            // Rows of whole vectors, none hidden, are operands as they lie in memory.
            bool whole = true;
            for (int slot = 0; slot < used; ++slot) whole &= seen[slot] == ~uint64_t{0};
            const bool streamed = streamed_ && whole;
            for (int slot = 0; slot < used && !direct_keys_ && !streamed; ++slot) {
                key_rows.seen = seen + slot;
                key_rows.seen_from = packed[slot];
                pack_key_tile<Math>(p_, key_rows, packed[slot], keys + slot * layout_.k_tile);
            }
            constexpr int64_t steps = kGroupKeys / Math::kPair * Math::kParts;
            const bool grouped = grouped_ && whole, unpacked = unpacked_values_ && !direct_values_ && whole;
            if constexpr (!Math::kTiles) {
                if (grouped) {
                    group(panels[0], key_rows, value_rows, packed, used,
                          ahead_of(p_.k, key_rows, j0 / 64 + kSlots - 1, last, after), q_lanes, scores);
                    continue;
                }
            }
            for (int n = 0; n < count; ++n) {
                Panel& x = panels[n];
                softmax_step<Math>(terms_, x, scores, [&] {
                    if constexpr (!Math::kTiles) {
                        for (int slot = 0; slot < used && direct_keys_; ++slot) {
                            const char* ahead = ahead_of(p_.k, key_rows, packed[slot], last, after);
                            direct_scores<Math>(x, key_rows, ahead, packed[slot], p_.D(), p_.Lk(),
                                                scores + slot * Scores<Math>::kSlot);
                        }
                    }
                    if constexpr (Math::kTiles) {
                        for (int slot = 0; slot < used && streamed; ++slot) {
                            stream_scores<Math>(q_lanes + n * kRows * layout_.d_units, x.rows,
                                                reinterpret_cast<const float*>(key_rows.at(packed[slot] * 64)),
                                                key_rows.row / 2, layout_.d_units, scores + slot * Scores<Math>::kSlot);
                        }
                    }
                    if (!direct_keys_ && !streamed) {
                        score_tiles<Math>(x, layout_.d_units, scores,
                                          [&](int slot) { return keys + slot * layout_.k_tile; });
                    }
                });
                for (int slot = 0; slot < used && n == 0 && !direct_values_ && !unpacked; ++slot) {
                    value_rows.seen = seen + slot;
                    value_rows.seen_from = packed[slot];
                    pack_value_tile<Math>(p_, value_rows, packed[slot], values, steps, slot * 64 / Math::kPair);
                }
                if (!direct_values_ && !unpacked) {
                    add_values<Math>(x, scores, values, steps, layout_.dv_vecs,
                                     [](int slot) { return int64_t{slot} * 64 / Math::kPair; });
                    continue;
                }
                if constexpr (!Math::kTiles) {
                    if (unpacked) {
                        rescale(x);
                        for (int slot = 0; slot < used; ++slot) {
                            const float* tile = reinterpret_cast<const float*>(value_rows.at(packed[slot] * 64));
                            gemm_unpacked<Math>(x.rows, static_cast<int>(layout_.dv_vecs),
                                                {scores + slot * Scores<Math>::kUnits, Scores<Math>::kRow, 1},
                                                {0, 0, 64}, tile, value_rows.row, x.out, x.ldo);
                        }
                        continue;
                    }
                    rescale(x);
                    for (int slot = 0; slot < used; ++slot) {
                        const char* ahead = ahead_of(p_.v, value_rows, packed[slot], last, after);
                        direct_values<Math>(x, scores + slot * Scores<Math>::kUnits, value_rows, ahead, seen[slot],
                                            packed[slot], p_.Dv());
                    }
                }
            }
        }
        for (int n = 0; n < count; ++n) {
            Panel& x = panels[n];
            x.add_up();
            for (int r = 0; r < x.rows; ++r) {
                const float* row = x.out + r * layout_.ldo;
                if (chunks_ == 1) {
                    finish_row(terms_, x, r, x.top[r], x.total[r], row);
                    continue;
                }
                float* target = partial + (n * kRows + r) * (layout_.ldo + 2);
                target[0] = x.top[r];
                target[1] = x.total[r];
                memcpy(target + 2, row, sizeof(float) * static_cast<size_t>(layout_.ldo));
            }
        }
    }

    // The 64 keys this thread reads after `tile` of `t`: in this chunk, that ends at `last`, or in the task after it.
    const char* ahead_of(const TensorView& t, const Source& rows, int64_t tile, int64_t last, int64_t after) const {
        if ((tile + 1) * 64 < last) return rows.at((tile + 1) * 64);
        const int64_t head = after / chunks_;
        if (head >= p_.B() * p_.Hk()) return nullptr;
        return source_of(t, head / p_.Hk(), head % p_.Hk()).at(after % chunks_ * kChunkKeys);
    }

    // A group of tiles, all keys seen, for the 3 to 8 rows of a panel. The values are asked for during the first
    // product, the keys at `ahead` during the second.
    void group(Panel& x, const Source& keys, const Source& values, const int64_t* tiles, int used, const char* ahead,
               const float* q_lanes, float* scores) const {
        const int64_t size = element_size(keys.dtype);
        softmax_step<Math>(terms_, x, scores, [&] {
            for (int slot = 0; slot < used; ++slot) {
                Ahead tile(values.at(tiles[slot] * 64), values, 64, p_.Dv());
                group_scores<Math>(q_lanes, x.rows, keys.at(tiles[slot] * 64), keys.row * size, layout_.d_units, tile,
                                   scores + slot * Scores<Math>::kSlot);
            }
        });
        rescale(x);
        Ahead next(ahead, keys, kGroupKeys, p_.D());
        for (int slot = 0; slot < used; ++slot) {
            group_values<Math>(scores + slot * Scores<Math>::kUnits, x.rows, values.at(tiles[slot] * 64),
                               values.row * size, p_.Dv(), next, x.out, x.ldo);
        }
    }

    // Enters the tile in every panel at the same slot if any row sees it; returns the keys some row sees.
    uint64_t look(Panel* panels, int count, int64_t tile, int slot) const {
        uint64_t any = 0, every = ~uint64_t{0};
        for (int n = 0; n < count; ++n) {
            Panel& x = panels[n];
            PanelTile& t = x.tiles[slot];
            for (int r = 0; r < x.rows; ++r) {
                t.bits[r] = visible_word(p_, x.b, x.head[r], x.i[r], tile);
                any |= t.bits[r];
                every &= t.bits[r];
            }
        }
        if (p_.bias && any) any &= biased_word(panels[0].b, panels[0].head[0] / p_.group(), tile);
        for (int n = 0; n < count && any; ++n) {
            PanelTile& t = panels[n].tiles[slot];
            for (int r = 0; r < panels[n].rows; ++r) t.bits[r] &= any;
            t.tile = tile;
            t.full = (every & any) == ~uint64_t{0};
            t.c0 = 0;
            t.c1 = trimmed(p_.Lk() - tile * 64);
            panels[n].count = slot + 1;
        }
        return any;
    }

    // Keys of the tile that some row sees and whose bias is not -inf there.
    uint64_t biased_word(int64_t b, int64_t hk, int64_t tile) const {
        uint64_t found = 0;
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t h = hk * p_.group() + row / p_.Lq(), i = row % p_.Lq();
            const uint64_t missing = visible_word(p_, b, h, i, tile) & ~found;
            if (missing) found |= missing & mask_word(p_.bias, b, h, i, tile, p_.Lk());
        }
        return found;
    }

    void merge(int64_t kv_head, float* partials) const {
        Panel x;
        const int64_t b = kv_head / p_.Hk(), hk = kv_head % p_.Hk(), width = layout_.ldo + 2;
        for (int64_t row = 0; row < rows_; row += kRows) {
            place(x, b, hk, row);
            for (int r = 0; r < x.rows; ++r) {
                float* first = partials + (row + r) * width;
                float top = -kInfinity, total = 0;
                for (int64_t c = 0; c < chunks_; ++c) top = most(top, first[c * rows_ * width]);
                const float base = top == -kInfinity ? 0.0f : top;
                for (int64_t c = 0; c < chunks_; ++c) {
                    const float* part = first + c * rows_ * width;
                    const float decay = exp2f((part[0] - base) * terms_.factor);
                    total += part[1] * decay;
                    for (int64_t v = 0; v < layout_.ldo; v += W) {
                        const Vec sum = c ? vload(first + 2 + v) : vzero();
                        vstore(first + 2 + v, vfma(vload(part + 2 + v), vset(decay), sum));
                    }
                }
                finish_row(terms_, x, r, top, total, first + 2);
            }
        }
    }

    const SoftmaxParams& p_;
    const Terms terms_;
    const Layout<Math> layout_;
    const Sight sight_;
    const int64_t rows_, chunks_;
    const bool direct_keys_, direct_values_, unpacked_values_, streamed_, grouped_;  // memory can be read as operands
    mutable std::atomic<bool> large_{false};
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
