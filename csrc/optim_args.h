// What the bindings of the optim stem share.
#pragma once

#include <vector>

#include "rows.h"

namespace fastwm {

using Tensors = std::vector<Tensor>;

// Lists of float32 tensors of the same shapes; those that are written must lie row-major.
inline void check_list(const char* op, const char* name, const Tensors& list, const Tensors& like,
                       bool written, ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(list.size() == like.size(), op, ": expected ", like.size(), " ", name, ", got ",
                  list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(sizes_of(list[i]) == sizes_of(like[i]), op, ": expected ", name, "[", i,
                    "] of shape ", format_sizes(like[i].sizes()), ", got ",
                    format_sizes(list[i].sizes()));
    check_dtype(op, name, list[i], dtype);
    check_same_device(op, name, list[i], like[0]);
    STD_TORCH_CHECK(!written || list[i].is_contiguous(), op, ": expected ", name, "[", i,
                    "] to be contiguous, it is written in place");
  }
}

}  // namespace fastwm
