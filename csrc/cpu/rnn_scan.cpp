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

// Every rule about how many workers a scan gets, and what they split, is here (measurements: docs/recurrent.md).
// Splitting the batch needs no barrier and moves no state between cores, so it comes first wherever the rows left to
// each worker still hide the reading of all of w_hh.
Plan plan_scan(const Parallel& parallel, DType dtype, int64_t T, int64_t B, int64_t H, int64_t G) {
  const int64_t threads = parallel.threads < 1 ? 1 : parallel.threads;
  const bool pairs = has_dot && dtype != DType::f32;
  const int64_t bytes = G * H * H * (pairs ? 2 : 4);
  const double reading = double(bytes) / 80.0, multiplying = double(B) * double(G) * double(H) * double(H) / 50.0;
  const double step_ns = reading > multiplying ? reading : multiplying;  // of one core, roughly
  const bool fits_l2 = bytes <= 768 * 1024;
  const int64_t rows = fits_l2 ? 2 : 4;
  if (B >= rows * threads || (!parallel.concurrent && B > 1)) {
    if (step_ns * double(T) < 15e3) return {1, false};  // less than what starting the threads costs
    return {threads < B ? threads : B, true};
  }
  if (!parallel.concurrent || step_ns < 2.5e3) return {1, false};  // less than what a barrier saves
  const int64_t blocks = ceil_div(H, VL);
  return {threads < blocks ? threads : blocks, false};
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
