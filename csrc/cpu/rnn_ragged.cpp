// Copies between padded sequences and rows. Contract: seqfuse/rnn_ragged.h
//
// Memory traffic: what exists is read once and written once, and zeros are written beyond the ends. Threads take
// stretches of sequences that hold equal shares of the rows; where time and sequence lie together one copy serves all.
#include "seqfuse/rnn_ragged.h"

#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int64_t kGrain = 1 << 16;  // bytes a worker should have

// f(b, the first row of sequence b) for all sequences, spread over the threads.
template <class F>
void for_sequences(const int64_t* lengths, int64_t B, int64_t row_bytes, const Parallel& parallel, F f) {
  int64_t total = 0;
  for (int64_t b = 0; b < B; b++) total += lengths[b];
  int64_t workers = total * row_bytes / kGrain + 1;
  if (workers > parallel.threads) workers = parallel.threads;
  if (workers > B) workers = B;
  auto job = [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (int64_t b = 0; b < B; start += lengths[b++]) {
      const int64_t middle = total ? (2 * start + lengths[b]) * workers / (2 * total) : 0;  // whose it is
      const int64_t worker = middle < workers ? middle : workers - 1;
      if (worker >= begin && worker < end) f(b, start);
    }
  };
  if (workers <= 1) {
    workers = 1;
    return job(0, 1);
  }
  parallel(workers, job);
}

}  // namespace

void rnn_ragged_copy(const RaggedCopy& a, const Parallel& parallel) {
  const bool together = a.padded_strides.t == a.row_bytes;
  for_sequences(a.lengths, a.B, a.row_bytes, parallel, [&](int64_t b, int64_t start) {
    char* rows = a.rows + start * a.row_bytes;
    char* padded = a.padded + b * a.padded_strides.b;
    const int64_t length = a.lengths[b], steps = together ? 1 : length;
    const size_t size = size_t(together ? length * a.row_bytes : a.row_bytes);
    for (int64_t t = 0; t < steps; t++, rows += size, padded += a.padded_strides.t)
      a.to_rows ? memcpy(rows, padded, size) : memcpy(padded, rows, size);
    if (a.to_rows) return;
    padded = a.padded + b * a.padded_strides.b + length * a.padded_strides.t;
    if (together) return void(memset(padded, 0, size_t((a.T - length) * a.row_bytes)));
    for (int64_t t = length; t < a.T; t++, padded += a.padded_strides.t) memset(padded, 0, size_t(a.row_bytes));
  });
}

void rnn_ragged_shift(const RaggedShift& a, const Parallel& parallel) {
  for_sequences(a.lengths, a.B, a.row_bytes, parallel, [&](int64_t b, int64_t start) {
    const int64_t length = a.lengths[b], size = a.row_bytes;
    if (!length) return;
    const char* rows = a.rows + start * size;
    char* out = a.shifted + start * size;
    char* begin = a.reverse ? out + (length - 1) * size : out;
    memcpy(a.reverse ? out : out + size, a.reverse ? rows + size : rows, size_t((length - 1) * size));
    a.first ? (void)memcpy(begin, a.first + b * size, size_t(size)) : (void)memset(begin, 0, size_t(size));
  });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
