#pragma once

#include <algorithm>
#include <cstdint>

namespace rpp {

// step(carry, t) for every token of the sequences first <= i < last, each from its last token back (or from its first
// on, with `forward`) and with a carry of its own. Every step waits for the one before it, so several sequences advance
// together, each in the time that the others wait.
template <class Carry, bool forward = false, class Step>
void scan(const int64_t* cu, int64_t first, int64_t last, const Step& step) {
  constexpr int kLanes = 4;
  int64_t next = first, t[kLanes], left[kLanes] = {};
  Carry carry[kLanes];
  for (;;) {
    int64_t together = INT64_MAX;
    for (int k = 0; k < kLanes; ++k) {
      for (; left[k] == 0 && next < last; ++next) {
        t[k] = forward ? cu[next] : cu[next + 1] - 1;
        left[k] = cu[next + 1] - cu[next];
        carry[k] = {};
      }
      together = std::min(together, left[k]);
    }
    if (together == 0) break;  // fewer sequences than lanes are left
    for (int64_t i = 0; i < together; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < kLanes; ++k) step(carry[k], forward ? t[k] + i : t[k] - i);
    }
    for (int k = 0; k < kLanes; ++k) {
      t[k] += forward ? together : -together;
      left[k] -= together;
    }
  }
  for (int k = 0; k < kLanes; ++k)
    for (int64_t i = 0; i < left[k]; ++i) step(carry[k], forward ? t[k] + i : t[k] - i);
}

}  // namespace rpp
