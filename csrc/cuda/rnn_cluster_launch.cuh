// What the two launchers of the cluster kernels share: shapes, options, launches in parts, and the choice of an
// instance.
#pragma once
#include <initializer_list>

#include "cuda/rnn_cluster.cuh"
#include "cuda/rnn_cluster_plan.h"

namespace seqfuse::cuda {

// cudaErrorNotSupported and cudaErrorInvalidValue, where no CUDA header may be included
constexpr int kNotSupported = 801, kInvalidValue = 1;

// whether all of these arrays of T can be read in pairs
template <class T>
bool pairs_fit(int64_t H, std::initializer_list<const void*> pointers, std::initializer_list<Strides> strides) {
  bool fit = H % 2 == 0;
  for (const void* p : pointers) fit = fit && reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0;
  for (const Strides& s : strides) fit = fit && s.t % 2 == 0 && s.b % 2 == 0;
  return fit;
}

// What the shape of a scan is to its kernel. backwards: whether the kernel takes the last time step first.
template <class T, class Scan>
ClusterShape shape_of(const Scan& a, bool backwards, bool paired) {
  ClusterShape shape{};
  shape.steps = a.T, shape.first = backwards ? a.T - 1 : 0, shape.direction = backwards ? -1 : 1;
  shape.H = int(a.H), shape.rows = a.B, shape.relu = a.cell == Cell::rnn_relu;
  shape.paired = paired, shape.vector = a.H % dev::kVector<T> == 0 && dev::aligned_16(a.w_hh);
  return shape;
}

template <class T>
inline constexpr DType dtype_number = std::is_same_v<T, dev::bf16>  ? DType::bf16
                                      : std::is_same_v<T, dev::f16> ? DType::f16
                                                                    : DType::f32;

template <class T, class Pointer>
Sequence<T> sequence_of(Pointer* data, Strides strides) {
  return {static_cast<T*>(data), strides};
}

// what two scans of one launch must have in common
template <class Scan>
bool alike(const Scan& a, const Scan& b) {
  return a.cell == b.cell && a.dtype == b.dtype && a.T == b.T && a.B == b.B && a.H == b.H &&
         a.options.lengths == b.options.lengths && a.options.resets == b.options.resets &&
         a.options.zoneout_h == b.options.zoneout_h && a.options.zoneout_c == b.options.zoneout_c;
}

// a cudaError_t for what these kernels don't take
template <class Scan>
int cluster_refused(const Scan* scans, int count) {
  if (count < 1 || count > 2 || !alike(scans[0], scans[count - 1])) return kInvalidValue;
  for (int i = 0; i < count; i++)
    if (cluster_option_refused(scans[i].options)) return kNotSupported;
  return 0;
}

inline void set_options(ClusterOptions& out, const RnnOptions& o, int scan) {
  out.lengths = o.lengths, out.resets = {o.resets, o.resets_strides};
  out.zone_h[scan] = {o.zone_h, o.zone_h_strides}, out.zone_c[scan] = {o.zone_c, o.zone_c_strides};
  out.zoneout_h = o.zoneout_h, out.zoneout_c = o.zoneout_c;
}

// Launches `kernel` for all batch rows of one scan or two. make(scan) gives a kernel's view of one.
template <class View, class Scan, class Make>
int launch_clusters(void (*kernel)(Scans<View>, ClusterOptions), const Scan* scans, int count, int64_t shared,
                    void* stream, Make make) {
  Scans<View> views{};
  ClusterOptions options{};
  for (int i = 0; i < count; i++) {
    views.of[i] = make(scans[i]);
    set_options(options, scans[i].options, i);
  }
  const int blocks = int((scans->H + kBlockUnits - 1) / kBlockUnits);
  const int64_t groups = (scans->B + kGroupRows - 1) / kGroupRows;
  const dev::Grid grid{groups * blocks, count, blocks, shared};
  return dev::launch(kernel, grid, kClusterThreads, stream, views, options);
}

// f(C, T, K) as template arguments of f.operator()
template <class F>
int with_cluster_instance(Cell cell, DType dtype, int64_t H, F f) {
  auto with_cell = [&]<class T, int K>() {
    if (cell == Cell::lstm) return f.template operator()<Cell::lstm, T, K>();
    if (cell == Cell::gru) return f.template operator()<Cell::gru, T, K>();
    return f.template operator()<Cell::rnn_tanh, T, K>();
  };
  auto with_extent = [&]<class T>() {
    if (H <= 256) return with_cell.template operator()<T, 256>();
    if constexpr (sizeof(T) == 2)
      return with_cell.template operator()<T, 512>();
    else  // only the weights of a plain RNN fit
      return f.template operator()<Cell::rnn_tanh, T, 512>();
  };
  if (H < 1 || H > cluster_most_units(cell, dtype)) return kInvalidValue;
  if (dtype == DType::bf16) return with_extent.template operator()<dev::bf16>();
  if (dtype == DType::f16) return with_extent.template operator()<dev::f16>();
  return with_extent.template operator()<float>();
}

}  // namespace seqfuse::cuda
