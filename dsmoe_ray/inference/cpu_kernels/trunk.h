// Everything but the FFN experts, in phases that all threads of a parallel region go through together.
#pragma once

#include <algorithm>

#include "attention.h"
#include "experts.h"
#include "down.h"
#include "int8_experts.h"
#include "model.h"
#include "routing.h"

namespace dsmoe {

constexpr int64_t kChunkBytes = 256 << 10;  // most weights of one piece of work

// Output rows of one piece of work: enough pieces for all threads, large ones so that few of them begin unprepared.
template <typename T>
inline int rows_per_chunk(int num_rows, int64_t size, int num_threads) {
  const int64_t fitting = std::max<int64_t>(kChunkBytes / (size * int64_t(sizeof(T))), kMaxRows);
  const int64_t shared = (num_rows / (2 * num_threads) + kMaxRows - 1) / kMaxRows * kMaxRows;
  return int(std::clamp<int64_t>(shared, kMaxRows, fitting));
}

inline RoundedRows rounded_rows(const Step& step) { return {step.rounded, step.rounded_scales}; }

// Adds what the experts gave, then norms: `normed` in float32 and as products with the weights read it.
template <typename T>
inline void norm_token(const Model& model, const Step& step, const float* weight, int token, bool add_experts) {
  const int64_t d_model = model.d_model, offset = token * d_model;
  float* x = step.x + offset;
  Vec squares = {};
  for_lanes(d_model, [&](int64_t i, int count) {
    Vec value = load_up_to(x + i, count);
    if (add_experts) {
      value += load_up_to(step.y + offset + i, count);
      store_up_to(x + i, value, count);
    }
    squares += value * value;
  });
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / float(d_model) + model.norm_eps);
  for_lanes(d_model, [&](int64_t i, int count) {
    const Vec normed = load_up_to(x + i, count) * scale * load_up_to(weight + i, count);
    store_up_to(step.normed + offset + i, normed, count);
    if constexpr (!kIsInt8<T>) store_up_to(static_cast<T*>(step.normed_cast) + offset + i, normed, count);
  });
  if constexpr (kIsInt8<T>)
    round_row(step.normed + offset, d_model, rounded_rows(step).row(token, count_input_blocks(d_model)));
}

template <typename T>
inline void norm_all(const Model& model, const Step& step, const float* weight, bool add_experts) {
#pragma omp for schedule(static)
  for (int token = 0; token < step.num_tokens; ++token) norm_token<T>(model, step, weight, token, add_experts);
}

// out[token][row] = weights[row] . x[token]; no barrier at the end.
template <typename T>
inline void project(const void* weights, int num_rows, int64_t size, const void* x, int num_tokens, float* out,
                    int64_t out_stride, int num_threads) {
  const int chunk = rows_per_chunk<T>(num_rows, size, num_threads);
  share_out((num_rows + chunk - 1) / chunk, num_tokens, [&](int64_t work) {
    const int first = int(work) * chunk;
    const T* rows = static_cast<const T*>(weights) + first * size;
    dot_rows<T>(
        std::min(chunk, num_rows - first), num_tokens, size, double(size), [&](int row) { return rows + row * size; },
        [&](int t) { return static_cast<const T*>(x) + t * size; },
        [&](int row, int t, float value) { out[t * out_stride + first + row] = value; });
  });
}

// Probabilities over all experts; scores are float32 whatever the weights' type. Ends with a barrier.
template <typename T>
inline void score_experts(const Model& model, const RouterWeights& router, const Step& step) {
  const float* x = step.normed;
  int64_t size = model.d_model;
  if (router.hidden) {
    // Routers are small and decide everything: they stay in float32 where matrices are int8.
    using Hidden = std::conditional_t<kIsInt8<T>, float, T>;
    project<Hidden>(router.hidden, router.d_hidden, size, kIsInt8<T> ? step.normed : step.normed_cast, step.num_tokens,
                    step.router_hidden, router.d_hidden, model.num_threads);
#pragma omp barrier
    size = router.d_hidden;
#pragma omp for schedule(static)
    for (int token = 0; token < step.num_tokens; ++token)
      for_lanes(size, [&](int64_t i, int count) {
        float* hidden = step.router_hidden + token * size + i;
        store_up_to(hidden, silu(load_up_to(hidden, count)), count);
      });
    x = step.router_hidden;
  }
  project<float>(router.proj, router.num_experts, size, x, step.num_tokens, step.router_probs, router.num_experts,
                 model.num_threads);
#pragma omp barrier
}

