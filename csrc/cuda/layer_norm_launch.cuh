// What the two layer_norm launchers share: the shape of a launch, the alignment test, the switch over types. They are
// two files so that they compile in parallel.
#pragma once
#include "cuda/layer_norm.cuh"
#include "seqfuse/layer_norm.h"

namespace seqfuse::cuda {

struct Shape {
  int group, threads, cluster;  // threads a row in a block, threads a block, blocks a row
  bool in_registers;            // else the *_long kernel
};

// A row takes the smallest group that holds it, with `a_thread` columns each, or the smallest cluster of blocks
inline Shape shape_for(int64_t cols, int a_thread) {
  int group = dev::kWarp;
  while (group < kMostThreads && int64_t(group) * a_thread < cols) group *= 2;
  int cluster = 1;
  if (dev::capability() == 90)
    while (cluster < kMostBlocksARow && int64_t(group) * cluster * a_thread < cols) cluster *= 2;
  const bool fits = int64_t(group) * cluster * a_thread >= cols;
  return {group, group < kSharedThreads ? kSharedThreads : group, fits ? cluster : 1, fits};
}

// blocks, or clusters of them, of at most `most` blocks
inline int64_t clusters_for(int64_t rows, const Shape& s, int64_t most) {
  const int64_t groups = s.in_registers ? s.threads / s.group : 1, wanted = (rows + groups - 1) / groups;
  const int64_t allowed = most / s.cluster > 0 ? most / s.cluster : 1;
  return wanted < allowed ? wanted : allowed;
}

template <class... Pointers>
bool vectors_fit(int64_t cols, int64_t size, Pointers... p) {
  return cols * size % 16 == 0 && (dev::aligned_16(p) && ...);
}

// null in rms_norm: the kernels' sign for it
template <class Call>
auto mean_of(const Call& a) {
  return a.options.rms ? nullptr : a.mean;
}

inline float offset_of(const NormOptions& o) {
  return o.zero_centered ? 1.0f : 0.0f;
}

inline NormDropout dropout_of(const NormOptions& o) {
  return norm_dropout(o.seed, o.dropout_p);
}

// f(T{}, P{}) for the element and parameter types
template <class F>
int with_types(DType dtype, DType param_dtype, F f) {
  return dev::with_dtype(dtype, [&](auto t) {
    if (param_dtype == DType::f32) return f(t, float{});
    return f(t, t);
  });
}

}  // namespace seqfuse::cuda
