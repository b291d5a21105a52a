// Kernels of layer_norm and rms_norm. Contract and maths: seqfuse/layer_norm.h
//
//   forward    mean, rstd of s = dropout(x) (+ residual);   y = (s - mean) * rstd * weight + bias
//   backward   g = dy * weight, xhat = (s - mean) * rstd
//              ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) (+ dsum), which is the residual's gradient
//              dx = dropout(ds)
//              dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
// rms_norm is the same with mean and mean(g) zero. It, dropout, a zero-centred weight and the type of the parameters
// are chosen at run time: what that adds to the arithmetic of a kernel that waits for memory is less than twice the
// kernels would cost to compile.
//
// Memory traffic allowed: forward reads x (and the residual) once, writes y (and the sum) once; backward reads dy and s
// (and dsum) once, writes dx once. A group of threads (a power of two from 32 up) holds a row in registers, 16 bytes a
// load; small rows share a block. A row too long for a block's registers is shared out to a cluster of blocks, which
// exchange their statistics through shared memory (sm_90); one that is too long for that too, or where there are no
// clusters, is read twice (the *_long kernels).
// dweight and dbias are summed in registers over the rows of a block, which walks the matrix with a fixed stride, and
// leave it as one fp32 partial row a block: no atomics, so the result depends on the shape and the device only.
#pragma once
#include "common/welford.h"
#include "cuda/device.cuh"
#include "cuda/dropout.cuh"

namespace seqfuse::cuda {

using dev::Bits16;
using dev::kVector;

// how much a thread holds of a row, in columns and in vectors of 16 bytes
constexpr int kForwardColumns = 32, kBackwardColumns = 16;  // backward: its partial sums are registers too
template <class T>
inline constexpr int kForwardVectors = kForwardColumns / kVector<T>;
template <class T>
inline constexpr int kBackwardVectors = kBackwardColumns / kVector<T>;
constexpr int kMostThreads = 512;    // rows of up to 16384 columns forward and 8192 backward stay in registers,
constexpr int kMostBlocksARow = 8;   // 8 times as many in those of a cluster
constexpr int kSharedThreads = 256;  // of a block whose rows take fewer

struct Pair {
  float a, b;
};
SEQFUSE_DEVICE Pair add(Pair x, Pair y) {
  return {x.a + y.a, x.b + y.b};
}

struct ForwardArgs {
  int64_t rows, cols;
  const void *x, *residual, *weight, *bias;
  void *y, *sum;       // sum: null where s is x
  float *mean, *rstd;  // mean: null in rms_norm, where it counts as zero
  float eps;
  float weight_offset;  // 1 if the weight is stored around zero, else 0
  NormDropout dropout;
  int group;             // threads a row in each block
  int cluster;           // blocks a row; several only with one row a block
  bool vectors;          // every row and parameter is 16-byte aligned and cols is a multiple of the vector
  bool wide_parameters;  // weight and bias are float; else T, as x is
};

struct BackwardArgs {
  int64_t rows, cols;
  const void *dy, *dsum, *s, *weight;
  const float *mean, *rstd;  // mean: null in rms_norm
  void *dx, *dresidual;      // dresidual: with dropout only, or null
  float *dweight, *dbias;    // partial rows [blocks, cols], or null
  float weight_offset;
  NormDropout dropout;
  int group, cluster;
  bool vectors, wide_parameters;
};

// Vector i of a thread covers columns [first, first + kVector) of a row; n of them exist.
struct Span {
  int64_t first;
  int n;
};
template <class T>
SEQFUSE_DEVICE Span span(int64_t cols, int group, int in_group, int i) {
  const int64_t first = (int64_t(i) * group + in_group) * kVector<T>, left = cols - first;
  return {first, left < 0 ? 0 : left < kVector<T> ? int(left) : kVector<T>};
}

// A thread's vectors as moments. Deviations are taken from the first value and then from the mean, so that nothing
// cancels, and a row of equal values has exactly that value as its mean. rms: the mean counts as zero.
template <class T, int N>
SEQFUSE_DEVICE Moments moments_of(const Bits16 (&v)[N], int64_t cols, int group, int in_group, bool rms) {
  float x[kVector<T>];
  dev::unpack<T>(v[0], x);
  const float origin = x[0];
  float count = 0.0f, sum = 0.0f, m2 = 0.0f;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const Span at = span<T>(cols, group, in_group, i);
    dev::unpack<T>(v[i], x);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++)
      if (j < at.n) sum += x[j] - origin;
    count += float(at.n);
  }
  if (count == 0.0f) return {0.0f, 0.0f, 0.0f};
  const float mean = rms ? 0.0f : origin + sum / count;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const Span at = span<T>(cols, group, in_group, i);
    dev::unpack<T>(v[i], x);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++)
      if (j < at.n) m2 += (x[j] - mean) * (x[j] - mean);
  }
  return {count, mean, m2};
}

