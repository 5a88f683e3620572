// Products with matrices whose rows are inputs: out = sum over f of hidden[f] * weights[f].
//
// Rows are summed in blocks of kSumBlock, each from zero, and the blocks are added up in order: so threads can share out
// one long product, and still every output is one sum in one order. Two ways to compute a block give the same bits: for
// few inputs rows are streamed as they lie in memory, with the sums in the cache; for many, a tile of columns is held in
// registers over all rows of the block.
#pragma once

#include <algorithm>
#include <vector>

#include "dot.h"

namespace dsmoe {

constexpr int kSumBlock = 256;
constexpr int kStreamInputs = 6;   // most inputs for which rows are streamed
constexpr int kStreamTile = 4;     // inputs, and rows, in one pass over the sums; a single input takes twice the rows
constexpr int kStreamBytes = 2048; // of each row in one pass: rows and sums stay in the first cache
constexpr int kColumnTile = 64;
constexpr int kInputChunk = 48;    // inputs that go through the tiles of a block together
constexpr int kColumnStep = 32;    // streaming needs rows of a multiple of this

inline int count_sum_blocks(int64_t size) { return int((size + kSumBlock - 1) / kSumBlock); }

inline bool streams(int num_inputs, int64_t num_columns) {
  return num_inputs <= kStreamInputs && num_columns % kColumnStep == 0;
}

// Adds R rows, weighted by C inputs' hidden units, to their sums over `width` columns; Fetch also asks for the R rows
// after them.
template <int C, int R, bool Fetch, typename T>
inline void stream_rows(const T* rows, int64_t stride, int width, const T* const* hidden, float* const* out) {
  Vec h[C][R];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) h[c][r] = splat(to_float(hidden[c][r]));
  for (int j = 0; j < width; j += kLanes) {
    Vec w[R];
    for (int r = 0; r < R; ++r) {
      // Not into the first cache: rows of a power of two lie in the same places there and push each other out.
      if (Fetch) __builtin_prefetch(rows + (r + R) * stride + j, 0, 2);
      w[r] = keep(load(rows + r * stride + j));
    }
    for (int c = 0; c < C; ++c) {
      Vec sum = load(out[c] + j);
      for (int r = 0; r < R; ++r) sum += h[c][r] * w[r];
      store(out[c] + j, sum);
    }
  }
}

template <typename T>
inline void finish_stream(float*, int) {}

#ifdef DSMOE_BF16_PAIRS

inline __m512bh splat_pair(const Bf16* hidden, bool has_second) {
  uint32_t pair = hidden[0].bits;
  if (has_second) pair |= uint32_t(hidden[1].bits) << 16;
  return (__m512bh)_mm512_set1_epi32(int32_t(pair));
}

// Two rows interleaved within groups of 128 bits: `low` has columns 0-3, 8-11, ... and `high` 4-7, 12-15, ...
inline void interleave(const Bf16* first, const Bf16* second, __m512bh* low, __m512bh* high) {
  __m512i a = _mm512_loadu_si512(first);
  __m512i b = second ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
  *low = (__m512bh)_mm512_unpacklo_epi16(a, b);
  *high = (__m512bh)_mm512_unpackhi_epi16(a, b);
}

// Puts the sums of interleaved rows in the order of their columns.
inline void store_interleaved(float* out, __m512 low, __m512 high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, first, high));
  _mm512_storeu_ps(out + kLanes, _mm512_permutex2var_ps(low, last, high));
}

// As above, pair by pair. Until finish_stream the sums lie in the order of interleaved rows.
template <int C, int R, bool Fetch>
inline void stream_rows(const Bf16* rows, int64_t stride, int width, const Bf16* const* hidden, float* const* out) {
  constexpr int kPairs = (R + 1) / 2;
  __m512bh h[C][kPairs];
  for (int c = 0; c < C; ++c)
    for (int p = 0; p < kPairs; ++p) h[c][p] = splat_pair(hidden[c] + 2 * p, 2 * p + 1 < R);
  for (int j = 0; j < width; j += 2 * kLanes) {
    __m512bh low[kPairs], high[kPairs];
    for (int r = 0; r < R; ++r)
      if (Fetch) __builtin_prefetch(rows + (r + R) * stride + j, 0, 2);
    for (int p = 0; p < kPairs; ++p) {
      const Bf16* first = rows + 2 * p * stride + j;
      interleave(first, 2 * p + 1 < R ? first + stride : nullptr, &low[p], &high[p]);
    }
    for (int c = 0; c < C; ++c) {
      __m512 sum_low = _mm512_loadu_ps(out[c] + j), sum_high = _mm512_loadu_ps(out[c] + j + kLanes);
      for (int p = 0; p < kPairs; ++p) {
        sum_low = _mm512_dpbf16_ps(sum_low, low[p], h[c][p]);
        sum_high = _mm512_dpbf16_ps(sum_high, high[p], h[c][p]);
      }
      _mm512_storeu_ps(out[c] + j, sum_low);
      _mm512_storeu_ps(out[c] + j + kLanes, sum_high);
    }
  }
}

