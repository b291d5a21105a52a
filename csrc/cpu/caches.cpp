// What the caches are taken to keep from one call to the next: found once, at run time, and set on request.
#include <atomic>
#include <cstdio>

#include "seqfuse/types.h"

#if defined(__unix__)
#include <unistd.h>
#endif

namespace seqfuse {

// What two neighbouring cores share. On AMD sysconf() adds up the caches of all the processor's core complexes, of
// which a thread fills only its own (10 x 32 MiB on Zen 4): so Linux is asked first.
static long third_level() {
#if defined(__linux__)
  if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    long kib = 0;
    const bool found = fscanf(file, "%ldK", &kib) == 1;
    fclose(file);
    if (found) return kib * 1024;
  }
#endif
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  return 0;
#endif
}

int64_t last_level_cache() {
  constexpr long most = 1 << 30;  // a virtual machine may say anything
  const long size = third_level();
  return size > 0 && size <= most ? size : 0;
}

static std::atomic<int64_t> kept{-1};

// A quarter of the last level is where storing past the caches was measured to begin to win, on one of 480 MiB and on
// one of 32 (docs/layer_norm.md): between two calls others use it too.
int64_t cached_bytes() {
  const int64_t set = kept.load(std::memory_order_relaxed);
  if (set >= 0) return set;
  static const int64_t found = [] {
    constexpr int64_t least = 8 << 20;
    const int64_t quarter = last_level_cache() / 4;
    return quarter > least ? quarter : least;
  }();
  return found;
}

void set_cached_bytes(int64_t bytes) {
  kept.store(bytes, std::memory_order_relaxed);
}

}  // namespace seqfuse
