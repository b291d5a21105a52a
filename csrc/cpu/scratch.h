// Memory that a kernel needs for the length of one call.
#pragma once
#include <new>

#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

SEQFUSE_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// 64-byte aligned scratch cut from one allocation; take() before allocate() only counts.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (base_) ::operator delete(base_, std::align_val_t(64));
  }
  void allocate() {
    base_ = (char*)::operator new(used_, std::align_val_t(64));
    used_ = 0;
  }
  template <class P>
  void take(P*& p, int64_t count) {
    if (base_) p = (P*)(base_ + used_);
    used_ += size_t(ceil_div(count * int64_t(sizeof(P)), 64) * 64);
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
