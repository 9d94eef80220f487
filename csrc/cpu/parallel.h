#pragma once

#include <sys/mman.h>

#include <algorithm>

#include "checks.h"

namespace rpp {

// f(begin, end) over `rows` rows of `row_cost` elements each, on torch's own threads; small work stays on the caller's.
template <class F>
void parallel_rows(int64_t rows, int64_t row_cost, const F& f) {
  constexpr int64_t kElementsWorthAThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kElementsWorthAThread / std::max<int64_t>(1, row_cost));
  if (rows <= grain) return f(0, rows);
  torch::stable::parallel_for(0, rows, grain, f);
}

// A large result is fresh memory, which the kernel hands out in 4 KiB pages, each a fault; 2 MiB pages fault 512 times
// less. Asked for, never needed: a refusal changes nothing.
inline void use_huge_pages(const Tensor& x) {
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.numel() * x.element_size()) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace rpp
