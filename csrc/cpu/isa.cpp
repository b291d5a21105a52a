// Which instruction set the CPU kernels use: found once, at run time, and limited on request.
#include <algorithm>
#include <atomic>

#include "seqfuse/types.h"

namespace seqfuse {

Isa isa_detected() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const Isa found = [] {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::baseline;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
      return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }();
  return found;
#else
  return Isa::baseline;
#endif
}

static std::atomic<int> limit{int(Isa::avx512_bf16)};

Isa isa_active() {
  return Isa(std::min(int(isa_detected()), limit.load(std::memory_order_relaxed)));
}

void isa_limit(Isa top) {
  limit.store(int(top), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    default:
      return "baseline";
  }
}

}  // namespace seqfuse
