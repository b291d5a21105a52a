// How the recurrent scan is spread over threads; shared by the forward and the backward pass.
//
// The whole time loop is one parallel region. `workers` logical workers split either the hidden units in blocks of VL
// (each keeps its slice of w_hh in its own cache; one barrier a step) or the batch (no barrier, but every core reads
// all of w_hh). Nothing depends on which thread runs which worker, so results repeat bit for bit.
#pragma once

#include "cpu/rnn_gemm.h"
#include "cpu/rnn_rows.h"
#include "cpu/scratch.h"
#include "seqfuse/rnn.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

// The time of one step on one core, roughly.
double step_ns(DType dtype, int64_t B, int64_t H, int64_t G);

Plan plan_scan(const Parallel& parallel, DType dtype, int64_t T, int64_t B, int64_t H, int64_t G);

// The units and the slots (rnn_rows.h) of one worker.
struct Slice {
  Range rows, blocks;
};

SEQFUSE_INLINE Slice slice_of(const Plan& p, int64_t worker, int64_t B, int64_t blocks) {
  if (p.by_batch) return {turns(B, worker, p.workers), {0, blocks}};
  return {{0, B}, part(blocks, worker, p.workers)};
}

// Rows of the largest slice.
SEQFUSE_INLINE int64_t rows_each(const Plan& p, int64_t B) {
  return p.by_batch ? ceil_div(B, p.workers) : B;
}

// Unit blocks are multiplied in groups of at most `most`, as even as can be.
SEQFUSE_INLINE int64_t groups_in(Range blocks, int64_t most) {
  return ceil_div(blocks.size(), most);
}
SEQFUSE_INLINE Range group(Range blocks, int64_t i, int64_t most) {
  const Range r = part(blocks.size(), i, groups_in(blocks, most));
  return {blocks.begin + r.begin, blocks.begin + r.end};
}

SEQFUSE_INLINE int lanes(int64_t block, int64_t H) {
  return int(H - block * VL < VL ? H - block * VL : VL);
}

template <class T>
SEQFUSE_INLINE vf get(const T* p, int n) {
  return n == VL ? load(p) : load_n(p, n);
}
template <class T>
SEQFUSE_INLINE void set(T* p, vf x, int n) {
  if (n == VL)
    store(p, x);
  else
    store_n(p, x, n);
}

// Writes x to place k of an operand row of the product (rnn_gemm.h): as T where pairs of bf16 are multiplied, else as
// the float of the rounded value.
template <class T>
SEQFUSE_INLINE void set_operand(word* row, int64_t k, vf x, int n) {
  if constexpr (uses_dot<T>)
    set((T*)row + k, x, n);
  else
    set((float*)row + k, rounded<T>(x), n);
}

// Half of an operand was just written by other cores. A tile would meet those lines one by one, each at the full
// latency between two cores; asked for all at once they overlap.
SEQFUSE_INLINE void prefetch_operand(const Plan& p, const word* operand, int64_t words) {
  if (p.by_batch || p.workers == 1) return;
  for (int64_t i = 0; i < words; i += 16) prefetch(operand + i);
}

// Words between operand rows: one line more than needed, so that rows of a power of two do not share cache sets.
SEQFUSE_INLINE int64_t operand_ld(int64_t words) {
  return ceil_div(words, 16) * 16 + 16;
}

SEQFUSE_INLINE void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A range of workers arrives at once, because a pool may give several of them to one thread.
class Barrier {
 public:
  explicit Barrier(int64_t workers) : workers_(workers) {}
  void wait(int64_t arriving) {
    const int64_t phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, arriving, __ATOMIC_ACQ_REL) == workers_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase; spins++) {
      if (spins < 2000)
        spin_pause();
      else
        yield_thread();  // more threads than cores: let the one we wait for run
    }
  }

 private:
  static void yield_thread();
  alignas(64) int64_t arrived_ = 0;
  alignas(64) int64_t phase_ = 0;
  int64_t workers_;
};

// Runs scan.pack(worker), scan.begin(worker), scan.step(worker, 0 .. steps - 1), scan.end(worker) for every worker.
// Every step, and the end, sees all that other workers wrote in the call before.
template <class Scan>
struct RunTogether {
  Scan& scan;
  Barrier& barrier;
  int64_t steps;
  void operator()(int64_t begin, int64_t end) {
    [[maybe_unused]] const tiles::InUse tiles_in_use;
    for (int64_t w = begin; w < end; w++) scan.pack(w), scan.begin(w);
    for (int64_t i = 0; i < steps; i++) {
      barrier.wait(end - begin);
      for (int64_t w = begin; w < end; w++) scan.step(w, i);
    }
    barrier.wait(end - begin);
    for (int64_t w = begin; w < end; w++) scan.end(w);
  }
};

template <class Scan>
struct PackOnly {
  Scan& scan;
  void operator()(int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) scan.pack(w);
  }
};

