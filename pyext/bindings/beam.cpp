// seqfuse::beam_step. Contract: csrc/include/seqfuse/beam.h
#include "seqfuse/beam.h"

#include <cstring>

#include "common.h"

namespace seqfuse {
namespace {

Tensor copy(const Tensor& t) {
  Tensor y = new_like(t);
  memcpy(pointer(y), t.const_data_ptr(), size_t(t.numel() * t.element_size()));
  return y;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs beam_step(Tensor logits_in, Tensor scores_in, Tensor stops_in, Tensor best_scores_in, Tensor best_at_in,
                  int64_t beams, int64_t step, bool last, double divisor, double flattering, bool normalised) {
  STD_TORCH_CHECK(scores_in.dim() == 2 && beams > 0, "scores must be [rows, beginnings] and beams positive");
  const int64_t B = scores_in.size(0), kept = scores_in.size(1);
  STD_TORCH_CHECK(logits_in.dim() == 2 && logits_in.size(0) == B * kept && logits_in.size(1) > 0, "logits must be [",
                  B * kept, ", vocabulary]");
  STD_TORCH_CHECK(best_scores_in.dim() == 1 && best_scores_in.size(0) == B && best_at_in.dim() == 2 &&
                      best_at_in.size(0) == B && best_at_in.size(1) == 3 && stops_in.dim() == 1,
                  "best_scores must be [", B, "], best_at [", B, ", 3] and stops [S]");
  for (const Tensor* t : {&logits_in, &scores_in, &best_scores_in})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "logits and scores must be float32");
  for (const Tensor* t : {&stops_in, &best_at_in})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long, "stops and best_at must be int64");
  const Tensor logits = dense(logits_in), scores = dense(scores_in), stops = dense(stops_in);
  Tensor best_scores = copy(dense(best_scores_in)), best_at = copy(dense(best_at_in));
  Tensor out_scores = empty(scores, {B, beams});
  Tensor parents = empty(stops, {B * beams}), tokens = empty(stops, {B * beams});
  Tensor over = empty(scores, nullptr, 0, ScalarType::Bool);
  const BeamStep a{B,
                   kept,
                   logits.size(1),
                   beams,
                   static_cast<const float*>(logits.const_data_ptr()),
                   static_cast<const float*>(scores.const_data_ptr()),
                   static_cast<const int64_t*>(stops.const_data_ptr()),
                   stops.size(0),
                   step,
                   normalised,
                   last,
                   float(divisor),
                   float(flattering),
                   pointer<float>(out_scores),
                   pointer<int64_t>(parents),
                   pointer<int64_t>(tokens),
                   pointer<float>(best_scores),
                   pointer<int64_t>(best_at),
                   pointer<bool>(over)};
  beam_step_cpu(a, torch_threads());
  return {out_scores, parents, tokens, best_scores, best_at, over};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "beam_step(Tensor logits, Tensor scores, Tensor stops, Tensor best_scores, Tensor best_at, int beams, int step, "
      "bool last, float divisor, float flattering, bool normalised) "
      "-> (Tensor scores, Tensor parents, Tensor tokens, Tensor best_scores, Tensor best_at, Tensor over)");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("beam_step", TORCH_BOX(&beam_step));
}

}  // namespace seqfuse