// of the weight or the bias
template <class T, class Args>
SEQFUSE_DEVICE void load_parameter(const void* data, const Args& p, Span at, float (&out)[kVector<T>]) {
  if (sizeof(T) == 4 || p.wide_parameters)
    dev::load_floats(static_cast<const float*>(data) + at.first, at.n, p.vectors, out);
  else
    dev::load_floats(static_cast<const T*>(data) + at.first, at.n, p.vectors, out);
}

template <class T>
SEQFUSE_DEVICE Bits16 load_x(const ForwardArgs& p, int64_t row, Span at) {
  return dev::load_some(static_cast<const T*>(p.x) + row * p.cols + at.first, at.n, p.vectors);
}

// s of one vector of x where it is something else: rounded to T and stored
template <class T>
SEQFUSE_DEVICE Bits16 store_sum(const ForwardArgs& p, int64_t row, Span at, const Bits16& x) {
  const int64_t offset = row * p.cols + at.first;
  float a[kVector<T>], b[kVector<T>];
  dev::unpack<T>(x, a);
  if (p.dropout.seed) drop(p.dropout, row, at.first, a);
  if (p.residual) {
    dev::unpack<T>(dev::load_some(static_cast<const T*>(p.residual) + offset, at.n, p.vectors), b);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) a[j] += b[j];
  }
  const Bits16 sum = dev::pack<T>(a);
  dev::store_some(static_cast<T*>(p.sum) + offset, sum, at.n, p.vectors);
  return sum;
}

template <class T>
SEQFUSE_DEVICE void write_normalised(const ForwardArgs& p, int64_t row, Span at, const Bits16& s, float mean,
                                     float rstd) {
  float x[kVector<T>], parameter[kVector<T>];
  dev::unpack<T>(s, x);
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) x[j] = (x[j] - mean) * rstd;
  if (p.weight) {
    load_parameter<T>(p.weight, p, at, parameter);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) x[j] *= p.weight_offset + parameter[j];
  }
  if (p.bias) {
    load_parameter<T>(p.bias, p, at, parameter);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) x[j] += parameter[j];
  }
  dev::store_some(static_cast<T*>(p.y) + row * p.cols + at.first, dev::pack<T>(x), at.n, p.vectors);
}

// combine(lower ranks, higher ranks) over the blocks of a row. Every thread gets the same bits. `scratch` is shared
// memory; `parity` alternates between calls, so that one barrier a call is enough.
template <class S, class F>
SEQFUSE_DEVICE S cluster_reduce(S value, int cluster, S (&scratch)[2], int parity, F combine) {
  if constexpr (dev::kClusters) {
    if (cluster > 1) {
      if (dev::thread() == 0) scratch[parity] = value;
      dev::cluster_barrier();
      value = *dev::cluster_peer(&scratch[parity], 0);
      for (int rank = 1; rank < cluster; rank++) value = combine(value, *dev::cluster_peer(&scratch[parity], rank));
    }
  }
  return value;
}
// No block may end while another reads its shared memory.
SEQFUSE_DEVICE void leave_cluster(int cluster) {
  if constexpr (dev::kClusters)
    if (cluster > 1) dev::cluster_barrier();
}

// Where a block stands: its first row and the distance to the next ones, its thread's place among those of a row.
struct Place {
  int groups, mine, in_row, a_row;
  int64_t first, step;
};
SEQFUSE_DEVICE Place place(int group, int cluster) {
  const int groups = dev::threads() / group, rank = cluster > 1 ? dev::cluster_rank() : 0;
  return {groups,
          dev::thread() / group,
          rank * group + dev::thread() % group,
          cluster * group,
          int64_t(dev::block_x()) / cluster * groups,
          int64_t(dev::blocks_x()) / cluster * groups};
}

