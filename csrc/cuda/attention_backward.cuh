// Attention backward for Hopper: dq, dk, dv from q, k, v, out, dout and lse. Never yet run on a GPU.
//
//   delta_i = sum_d dout_id out_id - dlse_i;  P_ij = exp2(c q_i . k_j - log2e lse_i), c = scale log2 e
//   dS_ij = P_ij (dout_i . v_j - delta_i);  dv_j = sum_i P_ij dout_i;  dk_j = scale sum_i dS_ij q_i
//   dq_i = scale sum_j dS_ij k_j
//
// Deterministic, nothing atomic, and no scratch of the size of dq: two passes, each of which makes S and P again (Dao
// et al. 2022, arXiv:2205.14135). One block owns 128 rows of the result and goes through the other side:
//
//   pass     resident (128 rows)  streamed (64 rows a stage)  products a turn               results
//   of keys  k, v                 q, dout                     S' = k q^T, dP' = v dout^T    dv += P' dout, dk += dS' q
//   of rows  q, dout              k, v                        S  = q k^T, dP  = dout v^T    dq += dS k
//
// In the pass of keys everything is transposed (S' is [keys, queries]), so that P' and dS' are, as they come out of a
// product, the operand a of the next one: neither pass writes P or dS to shared memory. With several query heads a key
// head the pass of keys streams the queries of all of them, one head after the other.
//
// Floor. 14 Tq Tk D flops a head (half of that for causal): 5 products if one pass did everything and summed dq up with
// atomics or in an order between blocks, 7 here. That bounds this backward at 5 / 7 of what such a kernel could reach.
// Bytes: q, k, v, out, dout read and dq, dk, dv written once; each pass reads its streamed side once a tile, mostly
// from the L2.
//
// Who. As in attention_forward.cuh: a producer group and two consumer groups of 64 rows. Registers a consumer thread, D
// = 128: dk and dv 128, S' and dP' 64, P' and dS' in 16 bits 32, of 240.
//
// What is in flight when, in one consumer group:
//
//   issue      S(i)                                       wait: the buffer of turn i is there
//   issue      dv += P(i-1) dout, dk += dS(i-1) q; dP(i)
//   S(i) done
//   P(i) = exp2(..), masked                               beside it the tensor cores run the three products
//   all done                                              the buffer of turn i - 1 may be overwritten
//   dS(i) = P(i) (dP(i) - delta), P and dS to 16 bits
//
// For D = 128 the pass of keys issues dP(i) only when the results of turn i - 1 are done: its registers are not free
// before (ptxas C7512).
//
// Nothing holds the two groups in step: while one is at its exponentials and at dS, the tensor cores have the products
// of the other. kBackwardStages buffers of q and dout (or k and v), and in the pass of keys of lse and delta, which
// belong to columns there; the pass of rows has two of each in registers. Shared memory: 162 KB for D = 128, 82 KB for
// D = 64. Queries beyond Tq have lse = +inf, so that their P is 0; so have rows that see no key.
#pragma once
#include "cuda/attention.cuh"

