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

template <class T>
ClusterBackward<T> view_of(const RnnBackward& a) {
  ClusterBackward<T> p{};
  const bool paired = pairs_fit<T>(a.H, {a.dy, a.dh_n, a.dc_n, a.y, a.gates, a.h0, a.c0, a.dxg, a.dan, a.dh0, a.dc0},
                                   {a.dy_strides, a.y_strides, a.gates_strides, a.dxg_strides, a.dan_strides});
  p.shape = shape_of<T>(a, !a.reverse, paired);  // the other way round than the forward pass went
  p.dy = sequence_of<const T>(a.dy, a.dy_strides), p.y = sequence_of<const T>(a.y, a.y_strides);
  p.dh_n = static_cast<const T*>(a.dh_n), p.dc_n = static_cast<const T*>(a.dc_n);
  p.dcells = sequence_of<const float>(a.dcells, a.dcells_strides);
  p.gates = sequence_of<const T>(a.gates, a.gates_strides),
  p.cells = sequence_of<const float>(a.cells, a.cells_strides);
  p.h0 = static_cast<const T*>(a.h0), p.c0 = static_cast<const T*>(a.c0), p.w_hh = static_cast<const T*>(a.w_hh);
  p.dxg = sequence_of<T>(a.dxg, a.dxg_strides), p.dan = sequence_of<T>(a.dan, a.dan_strides);
  p.dh0 = static_cast<T*>(a.dh0), p.dc0 = static_cast<T*>(a.dc0);
  return p;
}

}  // namespace

int64_t rnn_workspace_cluster_cuda(Cell cell, int64_t B, int64_t H) {
  return partial_rows(B) * gates_of(cell) * H * int64_t(sizeof(float));
}

int rnn_backward_cluster_cuda(const RnnBackward* scans, int count, void* workspace, void* stream) {
  const RnnBackward& a = scans[0];
  if (const int error = cluster_refused(scans, count)) return error;
  bool sums = false;
  for (int i = 0; i < count; i++) sums = sums || scans[i].db_hh;
  const int64_t rows = partial_rows(a.B), cols = gates_of(a.cell) * a.H;
  ColumnSum sum[2];
  for (int i = 0; i < 2; i++)
    sum[i] = {static_cast<float*>(workspace) + i * rows * cols, i < count ? scans[i].db_hh : nullptr, rows, cols};
  const int error = with_cluster_instance(a.cell, a.dtype, a.H, [&]<Cell C, class T, int K>() {
    static_assert(sizeof(BackwardShared<T, kGates<C>, K>) == cluster_shared(C, dtype_number<T>, K).backward);
    return launch_clusters(&rnn_cluster_backward<C, T, K>, scans, count, cluster_shared(C, a.dtype, K).backward, stream,
                           [&](const RnnBackward& scan) {
                             ClusterBackward<T> p = view_of<T>(scan);
                             if (sums) p.partial = const_cast<float*>(sum[&scan - scans].in);
                             return p;
                           });
  });
  return error || !sums ? error : launch_column_sums<float>(sum[0], sum[1], count, stream);
}

int64_t rnn_backward_clusters_resident_cuda(Cell cell, DType dtype, int64_t H) {
  return with_cluster_instance(cell, dtype, H, [&]<Cell C, class T, int K>() {
    const int blocks = int((H + kBlockUnits - 1) / kBlockUnits);
    return dev::resident_clusters(&rnn_cluster_backward<C, T, K>,
                                  {blocks, 1, blocks, cluster_shared(cell, dtype, K).backward}, kClusterThreads);
  });
}

}  // namespace seqfuse
