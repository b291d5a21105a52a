// The Hopper part of the device layer on a CPU (csrc/cuda/hopper.cuh says what the names mean). It follows the PTX
// manual and not the kernels: wgmma takes its operands apart by their descriptors and reads the swizzled bytes, TMA
// writes them. Both are late where hardware may be late: a panel arrives some time after load_panel, a product is done
// at a random moment between its commit and its wait, and until then its accumulators hold NaN.
#pragma once

#define SEQFUSE_CONSTANT const

namespace seqfuse::dev {

using TensorMap = Tiled;

namespace host {

constexpr int kReservedShared = 1024;  // the system's, at the start of a block's shared memory

int check_tensor_map(const Tiled& t);  // an error code where cuTensorMapEncodeTiled would refuse
void load_panel(void* to, const Tiled& map, const int (&at)[4], const void* arrivals);
void load_bytes(void* to, const void* from, int bytes, const void* arrivals);
void arrivals_arrive(const void* a);
void part_barrier(int id, int threads, bool wait);
uint32_t shared_address(const void* p);

struct Product {  // of one thread
  float* d;
  uint32_t a[4];
  uint64_t a_descriptor, b_descriptor;
  int16_t n;
  bool a_in_registers, transposed, add, bf16;
};
void wgmma_fence();
void wgmma(const Product& p);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace host

inline int make_tensor_map(TensorMap& map, const Tiled& t) {
  map = t;
  return host::check_tensor_map(t);
}
inline void load_panel(void* to, const TensorMap& map, int d, int t, int h, int b, Arrivals& a) {
  host::load_panel(to, map, {d, t, h, b}, &a);
}
inline void load_bytes(void* to, const void* from, int bytes, Arrivals& a) {
  host::load_bytes(to, from, bytes, &a);
}

constexpr bool kWarpGroups = true;

inline void arrivals_init(Arrivals& a, int count) {
  host::arrivals_init(&a, count);
}
inline void arrivals_arrive(Arrivals& a) {
  host::arrivals_arrive(&a);
}
inline uint32_t shared_address(const void* p) {
  return host::shared_address(p);
}
inline void part_barrier(int id, int threads) {
  host::part_barrier(id, threads, true);
}
inline void part_arrive(int id, int threads) {
  host::part_barrier(id, threads, false);
}
inline void warp_barrier() {
  host::exchange("warp_barrier", nullptr, 0);
}
inline int uniform(int x) {
  int first;
  std::memcpy(&first, host::exchange("uniform", &x, 4)[0], 4);
  if (first != x) host::fail("uniform: the lanes of a warp have %d and %d", first, x);
  return first;
}
template <int N>
void take_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void give_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

inline float maximum(float x, float y) {
  return std::fmax(x, y);
}
inline float exp2(float x) {
  return std::exp2(x);
}
inline float log2(float x) {
  return std::log2(x);
}

inline void wgmma_fence() {
  host::wgmma_fence();
}
inline void wgmma_commit() {
  host::wgmma_commit();
}
template <int K, int Words>
void wgmma_wait(float (&)[Words]) {
  host::wgmma_wait(K);
}
inline void settle(uint32_t) {}
template <class T, int N, bool Transposed>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  host::wgmma({d, {}, a, b, N, false, Transposed, add, std::is_same_v<T, bf16>});
}
template <class T, int N, bool Transposed>
void wgmma(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool add) {
  host::wgmma({d, {a[0], a[1], a[2], a[3]}, 0, b, N, true, Transposed, add, std::is_same_v<T, bf16>});
}

}  // namespace seqfuse::dev
