// Kernels that test the device layer itself, and kernels with one deliberate mistake each, which the host side of the
// layer must catch. tests/test_cuda_on_host.py runs them; nvcc compiles them too (sm_90a: clusters).
#pragma once
#include "cuda/attention.cuh"

namespace seqfuse::self_test {

constexpr int kThreads = 128, kCluster = 4;

struct Shared {
  float x[kThreads];
};

// out[i] = in[i rotated by 33 within the block]: right only if all have written before anyone reads, in every round
SEQFUSE_KERNEL(kThreads, 1) rotate(const float* in, float* out, int rounds, bool first_barrier, bool second_barrier) {
  Shared& s = dev::shared<Shared>();
  const int i = dev::thread();
  float x = in[dev::block_x() * kThreads + i];
  for (int r = 0; r < rounds; r++) {
    s.x[i] = x;
    if (first_barrier) dev::barrier();
    x = s.x[(i + 33) % kThreads];
    if (second_barrier) dev::barrier();
  }
  out[dev::block_x() * kThreads + i] = x;
}

// out[i] = value of the same thread in the next block of the cluster
SEQFUSE_KERNEL(kThreads, 1) ring(const float* in, float* out, bool with_barrier) {
  Shared& s = dev::shared<Shared>();
  const int i = dev::block_x() * kThreads + dev::thread();
  s.x[dev::thread()] = in[i];
  if (with_barrier) dev::cluster_barrier();
  const Shared* next = dev::cluster_peer(&s, (dev::cluster_rank() + 1) % dev::cluster_size());
  out[i] = next->x[dev::thread()];
  dev::cluster_barrier();  // nobody leaves while others read its shared memory
}

struct RelayShared {
  dev::Bits16 x[2][kThreads / 4];
  dev::Arrivals arrivals[2];
  float padding[8];
};
enum class RelayMistake : int { none, no_wait, too_few_bytes, no_init, wrong_count, dynamic_size, no_such_block };

// Each block sends its values to the next one of the cluster, `rounds` times, without any barrier but the block's.
SEQFUSE_KERNEL(kThreads, 1) relay(const float* in, float* out, int rounds, RelayMistake mistake) {
  RelayShared& s = dev::dynamic_shared<RelayShared>();
  const int i = dev::thread(), next = (dev::cluster_rank() + 1) % dev::cluster_size();
  const int before = (dev::cluster_rank() + dev::cluster_size() - 1) % dev::cluster_size();
  auto* values = reinterpret_cast<float*>(s.x[0]);
  values[i] = in[dev::block_x() * kThreads + i];
  if (i == 0 && mistake != RelayMistake::no_init) dev::arrivals_init(s.arrivals[0]), dev::arrivals_init(s.arrivals[1]);
  dev::cluster_barrier();
  for (int r = 0; r < rounds; r++) {
    dev::Arrivals& arrivals = s.arrivals[(r + 1) % 2];
    if (i == 0) dev::arrivals_expect(arrivals, kThreads * 4 - (mistake == RelayMistake::too_few_bytes ? 16 : 0));
    dev::barrier();
    const int to = mistake == RelayMistake::no_such_block ? dev::cluster_size() : next;
    const int count = mistake == RelayMistake::wrong_count ? before : to;
    if (i < kThreads / 4)
      dev::send_16(dev::cluster_peer(&s.x[(r + 1) % 2][i], to), s.x[r % 2][i], dev::cluster_peer(&arrivals, count));
    if (mistake != RelayMistake::no_wait) dev::arrivals_wait(arrivals, r / 2 % 2);
    // unlike the recurrent kernels, the sender does not hear from the receiver: it must not run ahead
    dev::cluster_barrier();
  }
  out[dev::block_x() * kThreads + i] = reinterpret_cast<float*>(s.x[rounds % 2])[i];
}

// c[16, 8] = a[16, 16] @ b[8, 16]^T, one warp
template <class T>
SEQFUSE_DEVICE void one_mma(const T* a, const T* b, float* c) {
  const int r = dev::lane() / 4, q = dev::lane() % 4;
  auto pair = [](const T* p) { return dev::raw(p[0]) | dev::raw(p[1]) << 16; };
  const uint32_t left[4] = {pair(a + r * 16 + 2 * q), pair(a + (r + 8) * 16 + 2 * q), pair(a + r * 16 + 2 * q + 8),
                            pair(a + (r + 8) * 16 + 2 * q + 8)};
  const uint32_t right[2] = {pair(b + r * 16 + 2 * q), pair(b + r * 16 + 2 * q + 8)};
  float acc[4] = {};
  dev::mma_m16n8k16<T>(acc, left, right);
  for (int e = 0; e < 4; e++) c[(r + e / 2 * 8) * 8 + 2 * q + e % 2] = acc[e];
}
SEQFUSE_KERNEL(32, 1) mma_bf16(const dev::bf16* a, const dev::bf16* b, float* c) {
  one_mma(a, b, c);
}
SEQFUSE_KERNEL(32, 1) mma_f16(const dev::f16* a, const dev::f16* b, float* c) {
  one_mma(a, b, c);
}

// c[16, 8] = a[16, 8] @ b[8, 8]^T in tf32, one warp
SEQFUSE_KERNEL(32, 1) mma_tf32(const float* a, const float* b, float* c) {
  const int r = dev::lane() / 4, q = dev::lane() % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; i++) left[i] = dev::round_tf32(a[(r + i % 2 * 8) * 8 + q + i / 2 * 4]);
  for (int i = 0; i < 2; i++) right[i] = dev::round_tf32(b[r * 8 + q + i * 4]);
  float acc[4] = {};
  dev::mma_m16n8k8_tf32(acc, left, right);
  for (int e = 0; e < 4; e++) c[(r + e / 2 * 8) * 8 + 2 * q + e % 2] = acc[e];
}