namespace seqfuse::cuda {

constexpr int kStreamRows = 64, kBackwardStages = 3;
constexpr int kBackwardConsumerRegisters = 240, kBackwardProducerRegisters = 24;

template <class T>
struct BackwardArguments {
  dev::TensorMap q, k, v, dout;  // boxes of kStreamRows rows
  T *dq, *dk, *dv;
  int64_t dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t;  // strides
  const float *lse, *delta;                                      // [B, Hq, padded], lse in base 2
  Order order;                                                   // of this pass
  int Tq, Tk, padded, heads, group;                              // heads: of queries; group: query heads a key head
  float scale, scale_log2;
};

template <int D>
struct BackwardTiles {
  Panels<kTileRows, D> first, second;                             // k and v, or q and dout
  Panels<kStreamRows, D> x[kBackwardStages], y[kBackwardStages];  // q and dout, or k and v
  struct alignas(16) {
    float lse[kStreamRows], delta[kStreamRows];
  } columns[kBackwardStages];
  dev::Arrivals resident, full[kBackwardStages], free[kBackwardStages];
};

// What a block streams: `heads` query heads (of keys; else one key head) x `blocks` blocks of 64 rows from `begin` on.
struct Stream {
  int begin, blocks, heads;
  SEQFUSE_DEVICE int turns() const { return blocks * heads; }
  SEQFUSE_DEVICE int row(int turn) const { return (begin + turn % blocks) * kStreamRows; }
};

// Of keys: the queries that see some key of the tile, which are the last ones. Else the keys that some row sees.
template <bool Keys, bool Causal, class T>
SEQFUSE_DEVICE Stream stream_of(const BackwardArguments<T>& p, const Place& at) {
  const int first = at.tile * kTileRows;
  if constexpr (Keys) {
    const int from =
        Causal && first > p.Tk - p.Tq ? first - (p.Tk - p.Tq) : 0;  // the first query that sees key `first`
    const int begin = from / kStreamRows, end = (p.Tq + kStreamRows - 1) / kStreamRows;
    return {begin, end > begin ? end - begin : 0, p.group};
  } else {
    const int keys = Visible<Causal>{p.Tk, p.Tk - p.Tq}.last(first + kTileRows - 1) + 1;
    return {0, (keys + kStreamRows - 1) / kStreamRows, 1};
  }
}

template <bool Keys, int D, class T>
SEQFUSE_DEVICE void produce_backward(BackwardTiles<D>& s, const BackwardArguments<T>& p, const Place& at,
                                     const Stream& stream) {
  constexpr int kBytes = kStreamRows * D * 2;
  const int first = at.tile * kTileRows;
  dev::arrivals_expect(s.resident, 2 * kTileRows * D * 2);
  load_tile<kStreamRows>(s.first, Keys ? p.k : p.q, first, at.head, at.batch, s.resident);
  load_tile<kStreamRows>(s.second, Keys ? p.v : p.dout, first, at.head, at.batch, s.resident);
  for (int i = 0; i < stream.turns(); i++) {
    const int slot = i % kBackwardStages, row = stream.row(i);
    const int head = Keys ? at.head * p.group + i / stream.blocks : at.head / p.group;
    dev::arrivals_wait(s.free[slot], i / kBackwardStages % 2 ^ 1);
    dev::arrivals_expect(s.full[slot], 2 * kBytes + (Keys ? 2 * kStreamRows * 4 : 0));
    load_tile<kStreamRows>(s.x[slot], Keys ? p.q : p.k, row, head, at.batch, s.full[slot]);
    load_tile<kStreamRows>(s.y[slot], Keys ? p.dout : p.v, row, head, at.batch, s.full[slot]);
    if constexpr (Keys) {
      const int64_t offset = (int64_t(at.batch) * p.heads + head) * p.padded + row;
      dev::load_bytes(s.columns[slot].lse, p.lse + offset, kStreamRows * 4, s.full[slot]);
      dev::load_bytes(s.columns[slot].delta, p.delta + offset, kStreamRows * 4, s.full[slot]);
    }
  }
}

// lse or delta of element e, e + 2 .. of a fragment's 8 columns: of the column in the pass of keys, else of the row
template <bool Keys>
struct Statistics {
  const float* columns;  // of this thread's first column
  float rows[2];
  SEQFUSE_DEVICE float at(int c, int i, int e) const { return Keys ? columns[8 * c + e] : rows[i]; }
};

template <int D, bool Causal, bool Keys, class T>
SEQFUSE_DEVICE void consume_backward(BackwardTiles<D>& s, const BackwardArguments<T>& p, const Place& at,
                                     const Stream& stream, int group) {
  constexpr int N = kStreamRows, kWords = N / 2;
  constexpr bool kTight = Keys && D == 128;  // dP has no registers before P and dS of the turn before are used up
  const int lane = dev::lane(), shift = p.Tk - p.Tq, turns = stream.turns();
  const int part = group * kPartRows, warp_row = part + dev::warp() % 4 * 16;  // in the tile
  const int row = at.tile * kTileRows + warp_row + lane / 4;                   // of the tensor, and 8 further
  Statistics<Keys> lse{}, delta{};
  if constexpr (!Keys) {
    const int64_t offset = (int64_t(at.batch) * p.heads + at.head) * p.padded + row;
#pragma unroll
    for (int i = 0; i < 2; i++) lse.rows[i] = p.lse[offset + 8 * i], delta.rows[i] = p.delta[offset + 8 * i];
  }

  float first[D / 2] = {}, second[D / 2] = {};  // dk and dv; or dq, and nothing
  float scores[kWords], slopes[kWords];         // S and dP
  uint32_t weights[kWords / 2], gradients[kWords / 2];
  auto slot = [](int i) { return i % kBackwardStages; };
  auto issue_scores = [&](int i) {
    dev::arrivals_wait(s.full[slot(i)], i / kBackwardStages % 2);
    multiply_rows<T, N>(scores, s.first, part, s.x[slot(i)]);
  };
  auto issue_slopes = [&](int i) { multiply_rows<T, N>(slopes, s.second, part, s.y[slot(i)]); };
  auto issue_results = [&](int i) {
    if constexpr (Keys) multiply_columns<T, D, N>(second, weights, s.y[slot(i)]);
    multiply_columns<T, D, N>(first, gradients, s.x[slot(i)]);
  };
  auto settle_results = [&] {
    if constexpr (Keys) dev::wgmma_wait<0>(second);
    dev::wgmma_wait<0>(first);
  };
  // S becomes P
  auto weigh = [&](int i) {
    const int column = stream.row(i) + lane % 4 * 2;
    if constexpr (Keys)
      lse.columns = s.columns[slot(i)].lse + lane % 4 * 2, delta.columns = s.columns[slot(i)].delta + lane % 4 * 2;
#pragma unroll
    for (int w = 0; w < kWords; w++) scores[w] = dev::exp2(scores[w] * p.scale_log2 - lse.at(w / 4, w / 2 % 2, w % 2));
    // a block on the diagonal, or of rows, at the end of the keys
    const int rows0 = at.tile * kTileRows + part, columns0 = stream.row(i);
    const int lowest_query = Keys ? columns0 : rows0, highest_key = Keys ? rows0 + kPartRows - 1 : columns0 + N - 1;
    if ((Causal && highest_key > lowest_query + shift) || (!Keys && highest_key >= p.Tk)) {
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        const int here = row + w / 2 % 2 * 8, there = column + w / 4 * 8 + w % 2;
        const int query = Keys ? there : here, key = Keys ? here : there;
        if ((Causal && key > query + shift) || key >= p.Tk) scores[w] = 0.0f;
      }
    }
    uint32_t all = 0;  // the exponentials stay here, beside the products
#pragma unroll
    for (int w = 0; w < kWords; w++) all |= dev::as_bits(scores[w]);
    dev::settle(all);
  };
  // dP becomes dS; P and dS in 16 bits
  auto differentiate = [&] {
#pragma unroll
    for (int w = 0; w < kWords; w++) slopes[w] = scores[w] * (slopes[w] - delta.at(w / 4, w / 2 % 2, w % 2));
    if constexpr (Keys) narrow_all<T>(scores, weights);
    narrow_all<T>(slopes, gradients);
  };
  if (turns) {
    dev::arrivals_wait(s.resident, 0);
    issue_scores(0);
    issue_slopes(0);
    dev::wgmma_wait<1>(scores);
    weigh(0);
    dev::wgmma_wait<0>(slopes);
    differentiate();
    for (int i = 1; i < turns; i++) {
      issue_scores(i);
      issue_results(i - 1);
      if constexpr (!kTight) issue_slopes(i);
      dev::wgmma_wait<(Keys ? 2 : 1) + (kTight ? 0 : 1)>(scores);
      weigh(i);
      if constexpr (kTight) {
        settle_results();
        issue_slopes(i);
        dev::wgmma_wait<0>(slopes);
      } else {
        dev::wgmma_wait<0>(slopes);
        settle_results();
      }
      release(s.free[slot(i - 1)]);
      differentiate();
    }
    issue_results(turns - 1);
    settle_results();
    release(s.free[slot(turns - 1)]);
  }
  dev::part_barrier(1 + group, dev::kWarpGroup);  // all of the group's products have read the resident tiles

