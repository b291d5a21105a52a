// seqfuse::linear_fwd and matrix_product. Contracts: csrc/include/seqfuse/linear.h, matrix_product.h
#include "seqfuse/linear.h"

#include "common.h"
#include "seqfuse/matrix_product.h"

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

void check_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " must be [", rows, ", ", cols, "]");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of a");
  check_same_device(t, like, name);
}

bool lies_plainly(const Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1;
}

void matrix_product(Tensor a_in, Tensor b_in, std::optional<Tensor> c_in, Tensor out) {
  STD_TORCH_CHECK(a_in.dim() == 2 && b_in.dim() == 2, "a and b must be matrices");
  STD_TORCH_CHECK(a_in.scalar_type() == ScalarType::Float || a_in.scalar_type() == ScalarType::BFloat16,
                  "a: the CPU kernel takes float32 and bfloat16");
  MatrixProduct p{dtype_of(a_in, "a"), a_in.size(0), a_in.size(1), b_in.size(1)};
  check_matrix(b_in, a_in, p.terms, p.cols, "b"), check_matrix(out, a_in, p.rows, p.cols, "out");
  STD_TORCH_CHECK(p.cols <= 1 || out.stride(1) == 1, "out: the numbers of a row must lie together");
  const Tensor a = lies_plainly(a_in) ? a_in : dense(a_in), b = lies_plainly(b_in) ? b_in : dense(b_in);
  p.a = a.const_data_ptr(), p.a_row = a.stride(0), p.a_term = a.stride(1);
  p.b = b.const_data_ptr(), p.b_term = b.stride(0), p.b_col = b.stride(1);
  std::optional<Tensor> c;
  if (c_in && c_in->dim() == 1) {
    STD_TORCH_CHECK(c_in->size(0) == p.cols, "c must be [", p.rows, ", ", p.cols, "] or [", p.cols, "]");
    STD_TORCH_CHECK(c_in->scalar_type() == a.scalar_type(), "c must have the dtype of a");
    check_same_device(*c_in, a, "c");
    c = dense(*c_in);
  } else if (c_in) {
    check_matrix(*c_in, a, p.rows, p.cols, "c");
    c = rows_together(*c_in), p.c_row = c->stride(0);
  }
  p.c = pointer_or_null(c);
  p.y = pointer(out), p.y_row = out.stride(0);
  if (p.rows && p.cols) matrix_product_cpu(p, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("matrix_product(Tensor a, Tensor b, Tensor? c, Tensor(a!) out) -> ()");
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&forward));
  m.impl("matrix_product", TORCH_BOX(&matrix_product));
}

}  // namespace seqfuse
