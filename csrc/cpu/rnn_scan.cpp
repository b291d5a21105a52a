// See rnn_scan.h.
#include "cpu/rnn_scan.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace seqfuse {
namespace SEQFUSE_ISA {

void Barrier::yield_thread() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

// Every rule about how many workers a scan gets, and what they split, is here (measurements: docs/rnn_cpu.md).
Plan plan_scan(const Parallel& parallel, DType dtype, int64_t T, int64_t B, int64_t H, int64_t G) {
  (void)T, (void)dtype;
  const int64_t blocks = ceil_div(H, VL);
  int64_t workers = parallel.threads < 1 ? 1 : parallel.threads;
  const double work = double(B) * double(G) * double(H) * double(H);  // multiply-adds a step
  if (work < 4096.0) workers = 1;
  const bool by_batch = B >= 2 * workers && (G * H * H * 4 <= 256 * 1024 || !parallel.concurrent);
  if (by_batch) return {workers < B ? workers : B, true};
  if (!parallel.concurrent) return {1, false};
  return {workers < blocks ? workers : blocks, false};
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
