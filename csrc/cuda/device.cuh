// The thin device layer: everything that a kernel in this folder may use of CUDA, under names of our own.
//
// nvcc maps the names to intrinsics and PTX (device_nvcc.cuh). With SEQFUSE_HOST_DEVICE defined the same names come
// from tests/host_device/device_host.h, an ordinary C++ implementation that runs a block's threads as fibres, so that
// the very same kernel bodies and launchers are executed on a CPU under address and undefined-behaviour sanitizers.
//
// What both sides supply, in namespace seqfuse::dev:
//   thread() threads() lane() warp()            position in the block
//   block_x() block_y() blocks_x()              position in the grid
//   barrier()                                   all threads of the block; none may have left the kernel
//   cluster_rank() cluster_size() cluster_barrier() cluster_peer(pointer, rank)
//                                               blocks of a cluster, their shared memory (sm_90, persistent kernels)
//   Arrivals                                    8 bytes in shared memory that count what other blocks send, in phases
//   arrivals_init(a)                            by one thread, before a cluster barrier
//   arrivals_expect(a, bytes)                   by one thread a phase: it ends when that much has come, early or late
//   arrivals_wait(a, parity)                    until the phase of this parity (0 first) has ended: it sees what was
//   sent send_16(p, bits, a)                         16 aligned bytes to p and their count to a, both from cluster_peer
//   kClusters                                   false where the architecture has none: such kernels are empty there
//   shared<S>()                                 one S in the block's shared memory, uninitialised, 16-byte aligned
//   dynamic_shared<S>()                         of the size that the launch asked for, 1024-byte aligned
//   shuffle_xor(word, mask)                     another lane's 32 bits; all 32 lanes take part
//   mma_m16n8k16<T>(c, a, b)                    c += a b on one warp: fp32 [16, 8], T [16, 16], T [16, 8]
//   mma_m16n8k8_tf32(c, a, b)                   the same of [16, 8] and [8, 8] in tf32, one value a word
//   round_tf32(float)                           to the nearest tf32, ties away from zero, as a word
//   load_16(p) store_16(p, bits)                16 aligned bytes; load_16 only of what this launch never writes
//   load_4(p) store_4(p, word)                  the same for 4
//   load_8(p) store_8(p, bits)                  the same for 8
//   widen(T) narrow<T>(float)                   T is float, bf16 or f16; rounds to nearest even
//   exp tanh rsqrt multiply                     fp32; multiply(a, b) is never fused into a later addition
//   launch(kernel, grid, threads, stream, args) returns a cudaError_t as int
//   multiprocessors() capability() current_device()
//                                               of the current device; capability is 10 * major + minor
//   resident_clusters(kernel, grid, threads)    how many clusters of such a launch the device can hold at once
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/gates.h"
#include "seqfuse/types.h"

namespace seqfuse::dev {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(16) Bits16 {
  uint32_t word[4];
};

struct alignas(8) Bits8 {
  uint32_t word[2];
};

struct alignas(8) Arrivals {
  uint64_t state;
};

// x * y blocks, in clusters of `cluster` neighbours along x, each with `shared` bytes of dynamic shared memory
struct Grid {
  int64_t x;
  int64_t y = 1;
  int cluster = 1;
  int64_t shared = 0;
};

constexpr int kWarp = 32;

}  // namespace seqfuse::dev

#if defined(SEQFUSE_HOST_DEVICE)
#include "device_host.h"
#else
#include "cuda/device_nvcc.cuh"
#endif

namespace seqfuse::dev {

// elements of T in 16 bytes
template <class T>
inline constexpr int kVector = 16 / int(sizeof(T));

// the M of common/gates.h
struct Math {
  static SEQFUSE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + dev::exp(-x)); }
  static SEQFUSE_DEVICE float tanh(float x) { return dev::tanh(x); }
  static SEQFUSE_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN
  static SEQFUSE_DEVICE float step(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

// 16 bytes of T as floats and back
template <class T>
SEQFUSE_DEVICE void unpack(const Bits16& bits, float (&out)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if constexpr (sizeof(T) == 4)
      out[i] = as_float(bits.word[i]);
    else
      out[i] = widen(T{uint16_t(bits.word[i / 2] >> (i % 2 * 16))});
  }
}
template <class T>
SEQFUSE_DEVICE Bits16 pack(const float (&x)[kVector<T>]) {
  Bits16 bits;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4)
      bits.word[w] = as_bits(x[w]);
    else
      bits.word[w] = narrow_pair<T>(x[2 * w], x[2 * w + 1]);
  }
  return bits;
}

template <class T>
SEQFUSE_DEVICE uint32_t raw(T x) {
  if constexpr (sizeof(T) == 4)
    return as_bits(x);
  else
    return x.bits;
}

