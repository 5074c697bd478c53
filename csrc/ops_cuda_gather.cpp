// CUDA binding of the gather stem; see ops_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "cuda/gather.h"
#include "gather_args.h"
#include "on_device.h"

namespace fastwm {
namespace {

std::vector<Tensor> gather_windows_cuda(std::vector<Tensor> rings, Tensor ids,
                                        std::vector<int64_t> offsets, std::vector<int64_t> rows,
                                        std::vector<int64_t> kinds) {
  const GatherCall call(rings, ids, offsets, rows, kinds);
  const OnDeviceOf device(ids);
  if (call.from.batch == 0) return call.out;
  STD_TORCH_CHECK(call.from.envs > 0, "gather_windows: expected rings with N > 0, got 0");
  cuda::GatherTable table{call.from, 0, 0, {}};
  for (size_t i = 0; i < call.rings.size(); ++i) {
    if (cuda::add_ring(table, call.rings[i]) && i + 1 < call.rings.size()) continue;
    STD_TORCH_CHECK(table.blocks < (int64_t{1} << 31), "gather_windows: expected less than ",
                    (int64_t{1} << 31) * cuda::kPiece, " bytes in a batch, got more");
    STD_CUDA_CHECK(cuda::gather_windows(table, device.stream()));
    table.rings = 0, table.blocks = 0;
  }
  return call.out;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("gather_windows", TORCH_BOX(&fastwm::gather_windows_cuda));
}
