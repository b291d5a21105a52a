// Launches of rnn_cluster_forward.cuh and rnn_cluster_backward.cuh, the last sum of db_hh, and the plan for the current
// device. Contract: seqfuse/rnn.h
#include <atomic>
#include <initializer_list>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/column_sum.cuh"
#include "cuda/rnn_cluster_backward.cuh"
#include "cuda/rnn_cluster_forward.cuh"
#include "cuda/rnn_cluster_plan.h"

namespace seqfuse {
namespace {

using namespace cuda;

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

void set_options(ClusterOptions& out, const RnnOptions& o, int scan) {
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

template <class T>
ClusterForward<T> forward_view(const RnnForward& a) {
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
                           &forward_view<T>);
  });
}

int64_t rnn_forward_clusters_resident_cuda(Cell cell, DType dtype, int64_t H) {
  return with_cluster_instance(cell, dtype, H, [&]<Cell C, class T, int K>() {
    const int blocks = int((H + kBlockUnits - 1) / kBlockUnits);
    return dev::resident_clusters(&rnn_cluster_forward<C, T, K>,
                                  {blocks, 1, blocks, cluster_shared(cell, dtype, K).forward}, kClusterThreads);
  });
}

namespace {

int64_t partial_rows(int64_t B) {
  return 2 * ((B + kGroupRows - 1) / kGroupRows);
}

template <class T>
ClusterBackward<T> backward_view(const RnnBackward& a) {
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
  for (int i = 0; i < count; i++)
    if (sums != bool(scans[i].db_hh)) return kInvalidValue;
  const int64_t rows = partial_rows(a.B), cols = gates_of(a.cell) * a.H;
  ColumnSum sum[2];
  for (int i = 0; i < 2; i++)
    sum[i] = {static_cast<float*>(workspace) + i * rows * cols, i < count ? scans[i].db_hh : nullptr, rows, cols};
  const int error = with_cluster_instance(a.cell, a.dtype, a.H, [&]<Cell C, class T, int K>() {
    static_assert(sizeof(BackwardShared<T, kGates<C>, K>) == cluster_shared(C, dtype_number<T>, K).backward);
    return launch_clusters(&rnn_cluster_backward<C, T, K>, scans, count, cluster_shared(C, a.dtype, K).backward, stream,
                           [&](const RnnBackward& scan) {
                             ClusterBackward<T> p = backward_view<T>(scan);
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

namespace cuda {
namespace {

std::atomic<bool> allowed{true};

// what the driver says costs some microseconds, and does not change
int64_t resident(const RnnClusterCase& c) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Cell, DType, int64_t, bool>, int64_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = known.try_emplace({dev::current_device(), c.cell, c.dtype, c.H, c.backward}, 0).first;
  if (entry->second == 0)  // none may also be an error, which need not come again
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