template <class Scan>
struct RunAlone {
  Scan& scan;
  int64_t steps;
  void operator()(int64_t begin, int64_t end) {
    [[maybe_unused]] const tiles::InUse tiles_in_use;
    for (int64_t w = begin; w < end; w++) {
      scan.begin(w);
      for (int64_t i = 0; i < steps; i++) scan.step(w, i);
      scan.end(w);
    }
  }
};

template <class Scan>
void run_scan(Scan& scan, const Plan& plan, int64_t steps, const Parallel& parallel) {
  if (plan.workers == 1) {
    PackOnly<Scan>{scan}(0, 1);
    RunAlone<Scan>{scan, steps}(0, 1);
  } else if (plan.by_batch) {
    PackOnly<Scan> pack{scan};
    parallel(plan.workers, pack);
    RunAlone<Scan> run{scan, steps};
    parallel(plan.workers, run);
  } else {
    Barrier barrier(plan.workers);
    RunTogether<Scan> run{scan, barrier, steps};
    parallel(plan.workers, run);
  }
}

// Tiles of the rows of a slice, none above the register budget: as even as can be, but for the tile unit, whose work
// comes in whole registers.
template <class F>
SEQFUSE_INLINE void for_row_tiles(Product product, Range rows, int vectors, F&& f) {
  const int64_t most = tile_rows(product, vectors), n = rows.size(), tiles = ceil_div(n, most);
  for (int64_t i = 0; i < tiles; i++) {
    const Range r = product != Product::tiles ? part(n, i, tiles) : Range{i * most, i + 1 < tiles ? (i + 1) * most : n};
    f(rows.begin + r.begin, int(r.size()));
  }
}

// The rows beyond a sequence's end that a worker clears at the end of a scan, where the sequences are dense.
SEQFUSE_INLINE Range rows_to_clear(const Plan& p, int64_t worker, int64_t B) {
  return p.by_batch ? turns(B, worker, p.workers) : part(B, worker, p.workers);
}

// The arguments of one head: pointers to its units. H stays the width of all heads, the distance between two gates.
RnnForward head_of(const RnnForward& a, int64_t head);
RnnBackward head_of(const RnnBackward& a, int64_t head);

// Builds a Scan for one head and runs it. Scan(args, plan) has take, pack, begin, step and end.
template <class Scan, class Args>
void run_head(const Args& a, const Plan& plan, const Parallel& parallel) {
  Scan scan(a, plan);
  Scratch scratch;
  scan.take(scratch);
  scratch.allocate();
  scan.take(scratch);
  scan.rows.fill(a.options, plan);
  run_scan(scan, plan, scan.rows.steps, parallel);
  scan.finish();
}

template <class Scan, class Args>
struct RunHeads {
  const Args& a;
  const Parallel& parallel;
  void operator()(int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++) run_head<Scan>(head_of(a, head), {1, false}, parallel);
  }
};

// Heads are scans of their own over views of the same tensors. Threads take whole heads where those go round evenly,
// else they share each head as they would share a scan.
template <class Scan, class Args>
void run_all(const Args& a, const Parallel& parallel) {
  const int64_t heads = a.options.heads, G = gates_of(a.cell);
  const Plan plan = plan_scan(parallel, a.dtype, a.T, a.B, a.H / heads, G);
  if (heads == 1) return run_head<Scan>(a, plan, parallel);
  RunHeads<Scan, Args> run{a, parallel};
  const int64_t threads = parallel.threads < 1 ? 1 : parallel.threads;
  const double work_ns = double(a.T) * step_ns(a.dtype, a.B, a.H / heads, G) * double(heads);
  if (work_ns < 15e3) return run(0, heads);  // less than what starting the threads costs
  if (heads % threads == 0 || heads >= 4 * threads) return parallel(heads, run);
  for (int64_t head = 0; head < heads; head++) run_head<Scan>(head_of(a, head), plan, parallel);
}

// f<T, cell, plain>() for the element type and the cell of a call; rnn_tanh stands for rnn_relu too.
template <class T, bool Plain, class F>
void for_cell_of(Cell cell, F f) {
  switch (cell) {
    case Cell::rnn_tanh:
    case Cell::rnn_relu:  // one copy of the code for both
      return f.template operator()<T, Cell::rnn_tanh, Plain>();
    case Cell::gru:
      return f.template operator()<T, Cell::gru, Plain>();
    case Cell::lstm:
      return f.template operator()<T, Cell::lstm, Plain>();
  }
}
template <class F>
void for_cell(DType dtype, Cell cell, bool plain, F f) {
  if (dtype != DType::f32)
    plain ? for_cell_of<bf16, true>(cell, f) : for_cell_of<bf16, false>(cell, f);
  else if constexpr (!has_dot)  // fp32 has nothing from dot products: see dispatch.cpp
    plain ? for_cell_of<float, true>(cell, f) : for_cell_of<float, false>(cell, f);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
