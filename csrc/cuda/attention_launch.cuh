// What the launchers of the attention kernels share: tensor maps, the order of blocks, the choice of an instance.
#pragma once
#include "cuda/attention.cuh"
#include "seqfuse/attention_cuda.h"

namespace seqfuse::cuda {

// cudaErrorNotSupported, where no CUDA header may be included
constexpr int kNotSupported = 801;
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int64_t kSectionBytes = 16 << 20;  // K and V of the heads worked on together, of 50 MB of L2: not yet tuned

struct Heads {
  int64_t B, H, T, D;
};

// TMA's view of a tensor in boxes of `rows` rows. The stride of a dimension of size 1 says nothing: torch lets it be
// anything, TMA does not.
inline int map_heads(dev::TensorMap& map, DType dtype, const void* data, const Heads& size, const HeadStrides& s,
                     int rows) {
  auto stride = [&](int64_t n, int64_t stride) { return n == 1 ? size.D : stride; };
  for (const int64_t step : {stride(size.T, s.t), stride(size.H, s.h), stride(size.B, s.b)})
    if (step <= 0 || step % 8) return kNotSupported;
  if (!dev::aligned_16(data)) return kNotSupported;
  const dev::Tiled tiled{dtype,
                         data,
                         {size.D, size.T, size.H, size.B},
                         {stride(size.T, s.t), stride(size.H, s.h), stride(size.B, s.b)},
                         rows};
  return dev::make_tensor_map(map, tiled);
}

// `head_bytes` of K and V a key head
inline Order order_of(int64_t tiles, int64_t heads, int64_t batches, int64_t group, int64_t head_bytes, bool causal) {
  int64_t section = head_bytes > 0 ? kSectionBytes / head_bytes : heads * batches;
  section = (section > 0 ? section : 1) * group;
  if (section > heads * batches) section = heads * batches;
  return {int(tiles), int(heads), int(batches), int(section), causal};
}

// f<D, Causal, T>()
template <class F>
int with_attention_instance(int64_t D, bool causal, DType dtype, F f) {
  auto with_type = [&]<int D_, bool Causal>() {
    if (dtype == DType::bf16) return f.template operator()<D_, Causal, dev::bf16>();
    if (dtype == DType::f16) return f.template operator()<D_, Causal, dev::f16>();
    return kNotSupported;
  };
  auto with_mask = [&]<int D_>() {
    return causal ? with_type.template operator()<D_, true>() : with_type.template operator()<D_, false>();
  };
  if (D == 64) return with_mask.template operator()<64>();
  if (D == 128) return with_mask.template operator()<128>();
  return kNotSupported;
}

}  // namespace seqfuse::cuda
