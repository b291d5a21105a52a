// The Hopper part of the device layer on a GPU: PTX. See hopper.cuh, which is the only file to include this one.
#pragma once
#include <cuda.h>  // types only: libcuda is not linked

#include <atomic>

#define SEQFUSE_CONSTANT const __grid_constant__

namespace seqfuse::dev {

using TensorMap = CUtensorMap;

using Encode = decltype(&cuTensorMapEncodeTiled);

// null where the driver has none, or could not be asked
inline Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  cudaGetLastError();
  const bool there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<Encode>(found) : nullptr;
}

inline int make_tensor_map(TensorMap& map, const Tiled& t) {
  static std::atomic<Encode> known{nullptr};  // what failed once may be there the next time
  Encode encode = known;
  if (!encode) known = encode = find_encode();
  if (!encode) return int(cudaErrorNotSupported);
  // a thread whose first work this is (autograd's, of a backward pass) may have no context yet, and the driver's call
  // takes the current one: torch's guard sets a device only if it is another
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return int(error);
  if (const cudaError_t error = cudaSetDevice(device)) return int(error);
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; i++) size[i] = cuuint64_t(t.size[i]);
  for (int i = 0; i < 3; i++) stride[i] = cuuint64_t(t.stride[i]) * 2;
  const cuuint32_t box[4] = {cuuint32_t(kPanelColumns), cuuint32_t(t.rows), 1, 1}, step[4] = {1, 1, 1, 1};
  const auto type = t.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult error =
      encode(&map, type, 4, const_cast<void*>(t.data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return int(error);  // the numbers are cudaError_t's
}

SEQFUSE_DEVICE float maximum(float x, float y) {
  return fmaxf(x, y);
}
SEQFUSE_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEQFUSE_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEQFUSE_DEVICE int uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}
SEQFUSE_DEVICE void warp_barrier() {
  __syncwarp();
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpGroups = true;

SEQFUSE_DEVICE void load_panel(void* to, const TensorMap& map, int d, int t, int h, int b, Arrivals& a) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&a)), "r"(d), "r"(t), "r"(h), "r"(b)
      : "memory");
}
SEQFUSE_DEVICE void load_bytes(void* to, const void* from, int bytes, Arrivals& a) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&a))
               : "memory");
}
SEQFUSE_DEVICE void arrivals_init(Arrivals& a, int count) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(&a)),
      "r"(count)
      : "memory");
}
SEQFUSE_DEVICE void arrivals_arrive(Arrivals& a) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&a)) : "memory");
}
SEQFUSE_DEVICE void part_barrier(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SEQFUSE_DEVICE void part_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N>
SEQFUSE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
SEQFUSE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

SEQFUSE_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SEQFUSE_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The compiler may not use d before the wait: it does not know that the products were still under way.
template <int K, int Words>
SEQFUSE_DEVICE void wgmma_wait(float (&d)[Words]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(K) : "memory");
#pragma unroll
  for (int i = 0; i < Words; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// ptxas moves arithmetic across a wait, as far as it likes; not across a barrier of the warp, whose mask comes from x.
SEQFUSE_DEVICE void settle(uint32_t x) {
  asm volatile(
      "{\n.reg .pred never;\n.reg .b32 mask;\nsetp.eq.u32 never, %0, 0xffffffff;\n"
      "selp.b32 mask, 0, 0xffffffff, never;\nbar.warp.sync mask;\n}" ::"r"(x)
      : "memory");
}

// d as asm operands, and their numbers
#define SEQFUSE_D8(i)                                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SEQFUSE_D32(i) SEQFUSE_D8(i), SEQFUSE_D8(i + 8), SEQFUSE_D8(i + 16), SEQFUSE_D8(i + 24)
#define SEQFUSE_N32                                                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define SEQFUSE_N64                                                                                              \
  SEQFUSE_N32                                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58" \
  ",%59,%60,%61,%62,%63"
#define SEQFUSE_WGMMA(n, type, numbers, a, b, add, transposed)                                                 \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
  " {" numbers "}, " a ", " b ", p, 1, 1, " transposed ";\n}"

template <class T, int N, bool Transposed>
SEQFUSE_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(N == 64 || N == 128);
  if constexpr (N == 64 && kBf16)
    asm volatile(SEQFUSE_WGMMA("64", "bf16", SEQFUSE_N32, "%32", "%33", "%34", "0, %35")
                 : SEQFUSE_D32(0)
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(Transposed)));
  else if constexpr (N == 64)
    asm volatile(SEQFUSE_WGMMA("64", "f16", SEQFUSE_N32, "%32", "%33", "%34", "0, %35")
                 : SEQFUSE_D32(0)
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(Transposed)));
  else if constexpr (kBf16)
    asm volatile(SEQFUSE_WGMMA("128", "bf16", SEQFUSE_N64, "%64", "%65", "%66", "0, %67")
                 : SEQFUSE_D32(0), SEQFUSE_D32(32)
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(Transposed)));
  else
    asm volatile(SEQFUSE_WGMMA("128", "f16", SEQFUSE_N64, "%64", "%65", "%66", "0, %67")
                 : SEQFUSE_D32(0), SEQFUSE_D32(32)
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(Transposed)));
}

