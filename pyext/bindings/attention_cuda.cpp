// seqfuse::attention_fwd and attention_bwd on CUDA: the Hopper kernels. Contract:
// csrc/include/seqfuse/attention_cuda.h; what it takes is said again in pyext/seqfuse/ops/attention_cuda_rules.py, for
// the choice of a backend. Never yet run on a GPU.
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
  STD_TORCH_CHECK(!given, "attention: the CUDA C++ kernels do not take ", option);
}

struct Options {
  const Maybe &bias, &mask, &alibi_slopes, &key_lengths, &cu_seqlens_q, &cu_seqlens_k, &query_start;
  double scale;
  int64_t window_left, window_right;
  bool top_left;
  double softcap, dropout_p;
};

// what forward and backward have in common: the options, and sizes of q, k, v
template <class Arguments>
void set_problem(Arguments& a, const Options& o, const Tensor& q, const Tensor& k, const Tensor& v) {
  refuse(o.bias.has_value(), "a bias"), refuse(o.mask.has_value(), "a mask");
  refuse(o.alibi_slopes.has_value(), "alibi_slopes"), refuse(o.key_lengths.has_value(), "key_lengths");
  refuse(o.cu_seqlens_q.has_value() || o.cu_seqlens_k.has_value(), "packed sequences");
  refuse(o.query_start.has_value(), "query_start"), refuse(o.softcap != 0.0, "softcap");
  refuse(o.dropout_p != 0.0, "dropout");
  refuse(o.window_left >= 0 || o.window_right > 0, "a window other than causal");
  check_heads(q, q, "q"), check_heads(k, q, "k"), check_heads(v, q, "v");
  a.dtype = dtype_of(q, "q");
  a.B = q.size(0), a.Hq = q.size(1), a.Tq = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.Tk = k.size(2);
  STD_TORCH_CHECK(a.dtype != DType::f32, "attention: the CUDA C++ kernels take bfloat16 and float16, not float32");
  STD_TORCH_CHECK(a.D == 64 || a.D == 128, "attention: the CUDA C++ kernels take D 64 and 128, not ", a.D);
  STD_TORCH_CHECK(k.size(0) == a.B && k.size(3) == a.D, "k must be [B, Hkv, Tk, D], with q's B and D");
  for (int64_t i = 0; i < 4; i++) STD_TORCH_CHECK(v.size(i) == k.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(a.Hkv > 0 ? a.Hq > 0 && a.Hq % a.Hkv == 0 : a.Hq == 0, "q's ", a.Hq, " heads are no multiple of k's ",
                  a.Hkv);
  a.causal = o.window_right == 0, a.scale = float(o.scale);
  refuse(o.top_left && a.causal && a.Tq != a.Tk, "top-left alignment of Tq != Tk");
  STD_TORCH_CHECK(o.scale > 0.0, "attention: the CUDA C++ kernels take a positive scale, not ", o.scale);
}

std::tuple<Tensor, Tensor> forward(Tensor q_in, Tensor k_in, Tensor v_in, Maybe bias, Maybe mask, Maybe alibi_slopes,
                                   Maybe key_lengths, Maybe cu_seqlens_q, Maybe cu_seqlens_k, Maybe query_start, Maybe,
                                   double scale, int64_t window_left, int64_t window_right, bool top_left,
                                   double softcap, double dropout_p) {
  torch::stable::accelerator::DeviceGuard guard(q_in.get_device_index());
  AttentionForwardCuda a{};
  set_problem(a,
              {bias, mask, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, query_start, scale, window_left,
               window_right, top_left, softcap, dropout_p},
              q_in, k_in, v_in);
  const Tensor q = loadable(q_in), k = loadable(k_in), v = loadable(v_in);
  Tensor out = heads_like(q_in), lse = empty(q, {a.B, a.Hq, a.Tq}, ScalarType::Float);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v);
  a.out = pointer(out), a.out_strides = strides_of(out), a.lse = pointer<float>(lse);
  check_cuda(attention_forward_cuda(a, current_stream(q)), "attention_fwd");
  return {out, lse};
}

// [B, Hq, Tq], dense
Tensor statistic(const Tensor& t, const AttentionBackwardCuda& a, const Tensor& q, const char* name) {
  check_same_device(t, q, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 3 && t.size(0) == a.B && t.size(1) == a.Hq &&
                      t.size(2) == a.Tq,
                  name, " must be float32 [B, Hq, Tq]");
  return dense(t);
}

// dbias is always absent, so always empty; always deterministic
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout_in, Maybe dlse_in, Tensor q_in, Tensor k_in,
                                                    Tensor v_in, Tensor out_in, Tensor lse_in, Maybe bias, Maybe mask,
                                                    Maybe alibi_slopes, Maybe key_lengths, Maybe cu_seqlens_q,
                                                    Maybe cu_seqlens_k, Maybe query_start, Maybe, double scale,
                                                    int64_t window_left, int64_t window_right, bool top_left,
                                                    double softcap, double dropout_p, bool want_dbias, bool) {
  torch::stable::accelerator::DeviceGuard guard(q_in.get_device_index());
  AttentionBackwardCuda a{};
  set_problem(a,
              {bias, mask, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, query_start, scale, window_left,
               window_right, top_left, softcap, dropout_p},
              q_in, k_in, v_in);
  refuse(want_dbias, "a bias");
  check_heads(dout_in, q_in, "dout"), check_heads(out_in, q_in, "out");
  for (int64_t i = 0; i < 4; i++)
    STD_TORCH_CHECK(dout_in.size(i) == q_in.size(i) && out_in.size(i) == q_in.size(i),
                    "dout and out must have the shape of q");
  const Tensor q = loadable(q_in), k = loadable(k_in), v = loadable(v_in);
  const Tensor out = loadable(out_in), dout = loadable(dout_in), lse = statistic(lse_in, a, q, "lse");
  const Maybe dlse = dlse_in ? Maybe(statistic(*dlse_in, a, q, "dlse")) : Maybe();
  Tensor dq = heads_like(q_in), dk = heads_like(k_in), dv = heads_like(v_in);
  Tensor workspace = empty(q, {attention_backward_workspace_cuda(a.B, a.Hq, a.Tq)}, ScalarType::Float);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.out = out.const_data_ptr(), a.dout = dout.const_data_ptr();
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v);
  a.out_strides = strides_of(out), a.dout_strides = strides_of(dout);
  a.lse = static_cast<const float*>(lse.const_data_ptr()), a.dlse = static_cast<const float*>(pointer_or_null(dlse));
  a.dq = pointer(dq), a.dk = pointer(dk), a.dv = pointer(dv);
  a.dq_strides = strides_of(dq), a.dk_strides = strides_of(dk), a.dv_strides = strides_of(dv);
  a.workspace = pointer<float>(workspace);
  check_cuda(attention_backward_cuda(a, current_stream(q)), "attention_bwd");
  return {dq, dk, dv, empty(q, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&forward));
  m.impl("attention_bwd", TORCH_BOX(&backward));
}

}  // namespace seqfuse
#endif
