// Whether and how the cluster-persistent recurrent kernel runs a scan: pure functions, so that they can be tested and
// printed where there is no GPU; and the same for the current device (rnn_cluster.cu).
#pragma once
#include <cstdio>
#include <string>

#include "seqfuse/rnn.h"

namespace seqfuse::cuda {

// A thread's share of w_hh is 128 registers at most: K = 512 for an LSTM in 16 bits, in tf32 half of that; see
// rnn_cluster.cuh. Why not more: docs/recurrent.md.
inline int64_t cluster_most_units(Cell cell, DType dtype) {
  return dtype == DType::f32 && gates_of(cell) > 1 ? 256 : 512;
}

struct ClusterShared {
  int64_t forward, backward;  // dynamic shared memory of a block, bytes
};

// Forward: one gate's weights (larger than h, twice) and the partial sums. Backward: da twice, and one gate's weights
// or the partial dh of every block, twice. And two mbarriers.
constexpr ClusterShared cluster_shared(Cell cell, DType dtype, int64_t extent) {
  const int64_t G = gates_of(cell), size = size_of(dtype);
  const int64_t weights = 32 * (extent * size + 16), parts = 2 * (extent / 32) * 2048;
  return {weights + 8 * G * 256 + 16, 2 * G * 512 * size + 16 + (parts > weights ? parts : weights)};
}

// What a plan depends on, besides the device.
struct RnnClusterCase {
  Cell cell;
  DType dtype;
  int64_t B, H;
  int scans = 1;          // 2: both directions of a layer
  bool tf32 = false;      // whether float32 may be multiplied in tf32
  bool backward = false;  // which pass
};

struct RnnClusterPlan {
  std::string refusal;   // empty: the kernel can run
  int64_t blocks = 0;    // of a cluster
  int64_t groups = 0;    // clusters of the launch, each for 16 batch rows of one scan
  int64_t resident = 0;  // clusters that the device holds at once
  int64_t waves = 0;
  int64_t extent = 0;  // of the contraction: which instantiation
  ClusterShared shared{};

  std::string text() const {
    if (!refusal.empty()) return "one launch a step: " + refusal;
    char line[200];
    std::snprintf(line, sizeof line,
                  "one launch: %lld clusters of %lld blocks, %lld at a time (%lld waves), extent %lld",
                  static_cast<long long>(groups), static_cast<long long>(blocks), static_cast<long long>(resident),
                  static_cast<long long>(waves), static_cast<long long>(extent));
    return line;
  }
};

// What the shape alone decides. capability: 10 * major + minor.
inline RnnClusterPlan rnn_cluster_shape(const RnnClusterCase& c, int capability) {
  RnnClusterPlan plan;
  const int64_t most = cluster_most_units(c.cell, c.dtype);
  if (capability < 90 || capability >= 100)
    plan.refusal = "the cluster kernel is for compute capability 9.0 (Hopper), this device has " +
                   std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  else if (c.dtype == DType::f32 && !c.tf32)
    plan.refusal = "the cluster kernel multiplies float32 in tf32, which torch.set_float32_matmul_precision must allow";
  else if (c.H > most)
    plan.refusal = "a cluster holds the weights of " + std::to_string(most) + " hidden units at most" +
                   (c.dtype == DType::f32 ? " in float32" : "") + ", not " + std::to_string(c.H);
  if (!plan.refusal.empty()) return plan;
  plan.blocks = (c.H + 31) / 32, plan.groups = c.scans * ((c.B + 15) / 16);
  plan.extent = c.H <= 256 ? 256 : 512;
  plan.shared = cluster_shared(c.cell, c.dtype, plan.extent);
  return plan;
}

// resident: what cudaOccupancyMaxActiveClusters says of the kernel in clusters of that shape's `blocks`. A cluster that
// has started holds all its blocks, so one resident cluster is enough to make progress: more only wait their turn.
inline RnnClusterPlan rnn_cluster_plan(const RnnClusterCase& c, int capability, int64_t resident) {
  RnnClusterPlan plan = rnn_cluster_shape(c, capability);
  if (!plan.refusal.empty()) return plan;
  plan.resident = resident;
  if (resident < 1) {
    plan.refusal = "the device has no room for a cluster of " + std::to_string(plan.blocks) +
                   " blocks (a MIG slice, or multiprocessors that are switched off)";
    return plan;
  }
  plan.waves = (plan.groups + resident - 1) / resident;
  return plan;
}

// the name of an option in use that these kernels don't have; null: there is none
inline const char* cluster_option_refused(const RnnOptions& o) {
  if (o.packed) return "a packed sequence";
  if (o.hidden_mask) return "hidden_mask";
  if (o.peephole) return "peephole";
  return o.heads > 1 ? "w_hh with heads" : nullptr;
}

// For the current device. The answers of the driver are kept, a plan costs no more than a look-up.
RnnClusterPlan rnn_cluster_plan_here(const RnnClusterCase&);

// For tests and benchmarks: false makes every plan of rnn_cluster_plan_here a refusal.
void rnn_cluster_allow(bool);

}  // namespace seqfuse::cuda
