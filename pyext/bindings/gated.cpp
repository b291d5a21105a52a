// seqfuse::gated_fwd / gated_bwd. Contract: csrc/include/seqfuse/gated.h
#include "seqfuse/gated.h"

#include "common.h"

namespace seqfuse {
namespace {

// rows may lie apart (halves of one projection), the elements of a row may not
Tensor with_dense_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

void check(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && like.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1), name,
                  " must be [rows, cols] like gate");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of gate");
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Half, name, ": the CPU kernel takes float32 and bfloat16");
  check_same_device(t, like, name);
}

template <class Args>
Args describe(const Tensor& gate, const Tensor& up, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0 (silu), 1 (gelu) or 2 (gelu by tanh)");
  Args a{};
  a.dtype = dtype_of(gate, "gate");
  a.activation = Activation(activation);
  a.rows = gate.size(0), a.cols = gate.size(1), a.gate_step = gate.stride(0), a.up_step = up.stride(0);
  a.gate = gate.const_data_ptr(), a.up = up.const_data_ptr();
  return a;
}

Tensor forward(Tensor gate_in, Tensor up_in, int64_t activation) {
  check(gate_in, gate_in, "gate"), check(up_in, gate_in, "up");
  const Tensor gate = with_dense_rows(gate_in), up = with_dense_rows(up_in);
  GatedForward a = describe<GatedForward>(gate, up, activation);
  Tensor y = empty(gate, {a.rows, a.cols});
  a.y = pointer(y);
  if (a.rows && a.cols) gated_forward_cpu(a, torch_threads());
  return y;
}

std::tuple<Tensor, Tensor> backward(Tensor dy_in, Tensor gate_in, Tensor up_in, int64_t activation) {
  check(gate_in, gate_in, "gate"), check(up_in, gate_in, "up"), check(dy_in, gate_in, "dy");
  const Tensor gate = with_dense_rows(gate_in), up = with_dense_rows(up_in), dy = dense(dy_in);
  GatedBackward a = describe<GatedBackward>(gate, up, activation);
  Tensor dgate = empty(gate, {a.rows, a.cols}), dup = empty(gate, {a.rows, a.cols});
  a.dy = dy.const_data_ptr(), a.dgate = pointer(dgate), a.dup = pointer(dup);
  if (a.rows && a.cols) gated_backward_cpu(a, torch_threads());
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("gated_fwd(Tensor gate, Tensor up, int activation) -> Tensor y");
  m.def("gated_bwd(Tensor dy, Tensor gate, Tensor up, int activation) -> (Tensor dgate, Tensor dup)");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("gated_fwd", TORCH_BOX(&forward));
  m.impl("gated_bwd", TORCH_BOX(&backward));
}

}  // namespace seqfuse
