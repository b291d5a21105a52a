// TMA and wgmma of hopper_host.h.
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "cuda/hopper.cuh"

namespace seqfuse::dev::host {

// TMA

int check_tensor_map(const Tiled& t) {
  constexpr int kInvalidValue = 1;
  if (t.dtype == DType::f32 || reinterpret_cast<uintptr_t>(t.data) % 16 || t.rows < 1 || t.rows > 256)
    return kInvalidValue;
  for (int64_t n : t.size)
    if (n < 1 || n > int64_t(1) << 32) return kInvalidValue;
  for (int64_t s : t.stride)
    if (s <= 0 || s * 2 % 16 || s * 2 >= int64_t(1) << 40) return kInvalidValue;
  return 0;
}

namespace {
// the 128-byte swizzle: bits 4-6 of an address in shared memory get bits 7-9 added without carry
uint32_t swizzle(uint32_t address) {
  return address ^ (address >> 7 & 7u) << 4;
}
}  // namespace

void load_panel(void* to, const Tiled& map, const int (&at)[4], const void* arrivals) {
  const uint32_t first = shared_address(to);
  if (first % 1024) fail("load_panel to an address that is no multiple of 1024 bytes");
  const int position[4] = {at[0], at[1], at[2], at[3]};
  unsigned char* const base = shared_bytes(first, size_t(map.rows) * 128);
  later(arrivals, map.rows * 128, [=] {
    for (int r = 0; r < map.rows; r++)
      for (int c = 0; c < kPanelColumns; c++) {
        const int64_t index[4] = {position[0] + c, position[1] + r, position[2], position[3]};
        bool inside = true;
        for (int i = 0; i < 4; i++) inside = inside && index[i] >= 0 && index[i] < map.size[i];
        const int64_t offset =
            index[0] + index[1] * map.stride[0] + index[2] * map.stride[1] + index[3] * map.stride[2];
        const uint16_t x = inside ? static_cast<const uint16_t*>(map.data)[offset] : uint16_t(0);
        std::memcpy(base + (swizzle(first + uint32_t(r * 128 + c * 2)) - first), &x, 2);
      }
  });
}

void load_bytes(void* to, const void* from, int bytes, const void* arrivals) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || shared_address(to) % 16 || bytes % 16)
    fail("load_bytes of %d bytes at an address that is no multiple of 16", bytes);
  unsigned char* const base = shared_bytes(shared_address(to), size_t(bytes));
  later(arrivals, bytes, [=] { std::memcpy(base, from, size_t(bytes)); });
}

// wgmma, of each warp for itself: its 16 rows of d depend on nothing that the other three do.

