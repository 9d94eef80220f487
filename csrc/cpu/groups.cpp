// group_advantages: a handful of numbers for each prompt, so plain double arithmetic on one thread.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "ops.h"

namespace rpp {
namespace {

enum class Baseline : int64_t { mean = 0, leave_one_out = 1 };
enum class Std : int64_t { none = 0, group = 1, batch = 2 };

struct Group {
  double count = 0, mean = 0, std = 0;
  double sum_dcentered = 0, dstd = 0;  // backward
};

struct Options {
  Baseline baseline;
  Std std;
  bool unbiased, keep_singletons;
  double eps;

  // What a centred score of a group of n is multiplied by.
  double factor(double n) const { return baseline == Baseline::leave_one_out ? n / std::max(n - 1, 1.0) : 1; }
  double degrees(double n) const { return std::max(n - unbiased, 1.0); }
};

template <class T>
struct Groups {
  const T* scores;
  const int64_t* ids;  // null: groups of `size` in a row
  int64_t batch, size;
  Options options;
  std::vector<Group> groups;
  Group whole;

  Groups(const Tensor& scores_tensor, const MaybeTensor& group_index, int64_t group_size, int64_t num_groups, Options o)
      : scores(data_of<T>(scores_tensor, scores_tensor.numel(), "scores")),
        ids(data_of<int64_t>(group_index, scores_tensor.numel(), "group_ids")),
        batch(scores_tensor.numel()),
        size(group_size),
        options(o),
        groups(num_groups) {
    STD_TORCH_CHECK(batch == 0 || ids || (size > 0 && (batch + size - 1) / size <= num_groups),
                    "group_size does not fit the batch");
    for (int64_t i = 0; ids && i < batch; ++i)
      STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < num_groups, "group_ids: ", ids[i], " is outside ", num_groups, " groups");
    for (int64_t i = 0; i < batch; ++i) {
      Group& g = of(i);
      g.count += 1, g.mean += scores[i], whole.count += 1, whole.mean += scores[i];
    }
    for (auto& g : groups) g.mean /= std::max(g.count, 1.0);
    whole.mean /= std::max(whole.count, 1.0);
    for (int64_t i = 0; i < batch; ++i) {
      Group& g = of(i);
      g.std += (scores[i] - g.mean) * (scores[i] - g.mean);
      whole.std += (scores[i] - whole.mean) * (scores[i] - whole.mean);
    }
    for (auto& g : groups) g.std = std::sqrt(g.std / options.degrees(g.count));
    whole.std = std::sqrt(whole.std / options.degrees(whole.count));
  }

  Group& of(int64_t i) { return groups[ids ? ids[i] : i / size]; }

  double centered(int64_t i) {
    const Group& g = of(i);
    if (g.count == 1) return options.keep_singletons ? scores[i] : 0;
    return options.factor(g.count) * (scores[i] - g.mean);
  }

  double inverse_std(int64_t i) {
    if (options.std == Std::none || (options.std == Std::group && of(i).count == 1)) return 1;
    return 1 / ((options.std == Std::group ? of(i).std : whole.std) + options.eps);
  }
};

Options options_of(int64_t baseline, int64_t std, bool unbiased, double eps, bool keep_singletons) {
  return {static_cast<Baseline>(baseline), static_cast<Std>(std), unbiased, keep_singletons, eps};
}

}  // namespace

Tensor group_advantages_fwd(Tensor scores, MaybeTensor group_index, int64_t group_size, int64_t num_groups,
                            int64_t baseline, int64_t std, bool unbiased, double eps, bool keep_singletons) {
  return for_float_type(scores, [&]<class T>(T*) {
    Groups<T> g(scores, group_index, group_size, num_groups, options_of(baseline, std, unbiased, eps, keep_singletons));
    Tensor out;
    T* data = new_like<T>(scores, {g.batch}, out);
    for (int64_t i = 0; i < g.batch; ++i) data[i] = static_cast<T>(g.centered(i) * g.inverse_std(i));
    return out;
  });
}

Tensor group_advantages_bwd(Tensor dadvantages, Tensor scores, MaybeTensor group_index, int64_t group_size,
                            int64_t num_groups, int64_t baseline, int64_t std, bool unbiased, double eps,
                            bool keep_singletons) {
  return for_float_type(scores, [&]<class T>(T*) {
    Groups<T> g(scores, group_index, group_size, num_groups, options_of(baseline, std, unbiased, eps, keep_singletons));
    const T* d = data_of<T>(dadvantages, g.batch, "dadvantages");
    for (int64_t i = 0; i < g.batch; ++i) {
      const double inverse_std = g.inverse_std(i), dstd = -d[i] * g.centered(i) * inverse_std * inverse_std;
      g.of(i).sum_dcentered += d[i] * inverse_std;
      if (g.of(i).count > 1) g.of(i).dstd += dstd;
      g.whole.dstd += dstd;
    }
    // d(std) / d(score) = (score - mean) / (degrees * std), and 0 where all scores are equal.
    const auto through_std = [&](const Group& group, double score) {
      return group.std > 0 ? group.dstd * (score - group.mean) / (g.options.degrees(group.count) * group.std) : 0;
    };
    Tensor out;
    T* data = new_like<T>(scores, {g.batch}, out);
    for (int64_t i = 0; i < g.batch; ++i) {
      const Group& group = g.of(i);
      const double dcentered = d[i] * g.inverse_std(i);
      double dscore = 0;
      if (group.count > 1) dscore = g.options.factor(group.count) * (dcentered - group.sum_dcentered / group.count);
      else if (g.options.keep_singletons) dscore = dcentered;
      if (g.options.std == Std::group) dscore += through_std(group, g.scores[i]);
      if (g.options.std == Std::batch) dscore += through_std(g.whole, g.scores[i]);
      data[i] = static_cast<T>(dscore);
    }
    return out;
  });
}

}  // namespace rpp
