// What a step of the cluster kernels waits for, measured alone: block barriers, cluster barriers, and a message of
// st.async from block to block, with the bytes that can be on their way at once. sm_90 only. Never yet run on a GPU.
//
//   nvcc -std=c++20 -O3 -arch=sm_90a -Icsrc/include -Icsrc benchmarks/cluster_latency.cu -o cluster_latency &&
//   ./cluster_latency
//
// One line for each: what, cluster size, bytes a block sends a round, nanoseconds a round.
#include <cstdio>

#include "cuda/device.cuh"

namespace dev = seqfuse::dev;
using dev::Bits16;

constexpr int kThreads = 256, kRounds = 20000, kMostBytes = 32768;

enum class What { block_barrier, cluster_barrier, message };

struct Shared {
  Bits16 x[2][kMostBytes / 16];
  dev::Arrivals arrivals[2];
};

// message: blocks in pairs, each sends `bytes` to the other and waits for as many. As in the recurrent kernels, who
// sends in round i has heard from its receiver in round i - 1, so two buffers are enough; in a ring they would not be.
SEQFUSE_KERNEL(kThreads, 1) rounds(What what, int bytes, int64_t* out) {
  if constexpr (dev::kClusters) {
    Shared& s = dev::dynamic_shared<Shared>();
    const int other = dev::cluster_rank() ^ 1;
    if (dev::thread() == 0) dev::arrivals_init(s.arrivals[0]), dev::arrivals_init(s.arrivals[1]);
    for (int v = dev::thread(); v < 2 * kMostBytes / 16; v += kThreads) s.x[0][v] = Bits16{};
    dev::cluster_barrier();
    int64_t begin = 0, end = 0;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    for (int i = 0; i < kRounds; i++) {
      if (what == What::block_barrier) dev::barrier();
      if (what == What::cluster_barrier) dev::cluster_barrier();
      if (what == What::message) {
        dev::Arrivals& arrivals = s.arrivals[i % 2];
        if (dev::thread() == 0) dev::arrivals_expect(arrivals, bytes);
        dev::barrier();
        for (int v = dev::thread(); v < bytes / 16; v += kThreads)
          dev::send_16(dev::cluster_peer(&s.x[(i + 1) % 2][v], other), s.x[i % 2][v],
                       dev::cluster_peer(&arrivals, other));
        dev::arrivals_wait(arrivals, i / 2 % 2);
      }
    }
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
    dev::cluster_barrier();
    if (dev::thread() == 0) out[dev::block_x()] = end - begin;
  }
}

int measure(const char* name, What what, int blocks, int bytes) {
  int64_t* out = nullptr;
  if (cudaMallocManaged(&out, 16 * sizeof(int64_t)) != cudaSuccess) return 1;
  int error = 0;
  for (int i = 0; i < 2 && !error; i++) {  // the first one warms up
    error = dev::launch(&rounds, {blocks, 1, blocks, int64_t(sizeof(Shared))}, kThreads, nullptr, what, bytes, out);
    if (!error) error = int(cudaDeviceSynchronize());
  }
  if (error)
    std::printf("%-16s %2d blocks %6d bytes: CUDA error %d\n", name, blocks, bytes, error);
  else
    std::printf("%-16s %2d blocks %6d bytes: %8.1f ns\n", name, blocks, bytes, double(out[0]) / kRounds);
  cudaFree(out);
  return error;
}

int main() {
  if (dev::capability() / 10 != 9) {
    std::printf("clusters need compute capability 9.0\n");
    return 0;
  }
  int failed = measure("block barrier", What::block_barrier, 2, 0) != 0;
  for (int blocks : {2, 4, 8, 16}) {
    failed |= measure("cluster barrier", What::cluster_barrier, blocks, 0) != 0;
    for (int bytes : {16, 1024, 4096, 15360, 30720}) failed |= measure("message", What::message, blocks, bytes) != 0;
  }
  return failed;
}
