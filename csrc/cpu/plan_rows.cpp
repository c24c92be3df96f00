#include "plan_rows.h"

#include <algorithm>
#include <stdexcept>

namespace fastattn {

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

namespace {

void append(Spans* spans, int64_t first, int64_t count, BitTile* partial) {
    if (!partial && !spans->empty()) {
        Span& last = spans->back();
        if (!last.partial && last.first + last.count == first) {
            last.count += static_cast<int32_t>(count);
            return;
        }
    }
    spans->push_back({static_cast<int32_t>(first), static_cast<int32_t>(count), partial});
}

// From one key tile on: what the next tiles up to `end` are.
struct Part {
    Kind kind;
    int32_t end;
    BitTile* partial;
};

class Cursor {
   public:
    Cursor(const Spans& spans, int64_t k_tiles) : at_(spans.data()), end_(at_ + spans.size()), k_tiles_(k_tiles) {}
    Part from(int32_t k) {
        while (at_ != end_ && at_->first + at_->count <= k) ++at_;
        if (at_ == end_) return {kEmpty, static_cast<int32_t>(k_tiles_), nullptr};
        if (at_->first > k) return {kEmpty, at_->first, nullptr};
        return {at_->partial ? kPartial : kFull, at_->first + at_->count, at_->partial};
    }

