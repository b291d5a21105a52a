// Rows dealt out in portions to whichever worker is free: a thread that wakes late, or whose core is busy elsewhere,
// does less. For kernels whose rows don't meet, so that a result depends neither on threads nor on their timing.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

// f(begin, end) over portions of [0, rows). `grain`: elements a worker should have, or waking it costs more than it
// saves.
template <class F>
void deal_rows(const Parallel& parallel, int64_t rows, int64_t cols, F f, int64_t grain = 1 << 14) {
  const int64_t useful = (rows * cols + grain - 1) / grain;
  int64_t workers = parallel.threads < useful ? parallel.threads : useful;
  if (workers > rows) workers = rows;
  if (workers <= 1) return f(int64_t(0), rows);
  int64_t portions = 8 * workers, next = 0;
  if (portions > useful) portions = useful;
  if (portions > rows) portions = rows;
  auto job = [&](int64_t, int64_t) {
    for (int64_t p; (p = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < portions;)
      f(rows * p / portions, rows * (p + 1) / portions);
  };
  parallel(workers, job);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
