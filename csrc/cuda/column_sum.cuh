// out[c] = sum over r of in[r, c], in fp32, in an order that depends on the shape only: the second half of every
// reduction over rows (the first half leaves one partial row per block). Reads `in` once.
#pragma once
#include "cuda/device.cuh"

namespace seqfuse::cuda {

constexpr int kSumThreads = 256;
constexpr int kSumColumns = 32;  // a block's; its 8 warps take every 8th row

struct ColumnSum {
  const float* in;  // [rows, cols]
  void* out;        // [cols] of P
  int64_t rows, cols;
};

// `sum` is one thread's share; the result is valid in warp 0
SEQFUSE_DEVICE float sum_over_warps(float sum) {
  struct Shared {
    float part[kSumThreads / dev::kWarp][kSumColumns];
  };
  Shared& s = dev::shared<Shared>();
  s.part[dev::warp()][dev::lane()] = sum;
  dev::barrier();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kSumThreads / dev::kWarp; w++) total += s.part[w][dev::lane()];
  return total;
}

// grid.y: which of the two sums
template <class P>
SEQFUSE_KERNEL(kSumThreads, 1)
column_sum(ColumnSum first, ColumnSum second) {
  const ColumnSum p = dev::block_y() ? second : first;
  const int64_t c = int64_t(dev::block_x()) * kSumColumns + dev::lane();
  float sum = 0.0f;
  if (c < p.cols)
    for (int64_t r = dev::warp(); r < p.rows; r += kSumThreads / dev::kWarp) sum += p.in[r * p.cols + c];
  const float total = sum_over_warps(sum);
  if (dev::warp() == 0 && c < p.cols) static_cast<P*>(p.out)[c] = dev::narrow<P>(total);
}

// one or two sums of equal shape in one launch
template <class P>
int launch_column_sums(ColumnSum first, ColumnSum second, int count, void* stream) {
  const dev::Grid grid{(first.cols + kSumColumns - 1) / kSumColumns, count};
  return dev::launch(&column_sum<P>, grid, kSumThreads, stream, first, second);
}

}  // namespace seqfuse::cuda
