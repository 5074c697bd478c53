// Arguments of `gather_windows`, for both devices: checks and the kernels' description of a ring.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gather.h"
#include "rows.h"

namespace fastwm {

// Owns nothing: the rings are the caller's, the outputs are in `out`.
struct GatherCall {
  std::vector<GatherRing> rings;
  std::vector<Tensor> out;
  Tensor ids;
  GatherFrom from;

  GatherCall(const std::vector<Tensor>& rings_, const Tensor& ids_,
             const std::vector<int64_t>& offsets, const std::vector<int64_t>& rows,
             const std::vector<int64_t>& kinds)
      : ids(ids_) {
    constexpr const char* op = "gather_windows";
    const size_t count = rings_.size();
    STD_TORCH_CHECK(count > 0, op, ": expected at least one ring, got none");
    for (const auto* list : {&offsets, &rows, &kinds}) {
      STD_TORCH_CHECK(list->size() == count, op, ": expected one entry of offsets, rows and kinds ",
                      "for each of ", count, " rings, got ", list->size());
    }
    check_shape(op, "ids", ids, "(B, 2)", {-1, 2});
    check_dtype(op, "ids", ids, ScalarType::Long);
    check_same_device(op, "ids", ids, rings_[0]);
    ids = dense(ids);
    check_min_dim(op, "rings[0]", rings_[0], "(N, L, ...)", 2);
    from = {ptr<int64_t>(ids), ids.size(0), rings_[0].size(0), rings_[0].size(1)};
    for (size_t i = 0; i < count; ++i) add(op, rings_[i], offsets[i], rows[i], kinds[i]);
  }

 private:
  void add(const char* op, const Tensor& ring, int64_t offset, int64_t rows, int64_t kind) {
    check_min_dim(op, "every ring", ring, "(N, L, ...)", 2);
    check_same_device(op, "every ring", ring, ids);
    STD_TORCH_CHECK(ring.size(0) == from.envs && ring.size(1) == from.length, op,
                    ": expected rings with the same (N, L) = (", from.envs, ", ", from.length,
                    "), got ", format_sizes(ring.sizes()));
    STD_TORCH_CHECK(ring.is_contiguous(), op, ": expected contiguous rings, got another layout");
    STD_TORCH_CHECK(1 <= rows && rows <= from.length, op, ": expected rows in [1, L = ",
                    from.length, "], got ", rows);
    STD_TORCH_CHECK(0 <= kind && kind <= 2, op, ": expected kinds in [0, 2], got ", kind);
    STD_TORCH_CHECK(kind == 0 || ring.scalar_type() == ScalarType::Byte, op,
                    ": expected a ring of dtype Byte where kinds is not 0, got ",
                    torch::headeronly::toString(ring.scalar_type()));
    std::vector<int64_t> sizes = sizes_of(ring);
    sizes[0] = from.batch, sizes[1] = rows;
    const ScalarType types[] = {ring.scalar_type(), ScalarType::Float, ScalarType::BFloat16};
    out.push_back(allocate(ring, sizes, types[kind]));
    const auto width = static_cast<int64_t>(ring.element_size());
    const int64_t record = from.envs == 0 ? 0 : ring.numel() / (from.envs * from.length) * width;
    rings.push_back({static_cast<const uint8_t*>(ring.const_data_ptr()),
                     static_cast<uint8_t*>(out.back().mutable_data_ptr()), record,
                     (offset % from.length + from.length) % from.length, rows,
                     static_cast<int>(kind)});
  }
};

}  // namespace fastwm
