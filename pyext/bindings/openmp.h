// Whether torch runs its threads as an OpenMP team: set by seqfuse.native, read where a kernel asks for threads.
#pragma once

namespace seqfuse {
namespace detail {
// whether torch runs parallel_for as an OpenMP team; set once from Python (torch.backends.openmp.is_available())
inline bool& openmp() {
  static bool value = false;
  return value;
}
}  // namespace detail
}  // namespace seqfuse
