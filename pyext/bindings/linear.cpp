// seqfuse::linear_fwd. Contract: csrc/include/seqfuse/linear.h
#include "seqfuse/linear.h"

#include "common.h"

namespace seqfuse {
namespace {

Tensor forward(Tensor x_in, Tensor weight_in, std::optional<Tensor> bias_in) {
  STD_TORCH_CHECK(weight_in.dim() == 2, "weight must be [outputs, inputs]");
  STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.size(x_in.dim() - 1) == weight_in.size(1),
                  "x must be [..., inputs] where weight is [outputs, inputs]");
  STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::Float || x_in.scalar_type() == ScalarType::BFloat16,
                  "x: the CPU kernel takes float32 and bfloat16");
  STD_TORCH_CHECK(weight_in.scalar_type() == x_in.scalar_type(), "weight must have the dtype of x");
  check_same_device(weight_in, x_in, "weight");
  LinearForward a{};
  a.dtype = dtype_of(x_in, "x");
  a.outputs = weight_in.size(0), a.cols = weight_in.size(1);
  if (bias_in) {
    STD_TORCH_CHECK(bias_in->dim() == 1 && bias_in->size(0) == a.outputs, "bias must be [outputs]");
    STD_TORCH_CHECK(bias_in->scalar_type() == x_in.scalar_type(), "bias must have the dtype of x");
    check_same_device(*bias_in, x_in, "bias");
    bias_in = dense(*bias_in);
  }
  const Tensor x = dense(x_in);
  const Tensor weight = a.cols <= 1 || weight_in.stride(1) == 1 ? weight_in : torch::stable::contiguous(weight_in);
  const int64_t dims = x.dim();
  int64_t shape[16];
  STD_TORCH_CHECK(dims <= 16, "x: at most 16 dimensions");
  a.rows = 1;
  for (int64_t i = 0; i + 1 < dims; i++) a.rows *= shape[i] = x.size(i);
  STD_TORCH_CHECK(a.rows <= linear_most_rows, "x: the kernel takes up to ", linear_most_rows, " rows, not ", a.rows);
  shape[dims - 1] = a.outputs;
  Tensor y = empty(x, shape, dims, {});
  a.weight_step = weight.stride(0);
  a.x = x.const_data_ptr(), a.weight = weight.const_data_ptr(), a.bias = pointer_or_null(bias_in);
  a.y = pointer(y);
  if (a.rows && a.outputs) linear_forward_cpu(a, torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&forward));
}

}  // namespace seqfuse
