// Tokens for experts elsewhere: cut into a piece for each place that computes some of them, and the answers added up.
//
// Sums run over a token's experts in ascending order from zero, whichever piece a row comes from, so that they have the
// bits of experts.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "model.h"
#include "vectors.h"

namespace dsmoe {

constexpr int64_t kPieceAlignment = 64;
constexpr int kManyTokens = 64;  // from here on threads share out the adding

// Calls visit(token, expert entry, piece) for every pair of the wanted pieces, token by token in ascending order of ids.
template <typename Visit>
inline void for_piece_pairs(const PieceCut& cut, Visit visit) {
  for (int t = 0; t < cut.num_tokens; ++t) {
    for (int k = 0; k < cut.stride; ++k) {
      const int64_t i = int64_t(t) * cut.stride + k;
      if (cut.expert_ids[i] < 0) break;
      const int piece = cut.piece_of[cut.expert_ids[i]] - cut.first_piece;
      if (piece >= 0 && piece < cut.num_pieces) visit(t, i, piece);
    }
  }
}

// Follows how many rows a piece has, and how many pairs its last row.
class PieceRows {
 public:
  explicit PieceRows(int num_pieces) : last_(num_pieces, -1), rows_(num_pieces), width_(num_pieces) {}

  void add(int piece, int token) {
    if (last_[piece] != token) last_[piece] = token, ++rows_[piece], width_[piece] = 0;
    ++width_[piece];
  }
  int rows(int piece) const { return rows_[piece]; }
  int width(int piece) const { return width_[piece]; }

 private:
  std::vector<int> last_, rows_, width_;
};

// Measures all pieces and gives each a place; returns the bytes that they take.
inline int64_t measure_pieces(const PieceCut& cut) {
  std::fill(cut.pieces, cut.pieces + cut.num_pieces, PiecePlace{});
  PieceRows rows(cut.num_pieces);
  for_piece_pairs(cut, [&](int t, int64_t, int p) {
    rows.add(p, t);
    PiecePlace& place = cut.pieces[p];
    place.num_rows = rows.rows(p);
    place.width = std::max(place.width, rows.width(p));
    ++place.num_pairs;
  });
  int64_t end = 0;
  auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
    return begin;
  };
  for (int p = 0; p < cut.num_pieces; ++p) {
    PiecePlace& place = cut.pieces[p];
    const int64_t entries = int64_t(place.num_rows) * place.width;
    place.rows = take(place.num_rows * int64_t(sizeof(int32_t)));
    place.ids = take(entries * int64_t(sizeof(int32_t)));
    place.gates = take(entries * int64_t(sizeof(float)));
    // A piece with all tokens takes them where they are.
    place.x = place.num_rows == cut.num_tokens ? -1 : take(place.num_rows * int64_t(cut.row_bytes));
  }
  return end;
}

// Writes the pieces that were measured.
inline void cut_pieces(const PieceCut& cut) {
  auto at = [&](int64_t offset) { return static_cast<char*>(cut.memory) + offset; };
  for (int p = 0; p < cut.num_pieces; ++p) {
    const PiecePlace& place = cut.pieces[p];
    const int64_t entries = int64_t(place.num_rows) * place.width;
    int32_t* ids = reinterpret_cast<int32_t*>(at(place.ids));
    float* gates = reinterpret_cast<float*>(at(place.gates));
    std::fill(ids, ids + entries, -1);
    std::fill(gates, gates + entries, 0.0f);
  }
  PieceRows rows(cut.num_pieces);
  for_piece_pairs(cut, [&](int t, int64_t i, int p) {
    rows.add(p, t);
    const PiecePlace& place = cut.pieces[p];
    const int row = rows.rows(p) - 1, column = rows.width(p) - 1;
    if (column == 0) {
      reinterpret_cast<int32_t*>(at(place.rows))[row] = t;
      if (place.x >= 0)
        std::memcpy(at(place.x) + row * int64_t(cut.row_bytes),
                    static_cast<const char*>(cut.x) + t * int64_t(cut.row_bytes), cut.row_bytes);
    }
    const int64_t entry = int64_t(row) * place.width + column;
    reinterpret_cast<int32_t*>(at(place.ids))[entry] = cut.expert_ids[i];
    reinterpret_cast<float*>(at(place.gates))[entry] = cut.gates[i];
  });
}

// y[t] = the sum of a token's rows. answers[piece] has a row for each pair of the piece, or for each of its tokens.
template <typename T>
inline void add_pieces(const PieceCut& cut, const void* const* answers, bool by_pair, int d_model, int num_threads,
                       float* y) {
  std::vector<const T*> rows;
  std::vector<int> starts(cut.num_tokens + 1);
  std::vector<int64_t> next(cut.num_pieces), last(cut.num_pieces, -1);
  rows.reserve(int64_t(cut.num_tokens) * std::min<int64_t>(cut.stride, cut.num_pieces));
  int done = 0;
  for_piece_pairs(cut, [&](int t, int64_t, int p) {
    for (; done < t; ++done) starts[done + 1] = int(rows.size());
    if (!by_pair && last[p] == t) return;
    last[p] = t;
    rows.push_back(static_cast<const T*>(answers[p]) + next[p]++ * d_model);
  });
  for (; done < cut.num_tokens; ++done) starts[done + 1] = int(rows.size());
#pragma omp parallel for num_threads(num_threads) if (cut.num_tokens >= kManyTokens)
  for (int t = 0; t < cut.num_tokens; ++t)
    for_lanes(d_model, [&](int64_t i, int count) {
      Vec sum = {};
      for (int r = starts[t]; r < starts[t + 1]; ++r) sum += load_up_to(rows[r] + i, count);
      store_up_to(y + int64_t(t) * d_model + i, sum, count);
    });
}

}  // namespace dsmoe