template <class T, int N, bool Transposed>
SEQFUSE_DEVICE void wgmma(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool add) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(N == 64 || N == 128);
  if constexpr (N == 64 && kBf16)
    asm volatile(SEQFUSE_WGMMA("64", "bf16", SEQFUSE_N32, "{%32, %33, %34, %35}", "%36", "%37", "%38")
                 : SEQFUSE_D32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(Transposed)));
  else if constexpr (N == 64)
    asm volatile(SEQFUSE_WGMMA("64", "f16", SEQFUSE_N32, "{%32, %33, %34, %35}", "%36", "%37", "%38")
                 : SEQFUSE_D32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(Transposed)));
  else if constexpr (kBf16)
    asm volatile(SEQFUSE_WGMMA("128", "bf16", SEQFUSE_N64, "{%64, %65, %66, %67}", "%68", "%69", "%70")
                 : SEQFUSE_D32(0), SEQFUSE_D32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(Transposed)));
  else
    asm volatile(SEQFUSE_WGMMA("128", "f16", SEQFUSE_N64, "{%64, %65, %66, %67}", "%68", "%69", "%70")
                 : SEQFUSE_D32(0), SEQFUSE_D32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(Transposed)));
}
#undef SEQFUSE_D8
#undef SEQFUSE_D32
#undef SEQFUSE_N32
#undef SEQFUSE_N64
#undef SEQFUSE_WGMMA

#else
// declared, so that kernels can name them; kWarpGroups keeps them from being called
constexpr bool kWarpGroups = false;
SEQFUSE_DEVICE void load_panel(void*, const TensorMap&, int, int, int, int, Arrivals&) {}
SEQFUSE_DEVICE void load_bytes(void*, const void*, int, Arrivals&) {}
SEQFUSE_DEVICE void arrivals_init(Arrivals&, int) {}
SEQFUSE_DEVICE void arrivals_arrive(Arrivals&) {}
SEQFUSE_DEVICE void part_barrier(int, int) {}
SEQFUSE_DEVICE void part_arrive(int, int) {}
template <int N>
SEQFUSE_DEVICE void take_registers() {}
template <int N>
SEQFUSE_DEVICE void give_registers() {}
SEQFUSE_DEVICE void wgmma_fence() {}
SEQFUSE_DEVICE void wgmma_commit() {}
template <int K, int Words>
SEQFUSE_DEVICE void wgmma_wait(float (&)[Words]) {}
SEQFUSE_DEVICE void settle(uint32_t) {}
template <class T, int N, bool Transposed>
SEQFUSE_DEVICE void wgmma(float (&)[N / 2], uint64_t, uint64_t, bool) {}
template <class T, int N, bool Transposed>
SEQFUSE_DEVICE void wgmma(float (&)[N / 2], const uint32_t*, uint64_t, bool) {}
#endif

}  // namespace seqfuse::dev
