// What the door leads to: our ops by name, and the nodes around them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace seqfuse {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// (y, x + residual) of checked arguments, differentiable. Without a residual the second is undefined or empty.
std::tuple<at::Tensor, at::Tensor> layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                              const std::optional<at::Tensor>& weight,
                                              const std::optional<at::Tensor>& bias, double eps, bool rms);

}  // namespace seqfuse
