// Matrix products of few or many rows with stored weights.
//
// Every output is one sum in one order, whatever the number of rows computed together: tiles only choose which outputs
// share a pass over the weights. So a row's result does not depend on its neighbours.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace dsmoe {

constexpr int kRowTile = 4;     // weight rows that share a pass over inputs
constexpr int kTokenTile = 6;   // tokens that share a pass over weights
constexpr int kMaxColumnTile = 256;  // most columns of a down projection in one pass

// out[r][c] = weights[r] . inputs[c], vectors of `size` numbers.
template <int C>
inline void dot_tile(const float* const* weights, const float* const* inputs, int64_t size, int64_t ahead,
                     float (*out)[kTokenTile]) {
  Vec sums[kRowTile][C] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = keep(load(inputs[c] + i));
    for (int r = 0; r < kRowTile; ++r) {
      __builtin_prefetch(weights[r] + i + ahead, 0, 2);
      Vec w = load(weights[r] + i);
      for (int c = 0; c < C; ++c) sums[r][c] += w * x[c];
    }
  }
  if (i < size) {
    for (int r = 0; r < kRowTile; ++r) {
      Vec w = load_part(weights[r] + i, int(size - i));
      for (int c = 0; c < C; ++c) sums[r][c] += w * load_part(inputs[c] + i, int(size - i));
    }
  }
  for (int r = 0; r < kRowTile; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes(sums[r][c]);
}

#ifdef DSMOE_BF16_PAIRS

inline __m512bh load_pairs(const Bf16* source) { return (__m512bh)_mm512_loadu_si512(source); }

inline __m512bh load_pairs_part(const Bf16* source, int count) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, source);
}

template <int C>
inline void dot_tile(const Bf16* const* weights, const Bf16* const* inputs, int64_t size, int64_t ahead,
                     float (*out)[kTokenTile]) {
  constexpr int kPairLanes = 2 * kLanes;
  __m512 sums[kRowTile][C];
  for (int r = 0; r < kRowTile; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + kPairLanes <= size; i += kPairLanes) {
    __m512bh x[C];
    for (int c = 0; c < C; ++c) x[c] = load_pairs(inputs[c] + i);
    for (int r = 0; r < kRowTile; ++r) {
      __builtin_prefetch(weights[r] + i + ahead, 0, 2);
      __m512bh w = load_pairs(weights[r] + i);
      for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w, x[c]);
    }
  }
  if (i < size) {
    for (int r = 0; r < kRowTile; ++r) {
      __m512bh w = load_pairs_part(weights[r] + i, int(size - i));
      for (int c = 0; c < C; ++c)
        sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w, load_pairs_part(inputs[c] + i, int(size - i)));
    }
  }
  for (int r = 0; r < kRowTile; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes((Vec)sums[r][c]);
}

#else

template <int C>
inline void dot_tile(const Bf16* const* weights, const Bf16* const* inputs, int64_t size, int64_t ahead,
                     float (*out)[kTokenTile]) {
  Vec sums[kRowTile][C] = {};
  for_lanes(size, [&](int64_t i, int count) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = load_up_to(inputs[c] + i, count);
    for (int r = 0; r < kRowTile; ++r) {
      Vec w = load_up_to(weights[r] + i, count);
      for (int c = 0; c < C; ++c) sums[r][c] += w * x[c];
    }
  });
  for (int r = 0; r < kRowTile; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes(sums[r][c]);
}

#endif

// Fetches rows of weights before a pass over them gets there; after its last row comes the first of the next pass.
template <typename T, int V>
class RowsAhead {
 public:
  RowsAhead(const T* rows, int64_t size, const T* next, int64_t stride)
      : rows_(rows), next_(next), size_(size), stride_(stride) {}

  void fetch_after(int64_t row) const {
    constexpr int64_t kAhead = 8192 / int64_t(sizeof(T) * V * kLanes);
    const int64_t wanted = row + kAhead;
    const T* from = wanted < size_ ? rows_ + wanted * stride_ : next_ + (wanted - size_) * stride_;
    for (int64_t i = 0; i < V * kLanes; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, 3);
  }

