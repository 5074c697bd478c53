// CPU bindings of the mlp stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/mlp.h"
#include "ranges.h"
#include "rows.h"

namespace fastwm {
namespace {

// Keeps the row-major copies alive for as long as the kernel's pointers are used.
struct Layers {
  std::vector<Tensor> kept;
  Mlp args{};
};

// Three tensors a layer, (out, in), (out), (out); the last one may be without the scale.
Layers read_layers(const char* op, const std::vector<Tensor>& weights) {
  const int64_t tensors = (int64_t)weights.size(), count = (tensors + 1) / 3;
  STD_TORCH_CHECK(tensors >= 2 && tensors % 3 != 1 && count <= kMlpLayers, op,
                  ": expected weights of 1..", kMlpLayers,
                  " layers of three tensors, or two in the last one, got ", tensors, " tensors");
  Layers a;
  a.args.count = count;
  const Tensor& like = weights[0];
  auto take = [&](const char* name, const Tensor& tensor, const char* letters,
                  std::initializer_list<int64_t> sizes) {
    a.kept.push_back(float_arg(op, name, tensor, like, letters, sizes));
    return ptr(a.kept.back());
  };
  int64_t width = -1;
  for (int64_t i = 0; i < count; ++i) {
    MlpLayer& layer = a.args.layers[i];
    layer.weight = take("weight", weights[3 * i], "(out, in)", {-1, width});
    layer.outputs = width = weights[3 * i].size(0), layer.inputs = weights[3 * i].size(1);
    STD_TORCH_CHECK(layer.outputs > 0 && layer.inputs > 0, op,
                    ": expected weights of at least one input and output, got ",
                    format_sizes(weights[3 * i].sizes()));
    layer.bias = take("bias", weights[3 * i + 1], "(out,)", {width});
    if (3 * i + 2 < tensors) layer.scale = take("scale", weights[3 * i + 2], "(out,)", {width});
  }
  return a;
}

Tensor mlp_pack_cpu(std::vector<Tensor> weights) {
  Layers a = read_layers("mlp_pack", weights);
  // Zeros in the gaps between panels, so that equal weights give equal tensors.
  Tensor packed = torch::stable::new_zeros(weights[0], {mlp_packed_floats(a.args)});
  a.args.packed = mutable_ptr(packed);
  mlp_pack(a.args);
  return packed;
}

Tensor mlp_cpu(Tensor x, Tensor packed, std::vector<Tensor> weights, bool squash) {
  constexpr const char* op = "mlp";
  check_min_dim(op, "x", x, "(..., in)", 1);
  Layers a = read_layers(op, weights);
  const auto lead = leading(x, 1);
  std::vector<int64_t> sizes = lead;
  sizes.push_back(a.args.layers[0].inputs);
  const Tensor input = rows_arg(op, "x", x, weights[0], "(..., in)", sizes);
  const Tensor panels =
      float_arg(op, "packed", packed, weights[0], "(floats,)", {mlp_packed_floats(a.args)});
  sizes.back() = a.args.layers[a.args.count - 1].outputs;
  Tensor y = allocate(x, sizes);
  a.args.x = ptr(input), a.args.y = mutable_ptr(y), a.args.squash = squash;
  a.args.packed = const_cast<float*>(ptr(panels));  // read only
  const int64_t rows = product(lead), groups = (rows + kMlpGroup - 1) / kMlpGroup;
  if (rows == 0) return y;
  // A thread takes the memory of its first group; what it does not take is never touched.
  const int64_t step = mlp_workspace(a.args);
  Tensor workspace = allocate(x, {groups * step});
  float* memory = mutable_ptr(workspace);
  int64_t work = 0;
  for (int64_t i = 0; i < a.args.count; ++i) {
    work += a.args.layers[i].inputs * a.args.layers[i].outputs;
  }
  parallel(groups, kMlpGroup * work / 16, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(rows, end * kMlpGroup);
    mlp(a.args, memory + begin * step, begin * kMlpGroup, stop);
  });
  return y;
}

Tensor sparse_linear_pack_cpu(Tensor weight) {
  constexpr const char* op = "sparse_linear_pack";
  SparseLinear a{};
  const Tensor rows = float_arg(op, "weight", weight, weight, "(out, in)", {-1, -1});
  a.outputs = rows.size(0), a.inputs = rows.size(1), a.weight = ptr(rows);
  const int64_t floats = sparse_packed_floats(a.inputs, a.outputs);
  Tensor packed = torch::stable::new_zeros(weight, {floats});
  a.packed = mutable_ptr(packed);
  sparse_pack(a);
  return packed;
}

Tensor sparse_linear_cpu(Tensor x, Tensor packed, Tensor bias) {
  constexpr const char* op = "sparse_linear";
  SparseLinear a{};
  check_float(op, "x", x, bias, "(N, in)", {-1, -1});
  const Tensor b = float_arg(op, "bias", bias, bias, "(out,)", {-1});
  const int64_t rows = x.size(0);
  a.inputs = x.size(1), a.outputs = b.size(0), a.bias = ptr(b);
  const Tensor panels = float_arg(op, "packed", packed, bias, "(floats,)",
                                  {sparse_packed_floats(a.inputs, a.outputs)});
  const Tensor input = rows < 2 || x.stride(1) != 1 ? dense(x) : x;  // rows may lie apart
  Tensor y = allocate(x, {rows, a.outputs});
  a.x = ptr(input), a.row_stride = input.stride(0), a.y = mutable_ptr(y);
  a.packed = const_cast<float*>(ptr(panels));  // read only
  if (rows == 0) return y;
  // A thread takes the memory of its first group; what it does not take is never touched.
  const int64_t groups = (rows + kSparseGroup - 1) / kSparseGroup;
  const int64_t step = sparse_workspace(a.inputs);
  Tensor workspace = allocate(x, {groups * step});
  float* memory = mutable_ptr(workspace);
  parallel(groups, kSparseGroup * a.outputs, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(rows, end * kSparseGroup);
    sparse_linear(a, memory + begin * step, begin * kSparseGroup, stop);
  });
  return y;
}