template <>
inline void finish_stream<Bf16>(float* out, int width) {
  for (int j = 0; j < width; j += 2 * kLanes)
    store_interleaved(out + j, _mm512_loadu_ps(out + j), _mm512_loadu_ps(out + j + kLanes));
}

#endif

// out[c][0..num_columns) = sum over the rows of a block.
template <typename T>
inline void stream_block(const T* weights, int64_t num_columns, const T* const* hidden, int num_inputs, int size,
                         float* const* out) {
  constexpr int kWidth = kStreamBytes / int(sizeof(T));
  for (int64_t begin = 0; begin < num_columns; begin += kWidth) {
    const int width = int(std::min<int64_t>(kWidth, num_columns - begin));
    for (int c = 0; c < num_inputs; ++c) std::memset(out[c] + begin, 0, sizeof(float) * width);
    auto pass = [&]<int C, int R, bool Fetch>(int first, int f) {
      const T* h[C];
      float* sums[C];
      for (int c = 0; c < C; ++c) h[c] = hidden[first + c] + f, sums[c] = out[first + c] + begin;
      stream_rows<C, R, Fetch>(weights + f * num_columns + begin, num_columns, width, h, sums);
    };
    auto all_inputs = [&]<int R>(int f) {
      if (num_inputs == 1) return pass.template operator()<1, R, true>(0, f);
      const int first = std::min(num_inputs, kStreamTile);
      if (first == 4) pass.template operator()<4, R, true>(0, f);
      if (first == 3) pass.template operator()<3, R, true>(0, f);
      if (first == 2) pass.template operator()<2, R, true>(0, f);
      int c = first;
      for (; c + 4 <= num_inputs; c += 4) pass.template operator()<4, R, false>(c, f);
      for (; c < num_inputs; ++c) pass.template operator()<1, R, false>(c, f);
    };
    // Pairs of rows come together, so a rest goes in twos and at last alone.
    int f = 0;
    if (num_inputs == 1)
      for (; f + 2 * kStreamTile <= size; f += 2 * kStreamTile) pass.template operator()<1, 2 * kStreamTile, true>(0, f);
    for (; f + kStreamTile <= size; f += kStreamTile) all_inputs.template operator()<kStreamTile>(f);
    for (; f + 2 <= size; f += 2) all_inputs.template operator()<2>(f);
    if (f < size) all_inputs.template operator()<1>(f);
    for (int c = 0; c < num_inputs; ++c) finish_stream<T>(out[c] + begin, width);
  }
}

// Fetches the rows that come after those in work, in the order in which they lie in memory, piece by piece.
template <typename T>
class RowsAhead {
 public:
  RowsAhead(const T* rows, int64_t stride, int64_t width) : rows_(rows), stride_(stride), width_(width) {}

  void fetch_piece() {
    for (int i = 0; i < kColumnTile; i += 64 / int(sizeof(T))) __builtin_prefetch(rows_ + column_ + i, 0, 2);
    column_ += kColumnTile;
    if (column_ < width_) return;
    column_ = 0;
    rows_ += stride_;
  }

 private:
  const T* rows_;
  int64_t stride_, width_, column_ = 0;
};

// out[c][0..64) = sum over the rows of a block; rows lie `stride` apart.
template <int C, bool Fetch, typename T>
inline void column_tile(const T* weights, int64_t stride, const T* const* hidden, int size, RowsAhead<T>& ahead,
                        float* const* out) {
  constexpr int kVecs = kColumnTile / kLanes;
  Vec sums[C][kVecs] = {};
  for (int f = 0; f < size; ++f) {
    if (Fetch) ahead.fetch_piece();
    Vec h[C];
    for (int c = 0; c < C; ++c) h[c] = keep(splat(to_float(hidden[c][f])));
    for (int v = 0; v < kVecs; ++v) {
      Vec w = keep(load(weights + f * stride + v * kLanes));
      for (int c = 0; c < C; ++c) sums[c][v] += h[c] * w;
    }
  }
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < kVecs; ++v) store(out[c] + v * kLanes, sums[c][v]);
}

