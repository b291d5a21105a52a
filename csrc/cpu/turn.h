// Squares of VL x VL words turned over: rows become columns.
#pragma once
#include <utility>

#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

// Exchanges, between rows D apart, the lanes D apart: one of the steps of a transposition.
template <int D, int... L>
SEQFUSE_INLINE void exchange_lanes(vf (&rows)[VL], std::integer_sequence<int, L...>) {
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) {
    if (i & D) continue;
    const vf a = rows[i], b = rows[i + D];
    rows[i] = __builtin_shufflevector(a, b, (L & D ? VL + L - D : L)...);
    rows[i + D] = __builtin_shufflevector(a, b, (L & D ? VL + L : L + D)...);
  }
}

SEQFUSE_INLINE void turn(vf (&rows)[VL]) {
  constexpr std::make_integer_sequence<int, VL> lanes;
  exchange_lanes<1>(rows, lanes), exchange_lanes<2>(rows, lanes);
  if constexpr (VL > 4) exchange_lanes<4>(rows, lanes);
  if constexpr (VL > 8) exchange_lanes<8>(rows, lanes);
}

// VL rows `ld` bytes apart, and the same turned over.
SEQFUSE_INLINE void turn(const void* from, int64_t ld, float* to, int64_t to_ld) {
  vf rows[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) rows[i] = load((const float*)((const char*)from + i * ld));
  turn(rows);
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) store(to + i * to_ld, rows[i]);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
