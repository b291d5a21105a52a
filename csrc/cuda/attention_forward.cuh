// Attention forward for Hopper: softmax(scale * q k^T) v, never a Tq x Tk matrix in memory. Never yet run on a GPU.
//
// A block has 128 queries of one head (a tile) and goes through the keys in blocks of 128, from the last that the tile
// sees to the first, with the running maximum m and sum l of each row (Dao et al. 2022, arXiv:2205.14135, Milakov &
// Gimelshein 2018, arXiv:1805.02867), in base 2:
//
//   S = q k_j^T;  m' = max(m, S);  P = exp2(c S - c m'), c = scale log2 e;  a = exp2(c m - c m')
//   l = a l + sum P;  O = a O + P v_j;  at the end out = O / l, lse = ln 2 (c m + log2 l)
//
// Floor. 4 Tq Tk D flops a head (half of that for causal, and exactly the blocks that the diagonal touches are done
// whole), q, k, v read once and out, lse written once: 2 D (2 Tq + 2 Tk) + 4 Tq bytes a head. A block reads all K and V
// that it sees, mostly from the L2: 4 Tq Tk D bytes / 128 a head. Besides, one exp2 a score: 16 a cycle and SM beside
// 4096 dense flops, so for D = 128 a block of 128 x 128 has 1024 cycles of exp2 and 2 x 1024 of products; that, and not
// memory, is what the schedule must hide. (Shah et al. 2024, arXiv:2407.08608, whose ping-pong and two-stage pipeline
// this is.)
//
// Who. 3 warp groups of 128 threads, one block an SM. Group 0 produces: one thread asks TMA for q once, and for k and v
// block by block into kStages buffers each; it gives its registers away (24 left). Groups 1 and 2 consume: 64 rows
// each, S, P and O in registers (64 + 32 + D / 2 of 240 a thread), q, k and v from shared memory by wgmma.
//
// What is in flight when, in one consumer group; its own order is a column, the two groups run half a turn apart:
//
//   issue      S(i)  = q k_i^T                            wait: k_i is there; it is this group's turn
//   issue      O    += P(i-1) v_(i-1)                     wait: v_(i-1) is there. Then it is the other group's turn
//   S(i) done                                             k_i may be overwritten
//   softmax    mask, m, a, P = exp2(..), l                beside it the tensor cores run O += P(i-1) v_(i-1) of this
//                                                         group, then S and O of the other
//                                                         (dev::settle keeps it before the wait for O)
//   O done                                                v_(i-1) may be overwritten
//   O *= a, P to 16 bits in registers                     (the accumulator's layout is the operand's: hopper.cuh)
//
// The turn is a pair of barriers of the two groups ("ping-pong"): a group gives the tensor cores both of its products
// and only then lets the other one queue its own, so that one group's softmax lies beside the other's products. The
// first S and the last O += P v of a tile stand outside the loop. Both groups go through the same number of blocks, so
// the turns come out even; the one that would be left over is not passed.
//
// Buffers. full[s]: one arrival (the producer's) and the bytes of a tile. free[s]: 8 arrivals, one for each warp of the
// consumers, after the wait that ends the product that read it. The i-th use of a buffer waits for parity i % 2 of
// full, and the producer for the opposite parity of free, which is there from the start.
//
// Shared memory: (1 + 2 kStages) tiles of 256 D bytes: 160 KB for D = 128, 80 KB for D = 64, and the barriers. q's tile
// takes the result on its way out, so that it is stored 16 bytes a thread: each warp writes and reads only the 16 rows
// that it alone has read.
#pragma once
#include "cuda/attention.cuh"

