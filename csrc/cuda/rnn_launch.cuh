// What the two recurrent launchers share: addresses of time steps, the alignment test, the workspace's layout.
#pragma once
#include <initializer_list>

#include "cuda/rnn_forward.cuh"

namespace seqfuse::cuda {

// time step t of a sequence [T, B, X]; null stays null
template <class T, class Pointer>
Rows<T> rows_at(Pointer* data, Strides strides, int64_t t) {
  return {data ? static_cast<T*>(data) + t * strides.t : nullptr, strides.b};
}

// whether every row of these operands of a product can be read 16 aligned bytes at a time
template <class T>
bool vectors_fit(int64_t H, std::initializer_list<const void*> pointers, std::initializer_list<Strides> strides) {
  bool fit = H % kVector<T> == 0;
  for (const void* p : pointers) fit = fit && dev::aligned_16(p);
  for (const Strides& s : strides) fit = fit && s.t % kVector<T> == 0 && s.b % kVector<T> == 0;
  return fit;
}

inline int64_t rounded_up(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// fp32 [B, H] that goes from step to step
inline int64_t carried_bytes(Cell cell, int64_t B, int64_t H) {
  return cell == Cell::lstm || cell == Cell::gru ? rounded_up(B * H * int64_t(sizeof(float))) : 0;
}

constexpr int64_t kPartialRows = 64;  // of db_hh

struct BackwardWorkspace {
  int64_t carry, transposed, partial, bytes;  // offsets, and the whole

  BackwardWorkspace(Cell cell, DType dtype, int64_t B, int64_t H)
      : carry(0),
        transposed(carried_bytes(cell, B, H)),
        partial(transposed + rounded_up(gates_of(cell) * H * H * size_of(dtype))),
        bytes(partial + kPartialRows * gates_of(cell) * H * int64_t(sizeof(float))) {}
};

}  // namespace seqfuse::cuda
