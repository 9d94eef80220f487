#pragma once

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

}  // namespace rpp
