// Luong's attention and its readout, one step. Contract: seqfuse/luong.h
//
// Floor: one read of the memory, which lies in the caches; what a step costs is calls, and this is one instead of five.
// A row's weights stay in a buffer; its sums run over the places of the source, kBlock vectors of the width at a time.
#include "seqfuse/luong.h"

#include "cpu/deal.h"
#include "cpu/scratch.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int kBlock = 4;  // vectors whose sums are in registers

float dot(const float* a, const float* b, int64_t n) {
  vf sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL)
    sums[0] = sums[0] + load(a + i) * load(b + i), sums[1] = sums[1] + load(a + i + VL) * load(b + i + VL);
  for_vectors(i, n, [&](int64_t j, int m) { sums[0] = sums[0] + take(a + j, m) * take(b + j, m); });
  return sum(sums[0] + sums[1]);
}

// x[0..n) becomes its softmax
void softmax(float* x, int64_t n) {
  vf top = splat(-__builtin_inff());
  for_vectors(0, n, [&](int64_t i, int m) { top = max(top, take(x + i, m, -__builtin_inff())); });
  const float largest_one = largest(top);
  vf total = {};
  for_vectors(0, n, [&](int64_t i, int m) {
    const vf e = exp(take(x + i, m) - largest_one);
    give(x + i, e, m);
    total = total + take(x + i, m);  // 0 beyond the end
  });
  const vf inverse = 1.0f / splat(sum(total));
  for_vectors(0, n, [=](int64_t i, int m) { give(x + i, take(x + i, m) * inverse, m); });
}

struct Row {
  const LuongReadout& a;
  float* weights;  // [length]

  // out[0..N * VL), of which the last vector has n elements
  template <int N>
  SEQFUSE_INLINE void mix(const float* added, const float* values, int64_t places, float* out, int n) const {
    vf sums[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) sums[i] = take(added + i * VL, i + 1 < N ? VL : n);
    for (int64_t t = 0; t < places; t++)
#pragma GCC unroll 4
      for (int i = 0; i < N; i++)
        sums[i] = sums[i] + weights[t] * take(values + t * a.width + i * VL, i + 1 < N ? VL : n);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) give(out + i * VL, tanh(sums[i]), i + 1 < N ? VL : n);
  }

  void operator()(int64_t row) const {
    const int64_t s = row / a.beams, places = a.lengths ? a.lengths[s] : a.length;
    const float *keys = a.keys + s * a.length * a.width, *values = a.values + s * a.length * a.width;
    for (int64_t t = 0; t < places; t++) weights[t] = dot(a.query + row * a.width, keys + t * a.width, a.width);
    softmax(weights, places);
    const float* added = a.added + row * a.width;
    float* out = a.out + row * a.width;
    int64_t i = 0;
    for (; i + kBlock * VL <= a.width; i += kBlock * VL) mix<kBlock>(added + i, values + i, places, out + i, VL);
    for_vectors(i, a.width, [&](int64_t j, int n) { mix<1>(added + j, values + j, places, out + j, n); });
  }
};

}  // namespace

void luong_readout(const LuongReadout& a, const Parallel& parallel) {
  deal_rows(parallel, a.sources * a.beams, 2 * a.length * a.width, [&](int64_t begin, int64_t end) {
    Row row{a, nullptr};
    Scratch scratch;
    scratch.take(row.weights, a.length), scratch.allocate(), scratch.take(row.weights, a.length);
    for (int64_t r = begin; r < end; r++) row(r);
  });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
