// The device layer on a GPU: intrinsics and PTX. See device.cuh, which is the only file to include this one.
#pragma once
#include <cuda_runtime.h>

#define SEQFUSE_DEVICE __device__ __forceinline__
#define SEQFUSE_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
// a kernel's argument that it may index and take references of without a copy
#define SEQFUSE_ARGUMENT const __grid_constant__

namespace seqfuse::dev {

SEQFUSE_DEVICE int thread() {
  return int(threadIdx.x);
}
SEQFUSE_DEVICE int threads() {
  return int(blockDim.x);
}
SEQFUSE_DEVICE int lane() {
  return int(threadIdx.x % kWarp);
}
SEQFUSE_DEVICE int warp() {
  return int(threadIdx.x / kWarp);
}
SEQFUSE_DEVICE int block_x() {
  return int(blockIdx.x);
}
SEQFUSE_DEVICE int block_y() {
  return int(blockIdx.y);
}
SEQFUSE_DEVICE int blocks_x() {
  return int(gridDim.x);
}

SEQFUSE_DEVICE void barrier() {
  __syncthreads();
}

SEQFUSE_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kClusters = true;

SEQFUSE_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
SEQFUSE_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
SEQFUSE_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// p points into this block's shared memory; the result into the same place of block `rank` of the cluster
template <class S>
SEQFUSE_DEVICE S* cluster_peer(S* p, int rank) {
  uint64_t peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<S*>(peer);
}

// Arrivals is an mbarrier that one thread arrives at; the rest of its phase is bytes.
SEQFUSE_DEVICE void arrivals_init(Arrivals& a) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(&a))
               : "memory");
}
SEQFUSE_DEVICE void arrivals_expect(Arrivals& a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&a)), "r"(bytes)
               : "memory");
}
SEQFUSE_DEVICE void arrivals_wait(Arrivals& a, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(&a)), "r"(parity)
        : "memory");
}
// No fence: the bytes are counted where they arrive, when they have arrived.
SEQFUSE_DEVICE void send_16(void* p, const Bits16& b, Arrivals* a) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   shared_address(p)),
               "r"(b.word[0]), "r"(b.word[1]), "r"(b.word[2]), "r"(b.word[3]), "r"(shared_address(a))
               : "memory");
}
#else
// declared, so that kernels can name them; kClusters keeps them from being called
constexpr bool kClusters = false;
SEQFUSE_DEVICE int cluster_rank() {
  return 0;
}
SEQFUSE_DEVICE int cluster_size() {
  return 1;
}
SEQFUSE_DEVICE void cluster_barrier() {}
template <class S>
SEQFUSE_DEVICE S* cluster_peer(S* p, int) {
  return p;
}
SEQFUSE_DEVICE void arrivals_init(Arrivals&) {}
SEQFUSE_DEVICE void arrivals_expect(Arrivals&, int) {}
SEQFUSE_DEVICE void arrivals_wait(Arrivals&, int) {}
SEQFUSE_DEVICE void send_16(void*, const Bits16&, Arrivals*) {}
#endif

template <class S>
SEQFUSE_DEVICE S& shared() {
  __shared__ __align__(16) unsigned char bytes[sizeof(S)];
  return reinterpret_cast<S&>(bytes);
}

template <class S>
SEQFUSE_DEVICE S& dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_bytes[];  // what a 128-byte swizzle counts from
  return reinterpret_cast<S&>(dynamic_bytes);
}

SEQFUSE_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

