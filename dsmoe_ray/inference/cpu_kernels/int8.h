// Products with matrices of int8 weights, which are packed for them when a model is loaded.
//
// A matrix of `outputs` x `inputs` lies as (groups of 16 outputs, blocks of 32 inputs, 16 pairs of inputs, 16 outputs, 2),
// padded with zeros, so that a piece of work reads one run of memory; every output has a scale. Inputs are rounded to 16
// bits, each block with a scale of its own. Within a block sums are integers, and so exact; blocks are added in order in
// float32: every output is one sum in one order, whatever is computed with it.
#pragma once

#include <algorithm>

#include "dot.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace dsmoe {

constexpr int kInputBlock = 32;  // inputs that share a scale
constexpr int kInt8Tile = 8;     // tokens that share a pass over weights
constexpr int kInt8Ahead = 4096;  // bytes of weights that are asked for before they are needed
constexpr int kBlockBytes = kInputBlock * kLanes;

struct Int8Matrix {
  const int8_t* values;
  const float* scales;  // of each output, padded to whole groups
};

inline int64_t count_groups(int64_t outputs) { return (outputs + kLanes - 1) / kLanes; }
inline int64_t count_input_blocks(int64_t inputs) { return (inputs + kInputBlock - 1) / kInputBlock; }

// The part of a matrix from one group of outputs on.
inline Int8Matrix from_group(Int8Matrix matrix, int64_t group, int64_t inputs) {
  return {matrix.values + group * count_input_blocks(inputs) * kBlockBytes, matrix.scales + group * kLanes};
}

inline void add_up_to(float* target, Vec values, int count) {
  store_up_to(target, load_up_to(target, count) + values, count);
}

// Inputs of products, rounded.
struct RoundedRows {
  int16_t* values;  // (rows, inputs padded to whole blocks)
  float* scales;    // (rows, blocks)

  RoundedRows row(int64_t index, int64_t num_blocks) const {
    return {values + index * num_blocks * kInputBlock, scales + index * num_blocks};
  }
};

// Rounds up to 32 numbers to 16 bits, the largest of them to 32767. One that is not finite makes all products with the
// block NaN, as it would unrounded.
inline void round_block(const float* x, int count, int16_t* values, float* scale) {
  const Vec low = load_up_to(x, std::min(count, kLanes));
  const Vec high = count > kLanes ? load_up_to(x + kLanes, count - kLanes) : Vec{};
  const float largest = max_lanes(max(max(low, -low), max(high, -high)));
  // So small that its inverse would overflow: nothing.
  const float factor = largest > 1e-30f ? 32767.0f / largest : 0.0f;
  *scale = largest / 32767.0f + sum_lanes((low - low) + (high - high));
  typedef int16_t Short __attribute__((vector_size(32)));
  for (int half = 0; half < 2; ++half) {
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const VecInt rounded = (VecInt)((half ? high : low) * factor + shift) - (VecInt)shift;
    const Short narrow = __builtin_convertvector(rounded, Short);
    std::memcpy(values + half * kLanes, &narrow, sizeof narrow);
  }
}

inline void round_row(const float* x, int64_t size, RoundedRows row) {
  for (int64_t i = 0; i < size; i += kInputBlock)
    round_block(x + i, int(std::min<int64_t>(kInputBlock, size - i)), row.values + i, row.scales + i / kInputBlock);
}

#ifdef __AVX512BW__

typedef __m512i Pairs;

inline Pairs load_pairs(const int8_t* source) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

// Adds the products of 16 pairs of weights with one pair of inputs.
inline VecInt add_pair(VecInt sum, Pairs weights, const int16_t* inputs) {
  int32_t pair;
  std::memcpy(&pair, inputs, sizeof pair);
#ifdef __AVX512VNNI__
  return (VecInt)_mm512_dpwssd_epi32((__m512i)sum, weights, _mm512_set1_epi32(pair));
#else
  return sum + (VecInt)_mm512_madd_epi16(weights, _mm512_set1_epi32(pair));
#endif
}

#elif defined(__AVX2__)

struct Pairs {
  __m256i low, high;
};

inline Pairs load_pairs(const int8_t* source) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(source);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(halves)), _mm256_cvtepi8_epi16(_mm_loadu_si128(halves + 1))};
}

inline VecInt add_pair(VecInt sum, Pairs weights, const int16_t* inputs) {
  int32_t pair;
  std::memcpy(&pair, inputs, sizeof pair);
  const __m256i both = _mm256_set1_epi32(pair);
  const __m256i products[2] = {_mm256_madd_epi16(weights.low, both), _mm256_madd_epi16(weights.high, both)};
  VecInt added;
  std::memcpy(&added, products, sizeof added);
  return sum + added;
}

#else

struct Pairs {
  VecInt first, second;
};

