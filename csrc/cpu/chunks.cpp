#include "cpu/chunks.h"

#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/chunks.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {
namespace {

int64_t with_room(int64_t tokens) { return (tokens + kChunkRoom - 1) / kChunkRoom * kChunkRoom; }

template <class T>
Chunk<T> chunk_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == scalar_type<T>(), name, ": want (tokens, vocabulary), all of one",
                  " floating type");
  const int64_t tokens = x.size(0), vocab = x.size(1);
  STD_TORCH_CHECK(vocab >= 1, name, ": want a vocabulary of at least one token");
  STD_TORCH_CHECK((x.stride(0) == 1 || tokens <= 1) && (x.stride(1) >= tokens || vocab == 1), name,
                  ": want contiguous tokens, strides (1, ld) with ld >= ", tokens, ", got (", x.stride(0), ", ",
                  x.stride(1), ")");
  return {static_cast<const T*>(x.data_ptr()), tokens, vocab, vocab == 1 ? tokens : x.stride(1)};
}

template <class T>
ChunkArgs<T> args_of(const Tensor& logits, const Tensor& target_ids, double temperature,
                     const MaybeTensor& token_temperature, double softcap) {
  STD_TORCH_CHECK(softcap == 0 || (softcap >= 1e-30 && softcap <= 1e30),
                  "softcap: want 0 for none, or from 1e-30 to 1e30");
  const auto chunk = chunk_of<T>(logits, "logits");
  return {chunk, data_of<int64_t>(target_ids, chunk.tokens, "target_ids"), temperature,
          data_of<T>(token_temperature, chunk.tokens, "temperature"), softcap};
}

template <class T>
void check_target(const ChunkArgs<T>& a, int64_t token) {
  const int64_t y = a.target_ids[token];
  STD_TORCH_CHECK(y >= 0 && y < a.logits.vocab, "target_ids: ", y, " at token ", token,
                  " is outside the vocabulary of ", a.logits.vocab);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target_ids, double temperature,
                                                   const MaybeTensor& token_temperature, double softcap) {
  ChunkSumArgs<T> a{args_of<T>(logits, target_ids, temperature, token_temperature, softcap)};
  const int64_t tokens = a.logits.tokens, tiles = (tokens + kChunkTile - 1) / kChunkTile;
  for (int64_t i = 0; i < tokens; ++i) check_target(a, i);
  Tensor logps, entropy, lse, lse_rest;
  a.logps = new_like<T>(logits, {tokens}, logps);
  a.entropy = new_like<T>(logits, {tokens}, entropy);
  a.lse = new_like<T>(logits, {tokens}, lse);
  a.lse_rest = new_like<T>(logits, {tokens}, lse_rest);
  a.stride = with_room(tokens);
  std::vector<T> inverse_temperature(a.stride, T(1));
  for (int64_t i = 0; i < tokens; ++i) inverse_temperature[i] = static_cast<T>(1 / a.temperature_of(i));
  a.inverse_temperature = inverse_temperature.data();
  a.parts = (a.logits.vocab + kChunkPart - 1) / kChunkPart;
  const auto max = std::make_unique_for_overwrite<T[]>(a.parts * a.stride);
  const auto sums = std::make_unique_for_overwrite<double[]>(2 * a.parts * a.stride);
  a.max = max.get();
  a.sum = sums.get();
  a.weighted = a.sum + a.parts * a.stride;
  parallel_rows(a.parts * tiles, kChunkPart * std::min(tokens, kChunkTile),
                [&](int64_t begin, int64_t end) { RPP_CALL(chunk_sums<T>, a, begin, end); });
  parallel_rows(a.stride / kChunkRoom, a.parts * kChunkRoom,
                [&](int64_t begin, int64_t end) { RPP_CALL(chunk_results<T>, a, begin, end); });
  return {logps, entropy, lse, lse_rest};
}

