// Attention of query heads over the paged cache, and writing to it.
//
// Positions are taken in order, block by block, so a query's result does not depend on which other queries are computed
// with it, nor on how its sequence was cut into steps.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"
#include "vectors.h"

namespace dsmoe {

constexpr int kQueryTile = 4;  // queries that share a pass over keys and values
constexpr int kDimTile = 4;    // vectors of a head's channels held at once

inline int padded_head_dim(const Model& model) { return (model.head_dim + kLanes - 1) / kLanes * kLanes; }

inline int64_t cache_offset(const Model& model, int64_t block, int kv_head) {
  return (block * model.num_kv_heads + kv_head) * int64_t(kBlockSize) * padded_head_dim(model);
}

inline int queries_per_kv_head(const Model& model) { return model.num_heads / model.num_kv_heads; }

// Which query head is the i-th of those that read a key/value head.
inline int query_head(const Model& model, int kv_head, int i) {
  return model.heads_interleaved ? i * model.num_kv_heads + kv_head : kv_head * queries_per_kv_head(model) + i;
}

// Tokens that are attended together for one key/value head.
inline int tokens_per_tile(const Model& model) { return std::max(1, 2 * kQueryTile / queries_per_kv_head(model)); }

inline void rotate(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float real = head[i], imaginary = head[half + i];
    head[i] = real * cos[i] - imaginary * sin[i];
    head[half + i] = imaginary * cos[i] + real * sin[i];
  }
}

inline void put(float* target, float value) { *target = value; }
inline void put(Bf16* target, float value) { store_part(target, splat(value), 1); }

// Rotates one token's queries and keys; stores its keys and values in the cache.
template <typename Cache>
inline void place_token(const Model& model, const LayerWeights& layer, const Step& step, int token) {
  const int sequence = step.sequence_of[token];
  const int position = step.first_positions[sequence] + token - step.query_starts[sequence];
  const int d = model.head_dim, half = d / 2, padded = padded_head_dim(model);
  const float *cos = model.cos + int64_t(position) * half, *sin = model.sin + int64_t(position) * half;
  float* q = step.q + int64_t(token) * model.num_heads * d;
  const float scale = 1.0f / std::sqrt(float(d));
  for (int h = 0; h < model.num_heads; ++h) rotate(q + h * d, cos, sin, half);
  for (int i = 0; i < model.num_heads * d; ++i) q[i] *= scale;
  float* k = step.kv + int64_t(token) * 2 * model.num_kv_heads * d;
  const float* v = k + model.num_kv_heads * d;
  const int64_t block = step.block_tables[int64_t(sequence) * step.max_blocks + position / kBlockSize];
  const int slot = position % kBlockSize;
  for (int g = 0; g < model.num_kv_heads; ++g) {
    rotate(k + g * d, cos, sin, half);
    Cache* k_cache = static_cast<Cache*>(layer.k_cache) + cache_offset(model, block, g);
    Cache* v_cache = static_cast<Cache*>(layer.v_cache) + cache_offset(model, block, g) + slot * padded;
    for (int i = 0; i < d; ++i) put(k_cache + i * kBlockSize + slot, k[g * d + i]);
    for_lanes(d, [&](int64_t i, int count) { store_part(v_cache + i, load_up_to(v + g * d + i, count), count); });
  }
}

// One query head at one position.
struct Query {
  const float* q;
  int64_t length;  // positions it attends to
  int token;
  int head;
  float gate;
};

// Scores of up to kQueryTile queries against one block of keys; `next` is the block that is read after this one.
template <typename T>
inline void score_block(const T* keys, const T* next, int head_dim, const Query* queries, int count, float* scores,
                        int64_t stride) {
  Vec sums[kQueryTile] = {};
  const float* q[kQueryTile];
  for (int i = 0; i < kQueryTile; ++i) q[i] = queries[std::min(i, count - 1)].q;
  for (int c = 0; c < head_dim; ++c) {
    __builtin_prefetch(next + c * kBlockSize);
    const Vec key = keep(load(keys + c * kBlockSize));
    for (int i = 0; i < kQueryTile; ++i) sums[i] += key * splat(q[i][c]);
  }
  for (int i = 0; i < count; ++i) store(scores + i * stride, sums[i]);
}

// Turns one query's scores into unnormalised probabilities, zero beyond its length; returns their sum.
inline float exponentiate(float* scores, int64_t length, int64_t padded_length) {
  const int64_t blocks = (length + kBlockSize - 1) / kBlockSize;
  for (int64_t i = length; i < blocks * kBlockSize; ++i) scores[i] = -INFINITY;
  Vec largest = splat(-INFINITY);
  for (int64_t b = 0; b < blocks; ++b) largest = max(largest, load(scores + b * kBlockSize));
  const float top = max_lanes(largest);
  for (int64_t b = 0; b < blocks; ++b)
    store(scores + b * kBlockSize, exp(load(scores + b * kBlockSize) - top));
  for (int64_t i = length; i < padded_length; ++i) scores[i] = 0.0f;
  Vec total = {};
  for (int64_t b = 0; b < blocks; ++b) total += load(scores + b * kBlockSize);
  return sum_lanes(total);
}

