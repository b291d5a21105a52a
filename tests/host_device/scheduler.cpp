// Fibres, barriers and shared memory of device_host.h.
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/hopper.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace seqfuse::dev::host {

uint64_t seed = 1;
int multiprocessors = 3;
int capability = 90;
int resident_clusters = 8;
long launches = 0;
Position here{};

namespace {

constexpr size_t kStack = 128 << 10;

struct Fibre {
  ucontext_t context;
  Position position;
  char* stack;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the fibre does not run
  int collectives = 0;         // warp operations so far
  const char* waiting = nullptr;
  bool done = false;
};

struct Warp {
  Slot slots[2][kWarp];  // two, so that a fast lane's next operation does not overwrite what a slow one still reads
  const char* operation = nullptr;
  std::vector<Fibre*> waiting;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Allocation {
  std::unique_ptr<void, Free> memory;
  size_t bytes;
};

struct PartBarrier {
  int arrived = 0, threads = 0;
  std::vector<Fibre*> waiting;
};

struct Block {
  std::vector<Warp> warps;
  std::vector<Fibre*> waiting;
  std::map<int, PartBarrier> parts;
  std::map<const void*, Allocation> memory;
  int left = 0;  // threads that have left the kernel
};

struct Phases {  // of an Arrivals
  int64_t bytes = 0, ended = 0;
  int count = 1, arrived = 0;
  std::vector<Fibre*> waiting;
};

struct Message {  // on its way from block to block, or from memory to a block
  std::function<void()> copy;
  int bytes;
  const void* arrivals;
  int rank;        // of the receiver
  bool from_peer;  // must not come when any thread of the block has left; else, when all have
  bool last;       // comes only when every thread waits
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fibre> fibres;
  std::vector<Fibre*> ready, waiting;
  size_t dynamic_bytes = 0;
  std::map<const void*, Phases> arrivals;
  std::vector<Message> messages;
};

Cluster* cluster = nullptr;
Fibre* running = nullptr;
const std::function<void()>* kernel = nullptr;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
uint64_t random_state = 0;

}  // namespace

uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) % n;
}

namespace {

// AddressSanitizer must know which stack is in use
void before_switch(void** save, const void* bottom, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, bytes);
#else
  (void)save, (void)bottom, (void)bytes;
#endif
}
void after_switch(void* saved, const void** bottom, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, bytes);
#else
  (void)saved, (void)bottom, (void)bytes;
#endif
}

// AddressSanitizer's own swapcontext wipes the shadow of the whole stack at every switch; told by the two functions
// above, it need not, and the C library's does.
using Swap = int (*)(ucontext_t*, const ucontext_t*);
Swap plain_swap() {
  void* library = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "swapcontext") : nullptr;
  return symbol ? reinterpret_cast<Swap>(symbol) : &swapcontext;
}
const Swap swap_context = plain_swap();

void entry() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel)();
  running->done = true;
  cluster->blocks[size_t(here.rank)].left++;
  before_switch(nullptr, scheduler_stack, scheduler_stack_bytes);  // null: this stack is finished
  swap_context(&running->context, &scheduler);
}

void resume(Fibre* f) {
  running = f, here = f->position, f->waiting = nullptr;
  before_switch(&scheduler_fake_stack, f->stack, kStack);
  swap_context(&scheduler, &f->context);
  after_switch(scheduler_fake_stack, nullptr, nullptr);
}

