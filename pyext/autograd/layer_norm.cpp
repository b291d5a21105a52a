// seqfuse::layer_norm: the LayerNormFunction of ops/layer_norm.py, without dropout and zero-centred weights, as a node
// of C++.
//
// The same ops inside (seqfuse::layer_norm_fwd and _bwd); only the 30 us are gone that a Python autograd.Function costs
// a call. It needs torch's C++ autograd, which has no stable ABI: the library is used only under the torch that it was
// built with (seqfuse.native.nodes_missing), and everything works without it.
#include <ATen/ops/add.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "nodes.h"

namespace {

using at::Tensor;
using seqfuse::find;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Optional&, const Optional&,
                                                           const Optional&, double, const Optional&, double, bool,
                                                           bool);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Optional&, const Tensor&,
                                                            const Optional&, const Tensor&, const Tensor&, bool, bool,
                                                            bool, const Optional&, double, bool, bool);

// torch 2.13 counts the references to a node inside it, 2.11 beside it
template <class T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return c10::make_intrusive<T>();
  else
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
}

Optional defined(Tensor t) {
  return t.defined() ? Optional(std::move(t)) : std::nullopt;
}

// Inputs: x, residual (or nothing), weight, bias. Outputs: y and, with a residual, the sum.
struct LayerNormNode : Node {
  SavedVariable s, weight, bias, mean, rstd;
  bool residual = false, want_weight = false, want_bias = false, rms = false, released = false;
  double eps = 0.0;

  std::string name() const override { return "SeqfuseLayerNormBackward"; }

  void release_variables() override {
    for (SavedVariable* v : {&s, &weight, &bias, &mean, &rstd}) v->reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    const Tensor dy = grads[0], dsum = residual ? grads[1] : Tensor();
    if (!dy.defined()) return results(dsum, {}, {});  // only the sum was used
    const auto self = getptr();
    const Tensor in = s.unpack(self), w = weight.unpack(), b = bias.unpack(), m = mean.unpack(), r = rstd.unpack();
    if (at::GradMode::is_enabled()) {
      return rms ? differentiable_rms(dy, dsum, in, w) : differentiable(dy, dsum, in, w, b, m, r);
    }
    static const auto op = find<Backward>("seqfuse::layer_norm_bwd");
    auto [dx, same, dw, db] =
        op.call(dy, defined(dsum), in, defined(w), m, r, want_weight, want_bias, false, {}, 0.0, rms, false);
    return results(std::move(dx), std::move(dw), std::move(db));
  }

  // create_graph=True: by PyTorch's own op, whose gradient has a gradient, in float32
  variable_list differentiable(const Tensor& dy, const Tensor& dsum, const Tensor& in, const Tensor& w, const Tensor& b,
                               const Tensor& m, const Tensor& r) {
    std::vector<int64_t> rows(in.sizes().begin(), in.sizes().end());
    rows.back() = 1;
    auto wide = [](const Tensor& t) { return t.defined() ? t.to(at::kFloat) : t; };
    auto [dx, dw, db] =
        at::native_layer_norm_backward(wide(dy), wide(in), {in.size(-1)}, m.view(rows), r.view(rows), defined(wide(w)),
                                       defined(wide(b)), {true, want_weight, want_bias});
    dx = dx.to(in.scalar_type());
    return results(dsum.defined() ? at::add(dx, dsum) : dx, want_weight ? dw.to(w.scalar_type()) : Tensor(),
                   want_bias ? db.to(b.scalar_type()) : Tensor());
  }

  // the same of rms_norm, which has no such op on every torch: written out
  variable_list differentiable_rms(const Tensor& dy, const Tensor& dsum, const Tensor& in, const Tensor& w) {
    const Tensor x = in.to(at::kFloat), d = dy.to(at::kFloat);
    const Tensor scale = x.square().mean({-1}, true).add(eps).rsqrt(), xhat = x.mul(scale);
    const Tensor g = w.defined() ? d.mul(w.to(at::kFloat)) : d;
    const Tensor dx = g.sub(xhat.mul(g.mul(xhat).mean({-1}, true))).mul(scale);
    Tensor dw;
    if (want_weight) dw = d.mul(xhat).reshape({-1, in.size(-1)}).sum(0).to(w.scalar_type());
    const Tensor narrow = dx.to(in.scalar_type());
    return results(dsum.defined() ? at::add(narrow, dsum) : narrow, dw, {});
  }

  variable_list results(Tensor dx, Tensor dw, Tensor db) const {
    return {dx, residual ? dx : Tensor(), want_weight ? dw : Tensor(), want_bias ? db : Tensor()};
  }
};

bool wants(const Optional& t) {
  return t && t->requires_grad();
}

Tensor or_undefined(const Optional& t) {
  return t ? *t : Tensor();
}

}  // namespace

std::tuple<Tensor, Tensor> seqfuse::layer_norm(const Tensor& x, const Optional& residual, const Optional& weight,
                                               const Optional& bias, double eps, bool rms) {
  static const auto op = find<Forward>("seqfuse::layer_norm_fwd");
  decltype(make_node<LayerNormNode>()) node;
  if (at::GradMode::is_enabled() && (x.requires_grad() || wants(residual) || wants(weight) || wants(bias))) {
    node = make_node<LayerNormNode>();
    node->set_next_edges(
        torch::autograd::collect_next_edges(x, or_undefined(residual), or_undefined(weight), or_undefined(bias)));
  }
  Tensor y, sum, mean, rstd;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(y, sum, mean, rstd) = op.call(x, residual, weight, bias, eps, {}, 0.0, rms, false);
  }
  if (!node) return {y, sum};
  node->residual = residual.has_value(), node->rms = rms, node->eps = eps;
  node->want_weight = wants(weight), node->want_bias = wants(bias);
  torch::autograd::create_gradient_edge(y, node);
  if (node->residual) torch::autograd::create_gradient_edge(sum, node);
  node->s = node->residual ? SavedVariable(sum, /*is_output=*/true) : SavedVariable(x, false);
  node->weight = SavedVariable(or_undefined(weight), false), node->bias = SavedVariable(or_undefined(bias), false);
  node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
  return {y, sum};
}

TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms=False) "
      "-> (Tensor y, Tensor sum)",
      seqfuse::layer_norm);
}