SEQFUSE_DEVICE Bits16 load_16(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
SEQFUSE_DEVICE void store_16(void* p, const Bits16& b) {
  *static_cast<uint4*>(p) = make_uint4(b.word[0], b.word[1], b.word[2], b.word[3]);
}

SEQFUSE_DEVICE uint32_t load_4(const void* p) {
  return __ldg(static_cast<const uint32_t*>(p));
}
SEQFUSE_DEVICE void store_4(void* p, uint32_t word) {
  *static_cast<uint32_t*>(p) = word;
}

SEQFUSE_DEVICE Bits8 load_8(const void* p) {
  const uint2 v = __ldg(static_cast<const uint2*>(p));
  return {{v.x, v.y}};
}
SEQFUSE_DEVICE void store_8(void* p, const Bits8& b) {
  *static_cast<uint2*>(p) = make_uint2(b.word[0], b.word[1]);
}

SEQFUSE_DEVICE float as_float(uint32_t x) {
  return __uint_as_float(x);
}
SEQFUSE_DEVICE uint32_t as_bits(float x) {
  return __float_as_uint(x);
}

SEQFUSE_DEVICE float widen(float x) {
  return x;
}
SEQFUSE_DEVICE float widen(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
SEQFUSE_DEVICE float widen(f16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}

template <class T>
SEQFUSE_DEVICE T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T r;
    if constexpr (std::is_same_v<T, bf16>)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
  }
}
// two elements in one word, `low` at the lower address
template <class T>
SEQFUSE_DEVICE uint32_t narrow_pair(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

SEQFUSE_DEVICE float exp(float x) {
  return expf(x);
}
SEQFUSE_DEVICE float tanh(float x) {
  return tanhf(x);
}
SEQFUSE_DEVICE float rsqrt(float x) {
  return 1.0f / sqrtf(x);
}
SEQFUSE_DEVICE float multiply(float a, float b) {
  return __fmul_rn(a, b);
}

// Fragments as PTX lays them out: with r = lane / 4 and q = lane % 4, a holds rows r, r+8, r, r+8 at columns 2q (first
// two words) and 2q + 8, two elements a word; b holds column r at rows 2q and 2q + 8; c rows r, r, r+8, r+8 at 2q,
// 2q+1.
template <class T>
SEQFUSE_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

SEQFUSE_DEVICE uint32_t round_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
// a holds rows r, r+8, r, r+8 at columns q (first two words) and q + 4; b holds column r at rows q and q + 4; c as
// above
SEQFUSE_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The configuration of one launch. It points into itself: not to be copied.
class Launch {
 public:
  // clusters: say how many blocks a cluster has even if it is one, which a question about clusters must
  Launch(const Grid& grid, int threads, void* stream, bool clusters) {
    config_.gridDim = dim3(uint32_t(grid.x), uint32_t(grid.y));
    config_.blockDim = dim3(uint32_t(threads));
    config_.dynamicSmemBytes = size_t(grid.shared);
    config_.stream = static_cast<cudaStream_t>(stream);
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = uint32_t(grid.cluster), cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
    if (clusters) config_.attrs = &cluster_, config_.numAttrs = 1;
  }
  Launch(const Launch&) = delete;

  // what a kernel must be told once before such a launch is legal
  static cudaError_t prepare(const void* kernel, const Grid& grid) {
    cudaError_t error = cudaSuccess;
    if (grid.shared > 48 * 1024)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared));
    if (error == cudaSuccess && grid.cluster > 8)  // above the portable size
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error;
  }
  cudaLaunchConfig_t& config() { return config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute cluster_{};
};

template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, void* stream, const A&... args) {
  cudaError_t error = Launch::prepare(reinterpret_cast<const void*>(kernel), grid);
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(&Launch(grid, threads, stream, grid.cluster > 1).config(), kernel, P(args)...);
  const cudaError_t last = cudaGetLastError();  // also clears it, so that the caller's next call does not see it
  return int(error != cudaSuccess ? error : last);
}

template <class... P>
int resident_clusters(void (*kernel)(P...), Grid grid, int threads) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int count = 0;
  cudaError_t error = Launch::prepare(function, grid);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveClusters(&count, function, &Launch(grid, threads, nullptr, true).config());
  cudaGetLastError();
  return error == cudaSuccess ? count : 0;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count > 0 ? count : 1;
}

inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

inline int capability() {
  const int device = current_device();
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
  return 10 * major + minor;
}

}  // namespace seqfuse::dev