namespace seqfuse::cuda {

constexpr int kStages = 2;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // 2 * 128 * 240 + 128 * 24 <= 65536

template <class T>
struct ForwardArguments {
  dev::TensorMap q, k, v;
  T* out;
  float* lse;
  int64_t out_b, out_h, out_t;  // strides
  Order order;
  int Tq, Tk, group;  // group: query heads a key head
  float scale_log2;
};

template <int D>
struct ForwardTiles {
  Panels<kTileRows, D> q, k[kStages], v[kStages];
  dev::Arrivals q_full, k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
};

// Named barriers of a block; 0 is dev::barrier's.
SEQFUSE_DEVICE int turn_of(int group) {
  return 1 + group;
}
SEQFUSE_DEVICE int rows_of(int group) {
  return 3 + group;
}

// Where the i-th block of keys lies, and in which phase of its barriers.
struct Stage {
  int slot, parity;
  explicit SEQFUSE_DEVICE Stage(int i) : slot(i % kStages), parity(i / kStages % 2) {}
};

template <int D, class T>
SEQFUSE_DEVICE void produce(ForwardTiles<D>& s, const ForwardArguments<T>& p, const Place& at, int blocks) {
  constexpr int kBytes = kTileRows * D * 2;
  const int head = at.head / p.group;
  dev::arrivals_expect(s.q_full, kBytes);
  load_tile<kTileRows>(s.q, p.q, at.tile * kTileRows, at.head, at.batch, s.q_full);
  for (int i = 0; i < blocks; i++) {
    const Stage to(i);
    const int first = (blocks - 1 - i) * kTileRows;
    dev::arrivals_wait(s.k_free[to.slot], to.parity ^ 1);
    dev::arrivals_expect(s.k_full[to.slot], kBytes);
    load_tile<kTileRows>(s.k[to.slot], p.k, first, head, at.batch, s.k_full[to.slot]);
    dev::arrivals_wait(s.v_free[to.slot], to.parity ^ 1);
    dev::arrivals_expect(s.v_full[to.slot], kBytes);
    load_tile<kTileRows>(s.v[to.slot], p.v, first, head, at.batch, s.v_full[to.slot]);
  }
}

// The two rows of a thread: i = 0 and 1 of the fragment layout.
struct RowState {
  float top[2] = {kHidden, kHidden};  // m, of unscaled scores
  float total[2] = {};                // l, of this thread's columns only

  // S becomes P; returns how much smaller what was summed up before counts now. A hidden score is -inf; where all are,
  // exp2(-inf - 0) = 0 keeps the row at nothing.
  template <bool Masked>
  SEQFUSE_DEVICE void softmax(float (&s)[kTileRows / 2], float (&shrink)[2], float scale_log2, int first_key,
                              const int (&last)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float high = kHidden;
#pragma unroll
      for (int c = 0; c < kTileRows / 8; c++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[4 * c + 2 * i + e];
          if (Masked && first_key + 8 * c + e > last[i]) x = kHidden;
          high = dev::maximum(high, x);
        }
      }
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2)
        high = dev::maximum(high, dev::as_float(dev::shuffle_xor(dev::as_bits(high), mask)));
      high = dev::maximum(high, top[i]);
      const float floor = high == kHidden ? 0.0f : high, base = floor * scale_log2;
      // exactly 1 where the largest stayed what it was: a fused top * scale_log2 - base would be what base was rounded
      // by
      shrink[i] = dev::exp2((top[i] - floor) * scale_log2);
      top[i] = high;
      float sum[2] = {};
#pragma unroll
      for (int c = 0; c < kTileRows / 8; c++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[4 * c + 2 * i + e];
          x = dev::exp2(x * scale_log2 - base);
          sum[e] += x;
        }
      }
      total[i] = total[i] * shrink[i] + (sum[0] + sum[1]);
    }
  }
};

// O *= shrink, by rows
template <int Words>
SEQFUSE_DEVICE void shrink_rows(float (&o)[Words], const float (&shrink)[2]) {
#pragma unroll
  for (int w = 0; w < Words; w++) o[w] *= shrink[w / 2 % 2];
}

// out and lse of this warp's 16 rows, from row `first` of the tile
template <int D, class T>
SEQFUSE_DEVICE void store_result(Panels<kTileRows, D>& tile, const ForwardArguments<T>& p, const Place& at, int first,
                                 const float (&o)[D / 2], const RowState& state) {
  const int rows = p.Tq - at.tile * kTileRows;
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float total = state.total[i];
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) total += dev::as_float(dev::shuffle_xor(dev::as_bits(total), mask));
    inverse[i] = total == 0.0f ? 0.0f : 1.0f / total;
    const int row = first + dev::lane() / 4 + 8 * i;
    if (dev::lane() % 4 == 0 && row < rows)
      p.lse[(int64_t(at.batch) * p.order.heads + at.head) * p.Tq + at.tile * kTileRows + row] =
          total == 0.0f ? kHidden : kLn2 * (state.top[i] * p.scale_log2 + dev::log2(total));
  }
  T* const out = p.out + at.batch * p.out_b + at.head * p.out_h + int64_t(at.tile) * kTileRows * p.out_t;
  store_rows(tile, first, o, inverse, out, p.out_t, rows);
}