struct ForwardShared {
  Moments moments[2][dev::kWarp];
  Moments cluster[2];
};

SEQFUSE_DEVICE float write_statistics(const ForwardArgs& p, int64_t row, bool writes, const Moments& m) {
  const float rstd = dev::rsqrt(m.m2 / float(p.cols) + p.eps);
  if (writes && p.mean) p.mean[row] = m.mean;
  if (writes) p.rstd[row] = rstd;
  return rstd;
}

struct MergeMoments {
  SEQFUSE_DEVICE Moments operator()(const Moments& a, const Moments& b) const { return merge(a, b); }
};
struct AddPairs {
  SEQFUSE_DEVICE Pair operator()(const Pair& a, const Pair& b) const { return add(a, b); }
};

template <class T>
SEQFUSE_KERNEL(kMostThreads, 1)
layer_norm_forward(ForwardArgs p) {
  ForwardShared& shared = dev::shared<ForwardShared>();
  const Place at_work = place(p.group, p.cluster);
  int parity = 0;
  for (int64_t base = at_work.first; base < p.rows; base += at_work.step) {
    const int64_t row = base + at_work.mine,
                  cols = row < p.rows ? p.cols : 0;  // a group without a row still meets the others
    Bits16 s[kForwardVectors<T>];
#pragma unroll
    for (int i = 0; i < kForwardVectors<T>; i++) {
      const Span at = span<T>(cols, at_work.a_row, at_work.in_row, i);
      s[i] = load_x<T>(p, row, at);
    }
    if (p.sum)
#pragma unroll
      for (int i = 0; i < kForwardVectors<T>; i++) {
        const Span at = span<T>(cols, at_work.a_row, at_work.in_row, i);
        if (at.n) s[i] = store_sum<T>(p, row, at, s[i]);
      }
    Moments m = moments_of<T>(s, cols, at_work.a_row, at_work.in_row, !p.mean);
    m = dev::group_reduce(m, p.group, shared.moments, parity, MergeMoments{});
    m = cluster_reduce(m, p.cluster, shared.cluster, parity, MergeMoments{});
    parity ^= 1;
    const float rstd = write_statistics(p, row, cols && at_work.in_row == 0, m);
#pragma unroll
    for (int i = 0; i < kForwardVectors<T>; i++) {
      const Span at = span<T>(cols, at_work.a_row, at_work.in_row, i);
      if (at.n) write_normalised<T>(p, row, at, s[i], m.mean, rstd);
    }
  }
  leave_cluster(p.cluster);
}

// One block a row, which is read twice (from the stored sum the second time, if there is one).
template <class T>
SEQFUSE_KERNEL(kMostThreads, 1)
layer_norm_forward_long(ForwardArgs p) {
  ForwardShared& shared = dev::shared<ForwardShared>();
  const int64_t step = int64_t(dev::threads()) * kVector<T>;
  const int vectors = int((p.cols + step - 1) / step);
  int parity = 0;
  for (int64_t row = dev::block_x(); row < p.rows; row += dev::blocks_x()) {
    Moments m{0.0f, 0.0f, 0.0f};
    for (int i = 0; i < vectors; i++) {
      const Span at = span<T>(p.cols, dev::threads(), dev::thread(), i);
      if (!at.n) continue;
      Bits16 s[1] = {load_x<T>(p, row, at)};
      if (p.sum) s[0] = store_sum<T>(p, row, at, s[0]);
      m = merge(m, moments_of<T>(s, at.n, 1, 0, !p.mean));
    }
    m = dev::group_reduce(m, dev::threads(), shared.moments, parity, MergeMoments{});
    parity ^= 1;
    const float rstd = write_statistics(p, row, dev::thread() == 0, m);
    const T* s = static_cast<const T*>(p.sum ? p.sum : p.x);
    for (int i = 0; i < vectors; i++) {
      const Span at = span<T>(p.cols, dev::threads(), dev::thread(), i);
      if (!at.n) continue;
      // not load_16: this thread may have just written what it reads
      Bits16 bits;
      if (p.vectors)
        bits = *reinterpret_cast<const Bits16*>(s + row * p.cols + at.first);
      else
        bits = dev::load_some(s + row * p.cols + at.first, at.n, false);
      write_normalised<T>(p, row, at, bits, m.mean, rstd);
    }
  }
}