Tensor sparse_linear_backward_cpu(Tensor grad_y, Tensor x) {
  constexpr const char* op = "sparse_linear_backward";
  const Tensor grad = float_arg(op, "grad_y", grad_y, grad_y, "(N, out)", {-1, -1});
  const int64_t rows = grad.size(0), outputs = grad.size(1);
  check_float(op, "x", x, grad_y, "(N, in)", {rows, -1});
  const int64_t inputs = x.size(1);
  const Tensor input = rows < 2 || x.stride(1) != 1 ? dense(x) : x;
  const SparseLinearGrad args{inputs, outputs, ptr(input), ptr(grad), input.stride(0)};
  const Ranges ranges(rows, kSparseGroup);
  const int64_t floats = sparse_packed_floats(inputs, outputs), space = sparse_workspace(inputs);
  Tensor sums = allocate(x, {ranges.count, floats}), scratch = allocate(x, {ranges.count, space});
  float *parts = mutable_ptr(sums), *memory = mutable_ptr(scratch);
  ranges.run(rows, outputs, [&](int64_t i, int64_t begin, int64_t end) {
    float* part = parts + i * floats;
    std::fill(part, part + floats, 0.0f);
    sparse_backward(args, memory + i * space, part, begin, end);
  });
  Tensor grad_weight = allocate(x, {outputs, inputs});
  sparse_unpack(total(parts, ranges, floats), inputs, outputs, mutable_ptr(grad_weight));
  return grad_weight;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("mlp_pack", TORCH_BOX(&fastwm::mlp_pack_cpu));
  m.impl("mlp", TORCH_BOX(&fastwm::mlp_cpu));
  m.impl("sparse_linear_pack", TORCH_BOX(&fastwm::sparse_linear_pack_cpu));
  m.impl("sparse_linear", TORCH_BOX(&fastwm::sparse_linear_cpu));
  m.impl("sparse_linear_backward", TORCH_BOX(&fastwm::sparse_linear_backward_cpu));
}
