// Contract of y = a b + c in bf16 for processors that do not multiply it: both operands are widened a block at a time,
// in the caches, never as a whole. Sums are fp32, rounded once.
//
// a [rows, terms] with any strides, b [terms, cols] and c [rows, cols] (null: zeros) with rows as far apart as their
// steps say, y [rows, cols] likewise; y may be c, and otherwise overlaps nothing. All sizes >= 1.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct WidenedProduct {
  int64_t rows, terms, cols;
  const void* a;
  int64_t a_row, a_term;
  const void* b;
  int64_t b_step;
  const void* c;
  int64_t c_step;
  void* y;
  int64_t y_step;
};

void widened_product_cpu(const WidenedProduct&, const Parallel&);

}  // namespace seqfuse
