// Every operator of the extension, on one screen.
//
// These are raw: no autograd, no broadcasting, float32 unless a comment says otherwise. A forward op
// `x` and its `x_backward` are joined by an autograd.Function in fastwm/ops/<stem>.py, which is what
// people should call. Kernels: csrc/cpu/<stem>.cpp and csrc/cuda/<stem>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastwm, m) {
  // What is running: bound in ops_cpu.cpp.
  m.def("build_info() -> str");
  m.def("cpu_capability() -> str");

  // lambda_return
  m.def("lambda_return(Tensor reward, Tensor value, Tensor discount, Tensor trace) -> Tensor");
  m.def("lambda_return_backward(Tensor grad_returns, Tensor returns, Tensor value, Tensor discount, "
        "Tensor trace) -> (Tensor, Tensor, Tensor)");
}
