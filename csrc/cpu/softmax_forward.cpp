// Softmax attention, forward. Long queries: K and V are packed once per key-value head, then blocks of query rows run
// over them in parallel. Few queries (decoding): keys are split into chunks that run in parallel and are merged in
// order.
#include "fastattn/parallel.h"
#include "fastattn/softmax.h"
#include "softmax_direct.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockRows = 64;     // query rows of a task
constexpr int64_t kChunkKeys = 512;    // keys of a decoding task
constexpr int64_t kDirectKeyRows = 8;  // rows up to which keys, or values, are not packed: it would cost more
constexpr int64_t kDirectValueRows = 2;
constexpr int64_t kWaveBytes = int64_t{48} << 20;  // packed keys and values held at once
constexpr int64_t kLocalBytes = 640 << 10;         // packed head that fits beside the work in a second-level cache
constexpr double kSerialWork = 1 << 17;            // multiply-adds under which waking a team costs more than it saves

// Sizes of packed operands, in units.
template <class Math>
struct Layout {
    int64_t d_units, ldq, dv_vecs, ldo, tiles, k_tile, k_size, v_steps, v_size;
    explicit Layout(const SoftmaxParams& p)
        : d_units(units<Math>(p.D())),
          ldq(round_up(most<int64_t>(d_units, 1), W)),
          dv_vecs(ceil_div(p.Dv(), W)),
          ldo(dv_vecs * W),
          tiles(ceil_div(p.Lk(), 64)),
          k_tile(kPanelsPerTile * kPanel * d_units),
          k_size(tiles * k_tile),
          v_steps(tiles * 64 / Math::kPair),
          v_size(v_steps * ldo) {}
    int64_t head_size() const { return round_up(k_size + v_size, 16); }
};

// Rows of k or v of one head; keys nobody sees are read as zeros.
Source key_source(const SoftmaxParams& p, const Sight& sight, const TensorView& t, int64_t b, int64_t hk) {
    Source s = source_of(t, b, hk);
    s.first = sight.first;
    s.last = sight.last;
    if (sight.seen) s.seen = sight.seen + (b * p.Hk() + hk) * sight.words;
    return s;
}

template <class Math>
void pack_key_tile(const SoftmaxParams& p, const Source& keys, int64_t tile, float* out) {
    const int64_t width = kPanel * units<Math>(p.D());
    for (int panel = 0; panel < kPanelsPerTile; ++panel) {
        const int64_t j = tile * 64 + panel * kPanel;
        const int64_t n = most<int64_t>(0, least<int64_t>(kPanel, p.Lk() - j));
        pack_transposed<Math>(keys, j, n, p.D(), out + panel * width);
    }
}

// Steps of values [at, at + 64 / pair) from key tile `tile`; keys past Lk are zeros.
template <class Math>
void pack_value_tile(const SoftmaxParams& p, Source values, int64_t tile, float* out, int64_t steps, int64_t at) {
    values.last = least(values.last, p.Lk());
    pack_summed<Math>(values, tile * 64, 64, p.Dv(), out, steps, at);
}

template <class Math>
class Tiled {
   public:
    Tiled(const SoftmaxParams& p)
        : p_(p),
          terms_(p),
          layout_(p),
          sight_(p, Sight::kSeen | Sight::kRows),
          q_blocks_(ceil_div(p.Lq(), kBlockRows)) {}

    void run() {
        const int64_t heads = p_.B() * p_.Hk(), size = layout_.head_size();
        const int64_t scratch = block_scratch();
        const bool local = heads >= 8 * p_.threads && size * 4 <= kLocalBytes;
        const int64_t wave = local ? p_.threads : most<int64_t>(1, least(heads, kWaveBytes / (size * 4 + 1)));
        const Scratch packed(wave * size * 4), blocks(p_.threads * scratch * 4);
        std::atomic<int> members{0};
        if (local) {
            std::atomic<int64_t> next{0};
            run_team(p_.threads, [&] {
                const int me = members.fetch_add(1);
                float* mine = packed.as<float>() + me * size;
                for (int64_t head; (head = next.fetch_add(1)) < heads;) {
                    for (int64_t tile = 0; tile < layout_.tiles; ++tile) pack(head, tile, mine);
                    for (int64_t block = 0; block < q_blocks_ * p_.group(); ++block) {
                        attend(head, block, mine, blocks.as<float>() + me * scratch);
                    }
                }
            });
            return;
        }
        for (int64_t first = 0; first < heads; first += wave) {
            const int64_t count = least(wave, heads - first);
            parallel_for(p_.threads, count * layout_.tiles, [&](int64_t task) {
                const int64_t at = task / layout_.tiles;
                pack(first + at, task % layout_.tiles, packed.as<float>() + at * size);
            });
            std::atomic<int64_t> next{0};
            members = 0;
            run_team(p_.threads, [&] {
                const int me = members.fetch_add(1);
                // The last query block of every head first: under a causal band it is the longest.
                for (int64_t task; (task = next.fetch_add(1)) < count * q_blocks_ * p_.group();) {
                    const int64_t at = task % count, block = q_blocks_ * p_.group() - 1 - task / count;
                    attend(first + at, block, packed.as<float>() + at * size, blocks.as<float>() + me * scratch);
                }
            });
        }
    }

