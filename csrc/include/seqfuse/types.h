// Types that every contract header shares. No torch header may be included below csrc/.
#pragma once
#include <cstdint>
#include <optional>

namespace seqfuse {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t size_of(DType t) {
  return t == DType::f32 ? 4 : 2;
}

// How a CPU kernel gets its threads: the caller lends its own pool, so there is never a second one.
// `run(n, fn, ctx)` calls fn(ctx, begin, end) on disjoint ranges that cover [0, n), at most `threads` of them at a
// time. `concurrent` promises that all ranges of one run are in flight together (an OpenMP team), which a kernel needs
// before it may make one range wait for another.
struct Parallel {
  using Body = void (*)(void* ctx, int64_t begin, int64_t end);
  void (*run)(int64_t n, Body body, void* ctx);
  int threads;
  bool concurrent;

  template <class F>
  void operator()(int64_t n, F& f) const {
    run(n, [](void* ctx, int64_t b, int64_t e) { (*static_cast<F*>(ctx))(b, e); }, &f);
  }
};

// Levels of the run-time dispatch on x86; every other architecture has the baseline only.
enum class Isa : int32_t { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa isa_detected();           // what this processor can do
Isa isa_active();             // what kernels use: min(detected, limit)
Isa isa_for_bf16_products();  // what those use that multiply bf16: AVX-512 where its own instructions are slow
// For tests and benchmarks: never use a level above `top`, and use it although slow; none: as found. Returns the limit
// there was.
std::optional<Isa> isa_limit(std::optional<Isa> top);
const char* isa_name(Isa);
bool is_intel();

// Whether VDPBF16PS, 32 products of bf16, takes as long as four FMAs of 16 instead of two: on Intel, where the tile
// unit is what bf16 is meant for (measured on Emerald and Granite Rapids). Not said where that unit may be used.
bool bf16_dots_are_slow();

// Whether MKL multiplies float32 with vectors of half the width that this processor computes with: on AMD it keeps to
// AVX2, and from Zen 5 on a core computes 512 bits at once. (Zen 4 does so in two halves, and Zen 5 in processors for
// notebooks, of models 2xh and 6xh.)
bool mkl_is_narrow();

int64_t last_level_cache();            // bytes; 0 where the system does not say
int64_t cached_bytes();                // what the caches are taken to keep from one call to the next
void set_cached_bytes(int64_t bytes);  // for tests and benchmarks; negative: as found

}  // namespace seqfuse
