// Which instruction set the CPU kernels use: found once, at run time, and limited on request.
#include <algorithm>
#include <atomic>

#include "seqfuse/types.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqfuse {

// Whether the tile unit multiplies bf16 and this process may use it: Linux lends its 8 KiB of registers on request, to
// all threads at once.
static bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & amx_bf16) && (d & amx_tile) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Isa isa_detected() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const Isa found = [] {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::baseline;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
      return Isa::avx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return tiles_granted() ? Isa::amx : Isa::avx512_bf16;
  }();
  return found;
#else
  return Isa::baseline;
#endif
}

bool is_intel() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool bf16_dots_are_slow() {
  return isa_detected() == Isa::avx512_bf16 && is_intel();
}

bool mkl_is_narrow() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (isa_detected() < Isa::avx512 || !__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned family = ((a >> 8) & 15) + ((a >> 20) & 255), model = (a >> 16) & 15;
  return family >= 0x1a && model != 2 && model != 6;
#else
  return false;
#endif
}

constexpr int none = int(Isa::amx) + 1;
static std::atomic<int> limit{none};

Isa isa_active() {
  return Isa(std::min(int(isa_detected()), limit.load(std::memory_order_relaxed)));
}

Isa isa_for_bf16_products() {
  static const bool slow = bf16_dots_are_slow();
  return slow && limit.load(std::memory_order_relaxed) == none ? Isa::avx512 : isa_active();
}

std::optional<Isa> isa_limit(std::optional<Isa> top) {
  const int before = limit.exchange(top ? int(*top) : none, std::memory_order_relaxed);
  return before == none ? std::nullopt : std::optional(Isa(before));
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
    default:
      return "baseline";
  }
}

}  // namespace seqfuse