#ifdef DSMOE_BF16_PAIRS

template <int C, bool Fetch>
inline void column_tile(const Bf16* weights, int64_t stride, const Bf16* const* hidden, int size,
                        RowsAhead<Bf16>& ahead, float* const* out) {
  constexpr int kPairs = kColumnTile / (2 * kLanes);
  __m512 low[C][kPairs], high[C][kPairs];
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < kPairs; ++v) low[c][v] = high[c][v] = _mm512_setzero_ps();
  for (int f = 0; f < size; f += 2) {
    const bool has_second = f + 1 < size;
    if (Fetch) ahead.fetch_piece(), ahead.fetch_piece();
    __m512bh h[C];
    for (int c = 0; c < C; ++c) h[c] = splat_pair(hidden[c] + f, has_second);
    for (int v = 0; v < kPairs; ++v) {
      const Bf16* first = weights + f * stride + v * 2 * kLanes;
      __m512bh w_low, w_high;
      interleave(first, has_second ? first + stride : nullptr, &w_low, &w_high);
      for (int c = 0; c < C; ++c) {
        low[c][v] = _mm512_dpbf16_ps(low[c][v], w_low, h[c]);
        high[c][v] = _mm512_dpbf16_ps(high[c][v], w_high, h[c]);
      }
    }
  }
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < kPairs; ++v) store_interleaved(out[c] + v * 2 * kLanes, low[c][v], high[c][v]);
}

#endif

// One tile of 64 columns, or fewer at the right edge, for up to kInputChunk inputs: sums (inputs, `sums_stride`) become
// the block's, or get them added.
template <typename T>
inline void tile_block(const T* weights, int64_t stride, int width, const T* hidden, int64_t hidden_stride,
                       int num_inputs, int size, bool add, RowsAhead<T>& ahead, float* sums, int64_t sums_stride) {
  thread_local std::vector<T> edge;
  if (width < kColumnTile) {
    // A padded copy: rows must not be read past their end.
    edge.assign(size_t(size) * kColumnTile, T{});
    for (int f = 0; f < size; ++f) std::memcpy(&edge[f * kColumnTile], weights + f * stride, sizeof(T) * width);
    weights = edge.data();
    stride = kColumnTile;
  }
  for (int c0 = 0; c0 < num_inputs; c0 += kTokenTile) {
    const int count = std::min(kTokenTile, num_inputs - c0);
    alignas(64) float block[kTokenTile][kColumnTile];
    const T* h[kTokenTile];
    float* out[kTokenTile];
    for (int c = 0; c < count; ++c) {
      h[c] = hidden + (c0 + c) * hidden_stride;
      out[c] = add ? block[c] : sums + (c0 + c) * sums_stride;
    }
    with_token_count(count, [&]<int C>() {
      if (c0 == 0)
        column_tile<C, true>(weights, stride, h, size, ahead, out);
      else
        column_tile<C, false>(weights, stride, h, size, ahead, out);
    });
    if (!add) continue;
    for (int c = 0; c < count; ++c) {
      float* sum = sums + (c0 + c) * sums_stride;
      for (int i = 0; i < kColumnTile; i += kLanes) store(sum + i, load(sum + i) + load(block[c] + i));
    }
  }
}

// The inputs that one matrix is multiplied with.
template <typename T>
struct DownGroup {
  const T* weights;       // (size, num_columns)
  const T* hidden;        // (num_inputs, size)
  int num_inputs;
  int64_t first_partial;  // where its streamed sums lie, in inputs
};

inline void add_columns(float* target, const float* values, int count) {
  for_lanes(count, [&](int64_t i, int lanes) {
    store_up_to(target + i, load_up_to(target + i, lanes) + load_up_to(values + i, lanes), lanes);
  });
}

// Streams one block of rows of a group into `partial` (inputs, blocks, num_columns).
template <typename T>
inline void stream_partial(const DownGroup<T>& group, int64_t size, int64_t num_columns, int block, float* partial) {
  const int64_t begin = int64_t(block) * kSumBlock, num_blocks = count_sum_blocks(size);
  const T* hidden[kStreamInputs];
  float* out[kStreamInputs];
  for (int c = 0; c < group.num_inputs; ++c) {
    hidden[c] = group.hidden + c * size + begin;
    out[c] = partial + ((group.first_partial + c) * num_blocks + block) * num_columns;
  }
  stream_block(group.weights + begin * num_columns, num_columns, hidden, group.num_inputs,
               int(std::min<int64_t>(kSumBlock, size - begin)), out);
}

