// CUDA's names on a CPU, so that the kernels of csrc/cuda run, and are tested, where there is no GPU.
//
// Each thread of a block is a fiber, with a stack of its own; it runs until it meets others (a barrier, a shuffle) and
// then waits until all of them have come. Blocks run one after another, those of a cluster together. What a GPU leaves
// open is left open here too: RPP_EMULATED_ORDER=reverse lets the last thread and the last block go first, and the
// results may not depend on it. A barrier that not all threads come to, memory behind the end of the shared memory and
// an access of 16 bytes that is not aligned end the process with a message.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include <ucontext.h>
#include <cmath>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace emulator {

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

// What a thread waits for; all that may meet have to wait for the same.
enum class Waits { nothing, warp, block, cluster, ended };

struct Block;

struct Thread {
  unsigned index = 0;
  Block* block = nullptr;
  Waits waits = Waits::nothing;
  alignas(16) unsigned char given[16];  // to the other threads of the warp
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<std::vector<Copy>> groups;  // the last one is not ended
  ucontext_t first;
  jmp_buf here;
  bool begun = false;
  std::unique_ptr<unsigned char[]> stack;
};

struct Block {
  unsigned index = 0, rank = 0;
  std::vector<unsigned char> shared;
  unsigned char* shared_memory() { return shared.data() + (-reinterpret_cast<uintptr_t>(shared.data()) & 127); }
  std::vector<std::unique_ptr<Thread>> threads;
};

struct Machine {
  std::vector<std::unique_ptr<Block>> cluster;
  unsigned blocks = 0, threads = 0;
  std::function<void()> kernel;
  bool reversed = false;
  Thread* now = nullptr;
  jmp_buf scheduler;
};

inline Machine& machine() {
  static thread_local Machine one;
  return one;
}

constexpr size_t kStack = 256 << 10, kGuard = 128;
constexpr unsigned char kGuardByte = 0xa5;

__attribute__((noinline)) inline void wait_for(Waits what) {
  Machine& m = machine();
  m.now->waits = what;
  if (_setjmp(m.now->here) == 0) _longjmp(m.scheduler, 1);
}

inline void body() {
  for (;;) {
    machine().kernel();
    wait_for(Waits::ended);
  }
}

__attribute__((noinline)) inline void go_on(Thread& t) {
  Machine& m = machine();
  m.now = &t;
  t.waits = Waits::nothing;
  if (_setjmp(m.scheduler) != 0) return;
  if (t.begun) _longjmp(t.here, 1);
  t.begun = true;
  setcontext(&t.first);
}

inline Thread& thread_of(Block& block, unsigned index) {
  while (block.threads.size() <= index) {
    auto t = std::make_unique<Thread>();
    t->index = block.threads.size();
    t->block = &block;
    t->stack = std::make_unique<unsigned char[]>(kStack);
    getcontext(&t->first);
    t->first.uc_stack.ss_sp = t->stack.get();
    t->first.uc_stack.ss_size = kStack;
    t->first.uc_link = nullptr;
    makecontext(&t->first, body, 0);
    block.threads.push_back(std::move(t));
  }
  return *block.threads[index];
}

// Lets those of [begin, end) that all wait for the same go on; whether there were any.
inline bool release(Block& block, unsigned begin, unsigned end, Waits what) {
  for (unsigned i = begin; i < end; ++i)
    if (block.threads[i]->waits != what) return false;
  for (unsigned i = begin; i < end; ++i) block.threads[i]->waits = Waits::nothing;
  return true;
}