// g = dy * weight and xhat of one vector; columns that do not exist give zeros
template <class T>
SEQFUSE_DEVICE void gradient_terms(const BackwardArgs& p, Span at, const Bits16& dy, const Bits16& s, float mean,
                                   float rstd, float (&g)[kVector<T>], float (&xhat)[kVector<T>]) {
  dev::unpack<T>(dy, g);
  dev::unpack<T>(s, xhat);
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) xhat[j] = j < at.n ? (xhat[j] - mean) * rstd : 0.0f;
  if (!p.weight) return;
  float w[kVector<T>];
  load_parameter<T>(p.weight, p, at, w);
  // multiply: were it fused into the subtraction of its own mean, the gradient of a constant row would not be zero
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) g[j] = dev::multiply(g[j], p.weight_offset + w[j]);
}

template <class T>
SEQFUSE_DEVICE Pair sum_terms(const float (&g)[kVector<T>], const float (&xhat)[kVector<T>], Pair sums) {
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) sums.a += g[j], sums.b += g[j] * xhat[j];
  return sums;
}

template <class T>
SEQFUSE_DEVICE void write_dx(const BackwardArgs& p, int64_t row, Span at, float (&g)[kVector<T>],
                             const float (&xhat)[kVector<T>], Pair means, float rstd) {
  const int64_t offset = row * p.cols + at.first;
#pragma unroll
  for (int j = 0; j < kVector<T>; j++) g[j] = rstd * (g[j] - means.a - xhat[j] * means.b);
  if (p.dsum) {
    float other[kVector<T>];
    dev::unpack<T>(dev::load_some(static_cast<const T*>(p.dsum) + offset, at.n, p.vectors), other);
#pragma unroll
    for (int j = 0; j < kVector<T>; j++) g[j] += other[j];
  }
  if (p.dropout.seed) {
    if (p.dresidual) dev::store_some(static_cast<T*>(p.dresidual) + offset, dev::pack<T>(g), at.n, p.vectors);
    drop(p.dropout, row, at.first, g);
  }
  dev::store_some(static_cast<T*>(p.dx) + offset, dev::pack<T>(g), at.n, p.vectors);
}

struct BackwardShared {
  Pair pairs[2][dev::kWarp];
  Pair cluster[2];
  float columns[2][kSharedThreads / 2 * kBackwardColumns];  // where the rows of one block add up
};