 private:
  const T* rows_;
  const T* next_;
  int64_t size_, stride_;
};

// out[c][0..16 V) = sum over f of hidden[c][f] * weights[f][0..16 V); rows of weights lie `stride` apart.
template <int C, int V>
inline void axpy_tile(const float* weights, int64_t stride, const float* const* hidden, int64_t size,
                      const float* next, float* const* out) {
  const RowsAhead<float, V> ahead(weights, size, next, stride);
  Vec sums[C][V] = {};
  for (int64_t f = 0; f < size; ++f) {
    const float* row = weights + f * stride;
    ahead.fetch_after(f);
    Vec h[C];
    for (int c = 0; c < C; ++c) h[c] = keep(splat(hidden[c][f]));
    for (int v = 0; v < V; ++v) {
      Vec w = keep(load(row + v * kLanes));
      for (int c = 0; c < C; ++c) sums[c][v] += h[c] * w;
    }
  }
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) store(out[c] + v * kLanes, sums[c][v]);
}

#ifdef DSMOE_BF16_PAIRS

template <int C, int V>
inline void axpy_tile(const Bf16* weights, int64_t stride, const Bf16* const* hidden, int64_t size, const Bf16* next,
                      float* const* out) {
  constexpr int kPairs = V / 2;
  // Two rows are interleaved within 128-bit groups: sums hold columns 0-3, 8-11, ... and 4-7, 12-15, ...
  const RowsAhead<Bf16, V> ahead(weights, size, next, stride);
  __m512 low[C][kPairs], high[C][kPairs];
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < kPairs; ++v) low[c][v] = high[c][v] = _mm512_setzero_ps();
  for (int64_t f = 0; f < size; f += 2) {
    const bool has_second = f + 1 < size;
    const Bf16* row = weights + f * stride;
    const Bf16* second = has_second ? row + stride : row;
    ahead.fetch_after(f);
    ahead.fetch_after(f + 1);
    __m512bh h[C];
    for (int c = 0; c < C; ++c) {
      uint32_t pair = hidden[c][f].bits;
      if (has_second) pair |= uint32_t(hidden[c][f + 1].bits) << 16;
      h[c] = (__m512bh)_mm512_set1_epi32(int32_t(pair));
    }
    for (int v = 0; v < kPairs; ++v) {
      __m512i a = _mm512_loadu_si512(row + v * 2 * kLanes);
      __m512i b = has_second ? _mm512_loadu_si512(second + v * 2 * kLanes) : _mm512_setzero_si512();
      __m512bh w_low = (__m512bh)_mm512_unpacklo_epi16(a, b);
      __m512bh w_high = (__m512bh)_mm512_unpackhi_epi16(a, b);
      for (int c = 0; c < C; ++c) {
        low[c][v] = _mm512_dpbf16_ps(low[c][v], w_low, h[c]);
        high[c][v] = _mm512_dpbf16_ps(high[c][v], w_high, h[c]);
      }
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < kPairs; ++v) {
      _mm512_storeu_ps(out[c] + v * 2 * kLanes, _mm512_permutex2var_ps(low[c][v], first, high[c][v]));
      _mm512_storeu_ps(out[c] + v * 2 * kLanes + kLanes, _mm512_permutex2var_ps(low[c][v], last, high[c][v]));
    }
}

#else

template <int C, int V>
inline void axpy_tile(const Bf16* weights, int64_t stride, const Bf16* const* hidden, int64_t size, const Bf16* next,
                      float* const* out) {
  const RowsAhead<Bf16, V> ahead(weights, size, next, stride);
  Vec sums[C][V] = {};
  for (int64_t f = 0; f < size; ++f) {
    ahead.fetch_after(f);
    for (int v = 0; v < V; ++v) {
      Vec w = load(weights + f * stride + v * kLanes);
      for (int c = 0; c < C; ++c) sums[c][v] += splat(to_float(hidden[c][f])) * w;
    }
  }
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) store(out[c] + v * kLanes, sums[c][v]);
}

