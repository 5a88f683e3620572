// Products with matrices whose rows are outputs: every output is a dot product of a weight row and an input row.
//
// Every output is one sum in one order, whatever the number of rows computed together: tiles only choose which outputs
// share a pass over the weights. So a row's result does not depend on its neighbours.
#pragma once

#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace dsmoe {

constexpr int kMaxRows = 8;     // most weight rows that share a pass over inputs
constexpr int kTokenTile = 6;   // tokens that share a pass over weights

// Up to so many tokens a step waits for memory, and pieces of work take equally long.
constexpr int kFewTokens = 8;

// Shares out the pieces of work [0, count) to all threads of a region, without a barrier at the end. For few tokens each
// thread gets neighbouring pieces, whose weights it has asked for ahead; for many, whoever is free takes the next.
template <typename Body>
inline void share_out(int64_t count, int num_tokens, Body body) {
  if (num_tokens <= kFewTokens) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

constexpr int64_t kEarlyBytes = 128 << 10;  // weights that a thread asks for before it needs them

// Asks for the first of this thread's weights of the next product, out of `count` equal pieces of `piece_bytes` that
// share_out gives to all threads: small work goes on meanwhile, and memory would idle. For few tokens only.
inline void fetch_early(const void* weights, int64_t count, int64_t piece_bytes, int num_tokens) {
  if (num_tokens > kFewTokens) return;
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  // As the static schedule of OpenMP deals: the first count % threads threads get one more.
  const int64_t first = count / threads * thread + std::min(count % threads, thread);
  const int64_t bytes = std::min(kEarlyBytes, (count - first) * piece_bytes);
  const char* from = static_cast<const char*>(weights) + first * piece_bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Calls body.template operator()<C>() with C = count, which is 1 to kTokenTile.
template <typename Body>
inline void with_token_count(int count, Body body) {
  switch (count) {
    case 1: body.template operator()<1>(); break;
    case 2: body.template operator()<2>(); break;
    case 3: body.template operator()<3>(); break;
    case 4: body.template operator()<4>(); break;
    case 5: body.template operator()<5>(); break;
    default: body.template operator()<kTokenTile>(); break;
  }
}

// out[r][c] = weights[r] . inputs[c], vectors of `size` numbers.
template <int R, int C>
inline void dot_tile(const float* const* weights, const float* const* inputs, int64_t size, int64_t ahead,
                     float (*out)[kTokenTile]) {
  Vec sums[R][C] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = keep(load(inputs[c] + i));
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weights[r] + i + ahead, 0, 2);
      Vec w = load(weights[r] + i);
      for (int c = 0; c < C; ++c) sums[r][c] += w * x[c];
    }
  }
  if (i < size) {
    for (int r = 0; r < R; ++r) {
      Vec w = load_part(weights[r] + i, int(size - i));
      for (int c = 0; c < C; ++c) sums[r][c] += w * load_part(inputs[c] + i, int(size - i));
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes(sums[r][c]);
}

#ifdef DSMOE_BF16_PAIRS

inline __m512bh load_pairs(const Bf16* source) { return (__m512bh)_mm512_loadu_si512(source); }

inline __m512bh load_pairs_part(const Bf16* source, int count) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, source);
}

template <int R, int C>
inline void dot_tile(const Bf16* const* weights, const Bf16* const* inputs, int64_t size, int64_t ahead,
                     float (*out)[kTokenTile]) {
  constexpr int kPairLanes = 2 * kLanes;
  __m512 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + kPairLanes <= size; i += kPairLanes) {
    __m512bh x[C];
    for (int c = 0; c < C; ++c) x[c] = load_pairs(inputs[c] + i);
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weights[r] + i + ahead, 0, 2);
      __m512bh w = load_pairs(weights[r] + i);
      for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w, x[c]);
    }
  }
  if (i < size) {
    for (int r = 0; r < R; ++r) {
      __m512bh w = load_pairs_part(weights[r] + i, int(size - i));
      for (int c = 0; c < C; ++c)
        sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w, load_pairs_part(inputs[c] + i, int(size - i)));
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes((Vec)sums[r][c]);
}

#else

template <int R, int C>
inline void dot_tile(const Bf16* const* weights, const Bf16* const* inputs, int64_t size, int64_t ahead,
                     float (*out)[kTokenTile]) {
  Vec sums[R][C] = {};
  for_lanes(size, [&](int64_t i, int count) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = load_up_to(inputs[c] + i, count);
    for (int r = 0; r < R; ++r) {
      Vec w = load_up_to(weights[r] + i, count);
      for (int c = 0; c < C; ++c) sums[r][c] += w * x[c];
    }
  });
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes(sums[r][c]);
}

#endif

// Weight rows in one pass: few inputs leave registers for more, and more rows are more reads under way at once.
inline int rows_per_pass(int num_inputs) { return num_inputs <= 2 ? kMaxRows : kMaxRows / 2; }

// Dot products of `num_rows` weight rows with `num_inputs` vectors; emit(row, input, value) takes each.
// row_pointer(row) and input_pointer(input) say where they lie. From the rows of one pass to those of the next it is
// `stride` numbers for each row.
template <typename T, typename RowPointer, typename InputPointer, typename Emit>
inline void dot_rows(int num_rows, int num_inputs, int64_t size, double stride, RowPointer row_pointer,
                     InputPointer input_pointer, Emit emit) {
  for (int c0 = 0; c0 < num_inputs; c0 += kTokenTile) {
    const int count = std::min(kTokenTile, num_inputs - c0), pass = rows_per_pass(count);
    const int64_t ahead = int64_t(pass * stride);
    const T* inputs[kTokenTile];
    for (int c = 0; c < count; ++c) inputs[c] = input_pointer(c0 + c);
    for (int r0 = 0; r0 < num_rows; r0 += pass) {
      const int rows = std::min(pass, num_rows - r0);
      const T* weights[kMaxRows];
      for (int r = 0; r < pass; ++r) weights[r] = row_pointer(r0 + std::min(r, rows - 1));
      float out[kMaxRows][kTokenTile];
      with_token_count(count, [&]<int C>() {
        constexpr int R = C <= 2 ? kMaxRows : kMaxRows / 2;
        dot_tile<R, C>(weights, inputs, size, ahead, out);
      });
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < count; ++c) emit(r0 + r, c0 + c, out[r][c]);
    }
  }
}

}  // namespace dsmoe