// `group` 0 or 1: which 64 rows of the tile
template <int D, bool Causal, class T>
SEQFUSE_DEVICE void consume(ForwardTiles<D>& s, const ForwardArguments<T>& p, const Place& at, int blocks, int group) {
  const Visible<Causal> visible{p.Tk, p.Tk - p.Tq};
  const int lane = dev::lane(), first_row = at.tile * kTileRows + group * kPartRows;
  const int warp_row = group * kPartRows + dev::warp() % 4 * 16;  // in the tile
  // the last visible column of each row, counted from this thread's first column
  int last[2];
#pragma unroll
  for (int i = 0; i < 2; i++) last[i] = visible.last(at.tile * kTileRows + warp_row + lane / 4 + 8 * i) - lane % 4 * 2;

  float o[D / 2] = {}, scores[kTileRows / 2], shrink[2];
  uint32_t weights[kTileRows / 4];
  RowState state;
  if (blocks) {
    dev::arrivals_wait(s.q_full, 0);
    dev::arrivals_wait(s.k_full[0], 0);
    multiply_rows<T, kTileRows>(scores, s.q, group * kPartRows, s.k[0]);
    dev::wgmma_wait<0>(scores);
    release(s.k_free[0]);
    state.softmax<true>(scores, shrink, p.scale_log2, (blocks - 1) * kTileRows, last);
    narrow_all<T>(scores, weights);
    if (group == 1 && blocks > 1) dev::part_arrive(turn_of(0), 2 * dev::kWarpGroup);  // the first turn is group 0's

    // the i-th block of keys, from the end
    auto turn = [&]<bool Masked>(int i) {
      const Stage now(i), before(i - 1);
      dev::arrivals_wait(s.k_full[now.slot], now.parity);
      dev::part_barrier(turn_of(group), 2 * dev::kWarpGroup);
      multiply_rows<T, kTileRows>(scores, s.q, group * kPartRows, s.k[now.slot]);
      dev::arrivals_wait(s.v_full[before.slot], before.parity);
      multiply_columns<T, D, kTileRows>(o, weights, s.v[before.slot]);
      if (group == 0 || i + 1 < blocks) dev::part_arrive(turn_of(group ^ 1), 2 * dev::kWarpGroup);
      dev::wgmma_wait<1>(scores);
      release(s.k_free[now.slot]);
      state.softmax<Masked>(scores, shrink, p.scale_log2, (blocks - 1 - i) * kTileRows, last);
      dev::settle(dev::as_bits(state.total[0] + state.total[1]));  // the exponentials, beside the products
      dev::wgmma_wait<0>(o);
      release(s.v_free[before.slot]);
      shrink_rows(o, shrink);
      narrow_all<T>(scores, weights);
    };
    int i = 1;
    if constexpr (Causal)
      for (const int masked = blocks - visible.whole_blocks(first_row); i < masked; i++)
        turn.template operator()<true>(i);
    for (; i < blocks; i++) turn.template operator()<false>(i);

    const Stage end(blocks - 1);
    dev::arrivals_wait(s.v_full[end.slot], end.parity);
    multiply_columns<T, D, kTileRows>(o, weights, s.v[end.slot]);
    dev::wgmma_wait<0>(o);
    release(s.v_free[end.slot]);
  }
  dev::part_barrier(rows_of(group), dev::kWarpGroup);  // all of the group's products have read q
  store_result<D>(s.q, p, at, warp_row, o, state);
}

template <int D, bool Causal, class T>
SEQFUSE_KERNEL(kAttentionThreads, 1)
attention_forward(SEQFUSE_CONSTANT ForwardArguments<T> p) {
  if constexpr (dev::kWarpGroups) {
    using Shared = ForwardTiles<D>;
    Shared& s = dev::dynamic_shared<Shared>();
    const Place at = place_of(p.order, dev::block_x());
    const int blocks = Visible<Causal>{p.Tk, p.Tk - p.Tq}.blocks(at.tile * kTileRows, kTileRows);
    if (dev::thread() == 0) {
      dev::arrivals_init(s.q_full, 1);
      for (int i = 0; i < kStages; i++) {
        dev::arrivals_init(s.k_full[i], 1), dev::arrivals_init(s.v_full[i], 1);
        dev::arrivals_init(s.k_free[i], 8), dev::arrivals_init(s.v_free[i], 8);
      }
    }
    dev::barrier();
    const int group = dev::uniform(dev::thread() / dev::kWarpGroup);
    if (group == 0) {
      dev::give_registers<kProducerRegisters>();
      if (dev::thread() == 0 && blocks) produce(s, p, at, blocks);
    } else {
      dev::take_registers<kConsumerRegisters>();
      consume<D, Causal>(s, p, at, blocks, group - 1);
    }
  }
}

}  // namespace seqfuse::cuda
