// Launches of layer_norm.cuh. Contract: seqfuse/layer_norm.h
#include "seqfuse/layer_norm.h"

#include "cuda/column_sum.cuh"
#include "cuda/layer_norm.cuh"

namespace seqfuse {
namespace {

using namespace cuda;

constexpr int64_t kMostBlocks = 1 << 20;  // blocks walk over further rows

struct Shape {
  int group, threads;  // threads a row, threads a block
  bool in_registers;   // else the *_long kernel
};

// A row takes the smallest group that holds it, with `a_thread` columns each
Shape shape_for(int64_t cols, int a_thread) {
  int group = dev::kWarp;
  while (group < kMostThreads && int64_t(group) * a_thread < cols) group *= 2;
  return {group, group < kSharedThreads ? kSharedThreads : group, int64_t(group) * a_thread >= cols};
}

int64_t blocks_for(int64_t rows, const Shape& s, int64_t most) {
  const int64_t groups = s.in_registers ? s.threads / s.group : 1, blocks = (rows + groups - 1) / groups;
  return blocks < most ? blocks : most;
}

template <class... Pointers>
bool vectors_fit(int64_t cols, int64_t size, Pointers... p) {
  return cols * size % 16 == 0 && (dev::aligned_16(p) && ...);
}

// f(T{}, P{}) for the element and parameter types
template <class F>
int with_types(DType dtype, DType param_dtype, F f) {
  return dev::with_dtype(dtype, [&](auto t) {
    if (param_dtype == DType::f32) return f(t, float{});
    return f(t, t);
  });
}

}  // namespace

int layer_norm_forward_cuda(const LayerNormForward& a, void* stream) {
  return with_types(a.dtype, a.param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    const Shape s = shape_for(a.cols, kForwardColumns);
    const bool vectors = vectors_fit(a.cols, sizeof(T), a.x, a.residual, a.weight, a.bias, a.y, a.sum);
    const ForwardArgs args{a.rows, a.cols, a.x,    a.residual, a.weight, a.bias, a.y,
                           a.sum,  a.mean, a.rstd, a.eps,      s.group,  vectors};
    const dev::Grid grid{blocks_for(a.rows, s, kMostBlocks)};
    const auto kernel = s.in_registers ? &layer_norm_forward<T, P> : &layer_norm_forward_long<T, P>;
    return dev::launch(kernel, grid, s.threads, stream, args);
  });
}

int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t cols) {
  // one partial row a block: enough blocks to fill the device, few enough for the second reduction to be small
  const Shape s = shape_for(cols, kBackwardColumns);
  return blocks_for(rows, s, int64_t(dev::multiprocessors()) * (1024 / s.threads));
}

int layer_norm_backward_cuda(const LayerNormBackward& a, void* stream) {
  return with_types(a.dtype, a.param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    const Shape s = shape_for(a.cols, kBackwardColumns);
    const bool vectors = vectors_fit(a.cols, sizeof(T), a.dy, a.dsum, a.s, a.weight, a.dx);
    float* const dweight = a.dweight ? a.partial : nullptr;
    float* const dbias = a.dbias ? a.partial + a.partial_rows * a.cols : nullptr;
    const BackwardArgs args{a.rows, a.cols, a.dy,    a.dsum, a.s,     a.weight, a.mean,
                            a.rstd, a.dx,   dweight, dbias,  s.group, vectors};
    const auto kernel = s.in_registers ? &layer_norm_backward<T, P> : &layer_norm_backward_long<T, P>;
    const int error = dev::launch(kernel, {a.partial_rows}, s.threads, stream, args);
    if (error || (!dweight && !dbias)) return error;
    const ColumnSum sums[2] = {{dweight, a.dweight, a.partial_rows, a.cols}, {dbias, a.dbias, a.partial_rows, a.cols}};
    return launch_column_sums<P>(sums[dweight ? 0 : 1], sums[1], dweight && dbias ? 2 : 1, stream);
  });
}

}  // namespace seqfuse