inline const Rule& rule_of(const Step& step, int layer, int token, int part) {
  return step.rules[(int64_t(layer) * step.num_rules + step.rule_idxs[step.sequence_of[token]]) * 2 + part];
}

// For threshold_top_k over the step: the mean of the counts above the threshold, of each rule. One thread.
inline void average_counts(const RouterWeights& router, const Step& step, int layer, int part) {
  for (int rule = 0; rule < step.num_rules; ++rule) {
    int64_t total = 0, tokens = 0;
    for (int t = 0; t < step.num_tokens; ++t) {
      if (step.rule_idxs[step.sequence_of[t]] != rule) continue;
      total += count_above(step.router_probs + int64_t(t) * router.num_experts, router.num_experts,
                           rule_of(step, layer, t, part).value);
      ++tokens;
    }
    step.rule_top_k[rule] = tokens ? int(std::nearbyint(double(total) / double(tokens))) : 0;
  }
}

// Selects experts for every token; take(token, ids, gates, count) gets them. Ends with a barrier.
template <typename Take>
inline void select_all(const Model& model, const RouterWeights& router, const Step& step, int layer, int part,
                       Take take) {
  const int num_experts = router.num_experts;
#pragma omp for schedule(static)
  for (int t = 0; t < step.num_tokens; ++t) softmax(step.router_probs + int64_t(t) * num_experts, num_experts);
  if (model.mean_over_step) {
#pragma omp single
    average_counts(router, step, layer, part);
  }
#pragma omp for schedule(static)
  for (int t = 0; t < step.num_tokens; ++t) {
    thread_local std::vector<int32_t> ids;
    thread_local std::vector<float> gates;
    ids.resize(num_experts);
    gates.resize(num_experts);
    const float* probs = step.router_probs + int64_t(t) * num_experts;
    const Rule& rule = rule_of(step, layer, t, part);
    int top_k = 0;
    if (rule.mode == kThresholdTopK) {
      const int wanted = model.mean_over_step ? step.rule_top_k[step.rule_idxs[step.sequence_of[t]]]
                                              : count_above(probs, num_experts, rule.value);
      top_k = std::clamp(wanted, 1, num_experts);
    }
    take(t, ids.data(), gates.data(), select_experts(probs, router, rule, top_k, ids.data(), gates.data()));
  }
}

template <typename T>
inline void project_heads(const Model& model, const LayerWeights& layer, const Step& step) {
  const int width = model.num_heads * model.head_dim, kv_width = model.num_kv_heads * model.head_dim;
  const int64_t d_model = model.d_model;
  project<T>(layer.wq, width, d_model, step.normed_cast, step.num_tokens, step.q, width, model.num_threads);
  project<T>(layer.wk, kv_width, d_model, step.normed_cast, step.num_tokens, step.kv, 2 * kv_width,
             model.num_threads);
  project<T>(layer.wv, kv_width, d_model, step.normed_cast, step.num_tokens, step.kv + kv_width, 2 * kv_width,
             model.num_threads);
#pragma omp barrier
}

template <>
inline void project_heads<Int8>(const Model& model, const LayerWeights& layer, const Step& step) {
  const int width = model.num_heads * model.head_dim, kv_width = model.num_kv_heads * model.head_dim;
  const RoundedRows x = rounded_rows(step);
  auto project = [&](const void* values, const float* scales, int outputs, float* out, int out_stride) {
    project_int8(int8_matrix(values, scales), outputs, model.d_model, x, step.num_tokens, out, out_stride);
  };
  project(layer.wq, layer.wq_scales, width, step.q, width);
  project(layer.wk, layer.wk_scales, kv_width, step.kv, 2 * kv_width);
  project(layer.wv, layer.wv_scales, kv_width, step.kv + kv_width, 2 * kv_width);
#pragma omp barrier
}

template <typename T>
inline void attend_all(const Model& model, const LayerWeights& layer, const Step& step, int num_tiles) {
#pragma omp for schedule(static)
  for (int token = 0; token < step.num_tokens; ++token) place_token<typename TypesOf<T>::Cache>(model, layer, step, token);
#pragma omp for schedule(dynamic, 1)
  for (int work = 0; work < num_tiles * model.num_kv_heads; ++work) {
    const int32_t* tile = step.tiles + 2 * (work / model.num_kv_heads);
    attend_tile<typename TypesOf<T>::Cache, typename TypesOf<T>::Attended>(model, layer, step, tile[0], tile[1], work % model.num_kv_heads);
  }
}

