// What a kernel asks of the GPU beyond CUDA's own names, and how the host starts one. Here alone is hardware named:
// with RPP_EMULATED the same kernels run on a CPU (tests/cuda/emulator.h), which is how they are tested without a GPU.
#pragma once

#include <limits>

#if defined(RPP_EMULATED)
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/stream.h"
#endif

#include "checks.h"
#include "numbers.h"

namespace rpp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The shared memory of the block, as one struct of all that the kernel keeps there.
template <class S>
__device__ __forceinline__ S& shared_memory() {
#if defined(RPP_EMULATED)
  return *reinterpret_cast<S*>(emulator::thread().block->shared_memory());
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return *reinterpret_cast<S*>(memory);
#endif
}

// 2^x to 2^-22 of it, one instruction; 0 for what would be subnormal.
__device__ __forceinline__ float power_of_2(float x) {
#if defined(RPP_EMULATED)
  const float power = std::exp2(x);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

__device__ __forceinline__ bool begins_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// 16 bytes that nobody reads again, or writes for others to read.
__device__ __forceinline__ Bytes16 load_16_bytes(const void* p) {
#if defined(RPP_EMULATED)
  if (!begins_16_bytes(p)) emulator::fail("a read of 16 bytes that is not aligned");
  Bytes16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
#else
  const uint4 x = __ldcs(static_cast<const uint4*>(p));
  return {x.x, x.y, x.z, x.w};
#endif
}

__device__ __forceinline__ void store_16_bytes(void* p, Bytes16 x) {
#if defined(RPP_EMULATED)
  if (!begins_16_bytes(p)) emulator::fail("a write of 16 bytes that is not aligned");
  std::memcpy(p, &x, sizeof x);
#else
  __stcs(static_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
#endif
}

// ---- copies into shared memory that go on while the thread does

__device__ __forceinline__ void copy_16_bytes(void* shared, const void* p) {
#if defined(RPP_EMULATED)
  if (!begins_16_bytes(p) || !begins_16_bytes(shared)) emulator::fail("a copy of 16 bytes that is not aligned");
  emulator::copy_later(shared, p, 16);
#else
  __pipeline_memcpy_async(shared, p, 16);
#endif
}

// Those of this thread since its last call are a group, that may be empty.
__device__ __forceinline__ void end_of_group() {
#if defined(RPP_EMULATED)
  emulator::end_of_group();
#else
  __pipeline_commit();
#endif
}

// Until all groups of this thread have come but its last `n`. What other threads copied is seen behind a barrier.
template <int n>
__device__ __forceinline__ void wait_for_groups() {
#if defined(RPP_EMULATED)
  emulator::wait_for_groups(n);
#else
  __pipeline_wait_prior(n);
#endif
}

// ---- thread block clusters, of Hopper and later; elsewhere a block is a cluster of one

__device__ __forceinline__ int cluster_rank() {
#if defined(RPP_EMULATED)
  return emulator::thread().block->rank;
#elif __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

// All blocks of the cluster come here before one goes on, and see what the others wrote.
__device__ __forceinline__ void sync_cluster() {
#if defined(RPP_EMULATED)
  emulator::wait_for(emulator::Waits::cluster);
#elif __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_block(T* ours, int rank) {
#if defined(RPP_EMULATED)
  emulator::Machine& m = emulator::machine();
  const auto at = reinterpret_cast<unsigned char*>(ours) - emulator::thread().block->shared_memory();
  return reinterpret_cast<T*>(m.cluster[rank]->shared_memory() + at);
#elif __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(ours, rank);
#else
  return ours;
#endif
}

// ---- the host's side

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;
};

constexpr size_t kSharedBytesUnasked = 48 << 10;

#if defined(RPP_EMULATED)

inline int largest_cluster(const Tensor&) { return 8; }
inline size_t most_shared_bytes(const Tensor&) { return 227 << 10; }

template <class... P, class... A>
void launch(const Tensor&, Grid grid, void (*kernel)(P...), A... arguments) {
  if (grid.blocks == 0) return;
  emulator::run(grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, [=] { kernel(P(arguments)...); });
}

#else

// How many blocks a cluster has at most on every GPU that has clusters, and 1 on others.
inline int largest_cluster(const Tensor& like) {
  return attribute(cudaDevAttrComputeCapabilityMajor, like.get_device_index()) >= 9 ? 8 : 1;
}
inline size_t most_shared_bytes(const Tensor& like) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index());
}

// Starts the kernel on the device of `like`, in torch's current stream there; of no blocks nothing.
template <class... P, class... A>
void launch(const Tensor& like, Grid grid, void (*kernel)(P...), A... arguments) {
  if (grid.blocks == 0) return;
  STD_TORCH_CHECK(grid.blocks < int64_t{1} << 31, "more rows than a launch has blocks: ", grid.blocks);
  const int device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check(cudaSetDevice(device), "cudaSetDevice");  // of the runtime within this extension, beside that of torch
  if (grid.shared_bytes > kSharedBytesUnasked)
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)),
        "cudaFuncSetAttribute");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = current_stream(device);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "the launch of a kernel");
}

#endif

}  // namespace rpp::cuda
