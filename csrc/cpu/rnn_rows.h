// Which sequences a step of the scan works on, and what stands at a (step, sequence) besides the sequence tensors.
//
// The scan holds its sequences in slots. With lengths they are sorted, longest first, so that the sequences which run
// at a step are the first ones of a worker's slots: steps cost what exists, and no data is moved. Where workers split
// the batch they take turns along the sorted order, so that each has its share of the long ones.
#pragma once
#include "cpu/scratch.h"
#include "seqfuse/rnn.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

struct Range {
  int64_t begin, end;
  SEQFUSE_INLINE int64_t size() const { return end - begin; }
};

SEQFUSE_INLINE Range part(int64_t n, int64_t i, int64_t of) {
  return {n * i / of, n * (i + 1) / of};
}

struct Plan {
  int64_t workers;
  bool by_batch;
  bool near = true;  // each worker's weights, as floats where the processor does not multiply pairs, stay in its L2
};

// The slots of one of the workers that split the batch: as many as it gets when they take turns.
SEQFUSE_INLINE Range turns(int64_t B, int64_t worker, int64_t workers) {
  const int64_t least = B / workers, more = B % workers;
  const int64_t begin = worker * least + (worker < more ? worker : more);
  return {begin, begin + least + (worker < more)};
}

// Plain: slot b is sequence b and runs all T steps; no table is kept or read.
template <bool Plain>
struct Rows {
  int64_t T, B;
  int64_t steps;  // of the longest sequence
  int64_t* sequence_ = nullptr;
  int64_t* place_ = nullptr;
  int64_t* length_ = nullptr;
  int64_t* count_ = nullptr;

  Rows(int64_t T, int64_t B, const RnnOptions& o) : T(T), B(B), steps(T) {
    if (Plain || !o.lengths) return;
    steps = 0;
    for (int64_t b = 0; b < B; b++) steps = o.lengths[b] > steps ? o.lengths[b] : steps;
  }

  void take(Scratch& s, const RnnOptions& o) {
    if constexpr (!Plain) {
      s.take(sequence_, B);
      s.take(place_, B);
      s.take(length_, B);
      s.take(count_, o.lengths ? steps + 1 : 0);
    }
  }

  void fill(const RnnOptions& o, const Plan& plan) {
    if constexpr (!Plain) {
      if (o.lengths) {  // a counting sort: count_[d] becomes the first position of length steps - d
        memset(count_, 0, size_t(steps + 1) * sizeof(int64_t));
        for (int64_t b = 0; b < B; b++) count_[steps - o.lengths[b]]++;
        for (int64_t d = 0, sum = 0; d <= steps; d++) {
          const int64_t n = count_[d];
          count_[d] = sum, sum += n;
        }
      }
      for (int64_t b = 0, start = 0; b < B; b++) {
        const int64_t length = o.lengths ? o.lengths[b] : T, position = o.lengths ? count_[steps - length]++ : b;
        const int64_t slot =
            plan.by_batch ? turns(B, position % plan.workers, plan.workers).begin + position / plan.workers : position;
        sequence_[slot] = b, length_[slot] = length, place_[slot] = o.packed ? start : b;
        start += length;
      }
    }
  }

  SEQFUSE_INLINE int64_t sequence(int64_t slot) const {
    if constexpr (Plain) return slot;
    return sequence_[slot];
  }
  SEQFUSE_INLINE int64_t length(int64_t slot) const {
    if constexpr (Plain) return T;
    return length_[slot];
  }
  // of (t, slot) in a sequence tensor
  SEQFUSE_INLINE int64_t offset(Strides s, int64_t t, int64_t slot) const {
    if constexpr (Plain) return t * s.t + slot * s.b;
    return t * s.t + place_[slot] * s.b;
  }

  // Those of a worker's slots whose sequence has a step t.
  SEQFUSE_INLINE Range running(Range slots, int64_t t) const {
    if constexpr (Plain) return slots;
    int64_t low = slots.begin, high = slots.end;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      length_[middle] > t ? low = middle + 1 : high = middle;
    }
    return {slots.begin, low};
  }

  // The first and the last step of a sequence in the order of the forward pass; its length is not 0.
  SEQFUSE_INLINE int64_t first(int64_t slot, bool reverse) const { return reverse ? length(slot) - 1 : 0; }
  SEQFUSE_INLINE int64_t last(int64_t slot, bool reverse) const { return reverse ? 0 : length(slot) - 1; }

  // Whether the state before (t, slot) is 0 instead of what was left there.
  SEQFUSE_INLINE bool reset(const RnnOptions& o, int64_t t, int64_t slot) const {
    if constexpr (Plain) return false;
    return o.resets && o.resets[offset(o.resets_strides, t, slot)];
  }
};

// n bools as 0.0 and 1.0
SEQFUSE_INLINE vf load_bools(const bool* p, int n) {
  typedef uint8_t vb __attribute__((vector_size(VL)));
  vb bytes{};
  if (n == VL)
    memcpy(&bytes, p, VL);
  else
    memcpy(&bytes, p, size_t(n));
  return select(__builtin_convertvector(bytes, vi) != 0, splat(1.0f), splat(0.0f));
}

// Zoneout of one vector of units: z of the value before is kept, 1 - z of the new one passes. What does not take part
// at all is not multiplied, so that it may be a NaN.
struct Zone {
  vf z;
  SEQFUSE_INLINE vf kept(vf before) const { return select(z == splat(0.0f), splat(0.0f), z * before); }
  SEQFUSE_INLINE vf passed(vf now) const { return select(z == splat(1.0f), splat(0.0f), (1.0f - z) * now); }
  SEQFUSE_INLINE vf blend(vf before, vf now) const { return kept(before) + passed(now); }
};

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
