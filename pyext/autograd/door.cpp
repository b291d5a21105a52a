// seqfuse._autograd as a module of Python: the door. Calls so small that `auto` gives them to PyTorch go through it
// straight to ATen's ops, in one trip out of Python, and PyTorch differentiates them. layer_norm's go through it to our
// node as well, and those of a step of decoding to our kernels.
//
// A function of the door returns None for everything that is not plainly such a call: another class or kind of tensor,
// a mode, a transform or autocast at work, arguments that may be wrong, sizes for which a kernel of ours pays. The call
// then takes the long way, through the checks and the dispatcher. The rules stay where they are, with the ops in
// Python: the door is opened with the sizes from which our kernels pay, and shut by whatever makes more than those
// rules decide.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cmath>

#include "nodes.h"

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using Arguments = PyObject* const*;

// Sizes from which a kernel of ours pays, as the ops' rules in Python have them.
struct Least {
  std::array<int64_t, 1> attention_decode;      // the first head dimension that is too wide
  std::array<int64_t, 8> attention;             // scores; [bf16][gradients][causal]
  std::array<int64_t, 3> gated;                 // elements; [activation]
  std::array<int64_t, 1> linear_cross_entropy;  // logits
  std::array<int64_t, 8> layer_norm;            // elements; [bf16][residual][gradients]
} least;

long opening = 0;         // which one this is, 0 while the door is shut
bool is_awaited = false;  // whether a module waits for the dispatcher's choice of its op

// Whether nothing is at work but PyTorch's eager mode: no mode, transform, tracer or autocast.
bool is_eager() {
  const auto now = c10::impl::tls_local_dispatch_key_set();
  return (now.included_ - c10::default_included_set).empty() && now.excluded_.has(DispatchKey::AutocastCPU) &&
         !at::impl::torch_function_mode_enabled();
}

// A dense tensor on the CPU, of class Tensor or Parameter and without a tangent; anything else is undefined.
Tensor plain(PyObject* object) {
  static const auto dense = DispatchKeySet(DispatchKey::CPU).raw_repr();
  static const auto beside =
      DispatchKeySet({DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU}).raw_repr();
  if (!THPVariable_CheckExact(object)) return {};
  const Tensor& t = THPVariable_Unpack(object);
  const auto keys = t.key_set().raw_repr();
  const bool is_plain = (keys & dense) == dense && (keys & ~(dense | beside)) == 0;
  return is_plain && !t._fw_grad(/*level=*/0).defined() ? t : Tensor();
}

// Whether they are plain tensors of one dtype for which there are kernels of ours.
template <class... Tensors>
bool alike(const Tensor& first, const Tensors&... others) {
  if (!first.defined() || !(... && others.defined())) return false;
  const auto dtype = first.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16) && (... && (others.scalar_type() == dtype));
}

template <class... Tensors>
bool wants_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || tensors.requires_grad());
}

bool is_bf16(const Tensor& t) {
  return t.scalar_type() == at::kBFloat16;
}

// While it lives, other threads of Python may run.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

template <class Make>
PyObject* made_by(Make make) {
  Tensor made;
  {
    Unlocked now;
    made = make();
  }
  return THPVariable_Wrap(std::move(made));
}

