// seqfuse::layer_norm_fwd / layer_norm_bwd. Contract: csrc/include/seqfuse/layer_norm.h
#include "seqfuse/layer_norm.h"

#include "common.h"

namespace seqfuse {
namespace {

struct Rows {
  int64_t rows, cols;
};

// every dimension but the last counts rows
Rows check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, " must have at least one dimension");
  const int64_t cols = x.size(x.dim() - 1);
  return {cols ? x.numel() / cols : 0, cols};
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); i++) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_same_device(t, x, name);
}

DType check_param(const std::optional<Tensor>& p, const Tensor& x, DType fallback, const char* name) {
  if (!p) return fallback;
  STD_TORCH_CHECK(p->dim() == 1 && p->size(0) == x.size(x.dim() - 1), name, " must be [", x.size(x.dim() - 1), "]");
  check_same_device(*p, x, name);
  STD_TORCH_CHECK(p->scalar_type() == x.scalar_type() || p->scalar_type() == ScalarType::Float, name,
                  " must have the dtype of x, or be float32");
  return dtype_of(*p, name);
}

// what NormOptions point to must live as long as they do
NormOptions options(const std::optional<Tensor>& seed, double dropout_p, bool rms, bool zero_centered,
                    const Tensor& x) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, "dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return {rms, zero_centered, 0.0, nullptr};
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "dropout needs a seed: an int64 tensor [1]");
  check_same_device(*seed, x, "seed");
  return {rms, zero_centered, dropout_p, static_cast<const int64_t*>(seed->const_data_ptr())};
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
Forward forward(const Tensor& x_in, const std::optional<Tensor>& residual_in, const std::optional<Tensor>& weight_in,
                const std::optional<Tensor>& bias_in, double eps, NormOptions options, Launch launch) {
  const auto [rows, cols] = check_rows(x_in, "x");
  if (residual_in) check_like(*residual_in, x_in, "residual");
  const Tensor x = dense(x_in);
  std::optional<Tensor> residual, weight, bias;
  if (residual_in) residual = dense(*residual_in);
  if (weight_in) weight = dense(*weight_in);
  if (bias_in) bias = dense(*bias_in);
  LayerNormForward a{};
  a.dtype = dtype_of(x, "x");
  a.param_dtype = check_param(weight, x, check_param(bias, x, dtype_of(x, "x"), "bias"), "weight");
  if (weight && bias)
    STD_TORCH_CHECK(weight->scalar_type() == bias->scalar_type(), "weight and bias must have one dtype");
  STD_TORCH_CHECK(!bias || !options.rms, "bias: rms_norm has none");
  a.rows = rows, a.cols = cols, a.eps = float(eps), a.options = options;
  a.x = x.const_data_ptr();
  a.residual = pointer_or_null(residual), a.weight = pointer_or_null(weight), a.bias = pointer_or_null(bias);
  const bool sums = residual || options.dropout_p > 0.0;
  Tensor y = new_like(x), sum = sums ? new_like(x) : empty(x, {0});
  Tensor mean = empty(x, {options.rms ? 0 : rows}, ScalarType::Float), rstd = empty(x, {rows}, ScalarType::Float);
  a.y = pointer(y), a.sum = sums ? pointer(sum) : nullptr;
  a.mean = pointer<float>(mean), a.rstd = pointer<float>(rstd);
  if (rows && cols) launch(a);
  return {y, sum, mean, rstd};
}