void wait(const char* what) {
  Fibre* self = running;
  self->waiting = what;
  before_switch(&self->fake_stack, scheduler_stack, scheduler_stack_bytes);
  swap_context(&self->context, &scheduler);
  after_switch(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

// the last of `total` to arrive wakes the others and goes on
void arrive(std::vector<Fibre*>& waiting, size_t total, const char* what) {
  if (waiting.size() + 1 < total) {
    waiting.push_back(running);
    wait(what);
    return;
  }
  cluster->ready.insert(cluster->ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

Block& block() {
  return cluster->blocks[size_t(here.rank)];
}

char* stack(size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fail("no memory for a fibre's stack");
    stacks.push_back(static_cast<char*>(p));
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks[index] + kStack - 4096, 4096);  // the last user's outermost frame never returned
#endif
  return stacks[index];
}

void deliver(const Message&);

void prepare(Fibre* f) {
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack, f->context.uc_stack.ss_size = kStack, f->context.uc_link = nullptr;
  makecontext(&f->context, entry, 0);
}

// Under an even seed all fibres are equally likely to be next, and stay close together. Under an odd one some blocks
// and some warps of a block run ahead of others for a while: what must hold back the fast ones is put to the test.
class Unevenness {
 public:
  Unevenness(int blocks, int warps) : warps_(warps), speeds_(size_t(blocks * warps)) {}

  uint64_t pick(const Cluster& c) {
    const uint64_t n = c.ready.size() + c.messages.size();
    uint64_t best = random_below(n);
    if (seed % 2 == 0) return best;
    if (picks_++ % 4096 == 0) draw();
    for (int i = 0; i < 15; i++) {
      const uint64_t other = random_below(n);
      if (speed(c, other) > speed(c, best)) best = other;
    }
    return best;
  }

 private:
  void draw() {
    uint64_t block = 0;
    for (size_t i = 0; i < speeds_.size(); i++) {
      if (i % size_t(warps_) == 0) block = random_below(8);
      speeds_[i] = block + random_below(8);
    }
  }
  uint64_t speed(const Cluster& c, uint64_t i) const {
    if (i >= c.ready.size()) return speeds_[size_t(c.messages[i - c.ready.size()].rank * warps_)];
    const Position& p = c.ready[i]->position;
    return speeds_[size_t(p.rank * warps_ + p.thread / kWarp)];
  }

  int warps_;
  uint64_t picks_ = 0;
  std::vector<uint64_t> speeds_;
};

void run_cluster(Grid grid, int threads, int64_t first_x, int64_t y) {
  Cluster c;
  c.blocks.resize(size_t(grid.cluster));
  c.fibres.resize(size_t(grid.cluster) * size_t(threads));
  c.dynamic_bytes = size_t(grid.shared);
  cluster = &c;
  for (size_t i = 0; i < c.fibres.size(); i++) {
    Fibre& f = c.fibres[i];
    const int rank = int(i) / threads;
    f.position = {int(i) % threads, threads, int(first_x) + rank, int(y), int(grid.x), rank, grid.cluster};
    f.stack = stack(i);
    prepare(&f);
    c.ready.push_back(&f);
  }
  for (Block& b : c.blocks) b.warps.resize(size_t(threads / kWarp));
  Unevenness uneven(grid.cluster, threads / kWarp);
  while (!c.ready.empty() || !c.messages.empty()) {
    // a message is as likely to be next as any fibre, so that it may come early or late
    uint64_t next = uneven.pick(c);
    if (next >= c.ready.size() && !c.ready.empty() && c.messages[next - c.ready.size()].last)
      next = random_below(c.ready.size());
    if (next >= c.ready.size()) {
      std::swap(c.messages[next - c.ready.size()], c.messages.back());
      const Message message = c.messages.back();
      c.messages.pop_back();
      deliver(message);
      continue;
    }
    std::swap(c.ready[next], c.ready.back());
    Fibre* fibre = c.ready.back();
    c.ready.pop_back();
    resume(fibre);
  }
  std::map<std::string, int> places;
  for (const Fibre& f : c.fibres)
    places[f.done ? "have left the kernel" : std::string("wait for ever at ") + f.waiting]++;
  std::string report;
  for (const auto& [place, count] : places) report += "; " + std::to_string(count) + " threads " + place;
  if (!places.count("have left the kernel") || places.size() > 1) fail("block %d%s", int(first_x), report.c_str());
  for (const auto& [address, p] : c.arrivals)
    if (p.bytes || p.arrived)
      fail("an Arrivals is left with %ld bytes to come and %d of %d threads", long(p.bytes), p.arrived, p.count);
  for (const Block& b : c.blocks)
    for (const auto& [id, part] : b.parts)
      if (part.arrived) fail("barrier %d is left with %d of %d threads", id, part.arrived, part.threads);
  finish_products();
  cluster = nullptr;
}

}  // namespace

void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::fputs("host device: ", stderr);
  std::vfprintf(stderr, format, args);
  std::fputs("\n", stderr);
  va_end(args);
  std::_Exit(3);
}

void run(Grid grid, int threads, const std::function<void()>& body) {
  if (threads < kWarp || threads > 1024 || threads % kWarp) fail("%d threads in a block", threads);
  if (grid.x < 1 || grid.y < 1 || grid.y > 65535 || grid.x > 0x7fffffff) fail("a grid that no GPU accepts");
  if (grid.shared < 0 || grid.shared > 232448) fail("%ld bytes of dynamic shared memory", long(grid.shared));
  if (grid.cluster < 1 || grid.cluster > 16 || grid.x % grid.cluster)
    fail("the grid is no multiple of its cluster size");
  launches++;
  random_state = seed * 0x100000001b3u + uint64_t(launches);
  kernel = &body;
  std::vector<int64_t> order(size_t(grid.x / grid.cluster * grid.y));
  for (size_t i = 0; i < order.size(); i++) order[i] = int64_t(i);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
  const int64_t along_x = grid.x / grid.cluster;
  for (int64_t i : order) run_cluster(grid, threads, i % along_x * grid.cluster, i / along_x);
}

void block_barrier() {
  arrive(block().waiting, size_t(here.threads), "a block barrier");
}

void cluster_barrier() {
  arrive(cluster->waiting, cluster->fibres.size(), "a cluster barrier");
}

namespace {
Phases& phases_of(const void* a) {
  const auto found = cluster->arrivals.find(a);
  if (found == cluster->arrivals.end()) fail("an Arrivals that was not initialised");
  return found->second;
}

void end_phase_if_complete(Phases& p) {
  if (p.arrived < p.count || p.bytes) return;
  p.arrived = 0, p.ended++;
  cluster->ready.insert(cluster->ready.end(), p.waiting.begin(), p.waiting.end());
  p.waiting.clear();
}

int rank_of(const void* p) {
  for (size_t rank = 0; rank < cluster->blocks.size(); rank++)
    for (const auto& [key, a] : cluster->blocks[rank].memory) {
      const ptrdiff_t offset = static_cast<const char*>(p) - static_cast<const char*>(a.memory.get());
      if (offset >= 0 && size_t(offset) < a.bytes) return int(rank);
    }
  fail("send_16 to an address outside the cluster's shared memory");
}

void deliver(const Message& m) {
  const int left = cluster->blocks[size_t(m.rank)].left, threads = int(cluster->fibres.size() / cluster->blocks.size());
  if (left >= (m.from_peer ? 1 : threads)) fail("a message reaches block %d, which is leaving the kernel", m.rank);
  m.copy();
  Phases& p = phases_of(m.arrivals);
  p.bytes -= m.bytes;
  end_phase_if_complete(p);
}
}  // namespace

void arrivals_init(const void* a, int count) {
  if (cluster->arrivals.count(a)) fail("an Arrivals that was initialised twice");
  cluster->arrivals[a].count = count;
}

void arrivals_expect(const void* a, int bytes) {
  Phases& p = phases_of(a);
  if (p.arrived == p.count) fail("arrivals_expect before the phase has ended");
  p.arrived++, p.bytes += bytes;
  end_phase_if_complete(p);
}

void arrivals_arrive(const void* a) {
  arrivals_expect(a, 0);
}

void arrivals_wait(const void* a, int parity) {
  Phases& p = phases_of(a);
  if (p.ended % 2 != parity) return;
  p.waiting.push_back(running);
  wait("arrivals");
}

void send(void* p, const Bits16& bits, const void* a) {
  const int rank = rank_of(p);
  if (rank_of(a) != rank) fail("send_16: the bytes and their count go to different blocks");
  cluster->messages.push_back({[=] { *static_cast<Bits16*>(p) = bits; }, sizeof(bits), a, rank, true, false});
}

// A third of the copies is done at once, a third as late as can be, the others in between.
void later(const void* arrivals, int bytes, std::function<void()> copy) {
  const uint64_t when = random_below(3);
  const Message message{std::move(copy), bytes, arrivals, here.rank, false, when == 2};
  if (when == 0) return deliver(message);
  cluster->messages.push_back(message);
}

void part_barrier(int id, int threads, bool wait_here) {
  if (id < 1 || id > 15 || threads % kWarp || threads > here.threads) fail("barrier %d of %d threads", id, threads);
  PartBarrier& part = block().parts[id];
  if (part.arrived && part.threads != threads) fail("barrier %d: %d and %d threads", id, part.threads, threads);
  part.threads = threads;
  if (++part.arrived == threads) {
    part.arrived = 0;
    cluster->ready.insert(cluster->ready.end(), part.waiting.begin(), part.waiting.end());
    part.waiting.clear();
  } else if (wait_here) {
    part.waiting.push_back(running);
    wait("a barrier of some warps");
  }
}

const Slot* exchange(const char* operation, const void* data, size_t bytes) {
  Warp& w = block().warps[size_t(warp())];
  if (bytes > kSlotBytes) fail("%s exchanges %zu bytes a lane", operation, bytes);
  if (w.waiting.empty()) w.operation = operation;
  if (std::strcmp(w.operation, operation)) fail("lanes of one warp meet in %s and %s", w.operation, operation);
  Slot* slots = w.slots[running->collectives++ % 2];
  if (bytes) std::memcpy(slots[lane()], data, bytes);
  arrive(w.waiting, kWarp, operation);
  return slots;
}

namespace {
Allocation& allocation(Block& b, const void* key, size_t bytes) {
  Allocation& a = b.memory[key];
  if (!a.memory) {
    void* p = nullptr;
    if (posix_memalign(&p, 1024, bytes)) fail("no memory for %zu bytes of shared memory", bytes);
    std::memset(p, 0xff, bytes);  // NaN in every dtype
    a = {std::unique_ptr<void, Free>(p), bytes};
  }
  return a;
}
}  // namespace

void* shared_memory(const void* key, size_t bytes) {
  return allocation(block(), key, bytes).memory.get();
}

namespace {
const char dynamic_key = 0;
}

void* dynamic_memory(size_t bytes) {
  if (bytes != cluster->dynamic_bytes)
    fail("the kernel uses %zu bytes of dynamic shared memory, its launch asked for %zu", bytes, cluster->dynamic_bytes);
  return shared_memory(&dynamic_key, bytes);
}

uint32_t shared_address(const void* p) {
  const Allocation& a = block().memory[&dynamic_key];
  const ptrdiff_t offset = static_cast<const char*>(p) - static_cast<const char*>(a.memory.get());
  if (!a.memory || offset < 0 || size_t(offset) >= a.bytes)
    fail("an address outside the block's dynamic shared memory");
  return kReservedShared + uint32_t(offset);
}

unsigned char* shared_bytes(uint32_t address, size_t bytes) {
  const Allocation& a = block().memory[&dynamic_key];
  if (!a.memory || address < kReservedShared || address - kReservedShared + bytes > a.bytes)
    fail("shared memory is read or written at %u, beyond what the launch asked for", address);
  return static_cast<unsigned char*>(a.memory.get()) + (address - kReservedShared);
}

void* peer_memory(void* own, int rank) {
  if (rank < 0 || rank >= here.cluster) fail("no block %d in a cluster of %d", rank, here.cluster);
  if (cluster->blocks[size_t(rank)].left == here.threads) fail("block %d of the cluster has left the kernel", rank);
  for (auto& [key, a] : block().memory) {
    const ptrdiff_t offset = static_cast<char*>(own) - static_cast<char*>(a.memory.get());
    if (offset < 0 || size_t(offset) >= a.bytes) continue;
    return static_cast<char*>(allocation(cluster->blocks[size_t(rank)], key, a.bytes).memory.get()) + offset;
  }
  fail("cluster_peer of an address outside shared memory");
}

void mma(MmaType type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t words[6];
  std::memcpy(words, a, 16), std::memcpy(words + 4, b, 8);
  const Slot* slots = exchange(type == MmaType::tf32 ? "mma of tf32" : "mma", words, sizeof(words));
  auto element = [&](int from, int word, int half) {
    uint32_t whole;
    std::memcpy(&whole, &slots[from][4 * word], 4);
    if (type == MmaType::tf32) {
      // hardware ignores the 13 low bits; a kernel that leaves something there has forgotten to round
      if (whole & 0x1fffu && (whole & 0x7f800000u) != 0x7f800000u) fail("an operand of mma is not rounded to tf32");
      return as_float(whole);
    }
    const auto x = uint16_t(whole >> (16 * half));
    return type == MmaType::bf16 ? as_float(uint32_t(x) << 16) : half_to_float(x);
  };
  for (int e = 0; e < 4; e++) {
    const int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
    if (type == MmaType::tf32) {
      for (int k = 0; k < 8; k++)
        c[e] += element(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0) * element(column * 4 + k % 4, 4 + k / 4, 0);
      continue;
    }
    for (int k = 0; k < 16; k++) {
      const int q = k % 8 / 2;
      c[e] += element(row % 8 * 4 + q, row / 8 + k / 8 * 2, k % 2) * element(column * 4 + q, 4 + k / 8, k % 2);
    }
  }
}

uint16_t float_to_half(float x) {
  const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                     // what cvt.rn.f16.f32 gives for a NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) return as_float(sign | as_bits(float(magnitude) * 0x1p-24f));
  return as_float(sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace seqfuse::dev::host