   private:
    int64_t block_scratch() const {
        return round_up(kBlockRows * (layout_.ldq + layout_.ldo) + kRows * kGroupKeys + 64, 16);
    }

    void pack(int64_t head, int64_t tile, float* out) const {
        const int64_t b = head / p_.Hk(), hk = head % p_.Hk();
        pack_key_tile<Math>(p_, key_source(p_, sight_, p_.k, b, hk), tile, out + tile * layout_.k_tile);
        pack_value_tile<Math>(p_, key_source(p_, sight_, p_.v, b, hk), tile, out + layout_.k_size, layout_.v_steps,
                              tile * 64 / Math::kPair);
    }

    // Query rows [i0, i0 + 64) of one head; block counts (query block, head of the group).
    void attend(int64_t kv_head, int64_t block, const float* packed, float* scratch) const {
        const int64_t b = kv_head / p_.Hk(), h = kv_head % p_.Hk() * p_.group() + block % p_.group();
        const int64_t i0 = block / p_.group() * kBlockRows, i1 = least(i0 + kBlockRows, p_.Lq());
        float* q = scratch;
        float* out = q + kBlockRows * layout_.ldq;
        float* scores = out + kBlockRows * layout_.ldo;
        if (terms_.zero_logits) {
            memset(q, 0, sizeof(float) * static_cast<size_t>((i1 - i0) * layout_.ldq));
        } else {
            pack_rows<Math>(source_of(p_.q, b, h), i0, i1 - i0, p_.D(), terms_.sign, q);
        }
        Panel panels[kBlockRows / kRows];
        int count = 0;
        for (int64_t i = i0; i < i1; i += kRows, ++count) {
            Panel& x = panels[count];
            x.rows = static_cast<int>(least<int64_t>(kRows, i1 - i));
            x.b = b;
            for (int r = 0; r < x.rows; ++r) {
                x.head[r] = h;
                x.i[r] = i + r;
            }
            x.q = q + (i - i0) * layout_.ldq;
            x.ldq = layout_.ldq;
            x.out = out + (i - i0) * layout_.ldo;
            x.ldo = layout_.ldo;
            x.reset();
        }
        const float* values = packed + layout_.k_size;
        int64_t tiles[kSlots], bits[kSlots];
        int filled = 0;
        const auto flush = [&] {
            for (int n = 0; n < count; ++n) {
                Panel& x = panels[n];
                select_tiles(x, tiles, bits, filled);
                if (!x.count) continue;
                score_tiles<Math>(x, layout_.d_units, scores,
                                  [&](int slot) { return packed + x.tiles[slot].tile * layout_.k_tile; });
                softmax_step<Math>(terms_, x, scores);
                add_values<Math>(x, scores, values, layout_.v_steps, layout_.dv_vecs,
                                 [&](int slot) { return x.tiles[slot].tile * 64 / Math::kPair; });
            }
            filled = 0;
        };
        visit_tiles(b, h, i0, i1, [&](int64_t tile, int64_t words) {
            tiles[filled] = tile;
            bits[filled] = words;
            if (++filled == kSlots) flush();
        });
        if (filled) flush();
        for (int n = 0; n < count; ++n) {
            const Panel& x = panels[n];
            for (int r = 0; r < x.rows; ++r) finish_row(terms_, x, r, x.top[r], x.total[r], x.out + r * x.ldo);
        }
    }

    // visit(tile, words) for the key tiles rows [i0, i1) may see: those of the band, and of the plan if there is one.
    template <class Visit>
    void visit_tiles(int64_t b, int64_t h, int64_t i0, int64_t i1, Visit&& visit) const {
        const int64_t lowest = most<int64_t>(0, i0 + p_.lo), highest = least(p_.Lk() - 1, i1 - 1 + p_.hi);
        if (lowest > highest) return;
        const int64_t first = lowest / 64, last = highest / 64;
        if (!sight_.plan.row_start) {
            for (int64_t tile = first; tile <= last; ++tile) visit(tile, -1);
            return;
        }
        const TilePlanView& plan = sight_.plan;
        const int64_t at = plan.slice(b, h) * plan.q_tiles + i0 / 64;
        for (int64_t run = plan.row_start[at]; run < plan.row_start[at + 1]; ++run) {
            const TileRun& r = plan.rows[run];
            const int64_t end = least<int64_t>(last, r.first + r.count - 1);
            for (int64_t tile = most<int64_t>(first, r.first); tile <= end; ++tile) visit(tile, r.bits);
        }
    }

