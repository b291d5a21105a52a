// Both directions of a bidirectional layer whose tensors lie together, the forward one first: side by side in columns
// where a GEMM makes or takes them, one behind the other elsewhere.
//
//   xg, dxg [T, B, 2*G*H]   y, dy, dan [T, B, 2*H]                       columns
//   h0, c0, h_n, c_n and their gradients [2, B, H]   w_hh [2*G*H, H / heads]   b_hh, db_hh [2*G*H]
//   gates [2, T, B, S*H]   cells, dcells, zone_h, zone_c [2, T, B, H]
//   lengths, resets, and the weights of zoneout                           are of both
//
// A scan described as the forward direction of these, with the strides of the whole, gives the other one here.
#pragma once
#include "seqfuse/rnn.h"

namespace seqfuse {

namespace detail {
template <class T>
void advance(T*& p, int64_t elements) {
  if (p) p += elements;
}
// of the scan's dtype
inline void advance(const void*& p, DType type, int64_t elements) {
  if (p) p = static_cast<const char*>(p) + elements * size_of(type);
}
inline void advance(void*& p, DType type, int64_t elements) {
  if (p) p = static_cast<char*>(p) + elements * size_of(type);
}
inline void advance_zones(RnnOptions& o, int64_t elements) {
  advance(o.zone_h, elements), advance(o.zone_c, elements);
}
}  // namespace detail

// rows: T * B, or those of a packed sequence
inline RnnForward reverse_of(RnnForward a, int64_t rows) {
  using detail::advance;
  const int64_t G = gates_of(a.cell), H = a.H, state = a.B * H;
  a.reverse = true;
  advance(a.xg, a.dtype, G * H), advance(a.y, a.dtype, H);
  advance(a.h0, a.dtype, state), advance(a.c0, a.dtype, state);
  advance(a.h_n, a.dtype, state), advance(a.c_n, a.dtype, state);
  advance(a.w_hh, a.dtype, G * H * (H / a.options.heads)), advance(a.b_hh, a.dtype, G * H);
  advance(a.gates, a.dtype, rows * saved_of(a.cell, a.options.zones_h()) * H), advance(a.cells, rows * H);
  detail::advance_zones(a.options, rows * H);
  return a;
}

inline RnnBackward reverse_of(RnnBackward a, int64_t rows) {
  using detail::advance;
  const int64_t G = gates_of(a.cell), H = a.H, state = a.B * H;
  a.reverse = true;
  advance(a.dy, a.dtype, H), advance(a.y, a.dtype, H), advance(a.dan, a.dtype, H), advance(a.dxg, a.dtype, G * H);
  advance(a.dh_n, a.dtype, state), advance(a.dc_n, a.dtype, state);
  advance(a.h0, a.dtype, state), advance(a.c0, a.dtype, state);
  advance(a.dh0, a.dtype, state), advance(a.dc0, a.dtype, state);
  advance(a.w_hh, a.dtype, G * H * (H / a.options.heads)), advance(a.db_hh, G * H);
  advance(a.gates, a.dtype, rows * saved_of(a.cell, a.options.zones_h()) * H);
  advance(a.cells, rows * H), advance(a.dcells, rows * H);
  detail::advance_zones(a.options, rows * H);
  return a;
}

}  // namespace seqfuse
