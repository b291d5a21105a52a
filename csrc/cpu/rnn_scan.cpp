// See rnn_scan.h.
#include "cpu/rnn_scan.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#include <unistd.h>
#endif

namespace seqfuse {
namespace SEQFUSE_ISA {

void Barrier::yield_thread() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

namespace {

template <class P>
void advance(P*& p, int64_t elements, int64_t size) {
  if (p) p = (P*)((char*)p + elements * size);
}

template <class Args>
Args head_of_both(Args a, int64_t head) {
  const int64_t D = a.H / a.options.heads, u = head * D, size = size_of(a.dtype);
  advance(a.w_hh, u * D, size);
  advance(a.h0, u, size), advance(a.c0, u, size), advance(a.gates, u, size), advance(a.y, u, size);
  advance(a.cells, u, sizeof(float));
  RnnOptions& o = a.options;
  advance(o.hidden_mask, u, size), advance(o.peephole, u, size);
  advance(o.zone_h, u, 1), advance(o.zone_c, u, 1);
  return a;
}

}  // namespace

RnnForward head_of(const RnnForward& args, int64_t head) {
  RnnForward a = head_of_both(args, head);
  const int64_t u = head * (a.H / a.options.heads), size = size_of(a.dtype);
  advance(a.xg, u, size), advance(a.b_hh, u, size), advance(a.h_n, u, size), advance(a.c_n, u, size);
  return a;
}

RnnBackward head_of(const RnnBackward& args, int64_t head) {
  RnnBackward a = head_of_both(args, head);
  const int64_t u = head * (a.H / a.options.heads), size = size_of(a.dtype);
  advance(a.dy, u, size), advance(a.dh_n, u, size), advance(a.dc_n, u, size), advance(a.dcells, u, sizeof(float));
  advance(a.dxg, u, size), advance(a.dan, u, size), advance(a.dh0, u, size), advance(a.dc0, u, size);
  advance(a.db_hh, u, sizeof(float));
  return a;
}

static int64_t weight_bytes(DType dtype, int64_t H, int64_t G) {
  const bool pairs = has_dot && dtype != DType::f32;
  return G * H * H * (pairs ? 2 : 4);
}

double step_ns(DType dtype, int64_t B, int64_t H, int64_t G) {
  const double reading = double(weight_bytes(dtype, H, G)) / 80.0;
  const double multiplying = double(B) * double(G) * double(H) * double(H) / (has_tiles ? 200.0 : 50.0);
  return reading > multiplying ? reading : multiplying;
}

// Whether each core keeps so much in its second-level cache beside everything else.
static bool fits_l2(int64_t bytes) {
  long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  size = found;
#endif
  return bytes <= (size > 0 ? size : 1 << 20) / 4 * 3;
}

// Rows from which on a worker multiplies by all of w_hh as fast as it reads it from its own cache. With the tile unit
// its products are fast. Intel's two FMAs of 512 bits a cycle use a vector of weights up before the L2 brings the next:
// with three rows of floats a step took longer than with four.
static int64_t least_rows(DType dtype, bool near) {
  if (has_tiles) return near ? 8 : 16;
  static const bool eager = VL == 16 && !has_dot && is_intel();
  if (eager) return dtype == DType::f32 ? (near ? 4 : 6) : near ? 3 : 4;
  return near ? 2 : 4;
}

// Every rule about how many workers a scan gets, and what they split, is here (measurements: docs/recurrent.md).
// Splitting the batch needs no barrier and moves no state between cores, so it comes first wherever the rows left to
// each worker still hide the reading of all of w_hh.
Plan plan_scan(const Parallel& parallel, DType dtype, int64_t T, int64_t B, int64_t H, int64_t G) {
  const int64_t threads = parallel.threads < 1 ? 1 : parallel.threads;
  const double step = step_ns(dtype, B, H, G);
  const int64_t weights = weight_bytes(dtype, H, G);
  const bool near = fits_l2(weights);
  if (B >= least_rows(dtype, near) * threads || (!parallel.concurrent && B > 1)) {
    if (step * double(T) < 15e3) return {1, false, near};  // less than what starting the threads costs
    return {threads < B ? threads : B, true, near};
  }
  if (!parallel.concurrent || step < (has_tiles ? 4e3 : 2.5e3))
    return {1, false, near};  // less than what a barrier saves
  const int64_t blocks = ceil_div(H, VL), workers = threads < blocks ? threads : blocks;
  return {workers, false, fits_l2(weights / workers)};
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
