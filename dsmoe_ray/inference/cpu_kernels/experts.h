// The selected FFN experts of one layer: tokens grouped by expert, each expert's weights read once.
//
// Up: hidden = gate * act(w1 x) [* (w3 x)] for every (token, expert) pair. Down: each expert's contribution is computed
// by itself and added to its tokens, experts in ascending order; so a token's sum is the same whatever else is computed
// with it, and the same as that of its contributions given out one by one. Called by all threads of a parallel region.
#pragma once

#include <algorithm>

#include "down.h"
#include "model.h"
#include "routing.h"

namespace dsmoe {

constexpr int kHiddenChunk = 32;  // hidden units of one piece of work

// Lists the tokens of each expert. One thread.
inline int group_by_expert(const ExpertWeights& weights, const ExpertCall& call) {
  const int num_experts = weights.num_experts;
  std::fill(call.expert_starts, call.expert_starts + num_experts + 1, 0);
  auto for_pairs = [&](auto body) {
    for (int t = 0; t < call.num_tokens; ++t) {
      for (int k = 0; k < call.stride; ++k) {
        const int64_t i = int64_t(t) * call.stride + k;
        if (call.expert_ids[i] < 0) break;
        body(t, call.expert_ids[i], call.gates[i]);
      }
    }
  };
  for_pairs([&](int, int e, float) { ++call.expert_starts[e + 1]; });
  for (int e = 0; e < num_experts; ++e) call.expert_starts[e + 1] += call.expert_starts[e];
  int num_pairs = 0;
  for_pairs([&](int t, int e, float gate) {
    const int pair = call.expert_starts[e]++;
    call.pair_tokens[pair] = t;
    call.pair_rows[pair] = call.by_pair ? num_pairs++ : t;
    call.pair_gates[pair] = gate;
  });
  for (int e = num_experts; e > 0; --e) call.expert_starts[e] = call.expert_starts[e - 1];
  call.expert_starts[0] = 0;
  int num_active = 0, num_streamed = 0;
  for (int e = 0; e < num_experts; ++e) {
    const int count = call.expert_starts[e + 1] - call.expert_starts[e];
    if (!count) continue;
    call.active_experts[num_active] = e;
    call.partial_starts[num_active++] = num_streamed;
    if (streams(count, weights.d_model)) num_streamed += count;
  }
  return num_active;
}

// Hidden units [first, first + count) of one expert for all of its tokens.
template <typename T>
inline void compute_hidden(const ExpertWeights& weights, const ExpertCall& call, int expert, int first, int count) {
  const int64_t d_model = weights.d_model, matrix = int64_t(weights.d_ff) * d_model;
  const bool is_gated = weights.activation == kSwiglu;
  const T* w1 = static_cast<const T*>(weights.w1) + expert * matrix + first * d_model;
  const T* w3 = is_gated ? static_cast<const T*>(weights.w3) + expert * matrix + first * d_model : nullptr;
  const int begin = call.expert_starts[expert], end = call.expert_starts[expert + 1];
  for (int pair = begin; pair < end; pair += kTokenTile) {
    const int num_tokens = std::min(kTokenTile, end - pair);
    // A pass takes rows of w1, or half of w1 and the same of w3.
    const int pass = rows_per_pass(num_tokens), units = is_gated ? pass / 2 : pass;
    const int num_rows = is_gated ? (count + units - 1) / units * pass : count;
    alignas(64) float up[kTokenTile][kHiddenChunk] = {}, linear[kTokenTile][kHiddenChunk] = {};
    auto unit_of = [&](int row) { return std::min(row / pass * units + row % units, count - 1); };
    auto is_linear = [&](int row) { return row % pass >= units; };
    dot_rows<T>(
        num_rows, num_tokens, d_model, is_gated ? d_model / 2.0 : double(d_model),
        [&](int row) { return (is_linear(row) ? w3 : w1) + unit_of(row) * d_model; },
        [&](int t) { return static_cast<const T*>(call.x) + call.pair_tokens[pair + t] * d_model; },
        [&](int row, int t, float value) { (is_linear(row) ? linear : up)[t][unit_of(row)] = value; });
    for (int t = 0; t < num_tokens; ++t) {
      T* hidden = static_cast<T*>(call.hidden) + (pair + t) * int64_t(weights.d_ff) + first;
      for_lanes(count, [&](int64_t i, int lanes) {
        const Vec a = load(up[t] + i);
        const Vec activated = is_gated ? silu(a) * load(linear[t] + i) : gelu(a);
        store_up_to(hidden + i, activated * call.pair_gates[pair + t], lanes);
      });
    }
  }
}

template <typename T>
inline void combine_outputs(const ExpertWeights& weights, const ExpertCall& call, int num_active) {
  const int64_t d_model = weights.d_model, d_ff = weights.d_ff;
  project_down<T>(
      num_active, call.num_tokens, d_ff, d_model, weights.num_threads, call.partial,
      [&](int i) {
        const int expert = call.active_experts[i], first = call.expert_starts[expert];
        return DownGroup<T>{static_cast<const T*>(weights.w2) + expert * d_ff * d_model,
                            static_cast<const T*>(call.hidden) + first * d_ff,
                            call.expert_starts[expert + 1] - first, call.partial_starts[i]};
      },
      [&](int i, int input) {
        return call.y + call.pair_rows[call.expert_starts[call.active_experts[i]] + input] * d_model;
      },
      [&](int64_t begin, int64_t end) {
        const int num_rows = call.by_pair ? call.expert_starts[weights.num_experts] : call.num_tokens;
        for (int row = 0; row < num_rows; ++row)
          std::memset(call.y + row * d_model + begin, 0, sizeof(float) * (end - begin));
      });
}

template <typename T>
inline void run_experts(const ExpertWeights& weights, const ExpertCall& call) {
  // On the thread that times routers too, so that no two add to the total at once.
#pragma omp master
  {
    const RoutingTimer timer(call.routing_s);
    *call.num_active = group_by_expert(weights, call);
  }
#pragma omp barrier
  const int num_active = *call.num_active;
  const int chunks = (weights.d_ff + kHiddenChunk - 1) / kHiddenChunk;
  share_out(int64_t(num_active) * chunks, call.num_tokens, [&](int64_t work) {
    const int first = int(work % chunks) * kHiddenChunk;
    compute_hidden<T>(weights, call, call.active_experts[work / chunks], first,
                      std::min(kHiddenChunk, weights.d_ff - first));
  });
#pragma omp barrier
  combine_outputs<T>(weights, call, num_active);
}

}  // namespace dsmoe
