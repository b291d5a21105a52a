// The part of the device layer that only Hopper (sm_90a) has: tiles that the copy engine (TMA) brings into shared
// memory, products of a warp group (wgmma), barriers of some of a block's warps, and registers that move between warp
// groups. As in device.cuh, nvcc's side (hopper_nvcc.cuh) is PTX and the host's (tests/host_device/hopper_host.h) is
// C++.
//
// What both sides supply, in namespace seqfuse::dev:
//   kWarpGroups                           false where the architecture lacks all this: such kernels are empty there
//   TensorMap                             what TMA knows of a tensor; a kernel argument declared SEQFUSE_CONSTANT
//   make_tensor_map(map, tiled)           by the host; returns an error code
//   load_panel(to, map, d, t, h, b, a)    by one thread: the map's box at (d, t, h, b) to `to`, 1024-byte aligned; a
//                                         counts the bytes of the whole box. What is outside the tensor is 0
//   load_bytes(to, from, bytes, a)        by one thread: a multiple of 16 bytes, 16-byte aligned; counted by a
//   arrivals_init(a, count)               a phase of `a` ends when `count` threads have arrived (arrivals_expect is
//   arrivals_arrive(a)                    one of them) and all bytes have come
//   shared_address(p)                     the address in shared memory's own 32-bit space
//   wgmma<T, N, Transposed>(d, a, b, add) d = a b (+ d): fp32 [64, N], [64, 16], [16, N]. a and b are descriptors; b's
//                                         memory is [N, 16], or [16, N] if Transposed
//   wgmma<T, N, Transposed>(d, w, b, add) the same with a in registers, words w[4] of a thread
//   wgmma_fence()                         before the first wgmma of a group, which then sees what registers hold
//   wgmma_commit()                        ends a group of products
//   wgmma_wait<K>(d)                      until all groups but the last K are done; their d may then be used
//   settle(x)                             all that x, whose bits are never all 1, comes from is computed before any
//                                         wgmma_wait that follows: else the compiler may put it behind
//   part_barrier(id, threads)             barrier `id` (1 to 15) of so many threads, this warp among them
//   part_arrive(id, threads)              the same without waiting
//   warp_barrier()                        of this warp
//   uniform(x)                            x, which is the same in all lanes, so that the compiler knows: wgmma in a
//                                         branch that may be divergent is run one at a time (ptxas C7520)
//   take_registers<N>()                   a warp group's registers a thread become N: more,
//   give_registers<N>()                   or fewer
//   exp2 log2 maximum                     fp32; the first two approximate: 2 ulp; of NaN and x the maximum is x
//
// Panels. A 16-bit tile [rows, D] lies in shared memory as D / 64 panels [rows, 64]: a row of a panel is 128 bytes, 8
// chunks of 16. With the 128-byte swizzle chunk c of row r lies at chunk c ^ (r % 8), so that 8 rows of one chunk,
// which is what a tensor core reads at once, lie in 32 different banks. TMA writes this order and wgmma reads it; an
// address counts from a multiple of 1024 bytes.
//
// Fragments (PTX ISA, "wgmma.mma_async.m64nNk16": register fragments). Warp w of the group has rows 16 w to 16 w + 15;
// with r = lane / 4 and q = lane % 4,
//   d[4 c + 2 i + e]  is row 16 w + r + 8 i, column 8 c + 2 q + e                 c < N / 8, i < 2, e < 2
//   word 2 h + i of a is row 16 w + r + 8 i, columns 8 h + 2 q and 8 h + 2 q + 1  h < 2, low half first
// so the words of a, for columns 16 k to 16 k + 15 of a product d, are d[8 k ..] packed in pairs: a's word 2 h + i is
// (d[8 k + 4 h + 2 i], d[8 k + 4 h + 2 i + 1]). No data moves between threads.
#pragma once
#include "cuda/device.cuh"

namespace seqfuse::dev {

// A 16-bit tensor [b, h, t, d], d contiguous, and the box [rows, 64] of (t, d) that one load brings.
struct Tiled {
  DType dtype;
  const void* data;
  int64_t size[4];    // d, t, h, b
  int64_t stride[3];  // of t, h, b, in elements
  int rows;
};

constexpr int kPanelColumns = 64;
constexpr int kWarpGroup = 128;

}  // namespace seqfuse::dev

#if defined(SEQFUSE_HOST_DEVICE)
#include "hopper_host.h"
#else
#include "cuda/hopper_nvcc.cuh"
#endif

namespace seqfuse::dev {

// The descriptor of an operand in shared memory with the 128-byte swizzle (PTX ISA, "Matrix Descriptor Format"): bits
// 0-13 the address, 16-29 the leading and 32-45 the stride dimension's byte offset, all / 16, and 1 in bits 62-63.
SEQFUSE_DEVICE uint64_t descriptor(const void* p, int leading_bytes, int stride_bytes) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 62;
}
// Of a panel [rows, 64] with the contraction along the 64 columns ("K-major"): 8 rows are 1024 bytes; the leading
// offset is not used. 16 columns further is 32 bytes further.
SEQFUSE_DEVICE uint64_t descriptor_of_rows(const void* panel) {
  return descriptor(panel, 16, 1024);
}
// Of panels [rows, 64] that follow each other, with the contraction along the rows ("MN-major"): 8 rows are 1024 bytes,
// the next 64 columns are a panel further. 16 rows further is 2048 bytes further.
SEQFUSE_DEVICE uint64_t descriptor_of_columns(const void* panels, int rows) {
  return descriptor(panels, rows * 128, 1024);
}
SEQFUSE_DEVICE uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes >> 4);
}

// where the swizzle puts byte `column_bytes` (< 128) of row `row` of a panel
SEQFUSE_DEVICE int swizzled(int row, int column_bytes) {
  return row * 128 + (column_bytes ^ (row % 8 << 4));
}

}  // namespace seqfuse::dev
