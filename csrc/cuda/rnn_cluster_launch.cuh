// What the two launchers of the cluster kernels share: shapes, options, launches in parts, and the choice of an
// instance.
#pragma once
#include <initializer_list>

#include "cuda/rnn_cluster.cuh"
#include "cuda/rnn_cluster_plan.h"

namespace seqfuse::cuda {

// cudaErrorNotSupported and cudaErrorInvalidValue, where no CUDA header may be included
constexpr int kNotSupported = 801, kInvalidValue = 1;

// whether all of these 16-bit arrays can be read in pairs
inline bool pairs_fit(int64_t H, std::initializer_list<const void*> pointers, std::initializer_list<Strides> strides) {
  bool fit = H % 2 == 0;
  for (const void* p : pointers) fit = fit && reinterpret_cast<uintptr_t>(p) % 4 == 0;
  for (const Strides& s : strides) fit = fit && s.t % 2 == 0 && s.b % 2 == 0;
  return fit;
}

template <class T, class Pointer>
Sequence<T> sequence_of(Pointer* data, Strides strides) {
  return {static_cast<T*>(data), strides};
}

inline void set_options(ClusterOptions<false>&, const RnnOptions&, int64_t, int64_t) {}
inline void set_options(ClusterOptions<true>& out, const RnnOptions& o, int64_t row0, int64_t rows) {
  out.resets = {o.resets, o.resets_strides};
  out.zone_h = {o.zone_h, o.zone_h_strides}, out.zone_c = {o.zone_c, o.zone_c_strides};
  out.zoneout_h = o.zoneout_h, out.zoneout_c = o.zoneout_c;
  out.limited = o.lengths != nullptr;
  for (int64_t b = row0; b < rows && o.lengths; b++) out.lengths[b - row0] = int32_t(o.lengths[b]);
}

// Launches `kernel` for all batch rows: in one go, with options in parts, whose lengths fit into the arguments.
template <bool Options, class Args>
int launch_clusters(void (*kernel)(Args, ClusterOptions<Options>), Args args, const RnnOptions& options, int64_t B,
                    int64_t shared, void* stream) {
  const int blocks = (args.shape.H + kBlockUnits - 1) / kBlockUnits;
  const int64_t part = Options ? kOptionRows : B;
  for (int64_t row0 = 0; row0 < B; row0 += part) {
    const int64_t rows = row0 + part < B ? row0 + part : B, groups = (rows - row0 + kGroupRows - 1) / kGroupRows;
    args.shape.row0 = row0, args.shape.rows = rows;
    ClusterOptions<Options> o{};
    set_options(o, options, row0, rows);
    const dev::Grid grid{groups * blocks, 1, blocks, shared};
    if (const int error = dev::launch(kernel, grid, kClusterThreads, stream, args, o)) return error;
  }
  return 0;
}

// f(C, T, K, Options) as template arguments of f.operator()
template <class F>
int with_cluster_instance(Cell cell, DType dtype, int64_t H, bool options, F f) {
  auto with_cell = [&]<class T, int K, bool Options>() {
    if (cell == Cell::lstm) return f.template operator()<Cell::lstm, T, K, Options>();
    if (cell == Cell::gru) return f.template operator()<Cell::gru, T, K, Options>();
    return f.template operator()<Cell::rnn_tanh, T, K, Options>();
  };
  auto with_extent = [&]<class T, bool Options>() {
    if (H <= 256) return with_cell.template operator()<T, 256, Options>();
    return with_cell.template operator()<T, 512, Options>();
  };
  auto with_type = [&]<class T>() {
    return options ? with_extent.template operator()<T, true>() : with_extent.template operator()<T, false>();
  };
  if (H < 1 || H > kClusterMostUnits) return kInvalidValue;
  if (dtype == DType::bf16) return with_type.template operator()<dev::bf16>();
  if (dtype == DType::f16) return with_type.template operator()<dev::f16>();
  return kNotSupported;
}

}  // namespace seqfuse::cuda
