// Contract of one step of beam search: which beginnings go on, and what has ended.
//
// Each of `batch` rows has `kept` beginnings of log-probability `scores` [batch, kept], and for each of these the
// `logits` [batch, kept, vocab] of its next token, or with normalised = false their log-probabilities. Of a row's
// kept * vocab continuations, total = (logit - lse) + score, the best beams * (1 + stop_count) are candidates, best
// first; of equal ones the first. Those whose token is no stop go on, at most `beams` of them: out_scores [batch,
// beams], parents [batch * beams] (which of batch * kept rows it continues), tokens [batch * beams]. Where fewer go on,
// the rest has score -inf, the row's first parent and token 0. Of the best `beams` candidates those that stop, or all
// with `last`, have ended: one whose total / divisor beats best_scores [batch] is noted there, and in best_at [batch,
// 3] as (step, parent, token). `over`: whether no row's out_scores[0] / flattering beats its best_scores. Only totals
// above -inf are candidates.
//
// All arrays are dense; outputs must not overlap inputs nor each other. Nothing is kept after a call returns.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct BeamStep {
  int64_t batch, kept, vocab, beams;
  const float* logits;
  const float* scores;
  const int64_t* stops;  // [stop_count]
  int64_t stop_count;
  int64_t step;
  bool normalised, last;  // normalised: lse is to be taken, else it is 0
  float divisor, flattering;
  float* out_scores;
  int64_t* parents;
  int64_t* tokens;
  float* best_scores;  // read and written
  int64_t* best_at;    // read and written
  bool* over;          // one
};

void beam_step_cpu(const BeamStep&, const Parallel&);

}  // namespace seqfuse
