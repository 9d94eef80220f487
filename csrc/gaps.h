// What a masked token does to a sum that passes it: nothing, start it anew, or discount it as any token does.
#pragma once

#include <cstdint>

namespace rpp {

enum class Gap : int64_t { carry = 0, reset = 1, step = 2 };

inline double factor_of_masked(Gap gap, double gamma) { return gap == Gap::step ? gamma : 1; }

}  // namespace rpp
