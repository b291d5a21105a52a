// What every binding shares: tensors of the LibTorch stable ABI, checks, and torch's own threads for the CPU kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "openmp.h"
#include "seqfuse/types.h"

namespace seqfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, what, ": dtype must be float32, bfloat16 or float16");
  }
}

inline void check_same_device(const Tensor& t, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(t.device() == like.device(), what, ": every tensor must be on one device");
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A new dense tensor on the device of `like`, of its dtype unless told. Half the cost of torch::stable::new_empty,
// which goes through the dispatcher.
inline Tensor empty(const Tensor& like, const int64_t* shape, int64_t dims, std::optional<ScalarType> type) {
  constexpr int64_t most = 16;
  STD_TORCH_CHECK(dims <= most, "a tensor of ", dims, " dimensions: at most ", most, " are supported");
  int32_t device_type, device_index, dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (type)
    dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  else
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  int64_t strides[most], step = 1;
  for (int64_t i = dims; i-- > 0;) {
    strides[i] = step;
    step *= shape[i] > 1 ? shape[i] : 1;
  }
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape, strides, dtype, device_type, device_index, &made));
  return Tensor(made);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> type = {}) {
  return empty(like, shape.begin(), int64_t(shape.size()), type);
}
inline Tensor new_like(const Tensor& t) {
  const auto shape = t.sizes();
  return empty(t, shape.data(), int64_t(shape.size()), {});
}

template <class T = void>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// null for an absent tensor
inline const void* pointer_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

inline Parallel torch_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  auto run = [](int64_t n, Parallel::Body body, void* ctx) {
    struct Call {
      Parallel::Body body;
      void* ctx;
    } call{body, ctx};
    torch_parallel_for(
        0, n, 1,
        [](int64_t begin, int64_t end, void* c) {
          auto* inner = static_cast<Call*>(c);
          inner->body(inner->ctx, begin, end);
        },
        &call);
  };
  return {run, int(threads), detail::openmp()};
}

#ifdef SEQFUSE_CUDA
inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream) == 0, "no current CUDA stream");
  return stream;
}

inline void check_cuda(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, what, ": CUDA error ", error, " at launch");
}
#endif

}  // namespace seqfuse
