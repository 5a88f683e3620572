// From router probabilities to the experts of a token: the rules of model/router.py, one token at a time.
#pragma once

#include <omp.h>

#include <chrono>
#include <cmath>
#include <vector>

#include "model.h"
#include "vectors.h"

namespace dsmoe {

// Adds the seconds of its life to a total, if there is one. For one thread of a region.
class RoutingTimer {
 public:
  explicit RoutingTimer(double* total_s) : total_s_(total_s) {
    if (total_s_) start_ = Clock::now();
  }
  ~RoutingTimer() {
    if (total_s_) *total_s_ += std::chrono::duration<double>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* total_s_;
  Clock::time_point start_;
};

// Turns logits into probabilities in place.
inline void softmax(float* values, int size) {
  float largest = values[0];
  for (int i = 1; i < size; ++i) largest = values[i] > largest ? values[i] : largest;
  float total = 0.0f;
  for_lanes(size, [&](int64_t i, int count) {
    store_part(values + i, exp(load_up_to(values + i, count) - largest), count);
  });
  for (int i = 0; i < size; ++i) total += values[i];
  for (int i = 0; i < size; ++i) values[i] /= total;
}

inline int count_above(const float* probs, int num_experts, float threshold) {
  int count = 0;
  for (int e = 0; e < num_experts; ++e) count += probs[e] * float(num_experts) > threshold;
  return count;
}

// Marks experts in order of falling probability, ties to the lower id, until done(marked, sum before) says so.
template <typename Done>
inline void mark_most_likely(const float* probs, int num_experts, std::vector<char>& marked, Done done) {
  float before = 0.0f;
  for (int kept = 0; kept < num_experts && !done(kept, before); ++kept) {
    int best = -1;
    for (int e = 0; e < num_experts; ++e)
      if (!marked[e] && (best < 0 || probs[e] > probs[best])) best = e;
    marked[best] = 1;
    before += probs[best];
  }
}

// Writes the kept experts in ascending order with their gates; returns how many. `top_k` serves threshold_top_k.
inline int select_experts(const float* probs, const RouterWeights& router, const Rule& rule, int top_k, int32_t* ids,
                          float* gates) {
  const int num_experts = router.num_experts;
  thread_local std::vector<char> marked;
  marked.assign(num_experts, 0);
  const int limit = rule.mode == kTopK ? rule.top_k : top_k;
  switch (rule.mode) {
    case kDense:
      std::fill(marked.begin(), marked.end(), 1);
      break;
    case kThreshold:
      for (int e = 0; e < num_experts; ++e) marked[e] = probs[e] * float(num_experts) > rule.value;
      break;
    case kTopP:
      mark_most_likely(probs, num_experts, marked, [&](int, float before) { return !(before < rule.value); });
      break;
    default:
      mark_most_likely(probs, num_experts, marked, [&](int kept, float) { return kept >= limit; });
  }
  int count = 0;
  float total = 0.0f;
  for (int e = 0; e < num_experts; ++e) {
    if (!marked[e]) continue;
    ids[count] = e;
    gates[count++] = probs[e];
    total += probs[e];
  }
  // With every expert kept the gates are the probabilities, whose sum is one already.
  const float divisor = router.renormalize && count < num_experts ? std::max(total, 1.17549435e-38f) : 1.0f;
  for (int i = 0; i < count; ++i) gates[i] = gates[i] / divisor * router.gate_scale;
  return count;
}

}  // namespace dsmoe