// attention(q, k, v, causal, top_left, scale, gqa): softmax(scale q k^T) v. gqa: whether q may have more heads.
PyObject* attention(Arguments args) {
  const Tensor q = plain(args[0]), k = plain(args[1]), v = plain(args[2]);
  if (!alike(q, k, v) || q.dim() != 4 || k.dim() != 4 || v.dim() != 4) Py_RETURN_NONE;
  const bool causal = args[3] == Py_True, top_left = args[4] == Py_True, gqa = args[6] == Py_True;
  if (!causal && args[3] != Py_False) Py_RETURN_NONE;
  std::optional<double> scale;
  if (args[5] != Py_None) {
    if (!PyFloat_CheckExact(args[5]) || !std::isfinite(PyFloat_AS_DOUBLE(args[5]))) Py_RETURN_NONE;
    scale = PyFloat_AS_DOUBLE(args[5]);
  }
  const auto qs = q.sizes(), ks = k.sizes(), vs = v.sizes();
  if (qs[0] != ks[0] || qs[3] != ks[3] || ks.slice(0, 3) != vs.slice(0, 3)) Py_RETURN_NONE;
  if (q.numel() == 0 || k.numel() == 0 || v.numel() == 0) Py_RETURN_NONE;
  const bool shared = qs[1] != ks[1];
  if (shared && !(gqa && qs[1] % ks[1] == 0)) Py_RETURN_NONE;
  if (causal && !top_left && qs[2] != ks[2]) Py_RETURN_NONE;  // PyTorch's op would need a mask
  const int64_t scores = qs[0] * qs[1] * qs[2] * ks[2] * (qs[3] + vs[3]) / 128;
  if (scores >= least.attention[4 * is_bf16(q) + 2 * wants_gradient(q, k, v) + causal]) Py_RETURN_NONE;
  return made_by([&] { return at::scaled_dot_product_attention(q, k, v, {}, 0.0, causal, scale, shared); });
}

// Whether all lengths lie between 0 and `most`.
template <class Integer>
bool within(const Tensor& lengths, int64_t most) {
  const Integer* numbers = lengths.const_data_ptr<Integer>();
  for (int64_t i = 0; i < lengths.size(0); ++i) {
    const int64_t n = numbers[i * lengths.stride(0)];
    if (n < 0 || n > most) return false;
  }
  return true;
}

// attention_with_kv_cache(q, k_cache, v_cache, k, v, cache_lengths, causal, scale), on our kernels. k, v: None for both
// if there are no new keys.
PyObject* attention_with_kv_cache(Arguments args) {
  using Optional = std::optional<Tensor>;
  using Append = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&);
  using Decode = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                                            const Optional&, double, int64_t, int64_t, double);
  const Tensor q = plain(args[0]), k_cache = plain(args[1]), v_cache = plain(args[2]), lengths = plain(args[5]);
  if (!alike(q, k_cache, v_cache) || q.dim() != 4 || k_cache.dim() != 4 || v_cache.dim() != 4) Py_RETURN_NONE;
  const auto qs = q.sizes(), ks = k_cache.sizes(), vs = v_cache.sizes();
  if (qs[0] != ks[0] || qs[3] != ks[3] || ks.slice(0, 3) != vs.slice(0, 3)) Py_RETURN_NONE;
  if (q.numel() == 0 || k_cache.numel() == 0 || v_cache.numel() == 0 || qs[1] % ks[1] != 0) Py_RETURN_NONE;
  if (std::max(qs[3], vs[3]) >= least.attention_decode[0]) Py_RETURN_NONE;
  Tensor k, v;
  int64_t added = 0;
  if (args[3] != Py_None || args[4] != Py_None) {
    k = plain(args[3]), v = plain(args[4]);
    if (!alike(q, k, v) || k.dim() != 4 || k.size(2) == 0) Py_RETURN_NONE;
    added = k.size(2);
    if (!k.sizes().equals({ks[0], ks[1], added, ks[3]}) || !v.sizes().equals({ks[0], ks[1], added, vs[3]}))
      Py_RETURN_NONE;
  }
  if (wants_gradient(q, k_cache, v_cache) || (added && wants_gradient(k, v))) Py_RETURN_NONE;
  if (!lengths.defined() || lengths.dim() != 1 || lengths.size(0) != qs[0]) Py_RETURN_NONE;
  const bool is_long = lengths.scalar_type() == at::kLong;
  if (!is_long && lengths.scalar_type() != at::kInt) Py_RETURN_NONE;
  const int64_t most = ks[2] - added;
  if (!(is_long ? within<int64_t>(lengths, most) : within<int32_t>(lengths, most))) Py_RETURN_NONE;
  double scale = 1.0 / std::sqrt(double(qs[3]));
  if (args[7] != Py_None) {
    if (!PyFloat_CheckExact(args[7]) || !std::isfinite(PyFloat_AS_DOUBLE(args[7]))) Py_RETURN_NONE;
    scale = PyFloat_AS_DOUBLE(args[7]);
  }
  if (!PyBool_Check(args[6])) Py_RETURN_NONE;
  const int64_t right = args[6] == Py_True ? 0 : -1;
  return made_by([&] {
    static const auto append = seqfuse::find<Append>("seqfuse::kv_cache_append");
    static const auto decode = seqfuse::find<Decode>("seqfuse::attention_decode");
    if (added) {
      append.call(k_cache, v_cache, k, v, lengths, {});
      for (const Tensor& cache : {k_cache, v_cache})  // autograd hears of the change
        if (!cache.is_inference()) cache.unsafeGetTensorImpl()->bump_version();
    }
    const Tensor now = added ? at::add(lengths, added) : lengths;
    return std::get<0>(decode.call(q, k_cache, v_cache, now, {}, {}, scale, -1, right, 0.0));
  });
}

