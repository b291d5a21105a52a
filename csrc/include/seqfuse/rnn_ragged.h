// Contract of the copies between a padded batch of sequences and the rows that exist (seqfuse/rnn.h: packed).
//
// Elements are bytes: any dtype. lengths: [B], host memory, each in [0, T]. Rows are [N, row_bytes], sequence after
// sequence, N = sum(lengths), dense. A padded batch has byte strides (t, b); its rows of row_bytes are dense.
// No argument may alias another one.
#pragma once
#include "seqfuse/rnn.h"

namespace seqfuse {

struct RaggedCopy {
  int64_t T, B, row_bytes;
  const int64_t* lengths;
  char* rows;
  char* padded;
  Strides padded_strides;
  bool to_rows;  // read padded and write rows; else read rows and write padded, zeros beyond the sequences' ends
};

// shifted[n] = the row of the step before row n (with reverse: after it) in the same sequence; where a sequence begins
// (with reverse: ends), its row of `first` [B, row_bytes], zeros if that is null.
struct RaggedShift {
  int64_t B, row_bytes;
  const int64_t* lengths;
  bool reverse;
  const char* rows;
  const char* first;
  char* shifted;
};

void rnn_ragged_copy_cpu(const RaggedCopy&, const Parallel&);
void rnn_ragged_shift_cpu(const RaggedShift&, const Parallel&);

}  // namespace seqfuse
