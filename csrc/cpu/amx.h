// The tile unit (AMX): eight registers of 16 rows of 64 bytes, and sums of products of bf16 pairs in them.
//
//   dot<C, A, B>: C[m][n] += sum over k < 32 of A[m][k] * B[k][n], in fp32
//
// A holds 16 rows of 32 bf16; B holds 16 rows of 16 words, row p the pairs (B[2p][n], B[2p + 1][n]); C 16 x 16 floats.
// A product takes 16 cycles, so tiles that come from the first-level cache (8 cycles) keep it busy if each is used
// twice. Strides are bytes. Where SEQFUSE_EMULATE_TILES is defined everything happens in memory, so that tests run the
// kernels on any machine.
#pragma once
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

#if defined(__AMX_BF16__) || defined(SEQFUSE_EMULATE_TILES)
constexpr bool has_tiles = true;
#else
constexpr bool has_tiles = false;
#endif

namespace tiles {

constexpr int rows = 16, words = 16;  // of a register; a word is a float or two bf16

// only where has_tiles
struct InUse;
template <int N>
void zero();
template <int N>
void load(const void* p, int64_t stride);
template <int N>
void store(void* p, int64_t stride);
template <int C, int A, int B>
void dot();
void set_operand_rows(int n);

#if defined(SEQFUSE_EMULATE_TILES)
inline thread_local uint32_t registers[8][rows][words];
inline thread_local int held[8] = {rows, rows, rows, rows, rows, rows, rows, rows};  // rows of each

struct InUse {
  InUse() {
    for (int& n : held) n = rows;
  }
};
SEQFUSE_INLINE void set_operand_rows(int n) {
  for (int i = 0; i < 6; i++) held[i] = n <= rows ? n : i == 2 || i == 3 || i == 5 ? n - rows : rows;
}
template <int N>
SEQFUSE_INLINE void zero() {
  memset(registers[N], 0, sizeof(registers[N]));
}
template <int N>
SEQFUSE_INLINE void load(const void* p, int64_t stride) {
  for (int r = 0; r < held[N]; r++) memcpy(registers[N][r], (const char*)p + r * stride, 4 * words);
}
template <int N>
SEQFUSE_INLINE void store(void* p, int64_t stride) {
  for (int r = 0; r < held[N]; r++) memcpy((char*)p + r * stride, registers[N][r], 4 * words);
}
template <int C, int A, int B>
void dot() {
  for (int m = 0; m < held[C]; m++)
    for (int n = 0; n < words; n++) {
      float sum;
      memcpy(&sum, &registers[C][m][n], 4);
      for (int p = 0; p < words; p++) {
        const uint32_t a = registers[A][m][p], b = registers[B][p][n];
        sum += widen(bf16{uint16_t(a)}) * widen(bf16{uint16_t(b)});
        sum += widen(bf16{uint16_t(a >> 16)}) * widen(bf16{uint16_t(b >> 16)});
      }
      memcpy(&registers[C][m][n], &sum, 4);
    }
}

#elif defined(__AMX_BF16__)
// The registers exist for a thread while one of these does; at its end they are given back, for others set them up in
// their own way and what is in them would be kept at every change of threads.
inline thread_local int operand_rows = 0;
SEQFUSE_INLINE void configure(int n) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t row_count[16] = {};
  } shape;
  const int low = n < rows ? n : rows, high = n < rows ? n : n > rows ? n - rows : rows;
  const int counts[8] = {low, low, high, high, low, high, rows, rows};
  for (int i = 0; i < 8; i++) shape.row_bytes[i] = 4 * words, shape.row_count[i] = uint8_t(counts[i]);
  asm volatile("ldtilecfg %0" ::"m"(shape));
  operand_rows = n;
}
struct InUse {
  InUse() { configure(rows); }
  ~InUse() { asm volatile("tilerelease"); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;
};
// A first operand of n rows, up to 32, and its sums, from then on: 16 of them, or all, are in register 4, their sums in
// 0 and 1, the others in 5, 2 and 3; up to 16 rows those may be so many others. 50 ns where n is not what it was.
SEQFUSE_INLINE void set_operand_rows(int n) {
  if (n != operand_rows) configure(n);
}
template <int N>
SEQFUSE_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(N));
}
template <int N>
SEQFUSE_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(N) : "memory");
}
template <int N>
SEQFUSE_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(N) : "memory");
}
template <int C, int A, int B>
SEQFUSE_INLINE void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else
struct InUse {
  InUse() {}
};
#endif

}  // namespace tiles
}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