// Vectors at p of which the first n elements exist (the others read as 0 and are not written). `vector` promises that p
// is 16-byte aligned and that n is at least kVector or at most 0; it must be the same for the whole warp to be cheap.
template <class T>
SEQFUSE_DEVICE Bits16 load_some(const T* p, int n, bool vector) {
  if (vector) return n > 0 ? load_16(p) : Bits16{};
  Bits16 bits{};
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if (i >= n) continue;
    if constexpr (sizeof(T) == 4)
      bits.word[i] = raw(p[i]);
    else
      bits.word[i / 2] |= raw(p[i]) << (i % 2 * 16);
  }
  return bits;
}
template <class T>
SEQFUSE_DEVICE void store_some(T* p, const Bits16& bits, int n, bool vector) {
  if (vector) {
    if (n > 0) store_16(p, bits);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if (i >= n) continue;
    if constexpr (sizeof(T) == 4)
      p[i] = as_float(bits.word[i]);
    else
      p[i] = T{uint16_t(bits.word[i / 2] >> (i % 2 * 16))};
  }
}

// N elements of P (float beside a 16-bit T takes several vectors) as floats
template <int N, class P>
SEQFUSE_DEVICE void load_floats(const P* p, int n, bool vector, float (&out)[N]) {
  constexpr int V = kVector<P>;
#pragma unroll
  for (int j = 0; j < N / V; j++) {
    float part[V];
    unpack<P>(load_some(p + j * V, n - j * V, vector), part);
#pragma unroll
    for (int i = 0; i < V; i++) out[j * V + i] = part[i];
  }
}

// Two neighbours, the one at the lower address first: one word of 16-bit values, two of float.
template <class T>
struct Pair {
  uint32_t word[sizeof(T) / 2] = {};
};

// The pair at p; of the n elements that exist (0, 1, 2 or more) the others read as 0 and are not written. `paired`
// promises that p is aligned to a pair wherever n is not 0; it is the same for all threads.
template <class T>
SEQFUSE_DEVICE Pair<T> load_pair(const T* p, int n, bool paired) {
  if constexpr (sizeof(T) == 2) {
    if (paired && n >= 2) return {{load_4(p)}};
    const uint32_t low = n > 0 ? raw(p[0]) : 0u, high = n > 1 ? raw(p[1]) : 0u;
    return {{low | high << 16}};
  } else {
    if (paired && n >= 2) {
      const Bits8 bits = load_8(p);
      return {{bits.word[0], bits.word[1]}};
    }
    return {{n > 0 ? raw(p[0]) : 0u, n > 1 ? raw(p[1]) : 0u}};
  }
}
template <class T>
SEQFUSE_DEVICE void store_pair(T* p, const Pair<T>& pair, int n, bool paired) {
  if constexpr (sizeof(T) == 2) {
    if (paired && n >= 2) return store_4(p, pair.word[0]);
    if (n > 0) p[0] = T{uint16_t(pair.word[0])};
    if (n > 1) p[1] = T{uint16_t(pair.word[0] >> 16)};
  } else {
    if (paired && n >= 2) return store_8(p, {{pair.word[0], pair.word[1]}});
    if (n > 0) p[0] = as_float(pair.word[0]);
    if (n > 1) p[1] = as_float(pair.word[1]);
  }
}
// element e
template <class T>
SEQFUSE_DEVICE float element(const Pair<T>& pair, int e) {
  if constexpr (sizeof(T) == 2)
    return widen(T{uint16_t(pair.word[0] >> (e * 16))});
  else
    return as_float(pair.word[e]);
}
template <class T>
SEQFUSE_DEVICE Pair<T> rounded_pair(float low, float high) {
  if constexpr (sizeof(T) == 2)
    return {{narrow_pair<T>(low, high)}};
  else
    return {{as_bits(low), as_bits(high)}};
}

template <class S>
SEQFUSE_DEVICE S shuffle_xor_struct(const S& value, int mask) {
  static_assert(sizeof(S) % 4 == 0 && std::is_trivially_copyable_v<S>);
  union Words {
    S value;
    uint32_t word[sizeof(S) / 4];
    SEQFUSE_DEVICE Words() {}
  } words;
  words.value = value;
#pragma unroll
  for (int i = 0; i < int(sizeof(S) / 4); i++) words.word[i] = shuffle_xor(words.word[i], mask);
  return words.value;
}

// combine(lower lanes, upper lanes) over aligned groups of `width` lanes (a power of two). Every lane gets the same
// bits, because both partners combine in lane order.
template <class S, class F>
SEQFUSE_DEVICE S warp_reduce(S value, int width, F combine) {
  for (int mask = 1; mask < width; mask *= 2) {
    const S other = shuffle_xor_struct(value, mask);
    value = lane() & mask ? combine(other, value) : combine(value, other);
  }
  return value;
}

// The same over aligned groups of `group` threads, a power of two from 32 up. `scratch` is S[2][32] in shared memory;
// `parity` alternates between calls, so that one barrier a call is enough. All threads of the block must call it.
template <class S, class F>
SEQFUSE_DEVICE S group_reduce(S value, int group, S (*scratch)[kWarp], int parity, F combine) {
  value = warp_reduce(value, kWarp, combine);
  if (group == kWarp) return value;
  if (lane() == 0) scratch[parity][warp()] = value;
  barrier();
  const int warps = group / kWarp, first = warp() / warps * warps;
  return warp_reduce(scratch[parity][first + lane() % warps], warps, combine);
}

inline bool aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// f(T{}) for the element type that `dtype` names
template <class F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

}  // namespace seqfuse::dev
