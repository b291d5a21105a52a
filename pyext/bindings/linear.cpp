// seqfuse::linear_fwd and widened_mm. Contracts: csrc/include/seqfuse/linear.h, widened.h
#include "seqfuse/linear.h"

#include "common.h"
#include "seqfuse/widened.h"

namespace seqfuse {
namespace {

Tensor rows_together(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

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
  const Tensor weight = rows_together(weight_in);
  const int64_t dims = x.dim();
  int64_t shape[16];
  STD_TORCH_CHECK(dims <= 16, "x: at most 16 dimensions");
  a.rows = 1;
  for (int64_t i = 0; i + 1 < dims; i++) a.rows *= shape[i] = x.size(i);
  shape[dims - 1] = a.outputs;
  Tensor y = empty(x, shape, dims, {});
  a.weight_step = weight.stride(0);
  a.x = x.const_data_ptr(), a.weight = weight.const_data_ptr(), a.bias = pointer_or_null(bias_in);
  a.y = pointer(y);
  if (a.rows && a.outputs) linear_forward_cpu(a, torch_threads());
  return y;
}

void check_matrix(const Tensor& t, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " must be [", rows, ", ", cols, "]");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16");
}

void widened_mm(Tensor a, Tensor b_in, std::optional<Tensor> c_in, Tensor out) {
  STD_TORCH_CHECK(a.dim() == 2 && b_in.dim() == 2, "a and b must be matrices");
  WidenedProduct p{a.size(0), a.size(1), b_in.size(1)};
  check_matrix(a, p.rows, p.terms, "a"), check_matrix(b_in, p.terms, p.cols, "b");
  check_matrix(out, p.rows, p.cols, "out");
  STD_TORCH_CHECK(p.cols <= 1 || out.stride(1) == 1, "out: the numbers of a row must lie together");
  check_same_device(b_in, a, "b"), check_same_device(out, a, "out");
  const Tensor b = rows_together(b_in);
  p.a = a.const_data_ptr(), p.a_row = a.stride(0), p.a_term = a.stride(1);
  p.b = b.const_data_ptr(), p.b_step = b.stride(0);
  std::optional<Tensor> c;
  if (c_in) {
    check_matrix(*c_in, p.rows, p.cols, "c"), check_same_device(*c_in, a, "c");
    c = rows_together(*c_in);
    p.c = c->const_data_ptr(), p.c_step = c->stride(0);
  }
  p.y = pointer(out), p.y_step = out.stride(0);
  if (p.rows && p.cols) widened_product_cpu(p, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("widened_mm(Tensor a, Tensor b, Tensor? c, Tensor(a!) out) -> ()");
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&forward));
  m.impl("widened_mm", TORCH_BOX(&widened_mm));
}

}  // namespace seqfuse
