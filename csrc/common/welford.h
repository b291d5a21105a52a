// Mean and variance that can be merged (Welford 1962; Chan, Golub, LeVeque 1979), for host and device.
#pragma once
#include "common/gates.h"  // SEQFUSE_HD

namespace seqfuse {

// count values with this mean and sum of squared deviations m2
struct Moments {
  float count, mean, m2;
};

SEQFUSE_HD Moments merge(Moments a, Moments b) {
  const float n = a.count + b.count;
  if (n == 0.0f) return a;
  const float d = b.mean - a.mean, w = b.count / n;
  return {n, a.mean + d * w, a.m2 + b.m2 + d * d * a.count * w};
}

}  // namespace seqfuse