// Sums of values, weighted by the probabilities of their positions, for `dims` vectors of channels from `first` on.
// block_of(b) points to the values of the sequence's b-th block.
template <int Dims, typename T, typename BlockOf>
inline void weigh_values(BlockOf block_of, int64_t num_positions, int padded, int first, const float* probs,
                         int64_t stride, Vec (*out)[kDimTile]) {
  Vec sums[kQueryTile][Dims] = {};
  const int64_t blocks = (num_positions + kBlockSize - 1) / kBlockSize;
  for (int64_t b = 0; b < blocks; ++b) {
    const T* values = block_of(b) + first;
    const T* next = block_of(std::min(b + 1, blocks - 1)) + first;
    const int positions = int(std::min<int64_t>(kBlockSize, num_positions - b * kBlockSize));
    for (int p = 0; p < positions; ++p, ++probs) {
      for (int j = 0; j < Dims * kLanes; j += 64 / int(sizeof(T))) __builtin_prefetch(next + p * padded + j);
      Vec v[Dims];
      for (int j = 0; j < Dims; ++j) v[j] = keep(load(values + p * padded + j * kLanes));
      for (int i = 0; i < kQueryTile; ++i) {
        const Vec prob = keep(splat(probs[i * stride]));
        for (int j = 0; j < Dims; ++j) sums[i][j] += v[j] * prob;
      }
    }
  }
  for (int i = 0; i < kQueryTile; ++i)
    for (int j = 0; j < Dims; ++j) out[i][j] = sums[i][j];
}

// Attends for up to kQueryTile queries of one sequence and key/value head.
template <typename Cache, typename Out>
inline void attend_queries(const Model& model, const LayerWeights& layer, const Step& step, int sequence, int kv_head,
                           const Query* queries, int count, std::vector<float>& scores) {
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) longest = std::max(longest, queries[i].length);
  const int64_t blocks = (longest + kBlockSize - 1) / kBlockSize, stride = blocks * kBlockSize;
  scores.resize(size_t(stride) * kQueryTile);
  // Unused queries of the tile read zeros.
  std::fill(scores.begin() + count * stride, scores.end(), 0.0f);
  const int32_t* table = step.block_tables + int64_t(sequence) * step.max_blocks;
  auto block_of = [&](const void* cache, int64_t b) {
    return static_cast<const Cache*>(cache) + cache_offset(model, table[b], kv_head);
  };
  auto value_block = [&](int64_t b) { return block_of(layer.v_cache, b); };
  for (int64_t b = 0; b < blocks; ++b) {
    const Cache* next = b + 1 < blocks ? block_of(layer.k_cache, b + 1) : value_block(0);
    score_block(block_of(layer.k_cache, b), next, model.head_dim, queries, count, scores.data() + b * kBlockSize,
                stride);
  }
  float totals[kQueryTile];
  for (int i = 0; i < count; ++i) totals[i] = exponentiate(scores.data() + i * stride, queries[i].length, stride);
  const int padded = padded_head_dim(model);
  for (int first = 0; first < padded; first += kDimTile * kLanes) {
    Vec sums[kQueryTile][kDimTile];
    const int dims = std::min(kDimTile, (padded - first) / kLanes);
    switch (dims) {
      case 1: weigh_values<1, Cache>(value_block, longest, padded, first, scores.data(), stride, sums); break;
      case 2: weigh_values<2, Cache>(value_block, longest, padded, first, scores.data(), stride, sums); break;
      case 3: weigh_values<3, Cache>(value_block, longest, padded, first, scores.data(), stride, sums); break;
      default: weigh_values<kDimTile, Cache>(value_block, longest, padded, first, scores.data(), stride, sums);
    }
    for (int i = 0; i < count; ++i) {
      const Query& query = queries[i];
      Out* out = static_cast<Out*>(step.attended) + (int64_t(query.token) * model.num_heads + query.head) * model.head_dim;
      for (int j = 0; j < dims; ++j) {
        const int offset = first + j * kLanes, left = std::min(kLanes, model.head_dim - offset);
        if (left > 0) store_up_to(out + offset, sums[i][j] * (query.gate / totals[i]), left);
      }
    }
  }
}

// Attends for all queries of one tile of tokens that read one key/value head. A head with a zero gate is not computed.
template <typename Cache, typename Out>
inline void attend_tile(const Model& model, const LayerWeights& layer, const Step& step, int sequence, int first_token,
                        int kv_head) {
  thread_local std::vector<float> scores;
  const int last = std::min(first_token + tokens_per_tile(model), step.query_starts[sequence + 1]);
  const int experts = layer.attention_router.num_experts, d = model.head_dim;
  Query queries[kQueryTile];
  int count = 0;
  for (int token = first_token; token < last; ++token) {
    const int64_t position = step.first_positions[sequence] + token - step.query_starts[sequence];
    for (int i = 0; i < queries_per_kv_head(model); ++i) {
      const int head = query_head(model, kv_head, i);
      const float gate = experts ? step.attention_gates[int64_t(token) * experts + i] : 1.0f;
      const int64_t offset = (int64_t(token) * model.num_heads + head) * d;
      if (gate == 0.0f) {
        std::memset(static_cast<Out*>(step.attended) + offset, 0, sizeof(Out) * d);
        continue;
      }
      queries[count++] = Query{step.q + offset, position + 1, token, head, gate};
      if (count == kQueryTile) {
        attend_queries<Cache, Out>(model, layer, step, sequence, kv_head, queries, count, scores);
        count = 0;
      }
    }
  }
  if (count) attend_queries<Cache, Out>(model, layer, step, sequence, kv_head, queries, count, scores);
}

}  // namespace dsmoe
