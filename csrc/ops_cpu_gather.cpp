// CPU binding of the gather stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "gather_args.h"

namespace fastwm {
namespace {

std::vector<Tensor> gather_windows_cpu(std::vector<Tensor> rings, Tensor ids,
                                       std::vector<int64_t> offsets, std::vector<int64_t> rows,
                                       std::vector<int64_t> kinds) {
  const GatherCall call(rings, ids, offsets, rows, kinds);
  for (int64_t b = 0; b < call.from.batch; ++b) {
    const int64_t env = call.from.ids[2 * b];
    STD_TORCH_CHECK(0 <= env && env < call.from.envs, "gather_windows: expected envs of ids in [0, ",
                    call.from.envs, "), got ", env);
  }
  for (const GatherRing& ring : call.rings) {
    parallel(call.from.batch, ring.rows * ring.record,
             [&](int64_t begin, int64_t end) { gather_windows(call.from, ring, begin, end); });
  }
  return call.out;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("gather_windows", TORCH_BOX(&fastwm::gather_windows_cpu));
}