namespace {

struct WarpProduct {
  Product lane[kWarp];
};

struct Shadow {  // what the accumulators will hold, while the threads see NaN
  std::vector<float> x[kWarp];
  int pending = 0;
};

struct Queue {
  std::vector<WarpProduct> open;
  std::deque<std::vector<WarpProduct>> groups;
  std::map<const float*, Shadow> shadows;  // by the address of lane 0's accumulators
  bool fenced = false;
  long done = 0, seen[kWarp] = {}, products = 0;
};

std::map<std::pair<int, int>, Queue> queues;  // by block of the cluster, warp

Queue& queue() {
  return queues[{here.rank, warp()}];
}

// Each operation is a meeting of the warp; the first lane that leaves it does the work.
template <class F>
void once(const char* name, const void* data, size_t bytes, F work) {
  const Slot* slots = exchange(name, data, bytes);
  Queue& q = queue();
  if (q.seen[lane()]++ < q.done) return;
  q.done++;
  work(q, slots);
}

float element(uint32_t address, bool bf16) {
  uint16_t x;
  std::memcpy(&x, shared_bytes(swizzle(address), 2), 2);
  return bf16 ? as_float(uint32_t(x) << 16) : half_to_float(x);
}

// Element (m, k) of an operand in shared memory, m along M or N (PTX ISA, "Strides" and "Canonical Layouts", T = 8).
float element(uint64_t descriptor, bool m_contiguous, int m, int k, bool bf16) {
  const auto field = [&](int shift) { return uint32_t(descriptor >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("a descriptor with a base offset");
  if (m_contiguous) return element(start + m % 64 * 2 + m / 64 * leading + k % 8 * 128 + k / 8 * stride, bf16);
  return element(start + m % 8 * 128 + m / 8 * stride + k * 2, bf16);
}

void run(Queue& q, const WarpProduct& p, int warp_of_group) {
  const Product& first = p.lane[0];
  Shadow& shadow = q.shadows[first.d];
  static thread_local float a[16][16], b[256][16];
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++) {
      if (first.a_in_registers) {
        const uint32_t word = p.lane[m % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + m / 8];
        const auto x = uint16_t(word >> (k % 2 * 16));
        a[m][k] = first.bf16 ? as_float(uint32_t(x) << 16) : half_to_float(x);
      } else {
        a[m][k] = element(first.a_descriptor, false, warp_of_group * 16 + m, k, first.bf16);
      }
    }
  for (int n = 0; n < first.n; n++)
    for (int k = 0; k < 16; k++) b[n][k] = element(first.b_descriptor, first.transposed, n, k, first.bf16);
  for (int t = 0; t < kWarp; t++)
    for (int w = 0; w < first.n / 2; w++) {
      const int m = t / 4 + w / 2 % 2 * 8, n = w / 4 * 8 + t % 4 * 2 + w % 2;
      float sum = first.add ? shadow.x[t][size_t(w)] : 0.0f;
      for (int k = 0; k < 16; k++) sum += a[m][k] * b[n][k];
      shadow.x[t][size_t(w)] = sum;
    }
  if (--shadow.pending) return;
  for (int t = 0; t < kWarp; t++) std::memcpy(p.lane[t].d, shadow.x[t].data(), shadow.x[t].size() * 4);
  q.shadows.erase(first.d);
}

void drain(Queue& q, size_t pending, int warp_of_group) {
  while (q.groups.size() > pending) {
    for (const WarpProduct& p : q.groups.front()) run(q, p, warp_of_group);
    q.groups.pop_front();
  }
}

}  // namespace

void wgmma_fence() {
  once("wgmma_fence", nullptr, 0, [](Queue& q, const Slot*) { q.fenced = true; });
}

void wgmma(const Product& mine) {
  static_assert(sizeof(Product) <= kSlotBytes);
  once("wgmma", &mine, sizeof(mine), [](Queue& q, const Slot* slots) {
    if (!q.fenced) fail("wgmma without a wgmma_fence before its group");
    WarpProduct p;
    for (int t = 0; t < kWarp; t++) std::memcpy(&p.lane[t], slots[t], sizeof(Product));
    const Product& first = p.lane[0];
    for (const Product& other : p.lane)
      if (other.a_descriptor != first.a_descriptor || other.b_descriptor != first.b_descriptor)
        fail("the lanes of a warp pass wgmma different descriptors");
    Shadow& shadow = q.shadows[first.d];
    for (int t = 0; t < kWarp && !shadow.pending; t++) {
      shadow.x[t].assign(p.lane[t].d, p.lane[t].d + first.n / 2);
      for (int w = 0; w < first.n / 2; w++) p.lane[t].d[w] = std::numeric_limits<float>::quiet_NaN();
    }
    shadow.pending++, q.products++;
    q.open.push_back(p);
  });
}

void wgmma_commit() {
  once("wgmma_commit", nullptr, 0, [](Queue& q, const Slot*) {
    q.groups.push_back(std::move(q.open));
    q.open.clear(), q.fenced = false;
    drain(q, random_below(q.groups.size() + 1), warp() % 4);  // some may be done already
  });
}

void wgmma_wait(int pending) {
  once("wgmma_wait", nullptr, 0, [&](Queue& q, const Slot*) { drain(q, size_t(pending), warp() % 4); });
}

void finish_products() {
  for (const auto& [place, q] : queues) {
    if (!q.open.empty() || !q.groups.empty()) fail("a wgmma that nobody waited for");
    const auto first = queues.find({place.first, place.second / 4 * 4});
    if (first == queues.end() || first->second.products != q.products)
      fail("the warps of a group ran different numbers of wgmma");
  }
  queues.clear();
}

}  // namespace seqfuse::dev::host
