// One step of beam search on the CPU. Contract: seqfuse/beam.h
//
// Floor: one read of the logits, which the product before has left in the caches. A beginning's row is read three times
// from there: largest, sum of exponentials, and the blocks whose largest may still enter the row's list of candidates.
// The best beginnings come first, so that after the first of them few blocks do.
#include "seqfuse/beam.h"

#include <cmath>

#include "cpu/deal.h"
#include "cpu/scratch.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr float kNone = -__builtin_inff();
constexpr int kVectors = 4;  // in a block
constexpr int64_t kBlock = kVectors * VL;

// The best totals of a row so far, best first, of equal ones the first that came.
struct Candidates {
  float* totals;
  int64_t* places;  // beginning * vocab + token
  int64_t most, count;

  float least() const { return count < most ? kNone : totals[most - 1]; }
  void offer(float total, int64_t place) {
    if (!(total > least())) return;
    int64_t i = count < most ? count++ : most - 1;
    for (; i > 0 && totals[i - 1] < total; i--) totals[i] = totals[i - 1], places[i] = places[i - 1];
    totals[i] = total, places[i] = place;
  }
};

struct Row {
  const BeamStep& a;
  Candidates found;
  float* largest_of;  // [blocks of a beginning's row]

  float largest_by_block(const float* x) const {
    vf top = splat(kNone);
    for (int64_t i = 0, block = 0; i < a.vocab; i += kBlock, block++) {
      vf m = splat(kNone);
      for_vectors(i, i + kBlock < a.vocab ? i + kBlock : a.vocab,
                  [&](int64_t j, int n) { m = max(m, take(x + j, n, kNone)); });
      largest_of[block] = largest(m), top = max(top, m);
    }
    return largest(top);
  }

  float log_sum(const float* x, float top) const {
    vf s = {};
    const vf t = splat(top);
    for_vectors(0, a.vocab, [&](int64_t j, int n) { s = s + exp(take(x + j, n, kNone) - t); });
    return top + std::log(sum(s));
  }

  void search(const float* x, float score, int64_t first) {
    const float top = largest_by_block(x);
    if (!(top > kNone) || !(score > kNone)) return;
    const float lse = a.normalised ? log_sum(x, top) : 0.0f;
    for (int64_t i = 0, block = 0; i < a.vocab; i += kBlock, block++) {
      if (!((largest_of[block] - lse) + score > found.least())) continue;
      for (int64_t j = i; j < i + kBlock && j < a.vocab; j++) found.offer((x[j] - lse) + score, first + j);
    }
  }

  bool stops(int64_t token) const {
    for (int64_t i = 0; i < a.stop_count; i++)
      if (a.stops[i] == token) return true;
    return false;
  }

  void operator()(int64_t b) {
    found.count = 0;
    for (int64_t k = 0; k < a.kept; k++)
      search(a.logits + (b * a.kept + k) * a.vocab, a.scores[b * a.kept + k], k * a.vocab);
    int64_t going = 0;
    float* scores = a.out_scores + b * a.beams;
    int64_t *parents = a.parents + b * a.beams, *tokens = a.tokens + b * a.beams;
    for (int64_t rank = 0; rank < found.count; rank++) {
      const int64_t parent = b * a.kept + found.places[rank] / a.vocab, token = found.places[rank] % a.vocab;
      const bool ends = stops(token);
      // not the worse ones: a beam of one is greedy search
      if ((ends || a.last) && rank < a.beams && found.totals[rank] / a.divisor > a.best_scores[b]) {
        a.best_scores[b] = found.totals[rank] / a.divisor;
        a.best_at[3 * b] = a.step, a.best_at[3 * b + 1] = parent, a.best_at[3 * b + 2] = token;
      }
      if (!ends && going < a.beams)
        scores[going] = found.totals[rank], parents[going] = parent, tokens[going++] = token;
    }
    for (; going < a.beams; going++) scores[going] = kNone, parents[going] = b * a.kept, tokens[going] = 0;
  }
};

}  // namespace

void beam_step(const BeamStep& a, const Parallel& parallel) {
  int64_t most = a.beams * (1 + a.stop_count);
  if (most > a.kept * a.vocab) most = a.kept * a.vocab;
  deal_rows(parallel, a.batch, a.kept * a.vocab, [&](int64_t begin, int64_t end) {
    Row row{a, {nullptr, nullptr, most, 0}, nullptr};
    Scratch scratch;
    auto take = [&] {
      scratch.take(row.found.totals, most), scratch.take(row.found.places, most);
      scratch.take(row.largest_of, ceil_div(a.vocab, kBlock));
    };
    take(), scratch.allocate(), take();
    for (int64_t b = begin; b < end; b++) row(b);
  });
  *a.over = true;
  for (int64_t b = 0; b < a.batch; b++)
    if (a.out_scores[b * a.beams] / a.flattering > a.best_scores[b]) *a.over = false;
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
