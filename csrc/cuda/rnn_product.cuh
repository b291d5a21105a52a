// The product of a recurrent step, shared by forward (h @ w_hh^T) and backward (da @ w_hh, from a transposed copy):
//
//   out[b, g, u] = sum over k of left[b, k] * w[g * units + u, k]
//
// One block computes kRows batch rows x kUnits units x G gates. Its warps share out the k axis, and their partial sums
// are added in warp order through shared memory (deterministic); afterwards each thread owns one (row, unit) and all
// its gates, so the cell's pointwise mathematics follow in registers.
// 16-bit types: mma.m16n8k16 with fp32 accumulators. The contraction does not care about the order of k as long as both
// sides agree, so a lane takes 8 neighbouring k of a row (one 16-byte load) where the fragments want 2 + 2, twice:
// both operands go from global memory into fragments without a detour through shared memory.
// float: exact fp32 FMA with the same accumulator layout.
// Memory traffic allowed: a block reads its rows of `left` and of w once.
#pragma once
#include "cuda/device.cuh"

namespace seqfuse::cuda {

using dev::Bits16;
using dev::kVector;

constexpr int kRows = 32, kUnits = 8, kStepThreads = kRows * kUnits, kStepWarps = kStepThreads / dev::kWarp;
// blocks an SM should hold: the float product keeps too much in registers for two
template <class T>
inline constexpr int kStepBlocks = sizeof(T) == 2 ? 2 : 1;

// A matrix [rows, width] whose columns from `split` on live in a second array (the GRU's gradients: dxg, then dan).
template <class T>
struct Left {
  const T* first;
  const T* second;
  int64_t first_stride, second_stride;
  int split, width;  // split == width: there is no second array

  SEQFUSE_DEVICE const T* at(int row, int k) const {
    return k < split ? first + row * first_stride + k : second + row * second_stride + (k - split);
  }
};

// kVector neighbours of a row of `left`; what lies outside the matrix is zero
template <class T, bool Aligned>
SEQFUSE_DEVICE Bits16 load_left(const Left<T>& left, int row, int rows, int k) {
  if (row >= rows) return Bits16{};
  if constexpr (Aligned) return k < left.width ? dev::load_16(left.at(row, k)) : Bits16{};
  Bits16 bits{};
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if (k + i >= left.width) continue;
    const uint32_t x = dev::raw(*left.at(row, k + i));
    if constexpr (sizeof(T) == 4)
      bits.word[i] = x;
    else
      bits.word[i / 2] |= x << (i % 2 * 16);
  }
  return bits;
}

template <class T, bool Aligned>
SEQFUSE_DEVICE Bits16 load_weight(const T* w, int gate, int unit, int units, int width, int k) {
  if (unit >= units) return Bits16{};
  return dev::load_some(w + (int64_t(gate) * units + unit) * width + k, width - k, Aligned);
}

// acc[m][g] is the mma accumulator of rows 16 m .. 16 m + 15 and gate g: rows r, r, r+8, r+8 at units 2q, 2q+1
template <class T, int G, bool Aligned>
SEQFUSE_DEVICE void accumulate(float (&acc)[2][G][4], const Left<T>& left, const T* w, int row0, int rows, int unit0,
                               int units) {
  const int r = dev::lane() / 4, q = dev::lane() % 4;
  if constexpr (sizeof(T) == 2) {
    const bool both = row0 + 16 < rows;  // the lower 16 rows exist; the same for the whole block
    for (int chunk = dev::warp(); chunk * 32 < left.width; chunk += kStepWarps) {
      const int k = chunk * 32 + q * 8;
      Bits16 a[4], b[G];
#pragma unroll
      for (int g = 0; g < G; g++) b[g] = load_weight<T, Aligned>(w, g, unit0 + r, units, left.width, k);
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = load_left<T, Aligned>(left, row0 + r + 8 * i, rows, k);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        if (m == 1 && !both) continue;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const uint32_t rows16[4] = {a[2 * m].word[j], a[2 * m + 1].word[j], a[2 * m].word[j + 1],
                                      a[2 * m + 1].word[j + 1]};
#pragma unroll
          for (int g = 0; g < G; g++) {
            const uint32_t units8[2] = {b[g].word[j], b[g].word[j + 1]};
            dev::mma_m16n8k16<T>(acc[m][g], rows16, units8);
          }
        }
      }
    }
  } else {
    // 4 rows x 2 units x G gates a lane. Two vectors of k a turn, so that whole 32-byte sectors are read.
    for (int chunk = dev::warp(); chunk * 8 < left.width; chunk += kStepWarps) {
#pragma unroll
      for (int k = chunk * 8; k < chunk * 8 + 8; k += 4) {
        float a[4][4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) dev::unpack<float>(load_left<T, Aligned>(left, row0 + r + 8 * i, rows, k), a[i]);
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            dev::unpack<float>(load_weight<T, Aligned>(w, g, unit0 + 2 * q + e, units, left.width, k), b);
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
              for (int j = 0; j < 4; j++) acc[i / 2][g][i % 2 * 2 + e] += a[i][j] * b[j];
            }
          }
        }
      }
    }
  }
}

// The block's tile of the product; out[g] belongs to row thread / kUnits and unit thread % kUnits.
template <class T, int G, bool Aligned>
SEQFUSE_DEVICE void step_product(float (&out)[G], const Left<T>& left, const T* w, int row0, int rows, int unit0,
                                 int units) {
  struct Shared {
    float part[kStepWarps][G][kRows * kUnits];
  };
  Shared& s = dev::shared<Shared>();
  float acc[2][G][4] = {};
  accumulate<T, G, Aligned>(acc, left, w, row0, rows, unit0, units);
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int g = 0; g < G; g++) {
      float* at = s.part[dev::warp()][g] + m * 16 * kUnits + dev::lane() * 2;  // row lane / 4, units 2 (lane % 4)
#pragma unroll
      for (int e = 0; e < 4; e++) at[e / 2 * 8 * kUnits + e % 2] = acc[m][g][e];
    }
  }
  dev::barrier();
#pragma unroll
  for (int g = 0; g < G; g++) {
    out[g] = 0.0f;
#pragma unroll
    for (int w = 0; w < kStepWarps; w++) out[g] += s.part[w][g][dev::thread()];
  }
}

}  // namespace seqfuse::cuda
