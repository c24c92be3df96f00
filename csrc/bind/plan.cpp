// _C.PlanBuilder and _C.check_plan: tile plans as int tensors, see fastattn/masks/plan.py.
#include "plan.h"

#include <pybind11/stl.h>

#include <cstring>
#include <vector>

#include "fastattn/plan_builder.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Contiguous, of this shape (-1: any length of the first dimension), of `dims` dimensions.
TensorView dense_view(py::handle tensor, const char* name, DType dtype, int dims, int64_t rows, int64_t columns,
                      int device = kCpu) {
    const TensorView view = view_as(tensor, name, dims, dtype, device);
    const int64_t found = dims == 1 ? view.size[3] : view.size[2];
    if ((rows >= 0 && found != rows) || (dims == 2 && view.size[3] != columns)) {
        refuse("malformed plan: " + std::string(name) + " has the wrong shape");
    }
    const bool packed = view.size[3] <= 1 || view.stride[3] == 1;
    if (found > 0 && (!packed || (found > 1 && dims == 2 && columns > 0 && view.stride[2] != columns))) {
        refuse("malformed plan: " + std::string(name) + " must be contiguous");
    }
    return view;
}

enum Field {
    kRowStart,
    kRows,
    kColumnStart,
    kColumns,
    kWords,
    kRowOrder,
    kColumnOrder,
    kBatches,
    kHeads,
    kLq,
    kLk,
    kTileSize,
    kFields
};

int64_t number(const py::sequence& plan, Field field) {
    const int64_t value = py::cast<int64_t>(plan[field]);
    if (value < 0 || value >= int64_t{1} << 31) refuse("malformed plan: a size is negative or over 2^31");
    return value;
}

class Builder {
   public:
    Builder(int64_t batches, int64_t heads, int64_t Lq, int64_t Lk)
        : batches_(batches), heads_(heads), Lq_(Lq), Lk_(Lk), builder_(batches, heads, Lq, Lk) {}

    void add_rows(const py::sequence& steps, int64_t i0, int64_t i1) {
        with_steps(steps, i0, i1, [&](const std::vector<RowStep>& found) { builder_.add_rows(found, i0, i1); });
    }

    int64_t count_pairs(const py::sequence& steps, int64_t i0, int64_t i1) const {
        int64_t pairs = 0;
        with_steps(steps, i0, i1,
                   [&](const std::vector<RowStep>& found) { pairs = builder_.count_pairs(found, i0, i1); });
        return pairs;
    }

    void add_mask(py::handle mask, int threads) {
        const TensorView view = rows_view(mask, "mask", DType::kBool, 0, Lq_);
        if (view.size[3] != Lk_ && view.size[3] != 1) refuse("mask must have Lk keys");
        if (threads < 1 || threads > 4096) refuse("threads must be in 1 .. 4096");
        const py::gil_scoped_release released;
        builder_.add_mask(view, threads);
    }

    py::tuple finish() {
        {
            const py::gil_scoped_release released;
            plan_ = builder_.finish(true);
        }
        return py::make_tuple(plan_.rows.size(), plan_.columns.size(), plan_.words.size() / kTile);
    }

    // Copies the finished plan into tensors of the sizes that finish() gave.
    void write(const py::tuple& fields) const {
        const int64_t slices = batches_ * heads_;
        copy(fields[kRowStart], "row_start", plan_.row_start, DType::kInt32, 1);
        copy(fields[kRows], "rows", plan_.rows, DType::kInt32, 3);
        copy(fields[kColumnStart], "column_start", plan_.column_start, DType::kInt32, 1);
        copy(fields[kColumns], "columns", plan_.columns, DType::kInt32, 3);
        copy(fields[kWords], "words", plan_.words, DType::kInt64, kTile);
        copy(fields[kRowOrder], "row_order", plan_.row_order, DType::kInt32, plan_.q_tiles, slices);
        copy(fields[kColumnOrder], "column_order", plan_.column_order, DType::kInt32, plan_.k_tiles, slices);
    }

   private:
    template <class F>
    void with_steps(const py::sequence& steps, int64_t i0, int64_t i1, F&& f) const {
        if (i0 < 0 || i1 < i0 || i1 > Lq_) refuse("rows must be those of queries from 0 to Lq");
        const auto kept = py::cast<std::vector<py::tuple>>(steps);  // with the tensors in them
        std::vector<RowStep> found;
        for (const py::tuple& step : kept) found.push_back(row_step(step, i0, i1));
        const py::gil_scoped_release released;
        f(found);
    }

    RowStep row_step(const py::tuple& step, int64_t i0, int64_t i1) const {
        const auto name = step.empty() ? std::string() : py::cast<std::string>(step[0]);
        const size_t given = step.size() - 1;
        RowStep found{};
        if (name == "intervals" && given == 2) {
            found.op = RowStep::kIntervals;
            found.lo = rows_view(step[1], "lo", DType::kInt32, i0, i1);
            found.hi = rows_view(step[2], "hi", DType::kInt32, i0, i1);
        } else if (name == "lists" && given == 4) {
            found.op = RowStep::kIntervals;
            found.start = rows_view(step[1], "start", DType::kInt32, i0, i1);
            found.end = rows_view(step[2], "end", DType::kInt32, i0, i1);
            if (found.start.size[3] != 1 || found.end.size[3] != 1) refuse("start and end must be [.., rows, 1]");
            found.lo = view_as(step[3], "lo", 1, DType::kInt32);
            found.hi = view_as(step[4], "hi", 1, DType::kInt32);
        } else if (name == "words" && given == 1) {
            found.op = RowStep::kWords;
            found.words = rows_view(step[1], "words", DType::kInt64, i0, i1);
            if (found.words.size[3] != tile_count(Lk_)) refuse("words must have one word for 64 keys");
        } else if (name == "multiples" && given == 2) {
            found.op = RowStep::kMultiples;
            found.step = py::cast<int64_t>(step[1]);
            found.shift = py::cast<int64_t>(step[2]);
            const int64_t limit = int64_t{1} << 32;
            if (found.step < 1 || found.step > limit || found.shift > limit || found.shift < -limit) {
                refuse("multiples are of a step from 1 to 2^32, shifted by no more");
            }
        } else if ((name == "intersect" || name == "unite" || name == "complement") && given == 0) {
            found.op = name == "intersect" ? RowStep::kIntersect
                       : name == "unite"   ? RowStep::kUnite
                                           : RowStep::kComplement;
        } else {
            refuse("unknown step of rows: " + name + " of " + std::to_string(given));
        }
        if (found.lo.size[3] != found.hi.size[3]) refuse("lo and hi must have the same number of intervals");
        for (const TensorView* ends : {&found.lo, &found.hi}) {
            if (ends->size[3] > 1 && ends->stride[3] != 1) refuse("intervals of a row must be contiguous");
        }
        return found;
    }