inline void run_cluster(unsigned first_block, unsigned size, size_t shared_bytes) {
  Machine& m = machine();
  const unsigned threads = m.threads;
  while (m.cluster.size() < size) m.cluster.push_back(std::make_unique<Block>());
  for (unsigned k = 0; k < size; ++k) {
    Block& block = *m.cluster[k];
    block.index = first_block + k, block.rank = k;
    block.shared.resize(shared_bytes + 2 * kGuard);
    std::memset(block.shared.data(), 0xff, block.shared.size());  // NaN, where nothing was written
    std::memset(block.shared_memory() + shared_bytes, kGuardByte,
                block.shared.data() + block.shared.size() - block.shared_memory() - shared_bytes);
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = thread_of(block, i);
      t.waits = Waits::nothing;
      t.groups.clear();
    }
  }
  for (;;) {
    bool moved = false, all_ended = true, all_at_cluster = true;
    for (unsigned j = 0; j < size * threads; ++j) {
      const unsigned at = m.reversed ? size * threads - 1 - j : j;
      Thread& t = *m.cluster[at / threads]->threads[at % threads];
      if (t.waits == Waits::nothing) go_on(t), moved = true;
      all_ended &= t.waits == Waits::ended;
      all_at_cluster &= t.waits == Waits::cluster;
    }
    if (all_ended) break;
    for (unsigned k = 0; k < size; ++k) {
      Block& block = *m.cluster[k];
      moved |= release(block, 0, threads, Waits::block);
      for (unsigned w = 0; w < threads; w += 32) moved |= release(block, w, w + 32, Waits::warp);
      if (all_at_cluster) moved |= release(block, 0, threads, Waits::cluster);
    }
    if (!moved) fail("threads wait for others that never come");
  }
  for (unsigned k = 0; k < size; ++k) {
    Block& block = *m.cluster[k];
    const unsigned char* end = block.shared.data() + block.shared.size();
    for (const unsigned char* p = block.shared_memory() + shared_bytes; p < end; ++p)
      if (*p != kGuardByte) fail("a write behind the end of the shared memory");
  }
}

inline void run(int64_t blocks, int threads, size_t shared_bytes, int cluster, std::function<void()> kernel) {
  if (blocks % cluster != 0) fail("blocks that are no multiple of the cluster");
  if (threads % 32 != 0 || threads > 1024) fail("threads that are no whole warps, or over 1024");
  if (blocks >= int64_t{1} << 31) fail("more blocks than a grid has");
  if (shared_bytes > 227 << 10) fail("more shared memory than a block has");
  Machine& m = machine();
  m.blocks = blocks, m.threads = threads, m.kernel = std::move(kernel);
  const char* order = std::getenv("RPP_EMULATED_ORDER");
  m.reversed = order && std::string_view(order) == "reverse";
  const int64_t clusters = blocks / cluster;
  for (int64_t i = 0; i < clusters; ++i)
    run_cluster((m.reversed ? clusters - 1 - i : i) * cluster, cluster, shared_bytes);
}

inline Thread& thread() { return *machine().now; }
inline Dim thread_index() { return {thread().index, 0, 0}; }
inline Dim block_index() { return {thread().block->index, 0, 0}; }
inline Dim block_size() { return {machine().threads, 1, 1}; }
inline Dim grid_size() { return {machine().blocks, 1, 1}; }

// A copy happens when the thread waits for it, no earlier: one that is not waited for is missing.
inline void copy_later(void* to, const void* from, size_t bytes) {
  auto& groups = thread().groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, bytes});
}
inline void end_of_group() {
  auto& groups = thread().groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
inline void wait_for_groups(size_t n) {
  auto& groups = thread().groups;
  while (groups.size() > n + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

template <class T>
T shuffled(T value, unsigned from) {
  static_assert(sizeof(T) <= 16);
  Thread& t = thread();
  std::memcpy(t.given, &value, sizeof value);
  wait_for(Waits::warp);
  T theirs;
  std::memcpy(&theirs, t.block->threads[t.index / 32 * 32 + from]->given, sizeof theirs);
  wait_for(Waits::warp);
  return theirs;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

inline void __syncthreads() { ::emulator::wait_for(::emulator::Waits::block); }
inline void __syncwarp() { ::emulator::wait_for(::emulator::Waits::warp); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return ::emulator::shuffled(value, (::emulator::thread().index % 32) ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = ::emulator::thread().index % 32;
  return ::emulator::shuffled(value, lane >= by ? lane - by : lane);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return ::emulator::shuffled(value, from % 32);
}

inline unsigned atomicAdd(unsigned* to, unsigned x) {
  const unsigned before = *to;
  *to += x;
  return before;
}

template <class T>
T __ldcg(const T* p) {
  return *p;
}
