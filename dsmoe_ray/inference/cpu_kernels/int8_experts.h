// The selected FFN experts of one layer with matrices of int8; experts.h tells how the work goes.
#pragma once

#include <algorithm>

#include "experts.h"
#include "int8.h"

namespace dsmoe {

// One block of hidden units, those from `first` on, of one expert for all of its tokens.
inline void compute_int8_hidden(const ExpertWeights& weights, const ExpertCall& call, int expert, int block) {
  const int64_t d_model = weights.d_model, x_blocks = count_input_blocks(d_model);
  const int64_t num_groups = count_groups(weights.d_ff), hidden_blocks = count_input_blocks(weights.d_ff);
  const bool is_gated = weights.activation == kSwiglu;
  const RoundedRows x{call.rounded, call.rounded_scales};
  const RoundedRows hidden{static_cast<int16_t*>(call.hidden), call.hidden_scales};
  const int end = call.expert_starts[expert + 1];
  for (int pair = call.expert_starts[expert]; pair < end; pair += kInt8Tile) {
    const int num_tokens = std::min(kInt8Tile, end - pair);
    alignas(64) float up[kInt8Tile][kInputBlock] = {}, linear[kInt8Tile][kInputBlock] = {};
    auto multiply = [&](Int8Matrix matrix, int64_t group, float(*out)[kInputBlock], int column) {
      int8_group(
          from_group(matrix, expert * num_groups + group, d_model), d_model, num_tokens,
          [&](int t) { return x.row(call.pair_tokens[pair + t], x_blocks); },
          [&](int t, Vec values) { store(out[t] + column, values); });
    };
    for (int column = 0; column < kInputBlock; column += kLanes) {
      const int64_t group = (block * kInputBlock + column) / kLanes;
      if (group == num_groups) break;
      multiply(int8_matrix(weights.w1, weights.w1_scales), group, up, column);
      if (is_gated) multiply(int8_matrix(weights.w3, weights.w3_scales), group, linear, column);
    }
    for (int t = 0; t < num_tokens; ++t) {
      alignas(64) float activated[kInputBlock];
      for (int i = 0; i < kInputBlock; i += kLanes) {
        const Vec a = load(up[t] + i);
        store(activated + i, (is_gated ? silu(a) * load(linear[t] + i) : gelu(a)) * call.pair_gates[pair + t]);
      }
      const RoundedRows row = hidden.row(pair + t, hidden_blocks);
      round_block(activated, kInputBlock, row.values + block * kInputBlock, row.scales + block);
    }
  }
}

// Sets columns [begin, end) of y to the sums of all active experts.
inline void combine_int8_outputs(const ExpertWeights& weights, const ExpertCall& call, int64_t begin, int64_t end) {
  const int64_t d_model = weights.d_model, num_groups = count_groups(d_model);
  const int64_t blocks = count_input_blocks(weights.d_ff);
  const RoundedRows hidden{static_cast<int16_t*>(call.hidden), call.hidden_scales};
  const int num_rows = call.by_pair ? call.expert_starts[weights.num_experts] : call.num_tokens;
  for (int row = 0; row < num_rows; ++row)
    std::memset(call.y + row * d_model + begin, 0, sizeof(float) * (end - begin));
  for (int i = 0; i < *call.num_active; ++i) {
    const int expert = call.active_experts[i], first = call.expert_starts[expert];
    const Int8Matrix w2 =
        from_group(int8_matrix(weights.w2, weights.w2_scales), expert * num_groups, weights.d_ff);
    for (int64_t column = begin; column < end; column += kLanes) {
      const int count = int(std::min<int64_t>(kLanes, end - column));
      int8_group(
          from_group(w2, column / kLanes, weights.d_ff), weights.d_ff, call.expert_starts[expert + 1] - first,
          [&](int pair) { return hidden.row(first + pair, blocks); },
          [&](int pair, Vec values) { add_up_to(call.y + call.pair_rows[first + pair] * d_model + column, values, count); });
    }
  }
}

template <>
inline void run_experts<Int8>(const ExpertWeights& weights, const ExpertCall& call) {
  const int64_t d_model = weights.d_model, x_blocks = count_input_blocks(d_model);
#pragma omp master
  {
    const RoutingTimer timer(call.routing_s);
    *call.num_active = group_by_expert(weights, call);
  }
  const RoundedRows rounded{call.rounded, call.rounded_scales};
#pragma omp for schedule(static)
  for (int token = 0; token < call.num_tokens; ++token)
    round_row(static_cast<const float*>(call.x) + token * d_model, d_model, rounded.row(token, x_blocks));
  const int64_t blocks = count_input_blocks(weights.d_ff);
  share_out(*call.num_active * blocks, call.num_tokens, [&](int64_t work) {
    compute_int8_hidden(weights, call, call.active_experts[work / blocks], int(work % blocks));
  });
#pragma omp barrier
  const int64_t width = columns_per_chunk(d_model, weights.num_threads);
  share_out((d_model + width - 1) / width, call.num_tokens, [&](int64_t chunk) {
    combine_int8_outputs(weights, call, chunk * width, std::min(d_model, (chunk + 1) * width));
  });
#pragma omp barrier
}

}  // namespace dsmoe
