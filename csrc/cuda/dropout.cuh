// Dropout of what is normalised, by Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), as norm_dropout in
// reference/layer_norm.py has it: nothing is kept between forward and backward.
#pragma once
#include "cuda/device.cuh"

namespace seqfuse::cuda {

struct NormDropout {
  const int64_t* seed;  // null: no dropout, and the rest is not read
  uint32_t below;       // an element is dropped where its word is smaller
  float factor;         // of the others: 1 / (1 - p)
};

inline NormDropout norm_dropout(const int64_t* seed, double p) {
  if (!(p > 0.0)) return {nullptr, 0, 1.0f};
  // p = 1: the largest word stays, times 0
  return {seed, p < 1.0 ? uint32_t(p * 4294967296.0) : 0xffffffffu, p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f};
}

// x[j] *= what dropout does to column first + j of the row; first and N are multiples of 4
template <int N>
SEQFUSE_DEVICE void drop(const NormDropout& d, int64_t row, int64_t first, float (&x)[N]) {
  const uint64_t seed = uint64_t(*d.seed);
#pragma unroll
  for (int part = 0; part < N / 4; part++) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    uint32_t c[4] = {uint32_t(first / 4) + uint32_t(part), uint32_t(row), uint32_t(uint64_t(row) >> 32), 0u};
#pragma unroll 1  // the loop costs a tenth of its body; unrolled, every kernel would hold it 16 times
    for (int round = 0; round < 10; round++) {
      const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
      c[0] = uint32_t(b >> 32) ^ c[1] ^ k0, c[1] = uint32_t(b);
      c[2] = uint32_t(a >> 32) ^ c[3] ^ k1, c[3] = uint32_t(a);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
#pragma unroll
    for (int w = 0; w < 4; w++) x[4 * part + w] *= c[w] < d.below ? 0.0f : d.factor;
  }
}

}  // namespace seqfuse::cuda