  const int64_t tile = int64_t(at.tile) * kTileRows;
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  if constexpr (Keys) {
    store_rows(s.first, warp_row, first, scale, p.dk + at.batch * p.dk_b + at.head * p.dk_h + tile * p.dk_t, p.dk_t,
               p.Tk - int(tile));
    store_rows(s.second, warp_row, second, one, p.dv + at.batch * p.dv_b + at.head * p.dv_h + tile * p.dv_t, p.dv_t,
               p.Tk - int(tile));
  } else {
    store_rows(s.first, warp_row, first, scale, p.dq + at.batch * p.dq_b + at.head * p.dq_h + tile * p.dq_t, p.dq_t,
               p.Tq - int(tile));
  }
}

template <int D, bool Causal, bool Keys, class T>
SEQFUSE_KERNEL(kAttentionThreads, 1)
attention_backward(SEQFUSE_CONSTANT BackwardArguments<T> p) {
  if constexpr (dev::kWarpGroups) {
    using Shared = BackwardTiles<D>;
    Shared& s = dev::dynamic_shared<Shared>();
    const Place at = place_of(p.order, dev::block_x());
    const Stream stream = stream_of<Keys, Causal>(p, at);
    if (dev::thread() == 0) {
      dev::arrivals_init(s.resident, 1);
      for (int i = 0; i < kBackwardStages; i++) dev::arrivals_init(s.full[i], 1), dev::arrivals_init(s.free[i], 8);
    }
    dev::barrier();
    const int group = dev::uniform(dev::thread() / dev::kWarpGroup);
    if (group == 0) {
      dev::give_registers<kBackwardProducerRegisters>();
      if (dev::thread() == 0 && stream.turns()) produce_backward<Keys>(s, p, at, stream);
    } else {
      dev::take_registers<kBackwardConsumerRegisters>();
      consume_backward<D, Causal, Keys>(s, p, at, stream, group - 1);
    }
  }
}