// gated(gate, up, activation): activation(gate) * up; 0 is silu, 1 gelu, 2 its approximation by tanh
PyObject* gated(Arguments args) {
  const Tensor gate = plain(args[0]), up = plain(args[1]);
  const size_t activation = PyLong_AsSize_t(args[2]);
  if (!alike(gate, up) || !gate.sizes().equals(up.sizes())) Py_RETURN_NONE;
  if (gate.numel() >= least.gated.at(activation)) Py_RETURN_NONE;
  return made_by([&] {
    const Tensor a = activation == 0 ? at::silu(gate) : at::gelu(gate, activation == 1 ? "none" : "tanh");
    return at::mul(a, up);
  });
}

// layer_norm(x, residual, weight, bias, eps, opening, backend): y, or (y, x + residual) with a residual, of PyTorch's
// op or of our node, as the rules have it. A module whose last call explain() knows of names the backend of that call
// and the opening of the door that it was in; it is sent the long way if either is another now. None for both: no
// matter.
PyObject* layer_norm(Arguments args) {
  const Tensor x = plain(args[0]), weight = plain(args[2]), bias = plain(args[3]);
  const bool adds = args[1] != Py_None;
  const Tensor residual = adds ? plain(args[1]) : x;
  if (args[5] != Py_None && PyLong_AsLong(args[5]) != opening) Py_RETURN_NONE;
  if (!alike(x, weight, bias, residual) || x.dim() == 0 || x.numel() == 0) Py_RETURN_NONE;
  if (!residual.sizes().equals(x.sizes()) || !weight.sizes().equals(x.sizes().slice(x.dim() - 1))) Py_RETURN_NONE;
  if (!bias.sizes().equals(weight.sizes()) || !PyFloat_CheckExact(args[4])) Py_RETURN_NONE;
  const double eps = PyFloat_AS_DOUBLE(args[4]);
  if (!(eps >= 0.0 && std::isfinite(eps))) Py_RETURN_NONE;
  const bool grad = wants_gradient(x, weight, bias, residual);
  const bool ours = x.numel() >= least.layer_norm[4 * is_bf16(x) + 2 * adds + grad];
  if (args[6] != Py_None && PyUnicode_CompareWithASCIIString(args[6], ours ? "cpu" : "torch")) Py_RETURN_NONE;
  Tensor y, sum;
  {
    Unlocked now;
    if (ours) {
      std::tie(y, sum) =
          seqfuse::layer_norm(x, adds ? std::optional(residual) : std::nullopt, weight, bias, eps, false);
    } else {
      sum = adds ? at::add(x, residual) : x;
      y = at::layer_norm(sum, weight.sizes(), weight, bias, eps, false);
    }
  }
  PyObject* normed = THPVariable_Wrap(std::move(y));
  return adds ? Py_BuildValue("NN", normed, THPVariable_Wrap(std::move(sum))) : normed;
}

