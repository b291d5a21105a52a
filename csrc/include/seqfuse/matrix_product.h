// Contract of y = a b + c in fp32 or bf16, for processors whose library multiplies them at half speed or worse. bf16 is
// widened a block at a time, in the caches, never as a whole. Sums are fp32, rounded once.
//
// a [rows, terms], b [terms, cols] with any strides (one of each matrix should be 1); c [rows, cols] (null: zeros) with
// rows c_row apart, 0 for one row that all share; y [rows, cols] with rows y_row apart; y may be c, and otherwise
// overlaps nothing. All sizes >= 1, terms >= 0.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct MatrixProduct {
  DType dtype;
  int64_t rows, terms, cols;
  const void* a;
  int64_t a_row, a_term;
  const void* b;
  int64_t b_term, b_col;
  const void* c;
  int64_t c_row;
  void* y;
  int64_t y_row;
};

void matrix_product_cpu(const MatrixProduct&, const Parallel&);

}  // namespace seqfuse
