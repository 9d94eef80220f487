// group_advantages: a handful of numbers for each prompt, so plain double arithmetic on one thread.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "groups.h"
#include "ops.h"

namespace rpp::cpu {
namespace {

using Baseline = GroupOptions::Baseline;
using Std = GroupOptions::Std;

struct Group {
  double count = 0, mean = 0, std = 0;
  double weight = 0, baseline = 0;       // sum of the weights, and the weighted mean
  double sum_dcentered = 0, dstd = 0;    // backward
  double sum_slope = 0, sum_moment = 0;  // backward through the standard deviations of the others
};

template <class T>
struct Groups {
  const T* scores;
  const int64_t* ids;     // null: groups of `size` in a row
  const double* lengths;  // null: all weigh the same
  int64_t batch, size;
  GroupOptions options;
  std::vector<Group> groups;
  Group whole;
  std::vector<Moments> others;  // of each score, where their standard deviation is asked for

  Groups(const Tensor& scores_tensor, const MaybeTensor& group_index, const MaybeTensor& lengths_tensor,
         const MaybeTensor& moments, int64_t group_size, int64_t num_groups, GroupOptions o)
      : scores(data_of<T>(scores_tensor, scores_tensor.numel(), "scores")),
        ids(data_of<int64_t>(group_index, scores_tensor.numel(), "group_ids")),
        lengths(data_of<double>(lengths_tensor, scores_tensor.numel(), "lengths")),
        batch(scores_tensor.numel()),
        size(group_size),
        options(o),
        groups(num_groups) {
    STD_TORCH_CHECK(batch == 0 || ids || (size > 0 && (batch + size - 1) / size <= num_groups),
                    "group_size does not fit the batch");
    for (int64_t i = 0; ids && i < batch; ++i)
      STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < num_groups, "group_ids: ", ids[i], " is outside ", num_groups, " groups");
    STD_TORCH_CHECK((options.baseline == Baseline::length_weighted) == lengths_tensor.has_value(),
                    "lengths are for the length-weighted baseline");
    for (int64_t i = 0; i < batch; ++i) {
      Group& g = of(i);
      g.count += 1, g.mean += scores[i], whole.count += 1, whole.mean += scores[i];
      g.weight += weight(i);
      if (weight(i) > 0) g.baseline += weight(i) * scores[i];  // one that weighs nothing may be anything
    }
    for (auto& g : groups) g.mean /= std::max(g.count, 1.0), g.baseline /= g.weight > 0 ? g.weight : 1;
    whole.mean /= std::max(whole.count, 1.0);
    for (int64_t i = 0; i < batch; ++i) {
      Group& g = of(i);
      g.std += (scores[i] - g.mean) * (scores[i] - g.mean);
      whole.std += (scores[i] - whole.mean) * (scores[i] - whole.mean);
    }
    if (const double* all = data_of<double>(moments, 3, "moments")) whole.count = all[0], whole.std = all[2];
    for (auto& g : groups) g.std = std::sqrt(g.std / options.degrees(g.count));
    whole.std = std::sqrt(whole.std / options.degrees(whole.count));
    if (options.std == Std::leave_one_out) find_others();
  }

  Group& of(int64_t i) { return groups[ids ? ids[i] : i / size]; }
  double weight(int64_t i) const { return lengths ? lengths[i] : 1; }

  // Those before and those after each score, merged: equal scores have squares of exactly 0, which to take the score's
  // own part from the group's squares would not give.
  void find_others() {
    others.resize(batch);
    std::vector<Moments> seen(groups.size());
    const auto pass = [&](int64_t i) {
      Moments& met = seen[&of(i) - groups.data()];
      others[i].merge(met);
      met.merge({1, double(scores[i]), 0});
    };
    for (int64_t i = 0; i < batch; ++i) pass(i);
    std::fill(seen.begin(), seen.end(), Moments{});
    for (int64_t i = batch - 1; i >= 0; --i) pass(i);
  }

