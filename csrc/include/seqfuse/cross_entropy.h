// Contract of the row kernels under cross_entropy, linear_cross_entropy and kl_loss: what happens to a block of logits
// between the GEMM that made it and the GEMMs that its gradient goes into.
//
//   u_j  = softcap * tanh(logits_j / softcap)                       (u = logits without a softcap)
//   lse  = log sum_j exp(u_j),   p_j = exp(u_j - lse),   w = class_weight[target] (1 without)
//   loss = (1 - eps) w (lse - u_target) + eps / V * sum_j class_weight_j (lse - u_j) + z_loss w lse^2
//   dlogits_j = scale (A p_j - eps / V class_weight_j - (1 - eps) w [j = target]) (1 - (u_j / softcap)^2)
//   A = (1 - eps) w + eps / V sum_j class_weight_j + 2 z_loss w lse
//
// logits and dlogits are [rows, cols] of `dtype`, row-major, both with `stride` elements from row to row; dlogits may
// be logits itself (in place), and nothing else may alias. A row whose target is ignore_index gives loss 0, lse 0 and a
// gradient of zeros. Any other target must lie in [0, cols): the caller checks. Nothing is kept after the call returns.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct CrossEntropyRows {
  DType dtype;
  int64_t rows, cols;
  int64_t stride;  // at least cols
  const void* logits;
  const int64_t* target;      // [rows]
  const float* class_weight;  // [cols]; null: ones
  float class_weight_sum;     // cols without class weights
  int64_t ignore_index;
  float label_smoothing;  // eps
  float softcap;          // 0: none
  float z_loss;
  const float* scale;  // [rows], or one value with scale_step 0; null: no gradient
  int64_t scale_step;  // 1 or 0
  void* dlogits;       // with scale only
  float* loss;         // [rows]; null: the backward pass alone
  float* lse;          // [rows]; written with `loss`, read without
};

// Distillation: temperature^2 * KL(p || q) for p = softmax(teacher / temperature), q = softmax(student / temperature).
//   loss = temperature^2 sum_j p_j (log p_j - log q_j),   dstudent_j = scale temperature (q_j - p_j)
// student, teacher and dstudent are [rows, cols] of `dtype`; dstudent may be student itself.
struct KlRows {
  DType dtype;
  int64_t rows, cols;
  const void* student;
  const void* teacher;
  const bool* keep;  // [rows]; a row that is not kept gives loss 0 and a gradient of zeros; null: all
  float temperature;
  const float* scale;  // as above
  int64_t scale_step;
  void* dstudent;  // with scale only
  float* loss;     // [rows]
};

void cross_entropy_rows_cpu(const CrossEntropyRows&, const Parallel&);
void kl_rows_cpu(const KlRows&, const Parallel&);

}  // namespace seqfuse
