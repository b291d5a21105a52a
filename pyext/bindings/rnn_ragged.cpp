// seqfuse::rnn_pack / rnn_pad / rnn_shift: between padded sequences [T, B, X] and rows [N, X] on the CPU.
// Contract: csrc/include/seqfuse/rnn_ragged.h
#include "seqfuse/rnn_ragged.h"

#include "rnn_options.h"

namespace seqfuse {
namespace {

// lengths as the kernels read them, each in [0, limit]; total: their sum.
Tensor checked_lengths(const Tensor& lengths, int64_t limit, int64_t& total) {
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == ScalarType::Long && lengths.is_cpu(),
                  "lengths must be int64 [B] on the CPU");
  const Tensor n = dense(lengths);
  const auto* data = static_cast<const int64_t*>(n.const_data_ptr());
  total = 0;
  for (int64_t b = 0; b < n.size(0); b++) {
    STD_TORCH_CHECK(data[b] >= 0 && data[b] <= limit, "lengths must lie in [0, ", limit, "], got ", data[b]);
    total += data[b];
  }
  return n;
}

RaggedCopy copy_of(const Tensor& padded, const Tensor& rows, const Tensor& lengths, bool to_rows) {
  const int64_t size = int64_t(padded.element_size());
  auto bytes = [](const Tensor& t) { return static_cast<char*>(const_cast<void*>(t.const_data_ptr())); };
  return {padded.size(0),
          padded.size(1),
          padded.size(2) * size,
          static_cast<const int64_t*>(lengths.const_data_ptr()),
          bytes(rows),
          bytes(padded),
          {padded.stride(0) * size, padded.stride(1) * size},
          to_rows};
}

Tensor pack_cpu(Tensor padded_in, Tensor lengths_in) {
  STD_TORCH_CHECK(padded_in.dim() == 3, "padded must be [T, B, X], got ", padded_in.dim(), "-D");
  const Tensor padded = sequence(padded_in);
  int64_t total;
  const Tensor lengths = checked_lengths(lengths_in, padded.size(0), total);
  STD_TORCH_CHECK(lengths.size(0) == padded.size(1), "lengths must be [B], with B = ", padded.size(1));
  Tensor rows = empty(padded, {total, padded.size(2)});
  rnn_ragged_copy_cpu(copy_of(padded, rows, lengths, true), torch_threads());
  return rows;
}

Tensor pad_cpu(Tensor rows_in, Tensor lengths_in, int64_t steps, bool batch_major) {
  STD_TORCH_CHECK(rows_in.dim() == 2, "rows must be [N, X], got ", rows_in.dim(), "-D");
  int64_t total;
  const Tensor rows = dense(rows_in), lengths = checked_lengths(lengths_in, steps, total);
  STD_TORCH_CHECK(total == rows.size(0), "lengths must add up to the ", rows.size(0), " rows");
  const int64_t B = lengths.size(0), X = rows.size(1);
  Tensor padded = batch_major ? torch::stable::transpose(empty(rows, {B, steps, X}), 0, 1) : empty(rows, {steps, B, X});
  rnn_ragged_copy_cpu(copy_of(padded, rows, lengths, false), torch_threads());
  return padded;
}

Tensor shift_cpu(Tensor rows_in, Tensor lengths_in, Maybe first_in, bool reverse) {
  STD_TORCH_CHECK(rows_in.dim() == 2, "rows must be [N, X], got ", rows_in.dim(), "-D");
  int64_t total;
  const Tensor rows = dense(rows_in), lengths = checked_lengths(lengths_in, rows.size(0), total);
  STD_TORCH_CHECK(total == rows.size(0), "lengths must add up to the ", rows.size(0), " rows");
  const int64_t B = lengths.size(0), X = rows.size(1);
  if (first_in) check(*first_in, rows, {B, X}, "first");
  const Maybe first = first_in ? Maybe(dense(*first_in)) : Maybe{};
  Tensor shifted = empty(rows, {total, X});
  const RaggedShift args{B,
                         X * int64_t(rows.element_size()),
                         static_cast<const int64_t*>(lengths.const_data_ptr()),
                         reverse,
                         static_cast<const char*>(rows.const_data_ptr()),
                         static_cast<const char*>(pointer_or_null(first)),
                         static_cast<char*>(pointer(shifted))};
  rnn_ragged_shift_cpu(args, torch_threads());
  return shifted;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("rnn_pack(Tensor padded, Tensor lengths) -> Tensor");
  m.def("rnn_pad(Tensor rows, Tensor lengths, int steps, bool batch_major) -> Tensor");
  m.def("rnn_shift(Tensor rows, Tensor lengths, Tensor? first, bool reverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("rnn_pack", TORCH_BOX(&pack_cpu));
  m.impl("rnn_pad", TORCH_BOX(&pad_cpu));
  m.impl("rnn_shift", TORCH_BOX(&shift_cpu));
}

}  // namespace seqfuse
