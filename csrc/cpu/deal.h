// Rows dealt out in portions, so that a thread that wakes late, or whose core is busy elsewhere, does less. For kernels
// whose rows don't meet, so that a result depends neither on threads nor on their timing.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

constexpr int64_t kGrain = 1 << 14;  // elements a worker should have, or waking it costs more than it saves

// How many workers [rows, cols] are worth; at least one.
inline int64_t useful_workers(const Parallel& parallel, int64_t rows, int64_t cols) {
  const int64_t useful = (rows * cols + kGrain - 1) / kGrain;
  int64_t n = parallel.threads < useful ? parallel.threads : useful;
  if (n > rows) n = rows;
  return n < 1 ? 1 : n;
}

// f(portion, begin, end): called for each of `portions` of the rows, by one worker. Each worker begins with a range of
// its own, the one that torch's ops deal it, whose rows its core's private cache may hold; then it helps the others.
template <class F>
void deal_portions(const Parallel& parallel, int64_t workers, int64_t rows, int64_t portions, F f) {
  constexpr int64_t most = 64;
  struct alignas(64) {
    int64_t next;
  } ranges[most];
  if (workers > portions) workers = portions < 1 ? 1 : portions;
  const int64_t n = workers < most ? workers : most;
  for (int64_t i = 0; i < n; i++) ranges[i].next = portions * i / n;
  auto job = [&](int64_t worker, int64_t) {
    for (int64_t k = 0; k < n; k++) {
      const int64_t i = (worker + k) % n, end = portions * (i + 1) / n;
      for (int64_t p; (p = __atomic_fetch_add(&ranges[i].next, 1, __ATOMIC_RELAXED)) < end;)
        f(p, rows * p / portions, rows * (p + 1) / portions);
    }
  };
  parallel(workers, job);
}

// f(begin, end) over portions of [0, rows).
template <class F>
void deal_rows(const Parallel& parallel, int64_t rows, int64_t cols, F f) {
  const int64_t workers = useful_workers(parallel, rows, cols), useful = (rows * cols + kGrain - 1) / kGrain;
  if (workers == 1) return f(int64_t(0), rows);
  int64_t portions = 8 * workers;
  if (portions > useful) portions = useful;
  if (portions > rows) portions = rows;
  deal_portions(parallel, workers, rows, portions, [&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