// Adds columns [begin, end) of a group's streamed sums to target(input), which points to a whole row.
template <typename Target>
inline void add_streamed(const float* partial, int num_inputs, int64_t num_blocks, int64_t num_columns, int64_t begin,
                         int64_t end, Target target) {
  for (int c = 0; c < num_inputs; ++c) {
    const float* sums = partial + c * num_blocks * num_columns;
    for_lanes(end - begin, [&](int64_t i, int lanes) {
      Vec row = load_up_to(sums + begin + i, lanes);
      for (int64_t b = 1; b < num_blocks; ++b) row += load_up_to(sums + b * num_columns + begin + i, lanes);
      float* out = target(c) + begin + i;
      store_up_to(out, load_up_to(out, lanes) + row, lanes);
    });
  }
}

// Computes columns [begin, end) of a group by tiles and adds them to target(input). `next`: the weights of the group
// after this one.
template <typename T, typename Target>
inline void add_tiles(const DownGroup<T>& group, const T* next, int64_t size, int64_t num_columns, int64_t begin,
                      int64_t end, Target target) {
  thread_local std::vector<float> memory;
  const int64_t width = (end - begin + kColumnTile - 1) / kColumnTile * kColumnTile;
  memory.resize(kInputChunk * width + kLanes);
  float* sums = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) / 4 % 16) % 16;
  for (int c0 = 0; c0 < group.num_inputs; c0 += kInputChunk) {
    const int count = std::min(kInputChunk, group.num_inputs - c0);
    for (int64_t first = 0; first < size; first += kSumBlock) {
      const int rows = int(std::min<int64_t>(kSumBlock, size - first));
      const T* following = first + kSumBlock < size ? group.weights + (first + kSumBlock) * num_columns : next;
      RowsAhead<T> ahead(following + begin, num_columns, end - begin);
      for (int64_t column = begin; column < end; column += kColumnTile)
        tile_block(group.weights + first * num_columns + column, num_columns,
                   int(std::min<int64_t>(kColumnTile, end - column)), group.hidden + c0 * size + first, size, count, rows,
                   first > 0, ahead, sums + column - begin, width);
    }
    for (int c = 0; c < count; ++c) add_columns(target(c0 + c) + begin, sums + c * width, int(end - begin));
  }
}

// Columns of one piece of work: enough pieces for all threads.
inline int64_t columns_per_chunk(int64_t num_columns, int num_threads) {
  const int64_t wanted = num_columns / num_threads / kColumnTile * kColumnTile;
  return std::clamp<int64_t>(wanted, kColumnTile, 8 * kColumnTile);
}

// Adds the products of all groups to their targets, group after group. group(i) is a DownGroup, target(i, input) the row
// that one of its inputs is added to; start(begin, end) is called for every range of columns before anything is added.
// Called by all threads of a parallel region; ends with a barrier.
template <typename T, typename Group, typename Target, typename Start>
inline void project_down(int num_groups, int num_tokens, int64_t size, int64_t num_columns, int num_threads,
                         float* partial, Group group, Target target, Start start) {
  const int num_blocks = count_sum_blocks(size);
  share_out(int64_t(num_groups) * num_blocks, num_tokens, [&](int64_t work) {
    const DownGroup<T> one = group(int(work / num_blocks));
    if (streams(one.num_inputs, num_columns)) stream_partial(one, size, num_columns, int(work % num_blocks), partial);
  });
#pragma omp barrier
  const int64_t width = columns_per_chunk(num_columns, num_threads), num_chunks = (num_columns + width - 1) / width;
  share_out(num_chunks, num_tokens, [&](int64_t chunk) {
    const int64_t begin = chunk * width, end = std::min(begin + width, num_columns);
    start(begin, end);
    for (int i = 0; i < num_groups; ++i) {
      const DownGroup<T> one = group(i);
      auto target_of = [&](int input) { return target(i, input); };
      if (streams(one.num_inputs, num_columns))
        add_streamed(partial + one.first_partial * num_blocks * num_columns, one.num_inputs, num_blocks, num_columns,
                     begin, end, target_of);
      else
        add_tiles(one, group(std::min(i + 1, num_groups - 1)).weights, size, num_columns, begin, end, target_of);
    }
  });
#pragma omp barrier
}

}  // namespace dsmoe
