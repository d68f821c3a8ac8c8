// csrc/cuda/intrinsics.cuh for a processor: every thread of a block, or of a cluster's blocks, is a coroutine, and one
// gives way where it waits for others. Shared memory starts as NaN, asynchronous copies land only when they are waited
// for, a shuffle needs all 32 lanes, and a launch in which nobody can go on is reported.
#pragma once
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/shape.h"

namespace emulator {

struct Index {
  unsigned x = 0, y = 0;
};

struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
};

constexpr int lanes = 32, slot_bytes = 64;

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[2][lanes][slot_bytes];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<uint64_t> variables, dynamic;  // uint64_t for its alignment
  size_t used = 0;
  std::vector<std::pair<const void*, size_t>> names;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index thread, block;
  Block* home;
  int rank_in_cluster;
  bool finished;
  long exchanges;
  std::vector<std::vector<Copy>> copies;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Thread>> pool;
  std::vector<Block> blocks;  // of the cluster that runs
  Barrier cluster;
  Thread* running = nullptr;
  Index block_size, grid_size;
  long progress = 0;
  std::function<void()> kernel;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}
inline Thread& self() { return *machine().running; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated launch: %s\n", what);
  std::abort();
}

inline void give_way() { swapcontext(&self().context, &machine().scheduler); }

inline void wait(Barrier& barrier) {
  const long generation = barrier.generation;
  ++machine().progress;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) give_way();
}

inline Warp& warp() { return self().home->warps[self().thread.x / lanes]; }
inline int lane() { return int(self().thread.x % lanes); }

// Gives `mine` to the other lanes; theirs stay readable until the next exchange but one.
template <typename X>
const unsigned char (*exchange(const X& mine))[slot_bytes] {
  static_assert(sizeof(X) <= slot_bytes, "");
  auto& slots = warp().slots[self().exchanges++ % 2];
  std::memcpy(slots[lane()], &mine, sizeof mine);
  wait(warp().barrier);
  return slots;
}

template <typename X>
X from_lane(const unsigned char (*slots)[slot_bytes], int lane) {
  X x;
  std::memcpy(&x, slots[lane], sizeof x);
  return x;
}

constexpr size_t variable_bytes = 16384;

inline void* block_variable(const void* name, size_t bytes) {
  Block& block = *self().home;
  for (const auto& [known, offset] : block.names)
    if (known == name) return reinterpret_cast<char*>(block.variables.data()) + offset;
  const size_t offset = block.used;
  block.used += (bytes + 15) / 16 * 16;
  if (block.used > variable_bytes) fail("too many shared variables");
  block.names.push_back({name, offset});
  return reinterpret_cast<char*>(block.variables.data()) + offset;
}

inline void entry() {
  machine().kernel();
  Thread& me = self();
  for (const auto& group : me.copies)
    if (!group.empty()) fail("a thread left without waiting for its copies");
  me.finished = true;
  ++machine().progress;
  give_way();
}

// Guard words behind the dynamic shared memory.
constexpr size_t guard = 8;
constexpr uint64_t untouched = 0x7ff87ff87ff87ff8u;  // NaN in every type

inline void prepare(Block& block, int threads, int64_t shared_bytes) {
  block.barrier = {threads, 0, 0};
  block.warps.resize(size_t(threads / lanes));
  for (Warp& each : block.warps) each.barrier = {lanes, 0, 0};
  block.variables.assign(variable_bytes / 8, ~uint64_t(0));
  block.dynamic.assign(size_t(shared_bytes / 8) + guard, ~uint64_t(0));
  std::fill(block.dynamic.end() - guard, block.dynamic.end(), untouched);
  block.used = 0;
  block.names.clear();
}

inline void start(Thread& thread) {
  constexpr size_t stack_bytes = 128 * 1024;
  if (!thread.stack) thread.stack.reset(new char[stack_bytes]);
  thread.finished = false;
  thread.exchanges = 0;
  thread.copies.assign(1, {});
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = stack_bytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, entry, 0);
}