  double centered(int64_t i) {
    const Group& g = of(i);
    if (g.count == 1) return options.keep_singletons ? scores[i] : 0;
    return options.factor(g.count) * (scores[i] - g.baseline);
  }

  double std_of_others(int64_t i) const { return std::sqrt(others[i].squares / options.degrees(others[i].count)); }

  double inverse_std(int64_t i) {
    switch (options.std) {
      case Std::group: return of(i).count == 1 ? 1 : 1 / (of(i).std + options.eps);
      case Std::batch: return 1 / (whole.std + options.eps);
      case Std::leave_one_out: return std_of_others(i) == 0 ? 1 : 1 / (std_of_others(i) + options.eps);
      default: return 1;
    }
  }
};

}  // namespace

Tensor group_advantages_fwd(Tensor scores, MaybeTensor group_index, MaybeTensor lengths, MaybeTensor moments,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons) {
  return for_float_type(scores, [&]<class T>(T*) {
    Groups<T> g(scores, group_index, lengths, moments, group_size, num_groups,
                {baseline, std, unbiased, eps, keep_singletons});
    Tensor out;
    T* data = new_like<T>(scores, {g.batch}, out);
    for (int64_t i = 0; i < g.batch; ++i) data[i] = static_cast<T>(g.centered(i) * g.inverse_std(i));
    return out;
  });
}

Tensor group_advantages_bwd(Tensor dadvantages, Tensor scores, MaybeTensor group_index, MaybeTensor lengths,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons) {
  return for_float_type(scores, [&]<class T>(T*) {
    Groups<T> g(scores, group_index, lengths, std::nullopt, group_size, num_groups,
                {baseline, std, unbiased, eps, keep_singletons});
    const T* d = data_of<T>(dadvantages, g.batch, "dadvantages");
    const bool of_others = g.options.std == Std::leave_one_out;
    // d(std of the others of i) / d(another's score) = (that score - their mean) / (degrees * std)
    const auto slope = [&](int64_t i) {
      const double std = g.std_of_others(i), inverse = g.inverse_std(i);
      const double dstd = -d[i] * g.centered(i) * inverse * inverse;
      return std > 0 ? dstd / (g.options.degrees(g.others[i].count) * std) : 0;
    };
    for (int64_t i = 0; i < g.batch; ++i) {
      Group& group = g.of(i);
      const double inverse_std = g.inverse_std(i), dstd = -d[i] * g.centered(i) * inverse_std * inverse_std;
      group.sum_dcentered += d[i] * inverse_std;
      if (group.count > 1) group.dstd += dstd;
      g.whole.dstd += dstd;
      if (!of_others) continue;
      group.sum_slope += slope(i);
      group.sum_moment += slope(i) * (g.others[i].mean - group.mean);
    }
    // d(std) / d(score) = (score - mean) / (degrees * std), and 0 where all scores are equal.
    const auto through_std = [&](const Group& group, double score) {
      return group.std > 0 ? group.dstd * (score - group.mean) / (g.options.degrees(group.count) * group.std) : 0;
    };
    Tensor out;
    T* data = new_like<T>(scores, {g.batch}, out);
    for (int64_t i = 0; i < g.batch; ++i) {
      const Group& group = g.of(i);
      const double dcentered = d[i] * g.inverse_std(i), share = group.weight > 0 ? g.weight(i) / group.weight : 0;
      double dscore = 0;
      if (group.count > 1) dscore = g.options.factor(group.count) * (dcentered - share * group.sum_dcentered);
      else if (g.options.keep_singletons) dscore = dcentered;
      if (g.options.std == Std::group) dscore += through_std(group, g.scores[i]);
      if (g.options.std == Std::batch) dscore += through_std(g.whole, g.scores[i]);
      if (of_others) {
        const double other_slopes = group.sum_slope - slope(i);
        const double other_moments = group.sum_moment - slope(i) * (g.others[i].mean - group.mean);
        dscore += other_slopes * (g.scores[i] - group.mean) - other_moments;
      }
      data[i] = static_cast<T>(dscore);
    }
    return out;
  });
}

}  // namespace rpp::cpu