   private:
    const Span *at_, *end_;
    const int64_t k_tiles_;
};

}  // namespace

RowProgram::RowProgram(const std::vector<RowStep>& steps, int64_t i0, int64_t Lq, int64_t Lk)
    : steps_(steps), i0_(i0), Lq_(Lq), Lk_(Lk), k_tiles_(tile_count(Lk)), results_(steps.size()) {
    int64_t depth = 0;
    for (const RowStep& step : steps) {
        const int64_t taken = step.op < RowStep::kComplement ? 0 : step.op == RowStep::kComplement ? 1 : 2;
        if (depth < taken) throw std::invalid_argument("a step combines more rows than there are");
        depth += 1 - taken;
    }
    if (depth != 1) throw std::invalid_argument("steps must leave one list of rows");
}

const Spans& RowProgram::of(int64_t b, int64_t h, int64_t t) {
    const int64_t i = t * kTile - i0_, rows = std::min(kTile, Lq_ - t * kTile);
    stack_.clear();
    for (size_t at = 0; at < steps_.size(); ++at) {
        const RowStep& step = steps_[at];
        Result* result = &results_[at];
        if (step.op > RowStep::kWords) result->clear();
        const auto pop = [&]() -> const Spans& {
            const Spans* last = stack_.back();
            stack_.pop_back();
            return *last;
        };
        switch (step.op) {
            case RowStep::kIntervals:
                intervals(step, result, b, h, i, rows);
                break;
            case RowStep::kWords:
                words(step, result, b, h, i, rows);
                break;
            case RowStep::kMultiples: {
                int64_t k0 = 0, k1 = k_tiles_;
                if (at + 1 < steps_.size() && steps_[at + 1].op == RowStep::kIntersect) {
                    // What they are intersected with has tiles from here to there: others are not made.
                    const Spans& spans = *stack_.back();
                    k0 = spans.empty() ? k1 : spans.front().first;
                    k1 = spans.empty() ? k1 : spans.back().first + spans.back().count;
                }
                multiples(step, result, t, rows, k0, k1);
                break;
            }
            case RowStep::kComplement:
                complement(pop(), result);
                break;
            case RowStep::kIntersect:
            case RowStep::kUnite: {
                const Spans &last = pop(), &first = pop();
                if (step.op == RowStep::kIntersect) {
                    combine<true>(first, last, result);
                } else {
                    combine<false>(first, last, result);
                }
            }
        }
        stack_.push_back(&result->spans);
    }
    return *stack_.back();
}

// Takes the last tile of the store, or drops it.
void RowProgram::add(Result* result, int64_t k, BitTile* tile, int64_t rows) const {
    const Kind kind = classify(tile->row, rows, all(k));
    if (kind != kPartial) result->tiles.drop_last();
    if (kind != kEmpty) append(&result->spans, k, 1, kind == kFull ? nullptr : tile);
}

RowProgram::Row RowProgram::row_of(const RowStep& step, int64_t b, int64_t h, int64_t i) const {
    const auto at = [&](const TensorView& view) { return reinterpret_cast<const int32_t*>(view.row(b, h, i)); };
    if (!step.start) return {at(step.lo), at(step.hi), step.lo.size[3]};
    const int64_t start = *at(step.start), end = *at(step.end);
    if (start < 0 || end < start || end > step.lo.size[3]) {
        throw std::invalid_argument("rows must have intervals that are there");
    }
    return {at(step.lo) + start, at(step.hi) + start, end - start};
}

void RowProgram::intervals(const RowStep& step, Result* result, int64_t b, int64_t h, int64_t i, int64_t rows) {
    bool same = true;
    for (int64_t r = 0; r < rows; ++r) {
        rows_[r] = row_of(step, b, h, i + r);
        same = same && rows_[r].lo == rows_[0].lo && rows_[r].hi == rows_[0].hi && rows_[r].count == rows_[0].count;
    }
    if (!result->begin(same, rows_[0].lo, rows_[0].hi, rows_[0].count)) return;
    if (same) rows = 1;
    int64_t total = 0, most = 0;
    for (int64_t r = 0; r < rows; ++r) {
        int32_t end = 0;
        for (int64_t c = 0; c < rows_[r].count; ++c) {
            const int32_t first = rows_[r].lo[c], last = rows_[r].hi[c];
            if (first < end || last < first || last > Lk_) {
                throw std::invalid_argument("intervals must be sorted, disjoint and within the keys");
            }
            end = last;
        }
        total += rows_[r].count;
        most = std::max(most, rows_[r].count);
    }
    if (rows > 1 && total > k_tiles_) {
        many_intervals(result, rows);
    } else {
        few_intervals(result, rows, most);
    }
}

void RowProgram::push_changes(const Extent& e, int32_t rows) {
    if (!rows) return;
    changes_.push_back({e.touch, rows, 0});
    changes_.push_back({e.touch_end, -rows, 0});
    if (e.cover >= e.cover_end) return;
    changes_.push_back({e.cover, 0, rows});
    changes_.push_back({e.cover_end, 0, -rows});
}

// Between two changes all key tiles are touched and covered by the same number of rows.
void RowProgram::few_intervals(Result* result, int64_t rows, int64_t most) {
    changes_.clear();
    for (int64_t c = 0; c < most; ++c) {
        Extent current{};
        int32_t alike = 0;
        for (int64_t r = 0; r < rows; ++r) {
            if (c >= rows_[r].count || rows_[r].lo[c] == rows_[r].hi[c]) continue;
            const int32_t first = rows_[r].lo[c], last = rows_[r].hi[c];
            const Extent e{static_cast<int32_t>(first / kTile), static_cast<int32_t>(tile_count(last)),
                           static_cast<int32_t>(tile_count(first)),
                           static_cast<int32_t>(last == Lk_ ? k_tiles_ : last / kTile)};
            if (!(e == current)) {
                push_changes(current, alike);
                current = e;
                alike = 0;
            }
            ++alike;
        }
        push_changes(current, alike);
    }
    std::sort(changes_.begin(), changes_.end(), [](const Change& a, const Change& b) { return a.tile < b.tile; });
    int64_t touching = 0, covering = 0;
    std::fill(behind_, behind_ + kTile, 0);
    for (size_t at = 0; at < changes_.size();) {
        const int32_t first = changes_[at].tile;
        for (; at < changes_.size() && changes_[at].tile == first; ++at) {
            touching += changes_[at].touch;
            covering += changes_[at].cover;
        }
        if (!touching) continue;
        const int32_t end = changes_[at].tile;
        if (covering == rows) {
            append(&result->spans, first, end - first, nullptr);
            continue;
        }
        for (int32_t k = first; k < end; ++k) partial_of_intervals(result, rows, k);
    }
}

// Called for increasing k: each row remembers how many of its intervals lie behind.
void RowProgram::partial_of_intervals(Result* result, int64_t rows, int64_t k) {
    BitTile* tile = result->tiles.next();
    const int64_t j0 = k * kTile;
    for (int64_t r = 0; r < rows; ++r) {
        const Row& row = rows_[r];
        int64_t& c = behind_[r];
        while (c < row.count && row.hi[c] <= j0) ++c;
        uint64_t word = 0;
        for (int64_t at = c; at < row.count && row.lo[at] < j0 + kTile; ++at) {
            word |= low_bits(row.hi[at] - j0) & ~low_bits(std::max<int64_t>(row.lo[at] - j0, 0));
        }
        tile->row[r] = word;
    }
    add(result, k, tile, rows);
}

// Many intervals are not put in order: all tiles that they span are made.
void RowProgram::many_intervals(Result* result, int64_t rows) {
    block_.resize(static_cast<size_t>(k_tiles_ * kTile));
    int64_t begin = k_tiles_, end = 0;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < rows_[r].count; ++c) {
            const int64_t first = rows_[r].lo[c], last = rows_[r].hi[c];
            if (first == last) continue;
            begin = std::min(begin, first / kTile);
            end = std::max(end, tile_count(last));
            for (int64_t k = first / kTile; k < tile_count(last); ++k) {
                const int64_t j0 = k * kTile;
                block_[k * kTile + r] |= low_bits(last - j0) & ~low_bits(std::max<int64_t>(first - j0, 0));
            }
        }
    }
    for (int64_t k = begin; k < end; ++k) {
        BitTile* tile = result->tiles.next();
        uint64_t* from = block_.data() + k * kTile;
        std::copy(from, from + kTile, tile->row);
        std::fill(from, from + kTile, 0);
        add(result, k, tile, rows);
    }
}

