// The device layer on a CPU (csrc/cuda/device.cuh says what the names mean). One fibre per thread of a block, blocks of
// a cluster together, clusters one after another; fibres and blocks run in an order drawn from host::seed, so that a
// missing barrier shows as a wrong result. Shared memory is exactly as large as asked for (AddressSanitizer sees an
// overrun) and holds NaN until it is written. A thread switches only where it waits, never between two statements:
// barriers that are missing are found, races that a barrier cannot cure are not.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define SEQFUSE_DEVICE inline
#define SEQFUSE_KERNEL(max_threads, min_blocks) inline void
#define SEQFUSE_ARGUMENT const

namespace seqfuse::dev {

namespace host {

extern uint64_t seed;           // of the order in which fibres and blocks run
extern int multiprocessors;     // what dev::multiprocessors() answers
extern int capability;          // what dev::capability() answers
extern int resident_clusters;   // what dev::resident_clusters() answers
extern long launches;           // so far
constexpr int kSlotBytes = 64;  // what a lane can show the other lanes at once

struct Position {
  int thread, threads, block_x, block_y, blocks_x, rank, cluster;
};
extern Position here;  // of the running fibre

using Slot = unsigned char[kSlotBytes];

void run(Grid grid, int threads, const std::function<void()>& body);  // every thread of every block calls body()
void block_barrier();
void cluster_barrier();
void arrivals_init(const void* a, int count);
void arrivals_expect(const void* a, int bytes);
void arrivals_wait(const void* a, int parity);
void send(void* p, const Bits16& bits, const void* a);  // arrives some time later
// runs `copy` some time later, then counts its bytes: what a copy engine does, in the block's own shared memory
void later(const void* arrivals, int bytes, std::function<void()> copy);
unsigned char* shared_bytes(uint32_t address, size_t bytes);  // of the block's dynamic shared memory
void finish_products();                                       // no product may be left when a cluster has ended
uint64_t random_below(uint64_t n);
// shows `bytes` at `data` to the warp and returns all 32 lanes' slots; `operation` must be the same in all lanes
const Slot* exchange(const char* operation, const void* data, size_t bytes);
enum class MmaType { bf16, f16, tf32 };
void mma(MmaType type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void* shared_memory(const void* key, size_t bytes);
void* dynamic_memory(size_t bytes);  // which must be what the launch asked for
void* peer_memory(void* own, int rank);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

uint16_t float_to_half(float x);
float half_to_float(uint16_t h);

}  // namespace host

inline int thread() {
  return host::here.thread;
}
inline int threads() {
  return host::here.threads;
}
inline int lane() {
  return host::here.thread % kWarp;
}
inline int warp() {
  return host::here.thread / kWarp;
}
inline int block_x() {
  return host::here.block_x;
}
inline int block_y() {
  return host::here.block_y;
}
inline int blocks_x() {
  return host::here.blocks_x;
}
inline void barrier() {
  host::block_barrier();
}

inline int cluster_rank() {
  return host::here.rank;
}
inline int cluster_size() {
  return host::here.cluster;
}
constexpr bool kClusters = true;
inline void cluster_barrier() {
  host::cluster_barrier();
}
inline void arrivals_init(Arrivals& a) {
  host::arrivals_init(&a, 1);
}
inline void arrivals_expect(Arrivals& a, int bytes) {
  host::arrivals_expect(&a, bytes);
}
inline void arrivals_wait(Arrivals& a, int parity) {
  host::arrivals_wait(&a, parity);
}
inline void send_16(void* p, const Bits16& bits, Arrivals* a) {
  host::send(p, bits, a);
}
template <class S>
S* cluster_peer(S* p, int rank) {
  return static_cast<S*>(host::peer_memory(p, rank));
}

template <class S>
S& shared() {
  static const char key = 0;  // one address per type, as __shared__ has one variable per type
  return *static_cast<S*>(host::shared_memory(&key, sizeof(S)));
}

template <class S>
S& dynamic_shared() {
  return *static_cast<S*>(host::dynamic_memory(sizeof(S)));
}

inline uint32_t shuffle_xor(uint32_t x, int mask) {
  uint32_t other;
  std::memcpy(&other, host::exchange("shuffle_xor", &x, 4)[(lane() ^ mask) % kWarp], 4);
  return other;
}

inline Bits16 load_16(const void* p) {
  return *static_cast<const Bits16*>(p);
}  // UBSan checks the alignment
inline void store_16(void* p, const Bits16& b) {
  *static_cast<Bits16*>(p) = b;
}

inline uint32_t load_4(const void* p) {
  return *static_cast<const uint32_t*>(p);
}
inline void store_4(void* p, uint32_t word) {
  *static_cast<uint32_t*>(p) = word;
}

inline Bits8 load_8(const void* p) {
  return *static_cast<const Bits8*>(p);
}
inline void store_8(void* p, const Bits8& b) {
  *static_cast<Bits8*>(p) = b;
}

inline float as_float(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline uint32_t as_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float widen(float x) {
  return x;
}
inline float widen(bf16 x) {
  return as_float(uint32_t(x.bits) << 16);
}
inline float widen(f16 x) {
  return host::half_to_float(x.bits);
}

template <class T>
T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    if (x != x) return {0x7fff};  // what cvt.rn.bf16.f32 gives for a NaN
    const uint32_t u = as_bits(x);
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  } else {
    return {host::float_to_half(x)};
  }
}
template <class T>
uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
}

inline float exp(float x) {
  return std::exp(x);
}
inline float tanh(float x) {
  return std::tanh(x);
}
inline float rsqrt(float x) {
  return 1.0f / std::sqrt(x);
}
inline float multiply(float a, float b) {
  return a * b;
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma(std::is_same_v<T, bf16> ? host::MmaType::bf16 : host::MmaType::f16, c, a, b);
}
inline uint32_t round_tf32(float x) {
  const uint32_t u = as_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;  // what cvt.rna.tf32.f32 gives for a NaN
  return (u + 0x1000u) & ~0x1fffu;
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma(host::MmaType::tf32, c, a, b);
}

template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, void*, const A&... args) {
  host::run(grid, threads, [&] { kernel(args...); });
  return 0;
}

inline int multiprocessors() {
  return host::multiprocessors;
}
inline int current_device() {
  return 0;
}
inline int capability() {
  return host::capability;
}
template <class... P>
int resident_clusters(void (*)(P...), Grid, int) {
  return host::resident_clusters;
}

}  // namespace seqfuse::dev
