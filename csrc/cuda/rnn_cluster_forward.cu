// The launch of rnn_cluster_forward.cuh, contract: seqfuse/rnn.h. Also the plan for the current device.
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/rnn_cluster_forward.cuh"
#include "cuda/rnn_cluster_launch.cuh"

namespace seqfuse {
namespace {

using namespace cuda;

template <class T>
ClusterForward<T> view_of(const RnnForward& a) {
  ClusterForward<T> p{};
  const bool paired = pairs_fit<T>(a.H, {a.xg, a.h0, a.c0, a.w_hh, a.b_hh, a.y, a.gates, a.h_n, a.c_n},
                                   {a.xg_strides, a.y_strides, a.gates_strides});
  p.shape = shape_of<T>(a, a.reverse, paired);
  p.xg = sequence_of<const T>(a.xg, a.xg_strides), p.y = sequence_of<T>(a.y, a.y_strides);
  p.gates = sequence_of<T>(a.gates, a.gates_strides), p.cells = sequence_of<float>(a.cells, a.cells_strides);
  p.h0 = static_cast<const T*>(a.h0), p.c0 = static_cast<const T*>(a.c0);
  p.w_hh = static_cast<const T*>(a.w_hh), p.b_hh = static_cast<const T*>(a.b_hh);
  p.h_n = static_cast<T*>(a.h_n), p.c_n = static_cast<T*>(a.c_n);
  return p;
}

}  // namespace

int rnn_forward_cluster_cuda(const RnnForward* scans, int count, void* stream) {
  const RnnForward& a = scans[0];
  if (const int error = cluster_refused(scans, count)) return error;
  return with_cluster_instance(a.cell, a.dtype, a.H, [&]<Cell C, class T, int K>() {
    static_assert(sizeof(ForwardShared<T, kGates<C>, K>) == cluster_shared(C, dtype_number<T>, K).forward);
    return launch_clusters(&rnn_cluster_forward<C, T, K>, scans, count, cluster_shared(C, a.dtype, K).forward, stream,
                           &view_of<T>);
  });
}

int64_t rnn_forward_clusters_resident_cuda(Cell cell, DType dtype, int64_t H) {
  return with_cluster_instance(cell, dtype, H, [&]<Cell C, class T, int K>() {
    const int blocks = int((H + kBlockUnits - 1) / kBlockUnits);
    return dev::resident_clusters(&rnn_cluster_forward<C, T, K>,
                                  {blocks, 1, blocks, cluster_shared(cell, dtype, K).forward}, kClusterThreads);
  });
}

namespace cuda {
namespace {

std::atomic<bool> allowed{true};

// what the driver says costs some microseconds, and does not change
int64_t resident(const RnnClusterCase& c) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Cell, DType, int64_t, bool>, int64_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = known.try_emplace({dev::current_device(), c.cell, c.dtype, c.H, c.backward}, 0);
  if (fresh)
    entry->second = c.backward ? rnn_backward_clusters_resident_cuda(c.cell, c.dtype, c.H)
                               : rnn_forward_clusters_resident_cuda(c.cell, c.dtype, c.H);
  return entry->second;
}

}  // namespace

void rnn_cluster_allow(bool value) {
  allowed = value;
}

RnnClusterPlan rnn_cluster_plan_here(const RnnClusterCase& c) {
  RnnClusterPlan plan = rnn_cluster_shape(c, dev::capability());
  if (plan.refusal.empty() && !allowed) plan.refusal = "the cluster kernel is switched off";
  if (!plan.refusal.empty()) return plan;
  return rnn_cluster_plan(c, dev::capability(), resident(c));
}

}  // namespace cuda

}  // namespace seqfuse
