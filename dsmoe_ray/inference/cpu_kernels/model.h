// What Python hands over: weights, one step's tokens, and memory to work in. cpu_library.py has the same structures.
//
// T tokens of the step, B sequences, D model width, E experts, F width of one expert, G key/value heads.
#pragma once

#include <cstdint>

namespace dsmoe {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
enum Activation : int32_t { kGelu = 0, kSwiglu = 1 };
enum RuleMode : int32_t { kDense = 0, kTopK = 1, kThreshold = 2, kThresholdTopK = 3, kTopP = 4 };

constexpr int kBlockSize = 16;  // positions of a block of the key/value cache: one vector

struct Rule {
  int32_t mode;
  int32_t top_k;
  float value;  // threshold or probability
};

struct RouterWeights {
  const void* hidden;  // (d_hidden, D) or null
  const float* proj;   // (E, d_hidden or D)
  int32_t d_hidden;
  int32_t num_experts;  // 0 where there is no router
  float gate_scale;
  int32_t renormalize;
};

struct LayerWeights {
  const float* attention_norm;
  const float* ffn_norm;
  const void* wq;  // (heads * head_dim, D)
  const void* wk;  // (G * head_dim, D)
  const void* wv;
  const void* wo;  // (heads * head_dim, D): input-major
  const float* wq_scales;  // of each output of a matrix of int8, whose layout int8.h tells; else null
  const float* wk_scales;
  const float* wv_scales;
  const float* wo_scales;
  RouterWeights attention_router;
  RouterWeights ffn_router;
  void* k_cache;  // (blocks, G, head_dim padded, 16): one vector holds one channel of a block's positions
  void* v_cache;  // (blocks, G, 16, head_dim padded)
};

struct Model {
  int32_t dtype;
  int32_t d_model;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t heads_interleaved;  // mixture of attention: head h reads key/value head h % G, not h / (heads / G)
  int32_t vocab_size;
  int32_t num_threads;
  int32_t mean_over_step;  // threshold_top_k takes its mean over the step's tokens under a rule, not over the token
  float norm_eps;
  const float* cos;  // (positions, head_dim / 2)
  const float* sin;
  const LayerWeights* layers;
  const void* embedding;  // (vocabulary, D)
  const void* head;
  const float* head_scales;
  const float* norm;
};

struct Step {
  int32_t num_tokens;
  int32_t num_sequences;
  int32_t max_blocks;
  int32_t num_rules;
  const int32_t* tokens;           // (T,)
  const int32_t* query_starts;     // (B + 1,)
  const int32_t* first_positions;  // (B,)
  const int32_t* block_tables;     // (B, max_blocks)
  const int32_t* rule_idxs;        // (B,)
  const Rule* rules;               // (layers, rules, 2): attention, then FFN
  const float* y;                  // (T, D) what the experts of the layer before gave
  float* x;                        // (T, D) residual stream
  float* normed;                   // (T, D)
  void* normed_cast;               // (T, D) in the weights' type; unused where they are int8
  float* q;                        // (T, heads * head_dim)
  float* kv;                       // (T, 2 * G * head_dim)
  void* attended;                  // (T, heads * head_dim) in the weights' type; float32 where they are int8
  int16_t* rounded;                // (T, D or heads * head_dim) what matrices of int8 are multiplied with
  float* rounded_scales;           // (T, blocks)
  float* router_hidden;            // (T, widest router)
  float* router_probs;             // (T, most experts)
  float* attention_gates;          // (T, attention experts)
  int32_t* expert_ids;             // (T, E) ascending, then -1
  float* gates;                    // (T, E), then 0
  int32_t* sequence_of;            // (T,)
  int32_t* tiles;                  // (T, 2): sequence and first row of each attention tile
  int32_t* rule_top_k;             // (rules,)
  float* partial;                  // (streamed tokens, blocks of summed rows, D)
  double* routing_s;               // grows by the seconds that routing takes, unless null
};

struct ExpertWeights {
  int32_t dtype;
  int32_t d_model;
  int32_t d_ff;
  int32_t num_experts;
  int32_t activation;
  int32_t num_threads;
  const void* w1;  // (E, F, D) each
  const void* w2;
  const void* w3;
  const float* w1_scales;  // (E, F) and so on, of each output of a matrix of int8
  const float* w2_scales;
  const float* w3_scales;
};

struct ExpertCall {
  int32_t num_tokens;
  int32_t stride;              // entries per token in ids and gates
  int32_t by_pair;             // each (token, expert) pair has a row of y of its own, instead of a sum per token
  const int32_t* expert_ids;   // (T, stride) ascending, then -1
  const float* gates;          // (T, stride)
  const void* x;               // (T, D) in the weights' type; float32 where they are int8
  float* y;                    // (T, D); by pair (pairs, D), token after token
  void* hidden;                // (pairs, F) in the weights' type; int16 where they are int8
  float* hidden_scales;        // (pairs, blocks)
  int16_t* rounded;            // (T, D) x for matrices of int8
  float* rounded_scales;       // (T, blocks)
  int32_t* expert_starts;      // (E + 1,)
  int32_t* pair_tokens;        // (pairs,)
  int32_t* pair_rows;          // (pairs,) which row of y a pair is added to
  float* pair_gates;           // (pairs,)
  int32_t* active_experts;     // (E,)
  int32_t* num_active;         // (1,)
  int32_t* partial_starts;     // (E,)
  float* partial;              // (streamed pairs, blocks of summed rows, D)
  double* routing_s;           // grows by the seconds that grouping tokens takes, unless null
};

// Where a piece of a call lies in the memory of its cut, in bytes.
struct PiecePlace {
  int32_t num_rows;   // tokens
  int32_t num_pairs;
  int32_t width;      // most experts of a token
  int32_t unused;
  int64_t rows;       // (num_rows,) int32: which tokens
  int64_t ids;        // (num_rows, width) int32
  int64_t gates;      // (num_rows, width)
  int64_t x;          // (num_rows, row_bytes); -1 if it has all tokens, in order
};

// Tokens whose experts are elsewhere.
struct PieceCut {
  int32_t num_tokens;
  int32_t stride;             // entries per token in ids and gates
  int32_t row_bytes;          // of a token
  int32_t first_piece;        // the pieces that are wanted
  int32_t num_pieces;
  const int32_t* expert_ids;  // (T, stride) ascending, then -1
  const float* gates;         // (T, stride)
  const void* x;              // (T, row_bytes)
  const int32_t* piece_of;    // (E,)
  PiecePlace* pieces;         // (num_pieces,)
  void* memory;
};

}  // namespace dsmoe
