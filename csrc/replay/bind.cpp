// fastwm._replay: the pybind11 door to gather.h and episodes.h. Shapes, types and ids are checked
// in fastwm/replay.py, which also owns all memory and holds the lock; tensors come as addresses.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "episodes.h"
#include "gather.h"

namespace py = pybind11;
using namespace fastwm::replay;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Copies of fewer bytes than this keep the GIL: giving it back and taking it again costs more.
constexpr std::int64_t kSmall = 1 << 16;

// What the rows of a key look like when they need no conversion.
struct Layout {
  py::str name;
  py::dtype dtype;
  std::vector<std::int64_t> shape;  // of one row
  bool plain;                       // whether its arrays may be copied as they are at all

  bool fits(const py::array& rows, std::int64_t m) const {
    if (!plain || rows.dtype().ptr() != dtype.ptr() || !(rows.flags() & py::array::c_style))
      return false;
    if (rows.ndim() != static_cast<py::ssize_t>(shape.size()) + 1 || rows.shape(0) != m)
      return false;
    for (std::size_t i = 0; i < shape.size(); ++i)
      if (rows.shape(i + 1) != shape[i]) return false;
    return true;
  }
};

class Ring {
 public:
  Ring(std::int64_t envs, std::int64_t length, std::int64_t rows, std::uintptr_t count,
       std::uintptr_t next)
      : shape_{envs, length, rows},
        count_(at<std::int64_t>(count)),
        next_(at<std::int64_t>(next)) {}

  void add_key(std::uintptr_t ring, std::int64_t record, std::int64_t first, std::int64_t rows,
               const py::str& name, const py::dtype& dtype, std::vector<std::int64_t> shape,
               bool plain) {
    keys_.push_back({at<std::uint8_t>(ring), record, first, rows});
    layouts_.push_back({name, dtype, std::move(shape), plain});
    row_bytes_ += record;
  }

  std::int64_t windows() const { return window_count(shape_, count_); }

  void add(const py::list& rows, const py::array& envs) {
    std::vector<const std::uint8_t*> from;
    for (py::handle array : rows) from.push_back(data(array));
    check(from.size());
    append(from.data(), static_cast<const std::int64_t*>(envs.data()), envs.size());
  }

  // `add` of a dict as it came, for all envs: true once it is stored. False, and nothing is done,
  // where a key is missing, unknown or not exactly in its stored form: then Python looks at it.
  bool add_whole(const py::object& rows, const py::array& envs) {
    if (!PyDict_CheckExact(rows.ptr())) return false;
    if (PyDict_GET_SIZE(rows.ptr()) != static_cast<py::ssize_t>(keys_.size())) return false;
    std::vector<py::object> alive(keys_.size());
    std::vector<const std::uint8_t*> from(keys_.size());
    for (std::size_t k = 0; k < keys_.size(); ++k) {
      PyObject* value = PyDict_GetItemWithError(rows.ptr(), layouts_[k].name.ptr());
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (value == nullptr || py::type::handle_of(value).ptr() != ndarray_.ptr()) return false;
      alive[k] = py::reinterpret_borrow<py::object>(value);
      if (!layouts_[k].fits(py::reinterpret_borrow<py::array>(value), shape_.envs)) return false;
      from[k] = data(value);
    }
    append(from.data(), static_cast<const std::int64_t*>(envs.data()), shape_.envs);
    return true;
  }

  py::tuple plan(std::uintptr_t ids, std::int64_t batch, bool online, std::uint64_t key,
                 std::uint64_t done) {
    Draws draws{key, done};
    Planned planned;
    {
      py::gil_scoped_release release;
      planned =
          fastwm::replay::plan(shape_, count_, next_, draws, batch, online, at<std::int64_t>(ids));
    }
    return py::make_tuple(planned.online, planned.dropped, draws.done);
  }

