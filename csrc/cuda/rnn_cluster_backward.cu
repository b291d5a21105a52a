// The launch of rnn_cluster_backward.cuh, and the last sum of db_hh. Contract: seqfuse/rnn.h
#include "cuda/column_sum.cuh"
#include "cuda/rnn_cluster_backward.cuh"
#include "cuda/rnn_cluster_launch.cuh"

namespace seqfuse {
namespace {

using namespace cuda;

int64_t partial_rows(int64_t B) {
  return 2 * ((B + kGroupRows - 1) / kGroupRows);
}

template <Cell C, class T, int K, bool Options>
int backward(const RnnBackward& a, float* partial, void* stream) {
  ClusterBackward<T> p{};
  // backwards through the order in which the forward pass went
  p.shape.steps = a.T, p.shape.first = a.reverse ? 0 : a.T - 1, p.shape.direction = a.reverse ? 1 : -1;
  p.shape.H = int(a.H), p.shape.relu = a.cell == Cell::rnn_relu;
  p.shape.paired = pairs_fit(a.H, {a.dy, a.dh_n, a.dc_n, a.y, a.gates, a.h0, a.c0, a.dxg, a.dan, a.dh0, a.dc0},
                             {a.dy_strides, a.y_strides, a.gates_strides, a.dxg_strides, a.dan_strides});
  p.shape.vector = a.H % 8 == 0 && dev::aligned_16(a.w_hh);
  p.dy = sequence_of<const T>(a.dy, a.dy_strides), p.y = sequence_of<const T>(a.y, a.y_strides);
  p.dh_n = static_cast<const T*>(a.dh_n), p.dc_n = static_cast<const T*>(a.dc_n);
  p.dcells = sequence_of<const float>(a.dcells, a.dcells_strides);
  p.gates = sequence_of<const T>(a.gates, a.gates_strides),
  p.cells = sequence_of<const float>(a.cells, a.cells_strides);
  p.h0 = static_cast<const T*>(a.h0), p.c0 = static_cast<const T*>(a.c0), p.w_hh = static_cast<const T*>(a.w_hh);
  p.dxg = sequence_of<T>(a.dxg, a.dxg_strides), p.dan = sequence_of<T>(a.dan, a.dan_strides);
  p.dh0 = static_cast<T*>(a.dh0), p.dc0 = static_cast<T*>(a.dc0);
  p.partial = a.db_hh ? partial : nullptr;
  const int error = launch_clusters<Options>(&rnn_cluster_backward<C, T, K, Options>, p, a.options, a.B,
                                             cluster_shared(a.cell, K).backward, stream);
  if (error || !a.db_hh) return error;
  const ColumnSum sum{partial, a.db_hh, partial_rows(a.B), kGates<C> * a.H};
  return launch_column_sums<float>(sum, sum, 1, stream);
}

}  // namespace

int64_t rnn_workspace_cluster_cuda(Cell cell, int64_t B, int64_t H) {
  return partial_rows(B) * gates_of(cell) * H * int64_t(sizeof(float));
}

int rnn_backward_cluster_cuda(const RnnBackward& a, void* workspace, void* stream) {
  if (cluster_option_refused(a.options)) return kNotSupported;
  const bool options = a.options.in_use() || a.dcells;
  return with_cluster_instance(a.cell, a.dtype, a.H, options, [&]<Cell C, class T, int K, bool Options>() {
    return backward<C, T, K, Options>(a, static_cast<float*>(workspace), stream);
  });
}

int64_t rnn_backward_clusters_resident_cuda(Cell cell, DType dtype, int64_t H, bool options) {
  return with_cluster_instance(cell, dtype, H, options, [&]<Cell C, class T, int K, bool Options>() {
    const int blocks = int((H + kBlockUnits - 1) / kBlockUnits);
    return dev::resident_clusters(&rnn_cluster_backward<C, T, K, Options>,
                                  {blocks, 1, blocks, cluster_shared(cell, K).backward}, kClusterThreads);
  });
}

}  // namespace seqfuse