    void select_tiles(Panel& x, const int64_t* tiles, const int64_t* bits, int n) const {
        const int64_t i0 = x.i[0], i1 = x.i[x.rows - 1];
        x.count = 0;
        for (int slot = 0; slot < n; ++slot) {
            const int64_t j0 = tiles[slot] * 64;
            if (bits[slot] < 0 && j0 >= i1 + p_.lo && j0 + 63 <= i0 + p_.hi && j0 + 64 <= p_.Lk()) {
                x.add_full(tiles[slot]);
                continue;
            }
            const uint64_t* words = bits[slot] < 0 ? nullptr : sight_.plan.words + bits[slot];
            for (int r = 0; r < x.rows; ++r) {
                const uint64_t band = band_word(p_.lo, p_.hi, p_.Lk(), x.i[r], tiles[slot]);
                x.tiles[x.count].bits[r] = words ? band & words[x.i[r] % 64] : band;
            }
            x.add(tiles[slot]);
        }
    }

    const SoftmaxParams& p_;
    const Terms terms_;
    const Layout<Math> layout_;
    const Sight sight_;
    const int64_t q_blocks_;
};

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
          direct_keys_(rows_ <= kDirectKeyRows && p.k.stride[3] == 1 && element_size(p.k.dtype) * Math::kPair == 4),
          direct_values_(rows_ <= kDirectValueRows && p.v.stride[3] == 1),
          unpacked_values_(Math::kPair == 1 && p.v.dtype == DType::kFloat32 && p.v.stride[3] == 1 && p.Dv() % W == 0) {}

    void run() {
        const int64_t heads = p_.B() * p_.Hk(), scratch = chunk_scratch();
        const double work = static_cast<double>(heads * rows_ * p_.Lk()) * static_cast<double>(p_.D() + p_.Dv());
        const int threads = work < kSerialWork ? 1 : p_.threads;
        const int64_t partial = chunks_ > 1 ? rows_ * (layout_.ldo + 2) : 0;
        const Scratch partials(heads * chunks_ * partial * 4), blocks(threads * scratch * 4);
        std::atomic<int> members{0};
        std::atomic<int64_t> next{0};
        run_team(threads, [&] {
            float* mine = blocks.as<float>() + members.fetch_add(1) * scratch;
            for (int64_t task; (task = next.fetch_add(1)) < heads * chunks_;) {
                attend(task / chunks_, task % chunks_, mine, partials.as<float>() + task * partial);
            }
        });
        if (chunks_ == 1) return;
        parallel_for(threads, heads,
                     [&](int64_t head) { merge(head, partials.as<float>() + head * chunks_ * partial); });
    }

   private:
    int64_t chunk_scratch() const {
        return round_up(rows_ * (layout_.ldq + layout_.ldo) + kRows * kGroupKeys + kSlots * layout_.k_tile +
                            kGroupKeys / Math::kPair * layout_.ldo + 64,
                        16);
    }

    // Asks for the 64 value rows from `rows` on: column by column the product would wait for each of their lines.
    void prefetch_rows(const float* rows, int64_t row) const {
        for (int n = 0; n < 64; ++n) {
            for (int64_t c = 0; c < layout_.ldo; c += 16) __builtin_prefetch(rows + n * row + c, 0, 2);
        }
    }

    void place(Panel& x, int64_t b, int64_t hk, int64_t row) const {
        x.rows = static_cast<int>(least<int64_t>(kRows, rows_ - row));
        x.b = b;
        for (int r = 0; r < x.rows; ++r) {
            x.head[r] = hk * p_.group() + (row + r) / p_.Lq();
            x.i[r] = (row + r) % p_.Lq();
        }
    }

    void attend(int64_t kv_head, int64_t chunk, float* scratch, float* partial) const {
        const int64_t b = kv_head / p_.Hk(), hk = kv_head % p_.Hk();
        float* q = scratch;
        float* out = q + rows_ * layout_.ldq;
        float* scores = out + rows_ * layout_.ldo;
        float* keys = scores + kRows * kGroupKeys;
        float* values = keys + kSlots * layout_.k_tile;
        Panel panels[kDecodeRows / kRows];
        int count = 0;
        for (int64_t row = 0; row < rows_; row += kRows, ++count) {
            Panel& x = panels[count];
            place(x, b, hk, row);
            x.q = q + row * layout_.ldq;
            x.ldq = layout_.ldq;
            x.out = out + row * layout_.ldo;
            x.ldo = layout_.ldo;
            x.reset();
        }
        for (int64_t g = 0; g < p_.group(); ++g) {
            float* rows = q + g * p_.Lq() * layout_.ldq;
            if (terms_.zero_logits) {
                memset(rows, 0, sizeof(float) * static_cast<size_t>(p_.Lq() * layout_.ldq));
            } else {
                pack_rows<Math>(source_of(p_.q, b, hk * p_.group() + g), 0, p_.Lq(), p_.D(), terms_.sign, rows);
            }
        }
        Source key_rows = key_source(p_, sight_, p_.k, b, hk), value_rows = key_source(p_, sight_, p_.v, b, hk);
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
            for (int slot = 0; slot < used && !direct_keys_; ++slot) {
                key_rows.seen = seen + slot;
                key_rows.seen_from = packed[slot];
                pack_key_tile<Math>(p_, key_rows, packed[slot], keys + slot * layout_.k_tile);
            }
            constexpr int64_t steps = kGroupKeys / Math::kPair;
            // Rows of whole float vectors, none hidden, are operands as they lie in memory.
            bool unpacked = unpacked_values_ && !direct_values_;
            for (int slot = 0; slot < used; ++slot) unpacked &= seen[slot] == ~uint64_t{0};
            for (int slot = 0; slot < used && !direct_values_ && !unpacked; ++slot) {
                value_rows.seen = seen + slot;
                value_rows.seen_from = packed[slot];
                pack_value_tile<Math>(p_, value_rows, packed[slot], values, steps, slot * 64 / Math::kPair);
            }
            for (int n = 0; n < count; ++n) {
                Panel& x = panels[n];
                for (int slot = 0; slot < used && direct_keys_; ++slot) {
                    direct_scores<Math>(x, key_rows, packed[slot], p_.D(), p_.Lk(), scores + slot * 64);
                }
                if (!direct_keys_) {
                    score_tiles<Math>(x, layout_.d_units, scores,
                                      [&](int slot) { return keys + slot * layout_.k_tile; });
                }
                softmax_step<Math>(terms_, x, scores);
                if (unpacked) {
                    rescale(x);
                    for (int slot = 0; slot < used; ++slot) {
                        const float* tile = reinterpret_cast<const float*>(value_rows.at(packed[slot] * 64));
                        prefetch_rows(tile + 64 * value_rows.row, value_rows.row);
                        gemm_unpacked<Math, Store::kAdd>(x.rows, static_cast<int>(layout_.dv_vecs),
                                                         {scores + slot * 64, kGroupKeys, 1}, {0, 0, 64}, tile,
                                                         value_rows.row, x.out, x.ldo);
                    }
                    continue;
                }
                if (!direct_values_) {
                    add_values<Math>(x, scores, values, steps, layout_.dv_vecs,
                                     [](int slot) { return int64_t{slot} * 64 / Math::kPair; });
                    continue;
                }
                rescale(x);
                for (int slot = 0; slot < used; ++slot) {
                    direct_values<Math>(x, scores + slot * 64 / Math::kPair, value_rows, seen[slot], packed[slot],
                                        p_.Dv());
                }
            }
        }
        for (int n = 0; n < count; ++n) {
            const Panel& x = panels[n];
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
            t.c1 = 64;
            panels[n].count = slot + 1;
        }
        return any;
    }

    // Keys of the tile that some row sees and whose bias is not -inf there.
    uint64_t biased_word(int64_t b, int64_t hk, int64_t tile) const {
        uint64_t found = 0;
        const int64_t keys = least<int64_t>(64, p_.Lk() - tile * 64);
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t h = hk * p_.group() + row / p_.Lq(), i = row % p_.Lq();
            uint64_t left = visible_word(p_, b, h, i, tile) & ~found;
            const char* bias = p_.bias.row(b, h, i);
            for (int64_t c = 0; left && c < keys; ++c) {
                if (!(left >> c & 1)) continue;
                const float x = load_one(bias, p_.bias.dtype, (tile * 64 + c) * p_.bias.last_stride());
                if (x != -kInfinity) found |= uint64_t{1} << c;
            }
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
    const bool direct_keys_, direct_values_, unpacked_values_;  // few rows, and memory that can be read as operands
};

template <class Math>
void forward(const SoftmaxParams& p) {
    if (is_decode(p.Lq(), p.group(), p.Lk())) {
        Split<Math>(p).run();
    } else {
        Tiled<Math>(p).run();
    }
}

}  // namespace

void softmax_forward(const SoftmaxParams& p) {
#ifdef FASTATTN_HAS_BF16_DOT
    if (p.q.dtype == DType::kBFloat16) return forward<Bf16>(p);
#endif
    forward<Fp32>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