inline void run_to_the_end(size_t threads) {
  Machine& m = machine();
  for (size_t left = threads; left > 0;) {
    const long before = m.progress;
    left = 0;
    for (size_t i = 0; i < threads; ++i) {
      m.running = m.pool[i].get();
      if (m.running->finished) continue;
      swapcontext(&m.scheduler, &m.running->context);
      left += !m.running->finished;
    }
    if (left > 0 && m.progress == before) fail("threads wait for others that will never come");
  }
}

inline void run_cluster(unsigned first, unsigned part, int cluster, int threads, int64_t shared_bytes) {
  Machine& m = machine();
  m.blocks.resize(size_t(cluster));
  m.cluster = {cluster * threads, 0, 0};
  while (m.pool.size() < size_t(cluster * threads)) m.pool.emplace_back(new Thread());
  for (int rank = 0; rank < cluster; ++rank) {
    prepare(m.blocks[size_t(rank)], threads, shared_bytes);
    for (int i = 0; i < threads; ++i) {
      Thread& thread = *m.pool[size_t(rank * threads + i)];
      thread.thread = {unsigned(i), 0};
      thread.block = {first + unsigned(rank), part};
      thread.home = &m.blocks[size_t(rank)];
      thread.rank_in_cluster = rank;
      start(thread);
    }
  }
  run_to_the_end(size_t(cluster * threads));
  for (const Block& block : m.blocks)
    for (size_t i = 0; i < guard; ++i)
      if (*(block.dynamic.end() - 1 - long(i)) != untouched) fail("a write behind the shared memory");
}

}  // namespace emulator