  void gather(const std::vector<std::uintptr_t>& out, std::uintptr_t ids, std::int64_t batch,
              std::uintptr_t first, std::uintptr_t last) const {
    check(out.size());
    py::gil_scoped_release release;
    for (std::size_t k = 0; k < keys_.size(); ++k)
      fastwm::replay::gather(shape_, keys_[k], batch, at<std::int64_t>(ids),
                             at<std::uint8_t>(out[k]));
    repair_last(shape_, batch, at<std::uint8_t>(first), at<std::uint8_t>(last));
  }

  std::int64_t write_back(std::size_t key, const py::array& values, const py::array& ids) {
    if (key >= keys_.size()) throw std::out_of_range("replay: write_back of an unknown key");
    const auto* from = static_cast<const std::uint8_t*>(values.data());
    const auto* where = static_cast<const std::int64_t*>(ids.data());
    const std::int64_t batch = ids.shape(0);
    py::gil_scoped_release release;
    return fastwm::replay::write_back(shape_, keys_[key], count_, batch, where, from);
  }

 private:
  static const std::uint8_t* data(py::handle array) {
    return static_cast<const std::uint8_t*>(py::reinterpret_borrow<py::array>(array).data());
  }

  void append(const std::uint8_t* const* rows, const std::int64_t* lanes, std::int64_t m) {
    if (row_bytes_ * m < kSmall) {
      fastwm::replay::append(shape_, keys_, count_, lanes, m, rows);
      return;
    }
    py::gil_scoped_release release;
    fastwm::replay::append(shape_, keys_, count_, lanes, m, rows);
  }

  void check(std::size_t arrays) const {
    if (arrays != keys_.size())
      throw std::length_error("replay: expected " + std::to_string(keys_.size()) +
                              " arrays, one per key, got " + std::to_string(arrays));
  }

  Shape shape_;
  std::int64_t* count_;
  std::int64_t* next_;
  std::int64_t row_bytes_ = 0;
  std::vector<Key> keys_;
  std::vector<Layout> layouts_;
  py::object ndarray_ = py::module_::import("numpy").attr("ndarray");
};

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// (scores, lengths) of the episodes that end with these rows; score and length go on in place.
py::object tally(const Array<float>& reward, const Array<bool>& first, const Array<bool>& last,
                 Array<double>& score, Array<std::int64_t>& length) {
  const std::int64_t n = score.size();
  const std::int64_t sizes_seen[] = {reward.size(), first.size(), last.size(), length.size()};
  for (const std::int64_t seen : sizes_seen) {
    if (seen == n) continue;
    throw std::length_error("episodes: expected rows of " + std::to_string(n) +
                            " environments, got " + std::to_string(seen));
  }
  std::vector<std::int64_t> ended(n);
  double* scores = score.mutable_data();
  std::int64_t* lengths = length.mutable_data();
  const std::int64_t count = fastwm::replay::count_row(n, reward.data(), first.data(), last.data(),
                                                       scores, lengths, ended.data());
  if (count == 0) return py::none();
  py::list found(count), sizes(count);
  for (std::int64_t i = 0; i < count; ++i) {
    found[i] = scores[ended[i]];
    sizes[i] = lengths[ended[i]];
  }
  return py::make_tuple(found, sizes);
}

}  // namespace

PYBIND11_MODULE(_replay, m, py::mod_gil_not_used()) {
  m.doc() = "Planning and copying of replay windows, and the counting of episodes.";
  py::class_<Ring>(m, "Ring")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>())
      .def("add_key", &Ring::add_key)
      .def("windows", &Ring::windows)
      .def("add", &Ring::add)
      .def("add_whole", &Ring::add_whole)
      .def("plan", &Ring::plan)
      .def("gather", &Ring::gather)
      .def("write_back", &Ring::write_back);
  m.def("tally", &tally, py::arg("reward"), py::arg("first"), py::arg("last"),
        py::arg("score").noconvert(), py::arg("length").noconvert());
}
