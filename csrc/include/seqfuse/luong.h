// Contract of one step of Luong's attention with its readout (Luong et al. 2015, section 3.1), several queries a
// source:
//
//   a = softmax over t of query . keys_t,   out = tanh(added + sum_t a_t values_t)
//
// query, added and out are [sources * beams, width], keys and values [sources, length, width], all fp32 and dense. Of a
// source the first lengths[s] places exist (null: all), at least one. out must not overlap anything else. Nothing is
// kept after a call returns.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct LuongReadout {
  int64_t sources, beams, length, width;
  const float* query;
  const float* keys;
  const float* values;
  const float* added;
  const int64_t* lengths;  // [sources]
  float* out;
};

void luong_readout_cpu(const LuongReadout&, const Parallel&);

}  // namespace seqfuse
