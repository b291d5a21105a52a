// Launch of layer_norm's forward kernels. Contract: seqfuse/layer_norm.h
#include "cuda/layer_norm_launch.cuh"

namespace seqfuse {

using namespace cuda;

constexpr int64_t kMostBlocks = 1 << 20;  // blocks walk over further rows

int layer_norm_forward_cuda(const LayerNormForward& a, void* stream) {
  return with_types(a.dtype, a.param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
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
                           vectors};
    const dev::Grid grid{clusters_for(a.rows, s, kMostBlocks) * s.cluster, 1, s.cluster};
    const auto kernel = s.in_registers ? &layer_norm_forward<T, P> : &layer_norm_forward_long<T, P>;
    return dev::launch(kernel, grid, s.threads, stream, args);
  });
}

}  // namespace seqfuse