// linear_cross_entropy(x, weight, target, ignore_index): the mean over [N] targets
PyObject* linear_cross_entropy(Arguments args) {
  const Tensor x = plain(args[0]), weight = plain(args[1]), target = plain(args[2]);
  if (!alike(x, weight) || x.dim() != 2 || weight.dim() != 2 || x.size(1) != weight.size(1)) Py_RETURN_NONE;
  if (!target.defined() || target.scalar_type() != at::kLong || !PyLong_CheckExact(args[3])) Py_RETURN_NONE;
  if (target.dim() != 1 || target.size(0) != x.size(0)) Py_RETURN_NONE;
  if (x.size(0) * weight.size(0) >= least.linear_cross_entropy[0]) Py_RETURN_NONE;
  const int64_t ignored = PyLong_AsLongLong(args[3]);
  if (PyErr_Occurred()) return nullptr;
  return made_by([&] {
    return at::cross_entropy_loss(at::linear(x, weight).to(at::kFloat), target, {}, at::Reduction::Mean, ignored);
  });
}

// tells: whether Python tells a module that waits for it what such a call ran on.
template <Py_ssize_t count, PyObject* (*call)(Arguments), bool tells>
PyObject* enter(PyObject*, Arguments args, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  if (given != count) return PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", count, given);
  if (!opening || (is_awaited && !tells) || !is_eager()) Py_RETURN_NONE;
  return call(args);
  END_HANDLE_TH_ERRORS
}

template <size_t N>
bool read(PyObject* sizes, const char* op, std::array<int64_t, N>& into) {
  PyObject* given = PyDict_GetItemString(sizes, op);
  if (!given || !PyTuple_Check(given) || PyTuple_GET_SIZE(given) != N) {
    PyErr_Format(PyExc_ValueError, "open: needs %zu sizes of %s", N, op);
    return false;
  }
  for (size_t i = 0; i < N; ++i) into[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(given, i));
  return !PyErr_Occurred();
}

// open({op: sizes from which our kernel pays}): from now on these decide, and nobody wants to hear of it
PyObject* open(PyObject*, PyObject* sizes) {
  static long openings = 0;
  if (!PyDict_Check(sizes)) return PyErr_Format(PyExc_TypeError, "open: needs a dict");
  if (!read(sizes, "attention", least.attention) || !read(sizes, "gated", least.gated)) return nullptr;
  if (!read(sizes, "linear_cross_entropy", least.linear_cross_entropy)) return nullptr;
  if (!read(sizes, "layer_norm", least.layer_norm)) return nullptr;
  if (!read(sizes, "attention_decode", least.attention_decode)) return nullptr;
  opening = ++openings;
  Py_RETURN_NONE;
}

PyObject* shut(PyObject*, PyObject*) {
  opening = 0;
  Py_RETURN_NONE;
}

// opened(): which opening this is, 0 while the door is shut
PyObject* opened(PyObject*, PyObject*) {
  return PyLong_FromLong(opening);
}

// awaited(whether a module waits for the dispatcher's choice of the op that it calls next)
PyObject* awaited(PyObject*, PyObject* whether) {
  is_awaited = whether == Py_True;
  Py_RETURN_NONE;
}

template <Py_ssize_t count, PyObject* (*call)(Arguments), bool tells = false>
PyMethodDef entry(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(enter<count, call, tells>)), METH_FASTCALL,
          nullptr};
}

PyMethodDef methods[] = {
    entry<7, attention>("attention"),
    entry<8, attention_with_kv_cache, true>("attention_with_kv_cache"),
    entry<3, gated>("gated"),
    entry<7, layer_norm>("layer_norm"),
    entry<4, linear_cross_entropy>("linear_cross_entropy"),
    {"open", open, METH_O, nullptr},
    {"shut", shut, METH_NOARGS, nullptr},
    {"opened", opened, METH_NOARGS, nullptr},
    {"awaited", awaited, METH_O, nullptr},
    {},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "seqfuse._autograd", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__autograd() {
  return PyModule_Create(&module);
}
