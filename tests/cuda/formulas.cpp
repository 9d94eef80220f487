// csrc/formulas.h and csrc/cuda/index.h for Python, as the kernels of csrc/cuda include them: numbers in, numbers out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/index.h"
#include "cuda/scalars.h"
#include "cuda/tokens.h"

namespace py = pybind11;
using namespace rpp::cuda;

namespace {

template <class F>
SurrogateOptions<F> options_of(const std::array<F, 4>& o) {
  return {{o[0], o[1], o[2], o[3]}};
}

// f.operator()<surrogate>()
template <class G>
auto with_surrogate(int surrogate, const G& f) {
  switch (static_cast<Surrogate>(surrogate)) {
    case Surrogate::clip: return f.template operator()<Surrogate::clip>();
    case Surrogate::reinforce: return f.template operator()<Surrogate::reinforce>();
    case Surrogate::cispo: return f.template operator()<Surrogate::cispo>();
    case Surrogate::sapo: return f.template operator()<Surrogate::sapo>();
    case Surrogate::gmpo: return f.template operator()<Surrogate::gmpo>();
  }
  throw py::value_error("surrogate");
}

template <class F>
void define_formulas(py::module_ m) {
  m.def("exponential", [](F x) { return exponential(x); });
  m.def("exp_minus_1_minus_x", [](F x) { return exp_minus_1_minus_x(x); });
  m.def("softcapped", [](F x, double cap) {
    const auto y = softcapped(x, softcap_of<F>(cap));
    return std::tuple(y.value, y.slope);
  });
  m.def("row_results", [](double max, double sum, double weighted, double target, double temperature) {
    const auto r = row_results<F>(max, sum, weighted, target, temperature);
    return std::tuple(r.logps, r.entropy, r.lse, r.lse_rest);
  });
  m.def("row_sum_squares",
        [](double max, double sum, double squares) { return row_sum_squares<F>(max, sum, squares); });
  m.def("dlogit",
        [](F logit, double lse, F entropy, double temperature, F dlogps, F dentropy, F dlse, bool with_entropy) {
          const auto g = row_gradient(lse, entropy, temperature, dlogps, dentropy, dlse);
          return with_entropy ? dlogit<true>(logit, g) : dlogit<false>(logit, g);
        });
  m.def("kl", [](int estimator, F d, F log_ratio_clamp, F kl_clamp) {
    const KlClamps<F> clamps{log_ratio_clamp, kl_clamp};
    return with_estimator(estimator,
                          [&]<Kl k>() { return std::tuple(kl_value<k>(d, clamps), kl_slope<k>(d, clamps)); });
  });
  m.def("rollout_weight", [](F log_ratio, F most, F low, F high, F below, F above) {
    const auto w = rollout_weight(log_ratio, RolloutBounds<F>{most, low, high, below, above});
    return std::tuple(w.weight, w.low, w.high);
  });
  m.def("ratio_of", [](F log_ratio, F most) {
    const auto r = ratio_of(log_ratio, most);
    return std::tuple(r.log_ratio, r.value, r.clamped);
  });
  m.def("log_ratio_term", [](int surrogate, F log_ratio, F advantage, const std::array<F, 4>& options) {
    return with_surrogate(surrogate, [&]<Surrogate s>() {
      const auto term = log_ratio_term<s>(log_ratio, advantage, options_of(options));
      return std::tuple(term.value, term.slope);
    });
  });
  m.def("surrogate_loss",
        [](int surrogate, F logp, F advantage, F log_ratio, F of_level, F most, const std::array<F, 4>& options) {
          const PolicyToken<F> token{logp, advantage, log_ratio, ratio_of(of_level, most), F(1)};
          return with_surrogate(surrogate, [&]<Surrogate s>() {
            const auto l = surrogate_loss<s>(token, options_of(options));
            return std::tuple(l.loss, l.ratio_slope, l.logp_slope, l.clipped_low, l.clipped_high, l.dual_clipped);
          });
        });
  m.def("clipped_critic_loss", [](F value, F old_value, F target, F epsilon) {
    const auto l = clipped_critic_loss(value, old_value, target, epsilon);
    return std::tuple(l.loss, l.slope, l.squared_error, l.clipped);
  });
}

}  // namespace

PYBIND11_MODULE(formulas, m) {
  define_formulas<float>(m.def_submodule("float32"));
  define_formulas<double>(m.def_submodule("float64"));

  m.def("pair_loss", [](int type, double chosen, double rejected, double beta, double smoothing, double margin) {
    const auto l = pair_loss(static_cast<Pair>(type), chosen, rejected, beta, smoothing, margin);
    return std::tuple(l.value, l.dchosen, l.drejected);
  });
  m.def("bfloat16_of", [](float x) { return narrowed<rpp::bf16>(x).bits; });
  m.def("of_bfloat16", [](uint16_t bits) { return widened(rpp::bf16{bits}); });
  m.def("float16_of", [](float x) { return std::bit_cast<uint16_t>(narrowed<rpp::f16>(x)); });
  m.def("of_float16", [](uint16_t bits) { return widened(std::bit_cast<rpp::f16>(bits)); });

  m.attr("part") = kPart;
  m.def("ceil_div", &ceil_div);
  m.def("parts_of", &parts_of);
  m.def("part_of", [](int64_t vocab, int64_t part) {
    const Range r = part_of(vocab, part);
    return std::tuple(r.begin, r.end);
  });
  m.def("slice_size", &slice_size);
  m.def("slice_of", [](int64_t vocab, int64_t rank, int64_t ranks, int64_t unit) {
    const Range r = slice_of(vocab, rank, ranks, unit);
    return std::tuple(r.begin, r.end);
  });
  m.attr("comfortable_bytes") = kComfortableBytes;
  m.def("cluster_of", &cluster_of);
  m.def("column_of", &column_of);
  m.def("offset", [](int64_t vocab, int64_t inner, int64_t outer_stride, int64_t row_stride, int64_t row) {
    return Rows{vocab, inner, outer_stride, row_stride}.offset(row);
  });
}
