// fastwm._replay: the pybind11 door to gather.h. Shapes, types and ids are checked in
// fastwm/replay.py, which also owns all memory and holds the lock; tensors come as addresses.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "gather.h"

namespace py = pybind11;
using namespace fastwm::replay;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

class Ring {
 public:
  Ring(std::int64_t envs, std::int64_t length, std::int64_t rows, std::uintptr_t count,
       std::uintptr_t next)
      : shape_{envs, length, rows},
        count_(at<std::int64_t>(count)),
        next_(at<std::int64_t>(next)) {}

  void add_key(std::uintptr_t ring, std::int64_t record, std::int64_t first, std::int64_t rows) {
    keys_.push_back({at<std::uint8_t>(ring), record, first, rows});
  }

  std::int64_t windows() const { return window_count(shape_, count_); }

  void add(const py::list& rows, const py::array& envs) {
    std::vector<const std::uint8_t*> from;
    for (py::handle array : rows)
      from.push_back(static_cast<const std::uint8_t*>(
          py::reinterpret_borrow<py::array>(array).data()));
    check(from.size());
    const auto* lanes = static_cast<const std::int64_t*>(envs.data());
    const std::int64_t m = envs.size();
    py::gil_scoped_release release;
    for (std::size_t k = 0; k < keys_.size(); ++k)
      scatter(shape_, keys_[k], count_, lanes, m, from[k]);
    for (std::int64_t i = 0; i < m; ++i) ++count_[lanes[i]];
  }

  py::tuple plan(std::uintptr_t ids, std::int64_t batch, bool online, std::uint64_t key,
                 std::uint64_t done) {
    Draws draws{key, done};
    Planned planned;
    {
      py::gil_scoped_release release;
      planned = fastwm::replay::plan(shape_, count_, next_, draws, batch, online,
                                     at<std::int64_t>(ids));
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
  void check(std::size_t arrays) const {
    if (arrays != keys_.size())
      throw std::length_error("replay: expected " + std::to_string(keys_.size()) +
                              " arrays, one per key, got " + std::to_string(arrays));
  }

  Shape shape_;
  std::int64_t* count_;
  std::int64_t* next_;
  std::vector<Key> keys_;
};

}  // namespace

PYBIND11_MODULE(_replay, m, py::mod_gil_not_used()) {
  m.doc() = "Planning and copying of replay windows, with the GIL released.";
  py::class_<Ring>(m, "Ring")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>())
      .def("add_key", &Ring::add_key)
      .def("windows", &Ring::windows)
      .def("add", &Ring::add)
      .def("plan", &Ring::plan)
      .def("gather", &Ring::gather)
      .def("write_back", &Ring::write_back);
}
