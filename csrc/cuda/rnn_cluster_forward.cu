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

template <Cell C, class T, int K, bool Options>
int forward(const RnnForward& a, void* stream) {
  ClusterForward<T> p{};
  p.shape.steps = a.T, p.shape.first = a.reverse ? a.T - 1 : 0, p.shape.direction = a.reverse ? -1 : 1;
  p.shape.H = int(a.H), p.shape.relu = a.cell == Cell::rnn_relu;
  p.shape.paired = pairs_fit(a.H, {a.xg, a.h0, a.c0, a.w_hh, a.b_hh, a.y, a.gates, a.h_n, a.c_n},
                             {a.xg_strides, a.y_strides, a.gates_strides});
  p.shape.vector = a.H % 8 == 0 && dev::aligned_16(a.w_hh);
  p.xg = sequence_of<const T>(a.xg, a.xg_strides), p.y = sequence_of<T>(a.y, a.y_strides);
  p.gates = sequence_of<T>(a.gates, a.gates_strides), p.cells = sequence_of<float>(a.cells, a.cells_strides);
  p.h0 = static_cast<const T*>(a.h0), p.c0 = static_cast<const T*>(a.c0);
  p.w_hh = static_cast<const T*>(a.w_hh), p.b_hh = static_cast<const T*>(a.b_hh);
  p.h_n = static_cast<T*>(a.h_n), p.c_n = static_cast<T*>(a.c_n);
  return launch_clusters<Options>(&rnn_cluster_forward<C, T, K, Options>, p, a.options, a.B,
                                  cluster_shared(a.cell, K).forward, stream);
}

}  // namespace

int rnn_forward_cluster_cuda(const RnnForward& a, void* stream) {
  if (cluster_option_refused(a.options)) return kNotSupported;
  return with_cluster_instance(
      a.cell, a.dtype, a.H, a.options.in_use() != nullptr,
      [&]<Cell C, class T, int K, bool Options>() { return forward<C, T, K, Options>(a, stream); });
}

int64_t rnn_forward_clusters_resident_cuda(Cell cell, DType dtype, int64_t H, bool options) {
  return with_cluster_instance(cell, dtype, H, options, [&]<Cell C, class T, int K, bool Options>() {
    const int blocks = int((H + kBlockUnits - 1) / kBlockUnits);
    return dev::resident_clusters(&rnn_cluster_forward<C, T, K, Options>,
                                  {blocks, 1, blocks, cluster_shared(cell, K).forward}, kClusterThreads);
  });
}

namespace cuda {
namespace {

std::atomic<bool> allowed{true};

// what the driver says costs some microseconds, and does not change
int64_t resident(Cell cell, DType dtype, int64_t H, bool options, bool backward) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Cell, DType, int64_t, bool, bool>, int64_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = known.try_emplace({dev::current_device(), cell, dtype, H, options, backward}, 0);
  if (fresh)
    entry->second = backward ? rnn_backward_clusters_resident_cuda(cell, dtype, H, options)
                             : rnn_forward_clusters_resident_cuda(cell, dtype, H, options);
  return entry->second;
}

}  // namespace

void rnn_cluster_allow(bool value) {
  allowed = value;
}

RnnClusterPlan rnn_cluster_plan_here(Cell cell, DType dtype, int64_t B, int64_t H, bool options, bool backward) {
  RnnClusterPlan plan = rnn_cluster_shape(cell, dtype, B, H, dev::capability());
  if (plan.refusal.empty() && !allowed) plan.refusal = "the cluster kernel is switched off";
  if (!plan.refusal.empty()) return plan;
  return rnn_cluster_plan(cell, dtype, B, H, dev::capability(), resident(cell, dtype, H, options, backward));
}

}  // namespace cuda

}  // namespace seqfuse
