// seqfuse::attention_fwd on CUDA: the Hopper kernel. Contract: csrc/include/seqfuse/attention_cuda.h; what it takes is
// said again in pyext/seqfuse/ops/attention_cuda_rules.py, for the choice of a backend. Never yet run on a GPU.
#include "seqfuse/attention_cuda.h"

#include "common.h"

#ifdef SEQFUSE_CUDA
namespace seqfuse {
namespace {

using Maybe = std::optional<Tensor>;

void check_heads(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have four dimensions, [B, H, T, D], not ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of q");
  check_same_device(t, like, name);
}

// as the copy engine reads it: 16-byte rows, positive strides; else a copy
Tensor loadable(const Tensor& t) {
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(3) == 1;
  for (int64_t i = 0; i < 3; i++) fits = fits && (t.size(i) <= 1 || (t.stride(i) > 0 && t.stride(i) % 8 == 0));
  return fits ? t : t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

HeadStrides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// the layout of ops/attention_op.py's empty_like
Tensor heads_like(const Tensor& t) {
  const int64_t B = t.size(0), H = t.size(1), T = t.size(2), D = t.size(3);
  if (T > 1 && t.stride(1) < t.stride(2)) return torch::stable::transpose(empty(t, {B, T, H, D}), 1, 2);
  return empty(t, {B, H, T, D});
}

void refuse(bool given, const char* option) {
  STD_TORCH_CHECK(!given, "attention_fwd: the CUDA C++ kernel does not take ", option);
}

std::tuple<Tensor, Tensor> forward(Tensor q_in, Tensor k_in, Tensor v_in, Maybe bias, Maybe mask, Maybe alibi_slopes,
                                   Maybe key_lengths, Maybe cu_seqlens_q, Maybe cu_seqlens_k, Maybe query_start, Maybe,
                                   double scale, int64_t window_left, int64_t window_right, bool top_left,
                                   double softcap, double dropout_p) {
  torch::stable::accelerator::DeviceGuard guard(q_in.get_device_index());
  refuse(bias.has_value(), "a bias"), refuse(mask.has_value(), "a mask");
  refuse(alibi_slopes.has_value(), "alibi_slopes"), refuse(key_lengths.has_value(), "key_lengths");
  refuse(cu_seqlens_q.has_value() || cu_seqlens_k.has_value(), "packed sequences");
  refuse(query_start.has_value(), "query_start"), refuse(softcap != 0.0, "softcap");
  refuse(dropout_p != 0.0, "dropout"), refuse(window_left >= 0 || window_right > 0, "a window other than causal");
  for (const auto& [t, name] : {std::pair{&q_in, "q"}, std::pair{&k_in, "k"}, std::pair{&v_in, "v"}})
    check_heads(*t, q_in, name);
  AttentionForwardCuda a{};
  a.dtype = dtype_of(q_in, "q");
  a.B = q_in.size(0), a.Hq = q_in.size(1), a.Tq = q_in.size(2), a.D = q_in.size(3);
  a.Hkv = k_in.size(1), a.Tk = k_in.size(2);
  STD_TORCH_CHECK(a.dtype != DType::f32, "attention_fwd: the CUDA C++ kernel takes bfloat16 and float16, not float32");
  STD_TORCH_CHECK(a.D == 64 || a.D == 128, "attention_fwd: the CUDA C++ kernel takes D 64 and 128, not ", a.D);
  for (const auto& [t, name] : {std::pair{&k_in, "k"}, std::pair{&v_in, "v"}})
    STD_TORCH_CHECK(t->size(0) == a.B && t->size(1) == a.Hkv && t->size(2) == a.Tk && t->size(3) == a.D, name,
                    " must be [B, Hkv, Tk, D], with q's B and D");
  STD_TORCH_CHECK(a.Hkv > 0 ? a.Hq % a.Hkv == 0 : a.Hq == 0, "q's ", a.Hq, " heads are no multiple of k's ", a.Hkv);
  a.causal = window_right == 0, a.scale = float(scale);
  refuse(top_left && a.causal && a.Tq != a.Tk, "top-left alignment of Tq != Tk");
  STD_TORCH_CHECK(scale > 0.0, "attention_fwd: the CUDA C++ kernel takes a positive scale, not ", scale);

  const Tensor q = loadable(q_in), k = loadable(k_in), v = loadable(v_in);
  Tensor out = heads_like(q_in), lse = empty(q, {a.B, a.Hq, a.Tq}, ScalarType::Float);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v);
  a.out = pointer(out), a.out_strides = strides_of(out), a.lse = pointer<float>(lse);
  check_cuda(attention_forward_cuda(a, current_stream(q)), "attention_fwd");
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&forward));
}

}  // namespace seqfuse
#endif