inline Pairs load_pairs(const int8_t* source) {
  typedef int8_t Bytes __attribute__((vector_size(32)));
  typedef int8_t HalfBytes __attribute__((vector_size(16)));
  Bytes bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  const HalfBytes even = __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const HalfBytes odd = __builtin_shufflevector(bytes, bytes, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {__builtin_convertvector(even, VecInt), __builtin_convertvector(odd, VecInt)};
}

inline VecInt add_pair(VecInt sum, Pairs weights, const int16_t* inputs) {
  return sum + weights.first * int32_t(inputs[0]) + weights.second * int32_t(inputs[1]);
}

#endif

// out[c] = 16 outputs for the c-th input row, without the outputs' scales.
template <int C>
inline void int8_tile(const int8_t* weights, int64_t num_blocks, const RoundedRows* inputs, Vec* out) {
  Vec totals[C] = {};
  for (int64_t b = 0; b < num_blocks; ++b) {
    VecInt sums[C] = {};
    for (int p = 0; p < kInputBlock / 2; ++p) {
      const int8_t* pairs = weights + b * kBlockBytes + p * 2 * kLanes;
      if (p % 2 == 0) __builtin_prefetch(pairs + kInt8Ahead, 0, 2);
      const Pairs w = load_pairs(pairs);
      for (int c = 0; c < C; ++c) sums[c] = add_pair(sums[c], w, inputs[c].values + b * kInputBlock + 2 * p);
    }
    for (int c = 0; c < C; ++c) totals[c] += __builtin_convertvector(sums[c], Vec) * inputs[c].scales[b];
  }
  for (int c = 0; c < C; ++c) out[c] = totals[c];
}

// Products of one group of 16 outputs with many input rows; emit(row, outputs) takes each.
template <typename Row, typename Emit>
inline void int8_group(Int8Matrix matrix, int64_t inputs, int num_rows, Row row, Emit emit) {
  const int64_t num_blocks = count_input_blocks(inputs);
  const Vec scales = load(matrix.scales);
  for (int c0 = 0; c0 < num_rows; c0 += kInt8Tile) {
    const int count = std::min(kInt8Tile, num_rows - c0);
    RoundedRows rows[kInt8Tile];
    for (int c = 0; c < count; ++c) rows[c] = row(c0 + c);
    Vec out[kInt8Tile];
    switch (count) {
      case 1: int8_tile<1>(matrix.values, num_blocks, rows, out); break;
      case 2: int8_tile<2>(matrix.values, num_blocks, rows, out); break;
      case 3: int8_tile<3>(matrix.values, num_blocks, rows, out); break;
      case 4: int8_tile<4>(matrix.values, num_blocks, rows, out); break;
      case 5: int8_tile<5>(matrix.values, num_blocks, rows, out); break;
      case 6: int8_tile<6>(matrix.values, num_blocks, rows, out); break;
      case 7: int8_tile<7>(matrix.values, num_blocks, rows, out); break;
      default: int8_tile<8>(matrix.values, num_blocks, rows, out);
    }
    for (int c = 0; c < count; ++c) emit(c0 + c, out[c] * scales);
  }
}

inline Int8Matrix int8_matrix(const void* values, const float* scales) {
  return {static_cast<const int8_t*>(values), scales};
}

// out[row][output] = matrix[output] . x[row]; no barrier at the end.
inline void project_int8(Int8Matrix matrix, int64_t outputs, int64_t inputs, RoundedRows x, int num_rows, float* out,
                         int64_t out_stride) {
  const int64_t num_blocks = count_input_blocks(inputs);
  share_out(count_groups(outputs), num_rows, [&](int64_t group) {
    const int count = int(std::min<int64_t>(kLanes, outputs - group * kLanes));
    int8_group(
        from_group(matrix, group, inputs), inputs, num_rows, [&](int row) { return x.row(row, num_blocks); },
        [&](int row, Vec values) { store_up_to(out + row * out_stride + group * kLanes, values, count); });
  });
}

// The same, added to what is there; rows of `out` are as long as the matrix has outputs.
inline void add_int8(Int8Matrix matrix, int64_t outputs, int64_t inputs, RoundedRows x, int num_rows, float* out) {
  const int64_t num_blocks = count_input_blocks(inputs);
  share_out(count_groups(outputs), num_rows, [&](int64_t group) {
    const int count = int(std::min<int64_t>(kLanes, outputs - group * kLanes));
    int8_group(
        from_group(matrix, group, inputs), inputs, num_rows, [&](int row) { return x.row(row, num_blocks); },
        [&](int row, Vec values) { add_up_to(out + row * outputs + group * kLanes, values, count); });
  });
}

inline void fetch_int8_early(const void* values, int64_t outputs, int64_t inputs, int num_rows) {
  fetch_early(values, count_groups(outputs), count_input_blocks(inputs) * kBlockBytes, num_rows);
}

}  // namespace dsmoe