#endif

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

// Dot products of `num_rows` weight rows with `num_inputs` vectors; emit(row, input, value) takes each.
// row_pointer(row) and input_pointer(input) say where they lie.
template <typename T, typename RowPointer, typename InputPointer, typename Emit>
inline void dot_rows(int num_rows, int num_inputs, int64_t size, int64_t ahead, RowPointer row_pointer,
                     InputPointer input_pointer, Emit emit) {
  for (int c0 = 0; c0 < num_inputs; c0 += kTokenTile) {
    const int count = std::min(kTokenTile, num_inputs - c0);
    const T* inputs[kTokenTile];
    for (int c = 0; c < count; ++c) inputs[c] = input_pointer(c0 + c);
    for (int r0 = 0; r0 < num_rows; r0 += kRowTile) {
      const int rows = std::min(kRowTile, num_rows - r0);
      const T* weights[kRowTile];
      for (int r = 0; r < kRowTile; ++r) weights[r] = row_pointer(r0 + std::min(r, rows - 1));
      float out[kRowTile][kTokenTile];
      with_token_count(count, [&]<int C>() { dot_tile<C>(weights, inputs, size, ahead, out); });
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < count; ++c) emit(r0 + r, c0 + c, out[r][c]);
    }
  }
}

// Fewer than 64 columns at the right edge, from a padded copy: rows must not be read past their end.
template <typename T>
inline void axpy_edge(const T* weights, int64_t stride, const T* const* hidden, int64_t size, int count, int width,
                      float* const* out) {
  thread_local std::vector<T> copy;
  copy.assign(size_t(size) * 64, T{});
  for (int64_t f = 0; f < size; ++f) std::memcpy(copy.data() + f * 64, weights + f * stride, sizeof(T) * width);
  with_token_count(count, [&]<int C>() {
    axpy_tile<C, 4>(copy.data(), 64, hidden, size, copy.data(), out);
  });
}

// How many columns one pass over the rows takes: fewer tokens leave registers for more columns.
inline int column_tile(int num_tokens) { return num_tokens == 1 ? 256 : num_tokens == 2 ? 128 : 64; }

// Columns [begin, end) of hidden @ weights, for `num_inputs` rows of hidden. emit(input, column, values, count) takes
// them piece by piece. `next` says which weights the caller multiplies after these.
template <typename T, typename InputPointer, typename Emit>
inline void axpy_columns(const T* weights, int64_t num_columns, int64_t begin, int64_t end, int64_t size,
                         int num_inputs, const T* next, InputPointer input_pointer, Emit emit) {
  for (int c0 = 0; c0 < num_inputs; c0 += kTokenTile) {
    const int count = std::min(kTokenTile, num_inputs - c0);
    const T* inputs[kTokenTile];
    alignas(64) float values[kTokenTile * kMaxColumnTile];
    float* out[kTokenTile];
    for (int c = 0; c < count; ++c) inputs[c] = input_pointer(c0 + c), out[c] = values + c * column_tile(count);
    for (int64_t column = begin; column < end;) {
      const int64_t left = end - column;
      const int width = left >= column_tile(count) ? column_tile(count) : left >= 64 ? 64 : int(left);
      const bool is_last = column + width >= end;
      const T* first = is_last ? (c0 + count < num_inputs ? weights + begin : next) : weights + column + width;
      if (width < 64) {
        axpy_edge(weights + column, num_columns, inputs, size, count, width, out);
      } else if (width == 256) {
        axpy_tile<1, 16>(weights + column, num_columns, inputs, size, first, out);
      } else if (width == 128) {
        axpy_tile<2, 8>(weights + column, num_columns, inputs, size, first, out);
      } else {
        with_token_count(count, [&]<int C>() {
          axpy_tile<C, 4>(weights + column, num_columns, inputs, size, first, out);
        });
      }
      for (int c = 0; c < count; ++c) emit(c0 + c, column, out[c], width);
      column += width;
    }
  }
}

}  // namespace dsmoe
