// Launches of layer_norm's backward kernels. Contract: seqfuse/layer_norm.h
#include "cuda/column_sum.cuh"
#include "cuda/layer_norm_launch.cuh"

namespace seqfuse {

using namespace cuda;

int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t cols) {
  // one partial row a block (a cluster), and as many blocks as the device holds at once (512 threads an SM, for their
  // registers)
  const Shape s = shape_for(cols, kBackwardColumns);
  return clusters_for(rows, s, int64_t(dev::multiprocessors()) * (kMostThreads / s.threads));
}

int layer_norm_backward_cuda(const LayerNormBackward& a, void* stream) {
  return with_types(a.dtype, a.param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
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
                            vectors};
    const auto kernel = s.in_registers ? &layer_norm_backward<T, P> : &layer_norm_backward_long<T, P>;
    const int error = dev::launch(kernel, {a.partial_rows * s.cluster, 1, s.cluster}, s.threads, stream, args);
    if (error || (!dweight && !dbias)) return error;
    const ColumnSum sums[2] = {{dweight, a.dweight, a.partial_rows, a.cols}, {dbias, a.dbias, a.partial_rows, a.cols}};
    return launch_column_sums<P>(sums[dweight ? 0 : 1], sums[1], dweight && dbias ? 2 : 1, stream);
  });
}

}  // namespace seqfuse