void RowProgram::words(const RowStep& step, Result* result, int64_t b, int64_t h, int64_t i, int64_t rows) const {
    const int64_t stride = step.words.last_stride();
    const bool same = step.words.size[2] == 1;
    if (!result->begin(same, step.words.row(b, h, i), nullptr, 0)) return;
    if (same) rows = 1;
    for (int64_t k = 0; k < k_tiles_; ++k) {
        BitTile* tile = result->tiles.next();
        for (int64_t r = 0; r < rows; ++r) {
            tile->row[r] = reinterpret_cast<const uint64_t*>(step.words.row(b, h, i + r))[k * stride];
        }
        add(result, k, tile, rows);
    }
}

// Row r of a tile sees the columns c with c = r + rest modulo step, so tiles of equal rest are equal; those with a key
// have -kTile < rest < kTile. Tiles that an end cuts are made for themselves.
void RowProgram::multiples(const RowStep& step, Result* result, int64_t t, int64_t rows, int64_t k0, int64_t k1) const {
    const int64_t n = step.step;
    constexpr int32_t kUnknown = -1;
    result->by_remainder.resize(2 * kTile, {kUnknown, 0, nullptr});
    int64_t rest = ((step.shift + (t - k0) * kTile) % n + n) % n;
    for (int64_t k = k0; k < k1; ++k, rest = (rest + n - kTile % n) % n) {
        const int64_t near = rest < kTile ? rest : rest - n;
        if (near <= -kTile) continue;
        const bool cut = rows < kTile || (k + 1) * kTile > Lk_;
        Span* known = &result->by_remainder[near + kTile];
        if (!cut && known->first != kUnknown) {
            if (known->count) append(&result->spans, k, 1, known->partial);
            continue;
        }
        BitTile* tile = (cut ? result->tiles : result->kept).next();
        for (int64_t r = 0; r < rows; ++r) {
            tile->row[r] = 0;
            for (int64_t c = (r + rest) % n; c < kTile; c += n) tile->row[r] |= uint64_t{1} << c;
        }
        const Kind kind = classify(tile->row, rows, all(k));
        if (kind != kEmpty) append(&result->spans, k, 1, kind == kFull ? nullptr : tile);
        if (!cut) *known = {0, kind != kEmpty, kind == kFull ? nullptr : tile};
    }
}

template <bool kAnd>
void RowProgram::combine(const Spans& a, const Spans& b, Result* result) const {
    constexpr Kind kDecisive = kAnd ? kEmpty : kFull;  // whatever the other is
    Cursor of_a(a, k_tiles_), of_b(b, k_tiles_);
    for (int32_t k = 0, end; k < k_tiles_; k = end) {
        const Part x = of_a.from(k), y = of_b.from(k);
        if (x.kind == kDecisive || y.kind == kDecisive) {
            end = std::max(x.kind == kDecisive ? x.end : k, y.kind == kDecisive ? y.end : k);
            if (!kAnd) append(&result->spans, k, end - k, nullptr);
            continue;
        }
        end = std::min(x.end, y.end);
        if (x.kind == kPartial && y.kind == kPartial) {
            BitTile* tile = result->tiles.next();
            for (int64_t r = 0; r < kTile; ++r) {
                tile->row[r] = kAnd ? x.partial->row[r] & y.partial->row[r] : x.partial->row[r] | y.partial->row[r];
            }
            add(result, k, tile, kTile);
        } else if (x.kind == kPartial || y.kind == kPartial) {
            append(&result->spans, k, 1, x.kind == kPartial ? x.partial : y.partial);
        } else if (kAnd) {
            append(&result->spans, k, end - k, nullptr);
        }
    }
}

void RowProgram::complement(const Spans& a, Result* result) const {
    int64_t k = 0;
    for (const Span& span : a) {
        if (span.first > k) append(&result->spans, k, span.first - k, nullptr);
        if (span.partial) {
            BitTile* tile = result->tiles.next();
            for (int64_t r = 0; r < kTile; ++r) tile->row[r] = ~span.partial->row[r] & all(span.first);
            append(&result->spans, span.first, 1, tile);
        }
        k = span.first + span.count;
    }
    if (k < k_tiles_) append(&result->spans, k, k_tiles_ - k, nullptr);
}

}  // namespace fastattn