// out[i] = the sum over i's group of threads, by shuffles and shared memory
struct Add {
  SEQFUSE_DEVICE float operator()(float a, float b) const { return a + b; }
};
SEQFUSE_KERNEL(kThreads, 1) group_sum(const float* in, float* out, int group, int rounds) {
  struct Scratch {
    float x[2][dev::kWarp];
  };
  Scratch& s = dev::shared<Scratch>();
  const int i = dev::block_x() * kThreads + dev::thread();
  float x = in[i], total = 0.0f;
  for (int r = 0; r < rounds; r++) total += dev::group_reduce(x, group, s.x, r % 2, Add{});
  out[i] = total;
}

// rounding: out[i] = T(in[i]) widened again, by the single and by the paired conversion
template <class T>
SEQFUSE_DEVICE void round_trip(const float* in, float* out, int n) {
  for (int i = dev::thread(); i + 1 < n; i += dev::threads()) {
    const uint32_t pair = dev::narrow_pair<T>(in[i], in[i + 1]);
    out[i] = dev::widen(dev::narrow<T>(in[i]));
    out[n + i] = dev::widen(T{uint16_t(pair)});
    out[2 * n + i] = dev::widen(T{uint16_t(pair >> 16)});
  }
}
SEQFUSE_KERNEL(kThreads, 1) round_bf16(const float* in, float* out, int n) {
  round_trip<dev::bf16>(in, out, n);
}
SEQFUSE_KERNEL(kThreads, 1) round_f16(const float* in, float* out, int n) {
  round_trip<dev::f16>(in, out, n);
}

SEQFUSE_KERNEL(kThreads, 1) round_tf32(const float* in, float* out, int n) {
  for (int i = dev::thread(); i < n; i += dev::threads()) out[i] = dev::as_float(dev::round_tf32(in[i]));
}

// Products of a warp group whose operands come by TMA: out[64, 64] = a @ b^T with a [64, 128], b [64, 128] by rows, or
// a @ c with a in registers and c [128, 64] by columns. One mistake each: what they are is at their place below.
struct PanelShared {
  cuda::Panels<64, 128> a, b;
  cuda::Panels<128, 64> c;
  dev::Arrivals full;
};
enum class PanelMistake : int { none, no_wait, no_fence, early_read, unaligned, few_bytes, no_barrier, uneven };