template <class T>
void backward(const Tensor& dlogits, const Tensor& logits, const MaybeTensor& rows, const Tensor& target_ids,
              double temperature, const MaybeTensor& token_temperature, double softcap, const Tensor& entropy,
              const Tensor& lse, const Tensor& lse_rest, const MaybeTensor& dlogps, const MaybeTensor& dentropy,
              const MaybeTensor& dlse) {
  ChunkGradArgs<T> a{args_of<T>(logits, target_ids, temperature, token_temperature, softcap)};
  const int64_t tokens = a.logits.tokens, vocab = a.logits.vocab;
  a.count = rows.has_value() ? rows->numel() : tokens;
  a.rows = data_of<int64_t>(rows, a.count, "rows");
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t row = a.row_of(i);
    STD_TORCH_CHECK(row >= 0 && row < tokens && (i == 0 || row > a.row_of(i - 1)), "rows: want rising tokens below ",
                    tokens, ", got ", row, " at ", i);
    check_target(a, row);
  }
  a.entropy = data_of<T>(entropy, tokens, "entropy");
  a.lse = data_of<T>(lse, tokens, "lse");
  a.lse_rest = data_of<T>(lse_rest, tokens, "lse_rest");
  a.dlogps = data_of<T>(dlogps, tokens, "dlogps");
  a.dentropy = data_of<T>(dentropy, tokens, "dentropy");
  a.dlse = data_of<T>(dlse, tokens, "dlse");

  const auto out = chunk_of<T>(dlogits, "dlogits");
  STD_TORCH_CHECK(out.tokens == a.count && out.vocab == vocab, "dlogits: want ", a.count, " tokens of ", vocab,
                  ", got ", out.tokens, " of ", out.vocab);
  if (a.count == 0) return;
  const auto end = [](const Chunk<T>& x) { return x.data + (x.vocab - 1) * x.ld + x.tokens; };
  const bool in_place = out.data == a.logits.data && (out.ld == a.logits.ld || vocab == 1);
  const bool apart = end(out) <= a.logits.data || end(a.logits) <= out.data;
  STD_TORCH_CHECK(in_place || apart, "dlogits: want memory of its own, or that of the logits with the same ld");
  a.dlogits = const_cast<T*>(out.data);
  a.dlogits_ld = out.ld;

  a.stride = with_room(a.count) + kChunkRoom;  // a tile of packed tokens begins anywhere
  const auto gradients = std::make_unique_for_overwrite<T[]>(kChunkFields * a.stride);
  const auto targets = std::make_unique_for_overwrite<T[]>(a.count);
  const auto vectors = std::make_unique_for_overwrite<ChunkVector[]>(a.count + 1);
  const auto index = std::make_unique_for_overwrite<LaneIndex<T>[]>(with_room(tokens));
  a.gradients = gradients.get();
  a.targets = targets.get();
  a.vectors = vectors.get();
  a.index = index.get();
  RPP_CALL(chunk_prepare<T>, a);
  parallel_rows(vocab, a.count, [&](int64_t begin, int64_t end) { RPP_CALL(chunk_bwd<T>, a, begin, end); });
  RPP_CALL(chunk_targets<T>, a);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_logps_fwd(Tensor logits, Tensor target_ids, double temperature,
                                                           MaybeTensor token_temperature, double softcap) {
  return for_float_type(
      logits, [&]<class T>(T*) { return forward<T>(logits, target_ids, temperature, token_temperature, softcap); });
}

void chunk_logps_bwd_out(Tensor dlogits, Tensor logits, MaybeTensor rows, Tensor target_ids, double temperature,
                         MaybeTensor token_temperature, double softcap, Tensor entropy, Tensor lse, Tensor lse_rest,
                         MaybeTensor dlogps, MaybeTensor dentropy, MaybeTensor dlse) {
  for_float_type(logits, [&]<class T>(T*) {
    backward<T>(dlogits, logits, rows, target_ids, temperature, token_temperature, softcap, entropy, lse, lse_rest,
                dlogps, dentropy, dlse);
  });
}

}  // namespace rpp::cpu
