// Kernels with one fault each, to see that the emulated machine finds it: `faults NAME`.
#include <string>

#include "emulator.h"

namespace {

float results[64];

void neighbour(bool with_barrier) {
  float* shared = reinterpret_cast<float*>(emulator::thread().block->shared_memory());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  results[threadIdx.x] = shared[threadIdx.x > 0 ? threadIdx.x - 1 : 0];
}

int neighbours_are_right() {
  for (int i = 0; i < 64; ++i)
    if (results[i] != (i > 0 ? i - 1 : 0)) {
      std::fprintf(stderr, "wrong result\n");
      return 1;
    }
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string fault = arguments[1];
  const size_t bytes = 64 * sizeof(float);
  if (fault == "none" || fault == "a missing barrier") {
    emulator::run(1, 64, bytes, 1, [&] { neighbour(fault == "none"); });
    return neighbours_are_right();
  }
  if (fault == "a barrier that half of the threads come to")
    emulator::run(1, 64, 0, 1, [] {
      if (threadIdx.x < 32) __syncthreads();
    });
  if (fault == "a shuffle that one lane misses")
    emulator::run(1, 64, 0, 1, [] {
      if (threadIdx.x != 40) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    });
  if (fault == "a write behind the shared memory")
    emulator::run(1, 64, bytes, 1, [] { emulator::thread().block->shared_memory()[64 * sizeof(float)] = 0; });
  if (fault == "a copy that nobody waits for") {
    alignas(16) static float from[4] = {1, 2, 3, 4};
    emulator::run(1, 32, 16, 1, [] {
      float* shared = reinterpret_cast<float*>(emulator::thread().block->shared_memory());
      if (threadIdx.x == 0) {
        emulator::copy_later(shared, from, 16);
        emulator::end_of_group();
      }
      __syncthreads();
      results[0] = shared[3];
    });
    if (results[0] != 4) {
      std::fprintf(stderr, "wrong result\n");
      return 1;
    }
  }
  if (fault == "too much shared memory") emulator::run(1, 64, 228 << 10, 1, [] {});
  if (fault == "half a warp") emulator::run(1, 48, 0, 1, [] {});
  return 0;
}