template <class T>
SEQFUSE_DEVICE void panels(const dev::TensorMap& a, const dev::TensorMap& b, const dev::TensorMap& c, float* out,
                           bool by_columns, PanelMistake mistake) {
  PanelShared& s = dev::dynamic_shared<PanelShared>();
  const int r = dev::thread() / 32 * 16 + dev::lane() / 4, q = dev::lane() % 4;
  if (dev::thread() == 0) {
    dev::arrivals_init(s.full, 1);
    dev::arrivals_expect(s.full, 3 * 64 * 128 * 2 - (mistake == PanelMistake::few_bytes ? 16 : 0));
    cuda::load_tile<64>(s.a, a, 0, 0, 0, s.full), cuda::load_tile<64>(s.b, b, 0, 0, 0, s.full);
    dev::load_panel(mistake == PanelMistake::unaligned ? &s.c.x[0][0][8] : s.c.x[0][0], c, 0, 0, 0, 0, s.full);
    dev::load_panel(s.c.x[0][64], c, 0, 64, 0, 0, s.full);
  }
  dev::barrier();
  if (mistake != PanelMistake::no_wait) dev::arrivals_wait(s.full, 0);
  float d[32] = {};
  if (by_columns) {
    uint32_t words[32];
    for (int w = 0; w < 32; w++)  // word 2 h + i of 16 columns
      words[w] = dev::load_4(reinterpret_cast<unsigned char*>(s.a.x[w / 16]) +
                             dev::swizzled(r + w % 2 * 8, w / 4 % 4 * 32 + w / 2 % 2 * 16 + 4 * q));
    cuda::multiply_columns<T, 64, 128>(d, words, s.c);
  } else if (mistake == PanelMistake::no_fence) {
    dev::wgmma<T, 64, false>(d, dev::descriptor_of_rows(s.a.x[0]), dev::descriptor_of_rows(s.b.x[0]), false);
  } else {
    cuda::multiply_rows<T, 64>(d, s.a, 0, s.b);
  }
  if (mistake != PanelMistake::early_read) dev::wgmma_wait<0>(d);
  for (int w = 0; w < 32; w++) out[(r + w / 2 % 2 * 8) * 64 + w / 4 * 8 + 2 * q + w % 2] = d[w];
  if (mistake == PanelMistake::early_read) dev::wgmma_wait<0>(d);
  if (mistake == PanelMistake::no_barrier && dev::warp() < 3) dev::part_arrive(5, 128);
  if (mistake == PanelMistake::uneven && dev::warp() < 3)
    cuda::multiply_rows<T, 64>(d, s.a, 0, s.b), dev::wgmma_wait<0>(d);
}
SEQFUSE_KERNEL(kThreads, 1)
panels_bf16(SEQFUSE_CONSTANT dev::TensorMap a, SEQFUSE_CONSTANT dev::TensorMap b, SEQFUSE_CONSTANT dev::TensorMap c,
            float* out, bool by_columns, PanelMistake mistake) {
  panels<dev::bf16>(a, b, c, out, by_columns, mistake);
}
SEQFUSE_KERNEL(kThreads, 1)
panels_f16(SEQFUSE_CONSTANT dev::TensorMap a, SEQFUSE_CONSTANT dev::TensorMap b, SEQFUSE_CONSTANT dev::TensorMap c,
           float* out, bool by_columns, PanelMistake mistake) {
  panels<dev::f16>(a, b, c, out, by_columns, mistake);
}

// out[block] = tile + 1000 head + 1000000 batch of the attention kernels' order
SEQFUSE_KERNEL(kThreads, 1) place(float* out, int tiles, int heads, int batches, int section, bool longest_first) {
  const cuda::Place at = cuda::place_of({tiles, heads, batches, section, longest_first}, dev::block_x());
  if (dev::thread() == 0) out[dev::block_x()] = float(at.tile + 1000 * at.head + 1000000 * at.batch);
}

enum class Mistake : int { none, past_the_end, past_shared, unaligned, split_warp, early_exit, left_the_barrier };

SEQFUSE_KERNEL(kThreads, 1) mistaken(const float* in, float* out, int n, Mistake mistake) {
  Shared& s = dev::shared<Shared>();
  const int i = dev::thread();
  if (mistake == Mistake::early_exit && i == 5) return;
  s.x[i] = i < n ? in[i] : 0.0f;
  if (mistake == Mistake::past_shared) (&s.x[0])[i + 1] = 0.0f;
  if (mistake == Mistake::unaligned) s.x[i] = dev::as_float(dev::load_16(in + 1).word[0]);
  if (mistake == Mistake::split_warp) {
    if (i % 2) dev::shuffle_xor(1, 1);
  }
  if (mistake != Mistake::left_the_barrier || i != 7) dev::barrier();
  if (i < n || mistake == Mistake::past_the_end) out[i] = s.x[i];
}

}  // namespace seqfuse::self_test