template <class PartialRows, class Launch>
Backward backward(const Tensor& dy_in, const std::optional<Tensor>& dsum_in, const Tensor& s_in,
                  const std::optional<Tensor>& weight_in, const Tensor& mean, const Tensor& rstd, bool want_dweight,
                  bool want_dbias, bool want_dresidual, NormOptions options, PartialRows partial_rows, Launch launch) {
  const auto [rows, cols] = check_rows(s_in, "s");
  check_like(dy_in, s_in, "dy");
  if (dsum_in) check_like(*dsum_in, s_in, "dsum");
  const Tensor dy = dense(dy_in), s = dense(s_in);
  std::optional<Tensor> dsum, weight;
  if (dsum_in) dsum = dense(*dsum_in);
  if (weight_in) weight = dense(*weight_in);
  LayerNormBackward a{};
  a.dtype = dtype_of(s, "s");
  a.param_dtype = check_param(weight, s, a.dtype, "weight");
  a.rows = rows, a.cols = cols, a.options = options;
  a.dy = dy.const_data_ptr(), a.dsum = pointer_or_null(dsum), a.s = s.const_data_ptr();
  a.weight = pointer_or_null(weight);
  a.mean = static_cast<const float*>(mean.const_data_ptr()), a.rstd = static_cast<const float*>(rstd.const_data_ptr());
  const ScalarType param = weight ? weight->scalar_type() : s.scalar_type();
  const bool apart = want_dresidual && options.dropout_p > 0.0;  // else it is dx
  Tensor dx = new_like(s), dresidual = apart ? new_like(s) : empty(s, {0});
  Tensor dweight = empty(s, {want_dweight ? cols : 0}, param), dbias = empty(s, {want_dbias ? cols : 0}, param);
  a.dx = pointer(dx), a.dresidual = apart ? pointer(dresidual) : nullptr;
  a.dweight = want_dweight ? pointer(dweight) : nullptr;
  a.dbias = want_dbias ? pointer(dbias) : nullptr;
  a.partial_rows = partial_rows(rows, cols);
  std::optional<Tensor> partial;
  if (a.partial_rows) partial = empty(s, {2, a.partial_rows, cols}, ScalarType::Float);
  a.partial = partial ? pointer<float>(*partial) : nullptr;
  if (rows && cols) {
    launch(a);
  } else {
    if (want_dweight) torch::stable::zero_(dweight);
    if (want_dbias) torch::stable::zero_(dbias);
  }
  return {dx, dresidual, dweight, dbias};
}

Forward forward_cpu(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
                    double eps, std::optional<Tensor> seed, double dropout_p, bool rms, bool zero_centered) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Half, "x: the CPU kernel takes float32 and bfloat16");
  return forward(x, residual, weight, bias, eps, options(seed, dropout_p, rms, zero_centered, x),
                 [](const LayerNormForward& a) { layer_norm_forward_cpu(a, torch_threads()); });
}

Backward backward_cpu(Tensor dy, std::optional<Tensor> dsum, Tensor s, std::optional<Tensor> weight, Tensor mean,
                      Tensor rstd, bool want_dweight, bool want_dbias, bool want_dresidual, std::optional<Tensor> seed,
                      double dropout_p, bool rms, bool zero_centered) {
  return backward(
      dy, dsum, s, weight, mean, rstd, want_dweight, want_dbias, want_dresidual,
      options(seed, dropout_p, rms, zero_centered, s), [](int64_t, int64_t) { return int64_t(0); },
      [](const LayerNormBackward& a) { layer_norm_backward_cpu(a, torch_threads()); });
}

#ifdef SEQFUSE_CUDA
Forward forward_cuda(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
                     double eps, std::optional<Tensor> seed, double dropout_p, bool rms, bool zero_centered) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return forward(
      x, residual, weight, bias, eps, options(seed, dropout_p, rms, zero_centered, x),
      [&](const LayerNormForward& a) { check_cuda(layer_norm_forward_cuda(a, current_stream(x)), "layer_norm_fwd"); });
}

Backward backward_cuda(Tensor dy, std::optional<Tensor> dsum, Tensor s, std::optional<Tensor> weight, Tensor mean,
                       Tensor rstd, bool want_dweight, bool want_dbias, bool want_dresidual, std::optional<Tensor> seed,
                       double dropout_p, bool rms, bool zero_centered) {
  torch::stable::accelerator::DeviceGuard guard(s.get_device_index());
  return backward(dy, dsum, s, weight, mean, rstd, want_dweight, want_dbias, want_dresidual,
                  options(seed, dropout_p, rms, zero_centered, s), layer_norm_partial_rows_cuda,
                  [&](const LayerNormBackward& a) {
                    check_cuda(layer_norm_backward_cuda(a, current_stream(s)), "layer_norm_bwd");
                  });
}
#endif

}  // namespace

// Without dropout the residual's gradient is dx, and dresidual is empty.
STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? seed=None, "
      "float dropout_p=0.0, bool rms=False, bool zero_centered=False) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, "
      "bool want_dweight, bool want_dbias, bool want_dresidual=False, Tensor? seed=None, float dropout_p=0.0, "
      "bool rms=False, bool zero_centered=False) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&forward_cpu));
  m.impl("layer_norm_bwd", TORCH_BOX(&backward_cpu));
}

#ifdef SEQFUSE_CUDA
STABLE_TORCH_LIBRARY_IMPL(seqfuse, CUDA, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&forward_cuda));
  m.impl("layer_norm_bwd", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace seqfuse
