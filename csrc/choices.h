// The choices that come from Python as numbers, for C++ and CUDA alike.
#pragma once

#include <cstdint>

namespace rpp {

// What a masked token does to a sum that passes it: nothing, start it anew, or discount it as any token does. GAPS in
// ops/advantages.py
enum class Gap : int64_t { carry = 0, reset = 1, step = 2 };

inline double factor_of_masked(Gap gap, double gamma) { return gap == Gap::step ? gamma : 1; }

// Of whom the ratio of the policy loss is. LEVELS in ops/policy_loss.py
enum class Level : int64_t { token = 0, sequence = 1, sequence_token = 2, sequence_sum = 3 };

// LEVELS in ops/rollout.py
enum class RolloutLevel : int64_t { token = 0, sequence = 1, geometric = 2 };

}  // namespace rpp
