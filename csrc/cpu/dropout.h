// Dropout by Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), as the reference has it: of attention
// weights, and of what is normalised.
#pragma once
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

typedef uint64_t vw __attribute__((vector_size(SEQFUSE_VBYTES)));

// x * m of every even lane, in 64 bits
SEQFUSE_INLINE vw multiply_even(vu x, uint32_t m) {
#if defined(__AVX512F__)  // masked: GCC 12 warns of the other's undefined lanes
  return (vw)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)x, _mm512_set1_epi32(int(m)));
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(int(m)));
#elif defined(__SSE2__)
  typedef int v4 __attribute__((vector_size(16)));
  return (vw)__builtin_ia32_pmuludq128((v4)x, (v4)(vu{} + m));
#else
  return ((vw)x & 0xffffffffu) * uint64_t(m);
#endif
}

struct Words {
  vu high, low;
};
SEQFUSE_INLINE Words multiply_wide(vu x, uint32_t m) {
  const vw even = multiply_even(x, m), odd = multiply_even((vu)((vw)x >> 32), m);
  return {(vu)((even >> 32) | (odd & 0xffffffff00000000u)), (vu)((even & 0xffffffffu) | (odd << 32))};
}

// Which weights of a head stay, and by what they are multiplied then.
struct Dropout {
  uint32_t key[2];
  uint64_t below;  // a weight is dropped where its word is smaller
  float factor;    // 1 / (1 - p)

  Dropout() = default;
  Dropout(const int64_t* seed, double p) {
    const uint64_t s = p > 0.0 ? uint64_t(*seed) : 0;
    key[0] = uint32_t(s), key[1] = uint32_t(s >> 32);
    below = uint64_t(p * 4294967296.0);
    factor = p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f;
  }

  // out[j - first] = factor or 0 for key j of query i, first <= j < first + n. `first` is a multiple of 4; whole
  // vectors are written: up to 4 * VL - 1 floats more than n.
  void row(int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, float* out) const {
    vu lanes;
    for (int l = 0; l < VL; l++) lanes[l] = uint32_t(l);
    for (int64_t j = 0; j < n; j += 4 * VL) {
      vu c[4] = {lanes + uint32_t((first + j) / 4), vu{} + uint32_t(i), vu{} + uint32_t(h), vu{} + uint32_t(b)};
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; round++) {
        const Words x = multiply_wide(c[0], 0xD2511F53u), y = multiply_wide(c[2], 0xCD9E8D57u);
        c[0] = y.high ^ c[1] ^ k0, c[1] = y.low, c[2] = x.high ^ c[3] ^ k1, c[3] = x.low;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      float kept[4][VL];
      for (int w = 0; w < 4; w++) {
        const vf all = splat(factor);
        store(kept[w], below > 0xffffffffu ? vf{} : select((vi)(c[w] < uint32_t(below)), vf{}, all));
      }
      for (int l = 0; l < VL; l++)
        for (int w = 0; w < 4; w++) out[j + 4 * l + w] = kept[w][l];
    }
  }
};

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