#define threadIdx (emulator::self().thread)
#define blockIdx (emulator::self().block)
#define blockDim (emulator::machine().block_size)
#define gridDim (emulator::machine().grid_size)
#define SYNKERN_SHARED(type, name)   \
  static const char name##_name = 0; \
  type& name = *static_cast<type*>(emulator::block_variable(&name##_name, sizeof(type)))

namespace synkern {

constexpr bool has_clusters = true;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float load(float16 x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof y);
  return float(y);
}
inline void store(float x, float* to) { *to = x; }
inline void store(double x, double* to) { *to = x; }
inline void store(float x, bfloat16* to) {
  const uint32_t bits = as_bits(x);
  to->bits = x != x ? 0x7fff : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(float x, float16* to) {
  const _Float16 y = _Float16(x);
  std::memcpy(to, &y, sizeof y);
}

template <typename T>
uint32_t pack2(float first, float second) {
  T x, y;
  store(first, &x);
  store(second, &y);
  return uint32_t(x.bits) | uint32_t(y.bits) << 16;
}

template <typename A>
A max_nan(A x, A y) {
  return x != x || x > y ? x : y;
}
template <typename T>
uint32_t max2_nan(uint32_t x, uint32_t y) {
  const auto half = [](uint32_t word, int i) { return load(T{uint16_t(word >> (16 * i))}); };
  return pack2<T>(max_nan(half(x, 0), half(y, 0)), max_nan(half(x, 1), half(y, 1)));
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline double exp_nonpositive(double x) { return std::exp(x); }

template <typename T>
T read_only(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("a misaligned read");
  return *p;
}

inline void copy_async(uint4* shared, const void* global, int bytes = 16) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || reinterpret_cast<uintptr_t>(shared) % 16)
    emulator::fail("a misaligned asynchronous copy");
  emulator::self().copies.back().push_back({shared, global, size_t(bytes)});
}
inline void copies_commit() { emulator::self().copies.emplace_back(); }
// Lands all groups but the last `pending` of those committed; the one that is being filled stays.
inline void land_copies(size_t pending) {
  auto& groups = emulator::self().copies;
  const size_t keep = pending + 1;
  while (groups.size() > keep) {
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}
template <int Pending>
void copies_wait() {
  land_copies(Pending);
}
inline void copies_done() {
  copies_commit();
  land_copies(0);
}

inline uint4* dynamic_shared() { return reinterpret_cast<uint4*>(emulator::self().home->dynamic.data()); }

inline void sync_block() { emulator::wait(emulator::self().home->barrier); }
inline void sync_warp() { emulator::wait(emulator::warp().barrier); }
template <typename X>
X shuffle_xor(X x, int lanes) {
  return emulator::from_lane<X>(emulator::exchange(x), emulator::lane() ^ lanes);
}
inline bool any_lane(bool x) {
  const auto slots = emulator::exchange(x);
  for (int i = 0; i < emulator::lanes; ++i)
    if (emulator::from_lane<bool>(slots, i)) return true;
  return false;
}

inline int cluster_rank() { return emulator::self().rank_in_cluster; }
inline int cluster_size() { return int(emulator::machine().blocks.size()); }
inline void sync_cluster() { emulator::wait(emulator::machine().cluster); }
template <typename X>
const X* in_block_of_cluster(const X* mine, int rank) {
  const auto offset =
      reinterpret_cast<const char*>(mine) - reinterpret_cast<const char*>(emulator::self().home->variables.data());
  if (offset < 0 || size_t(offset) >= emulator::variable_bytes) emulator::fail("not a shared variable");
  return reinterpret_cast<const X*>(
      reinterpret_cast<const char*>(emulator::machine().blocks[size_t(rank)].variables.data()) + offset);
}

[[noreturn]] inline void stop_launch() { emulator::fail("stopped by a kernel"); }

// Element (row, column) of an 8 x 8 matrix is in lane 4 row + column / 2, half column % 2.
struct Fragments {
  uint32_t a[4], b[2];
};
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto slots = emulator::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto element = [](uint32_t word, int i) { return load(T{uint16_t(word >> (16 * i))}); };
  for (int i = 0; i < 4; ++i) {
    const int row = emulator::lane() / 4 + 8 * (i / 2), column = emulator::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto of_a = emulator::from_lane<Fragments>(slots, row % 8 * 4 + k % 8 / 2);
      const auto of_b = emulator::from_lane<Fragments>(slots, column * 4 + k % 8 / 2);
      d[i] += element(of_a.a[row / 8 + 2 * (k / 8)], k % 2) * element(of_b.b[k / 8], k % 2);
    }
  }
}
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a misaligned matrix row");
  const auto slots = emulator::exchange(row);
  for (int i = 0; i < 4; ++i) {
    const auto from = emulator::from_lane<const uint32_t*>(slots, 8 * i + emulator::lane() / 4);
    words[i] = from[emulator::lane() % 4];
  }
  sync_warp();  // nobody overwrites what others still read
}

// ---- Host ----------------------------------------------------------------------------------------------------------
using Stream = cudaStream_t;

// What the tests set.
extern Device emulated_device;
// The kernels launched since the tests last looked, by address.
extern std::vector<Shape> launches;

inline cudaError_t current_device(Device& device) {
  device = emulated_device;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, Stream, const Arguments&... arguments) {
  if (shape.blocks * shape.cluster > INT32_MAX || shape.parts > UINT16_MAX) return cudaErrorInvalidConfiguration;
  if (shape.blocks <= 0 || shape.threads <= 0 || shape.threads % emulator::lanes || shape.threads > 1024 ||
      shape.shared_bytes > emulated_device.shared_bytes)
    return cudaErrorInvalidConfiguration;
  emulator::Machine& m = emulator::machine();
  launches.push_back(shape);
  m.block_size = {unsigned(shape.threads), 1};
  m.grid_size = {unsigned(shape.blocks * shape.cluster), unsigned(shape.parts)};
  m.kernel = [&] { kernel(Parameters(arguments)...); };
  for (unsigned part = 0; part < unsigned(shape.parts); ++part)
    for (unsigned first = 0; first < m.grid_size.x; first += unsigned(shape.cluster))
      emulator::run_cluster(first, part, shape.cluster, shape.threads, shape.shared_bytes);
  return cudaSuccess;
}

}  // namespace synkern