template <class T>
SEQFUSE_KERNEL(kMostThreads, 1)
layer_norm_backward(BackwardArgs p) {
  constexpr int V = kVector<T>, N = kBackwardVectors<T>;
  BackwardShared& shared = dev::shared<BackwardShared>();
  const Place at_work = place(p.group, p.cluster);
  float dweight[N][V] = {}, dbias[N][V] = {};
  int parity = 0;
  for (int64_t base = at_work.first; base < p.rows; base += at_work.step) {
    const int64_t row = base + at_work.mine, cols = row < p.rows ? p.cols : 0;
    const float mean = cols && p.mean ? p.mean[row] : 0.0f, rstd = cols ? p.rstd[row] : 0.0f;
    Bits16 dy[N], s[N];
    Pair sums{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Span at = span<T>(cols, at_work.a_row, at_work.in_row, i);
      dy[i] = dev::load_some(static_cast<const T*>(p.dy) + row * p.cols + at.first, at.n, p.vectors);
      s[i] = dev::load_some(static_cast<const T*>(p.s) + row * p.cols + at.first, at.n, p.vectors);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Span at = span<T>(cols, at_work.a_row, at_work.in_row, i);
      float g[V], xhat[V];
      gradient_terms<T>(p, at, dy[i], s[i], mean, rstd, g, xhat);
      sums = sum_terms<T>(g, xhat, sums);
    }
    sums = dev::group_reduce(sums, p.group, shared.pairs, parity, AddPairs{});
    sums = cluster_reduce(sums, p.cluster, shared.cluster, parity, AddPairs{});
    parity ^= 1;
    const Pair means{p.mean ? sums.a / float(p.cols) : 0.0f, sums.b / float(p.cols)};
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Span at = span<T>(cols, at_work.a_row, at_work.in_row, i);
      float g[V], xhat[V], d[V];
      gradient_terms<T>(p, at, dy[i], s[i], mean, rstd, g, xhat);
      dev::unpack<T>(dy[i], d);
#pragma unroll
      for (int j = 0; j < V; j++) dweight[i][j] += d[j] * xhat[j], dbias[i][j] += d[j];
      if (at.n) write_dx<T>(p, row, at, g, xhat, means, rstd);
    }
  }
  leave_cluster(p.cluster);
  if (!p.dweight && !p.dbias) return;
  const int groups = at_work.groups;
  for (int turn = 0; turn < groups; turn++) {  // one group after another, so that the order of additions is fixed
    if (groups > 1) dev::barrier();
    if (turn != at_work.mine) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Span at = span<T>(p.cols, at_work.a_row, at_work.in_row, i);
#pragma unroll
      for (int j = 0; j < V; j++) {
        if (j >= at.n) continue;
        const int64_t c = at.first + j, out = int64_t(dev::block_x()) / p.cluster * p.cols + c;
        if (turn > 0) dweight[i][j] += shared.columns[0][c], dbias[i][j] += shared.columns[1][c];
        if (turn < groups - 1) {
          shared.columns[0][c] = dweight[i][j], shared.columns[1][c] = dbias[i][j];
        } else {
          if (p.dweight) p.dweight[out] = dweight[i][j];
          if (p.dbias) p.dbias[out] = dbias[i][j];
        }
      }
    }
  }
}

// One block a row, which is read twice; the block adds to its partial rows in global memory, each thread to its own
// columns.
template <class T>
SEQFUSE_KERNEL(kMostThreads, 1)
layer_norm_backward_long(BackwardArgs p) {
  constexpr int V = kVector<T>;
  BackwardShared& shared = dev::shared<BackwardShared>();
  const int64_t step = int64_t(dev::threads()) * V;
  const int vectors = int((p.cols + step - 1) / step);
  int parity = 0;
  for (int64_t row = dev::block_x(); row < p.rows; row += dev::blocks_x()) {
    const float mean = p.mean ? p.mean[row] : 0.0f, rstd = p.rstd[row];
    const bool first = row == dev::block_x();
    Pair sums{0.0f, 0.0f};
    for (int pass = 0; pass < 2; pass++) {
      for (int i = 0; i < vectors; i++) {
        const Span at = span<T>(p.cols, dev::threads(), dev::thread(), i);
        if (!at.n) continue;
        const int64_t offset = row * p.cols + at.first;
        const Bits16 dy = dev::load_some(static_cast<const T*>(p.dy) + offset, at.n, p.vectors);
        const Bits16 s = dev::load_some(static_cast<const T*>(p.s) + offset, at.n, p.vectors);
        float g[V], xhat[V], d[V];
        gradient_terms<T>(p, at, dy, s, mean, rstd, g, xhat);
        if (pass == 0) {
          sums = sum_terms<T>(g, xhat, sums);
          continue;
        }
        dev::unpack<T>(dy, d);
        const int64_t out = int64_t(dev::block_x()) * p.cols + at.first;
#pragma unroll
        for (int j = 0; j < V; j++) {
          if (j >= at.n) continue;
          if (p.dweight) p.dweight[out + j] = (first ? 0.0f : p.dweight[out + j]) + d[j] * xhat[j];
          if (p.dbias) p.dbias[out + j] = (first ? 0.0f : p.dbias[out + j]) + d[j];
        }
        write_dx<T>(p, row, at, g, xhat, sums, rstd);
      }
      if (pass == 1) continue;
      sums = dev::group_reduce(sums, dev::threads(), shared.pairs, parity, AddPairs{});
      parity ^= 1;
      sums = {p.mean ? sums.a / float(p.cols) : 0.0f, sums.b / float(p.cols)};
    }
  }
}

}  // namespace seqfuse::cuda