    TensorView rows_view(py::handle tensor, const char* name, DType dtype, int64_t i0, int64_t i1) const {
        const TensorView view = view_as(tensor, name, 4, dtype);
        const int64_t wanted[3] = {batches_, heads_, i1 - i0};
        for (int d = 0; d < 3; ++d) {
            if (view.size[d] != wanted[d] && view.size[d] != 1) refuse(std::string(name) + " has the wrong shape");
        }
        return view;
    }

    template <class T>
    static void copy(py::handle tensor, const char* name, const std::vector<T>& from, DType dtype, int64_t columns,
                     int64_t rows = -1) {
        const int64_t wanted = static_cast<int64_t>(from.size() * sizeof(T)) / element_size(dtype);
        const TensorView to = dense_view(tensor, name, dtype, columns == 1 && rows < 0 ? 1 : 2,
                                         rows >= 0 ? rows : wanted / columns, columns);
        if (wanted) std::memcpy(to.data, from.data(), from.size() * sizeof(T));
    }

    const int64_t batches_, heads_, Lq_, Lk_;
    PlanBuilder builder_;
    TilePlan plan_;
};

}  // namespace

TilePlanView plan_view(py::handle plan, int device) {
    if (!py::isinstance<py::tuple>(plan) || py::len(plan) != kFields) refuse("a plan is a TilePlan of fastattn.masks");
    const auto f = py::reinterpret_borrow<py::sequence>(plan);
    TilePlanView view;
    view.batches = number(f, kBatches);
    view.heads = number(f, kHeads);
    view.Lq = number(f, kLq);
    view.Lk = number(f, kLk);
    view.q_tiles = tile_count(view.Lq);
    view.k_tiles = tile_count(view.Lk);
    if (number(f, kTileSize) != kTile) refuse("the native kernels take plans of tile 64");
    const int64_t slices = view.batches * view.heads;
    int64_t row_lists, column_lists;
    if (__builtin_mul_overflow(slices, view.q_tiles, &row_lists) ||
        __builtin_mul_overflow(slices, view.k_tiles, &column_lists)) {
        refuse("malformed plan: a size is over 2^63");
    }
    const TensorView rows = dense_view(f[kRows], "rows", DType::kInt32, 2, -1, 3, device);
    const TensorView columns = dense_view(f[kColumns], "columns", DType::kInt32, 2, -1, 3, device);
    const TensorView words = dense_view(f[kWords], "words", DType::kInt64, 2, -1, kTile, device);
    const auto ints = [&](Field field, const char* name, int dims, int64_t size, int64_t width) {
        return reinterpret_cast<const int32_t*>(
            dense_view(f[field], name, DType::kInt32, dims, size, width, device).data);
    };
    view.row_start = ints(kRowStart, "row_start", 1, row_lists + 1, 1);
    view.column_start = ints(kColumnStart, "column_start", 1, column_lists + 1, 1);
    view.row_order = ints(kRowOrder, "row_order", 2, slices, view.q_tiles);
    view.column_order = ints(kColumnOrder, "column_order", 2, slices, view.k_tiles);
    view.rows = reinterpret_cast<const TileRun*>(rows.data);
    view.columns = reinterpret_cast<const TileRun*>(columns.data);
    view.words = reinterpret_cast<const uint64_t*>(words.data);
    if (device == kCpu) check_plan(view, rows.size[2], columns.size[2], words.size[2]);
    return view;
}

void register_plan(py::module_& m) {
    py::class_<Builder>(m, "PlanBuilder", "Builds a tile plan from stretches of query rows.")
        .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("batches"), py::arg("heads"), py::arg("Lq"),
             py::arg("Lk"))
        .def("add_rows", &Builder::add_rows,
             "add_rows(steps, i0, i1): postfix of ('intervals', lo, hi), ('lists', start, end, lo, hi), "
             "('words', words), ('multiples', step, shift), ('intersect',), ('unite',), ('complement',)")
        .def("count_pairs", &Builder::count_pairs, "count_pairs(steps, i0, i1) -> visible pairs of these rows alone")
        .def("add_mask", &Builder::add_mask, "add_mask(mask, threads): bool [B|1, H|1, Lq|1, Lk|1]")
        .def("finish", &Builder::finish, "finish() -> number of rows, columns and bit tiles")
        .def("write", &Builder::write, "write(tensors): fills the seven tensors of a TilePlan");
    m.def(
        "check_plan", [](py::handle plan) { plan_view(plan); },
        "check_plan(plan): ValueError or TypeError unless kernels can read the TilePlan safely");
}

}  // namespace fastattn
