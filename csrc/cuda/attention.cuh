// What the attention kernels share: who works on what, which keys a row sees, operands in shared memory.
#pragma once
#include "cuda/hopper.cuh"

namespace seqfuse::cuda {

constexpr int kTileRows = 128;  // queries of a block, keys of a stage
constexpr int kPartRows = 64;   // queries of a warp group: the m of a wgmma
constexpr int kAttentionThreads = 3 * dev::kWarpGroup;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHidden = -__builtin_huge_valf();

// a 16-bit tile [Rows, D] in shared memory: panels [Rows, 64], swizzled
template <int Rows, int D>
struct alignas(1024) Panels {
  uint16_t x[D / dev::kPanelColumns][Rows][dev::kPanelColumns];
};

// BoxRows: of the map
template <int BoxRows, int Rows, int D>
SEQFUSE_DEVICE void load_tile(Panels<Rows, D>& to, const dev::TensorMap& map, int t, int h, int b, dev::Arrivals& a) {
#pragma unroll
  for (int panel = 0; panel < D / dev::kPanelColumns; panel++) {
#pragma unroll
    for (int row = 0; row < Rows; row += BoxRows)
      dev::load_panel(to.x[panel][row], map, panel * dev::kPanelColumns, t + row, h, b, a);
  }
}

// Both products are one group of wgmma: started here, to be waited for by the caller.
// d[64, N] = rows first .. first + 63 of a times the rows of b, contracted over their D columns
template <class T, int N, int D, int Rows>
SEQFUSE_DEVICE void multiply_rows(float (&d)[N / 2], const Panels<Rows, D>& a, int first, const Panels<N, D>& b) {
  const uint64_t left = dev::descriptor_of_rows(a.x[0][first]), right = dev::descriptor_of_rows(b.x[0]);
  dev::wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const int panel = k / 4, column = k % 4 * 32;
    dev::wgmma<T, N, false>(d, dev::moved(left, panel * Rows * 128 + column),
                            dev::moved(right, panel * N * 128 + column), k > 0);
  }
  dev::wgmma_commit();
}

// d[64, D] += a[64, K] b[K, D], a in registers
template <class T, int D, int K>
SEQFUSE_DEVICE void multiply_columns(float (&d)[D / 2], const uint32_t (&a)[K / 4], const Panels<K, D>& b) {
  const uint64_t right = dev::descriptor_of_columns(b.x[0], K);
  dev::wgmma_fence();
#pragma unroll
  for (int k = 0; k < K / 16; k++) dev::wgmma<T, D, true>(d, a + 4 * k, dev::moved(right, k * 2048), true);
  dev::wgmma_commit();
}

// The accumulator [64, 2 * Words] in 16 bits: the same words are the operand a of the next product (hopper.cuh).
template <class T, int Words>
SEQFUSE_DEVICE void narrow_all(const float (&x)[2 * Words], uint32_t (&out)[Words]) {
#pragma unroll
  for (int w = 0; w < Words; w++) out[w] = dev::narrow_pair<T>(x[2 * w], x[2 * w + 1]);
}

SEQFUSE_DEVICE void release(dev::Arrivals& free) {
  if (dev::lane() == 0) dev::arrivals_arrive(free);
}

// This warp's 16 rows of an accumulator, rows `first` on of the tile, times a factor for each of a thread's two rows,
// to out: 16 bytes a thread, by way of `tile`, which nothing else may use. out is the tile's row 0; `rows` exist.
template <class T, int D>
SEQFUSE_DEVICE void store_rows(Panels<kTileRows, D>& tile, int first, const float (&x)[D / 2], const float (&factor)[2],
                               T* out, int64_t stride, int rows) {
  const int r = dev::lane() / 4, q = dev::lane() % 4;
  auto* const bytes = reinterpret_cast<unsigned char*>(tile.x);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = first + r + 8 * i;
#pragma unroll
    for (int c = 0; c < D / 8; c++) {
      const uint32_t word = dev::narrow_pair<T>(x[4 * c + 2 * i] * factor[i], x[4 * c + 2 * i + 1] * factor[i]);
      dev::store_4(bytes + c / 8 * kTileRows * 128 + dev::swizzled(row, c % 8 * 16 + 4 * q), word);
    }
  }
  dev::warp_barrier();
#pragma unroll
  for (int v = dev::lane(); v < 16 * D / 8; v += dev::kWarp) {
    const int row = first + v / (D / 8), c = v % (D / 8);
    const auto* from = bytes + c / 8 * kTileRows * 128 + dev::swizzled(row, c % 8 * 16);
    if (row < rows) dev::store_16(out + row * stride + c * 8, *reinterpret_cast<const dev::Bits16*>(from));
  }
}

// The order of the blocks of a grid. Blocks that run together should read the same keys, so that K and V come from the
// L2 cache: `section` heads are worked off at a time, all of their tiles before the next section. Within it the tile
// changes slowest, for causal attention from the last tile, which has most to do, to the first: blocks that start late
// are short.
struct Place {
  int tile, head, batch;
};
struct Order {
  int tiles, heads, batches, section;  // heads: of queries, of one batch entry
  bool longest_first;
};
SEQFUSE_DEVICE Place place_of(const Order& o, int block) {
  const int all = o.heads * o.batches, whole = o.tiles * o.section;
  const int first = block / whole * o.section, within = block % whole;
  const int width = first + o.section < all ? o.section : all - first;
  const int tile = within / width, head = first + within % width;
  return {o.longest_first ? o.tiles - 1 - tile : tile, head % o.heads, head / o.heads};
}

// Which keys the rows of a tile see: row i those up to last(i).
template <bool Causal>
struct Visible {
  int Tk, shift;  // Tk - Tq

  SEQFUSE_DEVICE int last(int row) const {
    const int end = Causal && row + shift < Tk - 1 ? row + shift : Tk - 1;
    return end < -1 ? -1 : end;
  }
  // blocks of keys of which `rows` rows from `row` on see something
  SEQFUSE_DEVICE int blocks(int row, int rows) const { return (last(row + rows - 1) + kTileRows) / kTileRows; }
  // blocks of keys of which every row from `row` on sees everything
  SEQFUSE_DEVICE int whole_blocks(int row) const { return (last(row) + 1) / kTileRows; }
};

}  // namespace seqfuse::cuda