// delta and lse in base 2, [B, Hq, padded]: +inf and 0 for rows that see no key or do not exist. D / 8 threads a row.
template <class T>
struct DeltaArguments {
  const T *out, *dout;
  int64_t out_b, out_h, out_t, dout_b, dout_h, dout_t;
  const float *lse_in, *dlse;  // [B, Hq, Tq]; dlse may be null
  float *lse, *delta;
  int64_t rows;  // B * Hq * padded
  int Hq, Tq, padded;
};

constexpr int kDeltaThreads = 256;

template <int D, class T>
SEQFUSE_KERNEL(kDeltaThreads, 4)
attention_delta(DeltaArguments<T> p) {
  constexpr int kLanes = D / 8;
  const int64_t index = int64_t(dev::block_x()) * (kDeltaThreads / kLanes) + dev::thread() / kLanes;
  const int64_t head = index / p.padded, t = index % p.padded, b = head / p.Hq, h = head % p.Hq;
  const bool exists = index < p.rows && t < p.Tq;
  const int d = dev::thread() % kLanes * 8;
  float sum = 0.0f;
  if (exists) {
    float x[8], y[8];
    dev::unpack<T>(dev::load_16(p.out + b * p.out_b + h * p.out_h + t * p.out_t + d), x);
    dev::unpack<T>(dev::load_16(p.dout + b * p.dout_b + h * p.dout_h + t * p.dout_t + d), y);
#pragma unroll
    for (int e = 0; e < 8; e++) sum += x[e] * y[e];
  }
  sum = dev::warp_reduce(sum, kLanes, [](float a, float b) { return a + b; });
  if (d || index >= p.rows) return;
  float lse = -kHidden, delta = 0.0f;
  if (exists) {
    const int64_t from = head * p.Tq + t;
    const float natural = p.lse_in[from];
    if (natural != kHidden) lse = natural * kLog2E, delta = sum - (p.dlse ? p.dlse[from] : 0.0f);
  }
  p.lse[index] = lse, p.delta[index] = delta;
}

}  // namespace seqfuse::cuda
