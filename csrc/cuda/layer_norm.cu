// Launches of layer_norm.cuh. Contract: seqfuse/layer_norm.h
#include "cuda/column_sum.cuh"
#include "cuda/layer_norm.cuh"
#include "seqfuse/layer_norm.h"

namespace seqfuse {
namespace {

using namespace cuda;

constexpr int64_t kMostBlocks = 1 << 20;  // blocks walk over further rows

struct Shape {
  int group, threads, cluster;  // threads a row in a block, threads a block, blocks a row
  bool in_registers;            // else the *_long kernel
};

// A row takes the smallest group that holds it, with `a_thread` columns each, or the smallest cluster of blocks
Shape shape_for(int64_t cols, int a_thread) {
  int group = dev::kWarp;
  while (group < kMostThreads && int64_t(group) * a_thread < cols) group *= 2;
  int cluster = 1;
  if (dev::capability() == 90)
    while (cluster < kMostBlocksARow && int64_t(group) * cluster * a_thread < cols) cluster *= 2;
  const bool fits = int64_t(group) * cluster * a_thread >= cols;
  return {group, group < kSharedThreads ? kSharedThreads : group, fits ? cluster : 1, fits};
}

// blocks, or clusters of them, of at most `most` blocks
int64_t clusters_for(int64_t rows, const Shape& s, int64_t most) {
  const int64_t groups = s.in_registers ? s.threads / s.group : 1, wanted = (rows + groups - 1) / groups;
  const int64_t allowed = most / s.cluster > 0 ? most / s.cluster : 1;
  return wanted < allowed ? wanted : allowed;
}

template <class... Pointers>
bool vectors_fit(int64_t cols, int64_t size, Pointers... p) {
  return cols * size % 16 == 0 && (dev::aligned_16(p) && ...);
}

// null in rms_norm: the kernels' sign for it
template <class Call>
auto mean_of(const Call& a) {
  return a.options.rms ? nullptr : a.mean;
}

float offset_of(const NormOptions& o) {
  return o.zero_centered ? 1.0f : 0.0f;
}

NormDropout dropout_of(const NormOptions& o) {
  return norm_dropout(o.seed, o.dropout_p);
}

}  // namespace

int layer_norm_forward_cuda(const LayerNormForward& a, void* stream) {
  return dev::with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Shape s = shape_for(a.cols, kForwardColumns);
    const bool vectors = vectors_fit(a.cols, sizeof(T), a.x, a.residual, a.weight, a.bias, a.y, a.sum);
    const ForwardArgs args{a.rows,
                           a.cols,
                           a.x,
                           a.residual,
                           a.weight,
                           a.bias,
                           a.y,
                           a.sum,
                           mean_of(a),
                           a.rstd,
                           a.eps,
                           offset_of(a.options),
                           dropout_of(a.options),
                           s.group,
                           s.cluster,
                           vectors,
                           a.param_dtype == DType::f32};
    const dev::Grid grid{clusters_for(a.rows, s, kMostBlocks) * s.cluster, 1, s.cluster};
    const auto kernel = s.in_registers ? &layer_norm_forward<T> : &layer_norm_forward_long<T>;
    return dev::launch(kernel, grid, s.threads, stream, args);
  });
}

int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t cols) {
  // one partial row a block (a cluster), and as many blocks as the device holds at once (512 threads an SM, for their
  // registers)
  const Shape s = shape_for(cols, kBackwardColumns);
  return clusters_for(rows, s, int64_t(dev::multiprocessors()) * (kMostThreads / s.threads));
}

int layer_norm_backward_cuda(const LayerNormBackward& a, void* stream) {
  return dev::with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Shape s = shape_for(a.cols, kBackwardColumns);
    const bool vectors = vectors_fit(a.cols, sizeof(T), a.dy, a.dsum, a.s, a.weight, a.dx, a.dresidual);
    float* const dweight = a.dweight ? a.partial : nullptr;
    float* const dbias = a.dbias ? a.partial + a.partial_rows * a.cols : nullptr;
    const BackwardArgs args{a.rows,
                            a.cols,
                            a.dy,
                            a.dsum,
                            a.s,
                            a.weight,
                            mean_of(a),
                            a.rstd,
                            a.dx,
                            a.dresidual,
                            dweight,
                            dbias,
                            offset_of(a.options),
                            dropout_of(a.options),
                            s.group,
                            s.cluster,
                            vectors,
                            a.param_dtype == DType::f32};
    const auto kernel = s.in_registers ? &layer_norm_backward<T> : &layer_norm_backward_long<T>;
    const int error = dev::launch(kernel, {a.partial_rows * s.cluster, 1, s.cluster}, s.threads, stream, args);
    if (error || (!dweight && !dbias)) return error;
    const ColumnSum sums[2] = {{dweight, a.dweight, a.partial_rows, a.cols}, {dbias, a.dbias, a.partial_rows, a.cols}};
    return dev::with_dtype(a.param_dtype, [&](auto p) {
      return launch_column_sums<decltype(p)>(sums[dweight ? 0 : 1], sums[1], dweight && dbias ? 2 : 1, stream);
    });
  });
}

}  // namespace seqfuse