// x += attended @ wo
template <typename T>
inline void project_out(const Model& model, const LayerWeights& layer, const Step& step) {
  const int64_t d_model = model.d_model, size = int64_t(model.num_heads) * model.head_dim;
  const DownGroup<T> group{static_cast<const T*>(layer.wo), static_cast<const T*>(step.attended), step.num_tokens, 0};
  project_down<T>(
      1, step.num_tokens, size, d_model, model.num_threads, step.partial, [&](int) { return group; },
      [&](int, int token) { return step.x + token * d_model; }, [](int64_t, int64_t) {});
}

template <>
inline void project_out<Int8>(const Model& model, const LayerWeights& layer, const Step& step) {
  const int64_t d_model = model.d_model, size = int64_t(model.num_heads) * model.head_dim;
  const float* attended = static_cast<const float*>(step.attended);
  const RoundedRows rounded = rounded_rows(step);
#pragma omp for schedule(static)
  for (int token = 0; token < step.num_tokens; ++token)
    round_row(attended + token * size, size, rounded.row(token, count_input_blocks(size)));
  add_int8(int8_matrix(layer.wo, layer.wo_scales), d_model, size, rounded, step.num_tokens, step.x);
#pragma omp barrier
}

// Asks for the first weights of the heads' queries.
template <typename T>
inline void fetch_queries_early(const Model& model, const LayerWeights& layer, const Step& step) {
  const int width = model.num_heads * model.head_dim;
  const int chunk = rows_per_chunk<T>(width, model.d_model, model.num_threads);
  fetch_early(layer.wq, (width + chunk - 1) / chunk, chunk * model.d_model * int64_t(sizeof(T)), step.num_tokens);
}

template <>
inline void fetch_queries_early<Int8>(const Model& model, const LayerWeights& layer, const Step& step) {
  fetch_int8_early(layer.wq, model.num_heads * model.head_dim, model.d_model, step.num_tokens);
}

// Asks for the first weights of the projection of attention's outputs.
template <typename T>
inline void fetch_outputs_early(const Model& model, const LayerWeights& layer, const Step& step) {
  const int width = model.num_heads * model.head_dim;
  fetch_early(layer.wo, count_sum_blocks(width), kSumBlock * model.d_model * int64_t(sizeof(T)), step.num_tokens);
}

template <>
inline void fetch_outputs_early<Int8>(const Model& model, const LayerWeights& layer, const Step& step) {
  fetch_int8_early(layer.wo, model.d_model, model.num_heads * model.head_dim, step.num_tokens);
}

// One layer up to and with the choice of FFN experts.
template <typename T>
inline void run_trunk(const Model& model, const Step& step, int index, int num_tiles) {
  const LayerWeights& layer = model.layers[index];
  fetch_queries_early<T>(model, layer, step);
  norm_all<T>(model, step, layer.attention_norm, index > 0);
  const int attention_experts = layer.attention_router.num_experts;
  if (attention_experts) {
    const RoutingTimer timer(omp_get_thread_num() == 0 ? step.routing_s : nullptr);
    score_experts<T>(model, layer.attention_router, step);
    select_all(model, layer.attention_router, step, index, 0, [&](int t, const int32_t* ids, const float* gates, int n) {
      float* out = step.attention_gates + int64_t(t) * attention_experts;
      std::fill(out, out + attention_experts, 0.0f);
      for (int i = 0; i < n; ++i) out[ids[i]] = gates[i];
    });
  }
  project_heads<T>(model, layer, step);
  fetch_outputs_early<T>(model, layer, step);
  attend_all<T>(model, layer, step, num_tiles);
  project_out<T>(model, layer, step);
  const int num_experts = layer.ffn_router.num_experts;
  if (num_experts && !layer.ffn_router.hidden)
    fetch_early(layer.ffn_router.proj, num_experts / kMaxRows, kMaxRows * model.d_model * int64_t(sizeof(float)),
                step.num_tokens);
  norm_all<T>(model, step, layer.ffn_norm, false);
  if (!num_experts) return;
  const RoutingTimer timer(omp_get_thread_num() == 0 ? step.routing_s : nullptr);
  score_experts<T>(model, layer.ffn_router, step);
  select_all(model, layer.ffn_router, step, index, 1, [&](int t, const int32_t* ids, const float* gates, int n) {
    const int64_t offset = int64_t(t) * num_experts;
    std::copy(ids, ids + n, step.expert_ids + offset);
    std::copy(gates, gates + n, step.gates + offset);
    std::fill(step.expert_ids + offset + n, step.expert_ids + offset + num_experts, -1);
    std::fill(step.gates + offset + n, step.gates + offset + num_experts, 0.0f);
  });
}

}  // namespace dsmoe
