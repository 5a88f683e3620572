// The functions that Python calls through ctypes. Each opens one parallel region.
#include <algorithm>

#include "pieces.h"
#include "trunk.h"

using namespace dsmoe;

namespace {

// Which sequence each token belongs to, and the tiles of tokens that attend together; returns the number of tiles.
int lay_out(const Model& model, const Step& step) {
  int num_tiles = 0;
  for (int b = 0; b < step.num_sequences; ++b) {
    const int begin = step.query_starts[b], end = step.query_starts[b + 1];
    std::fill(step.sequence_of + begin, step.sequence_of + end, b);
    for (int token = begin; token < end; token += tokens_per_tile(model)) {
      step.tiles[2 * num_tiles] = b;
      step.tiles[2 * num_tiles++ + 1] = token;
    }
  }
  return num_tiles;
}

template <typename T>
void embed(const Model& model, const Step& step) {
  using Stored = typename TypesOf<T>::Cache;
  const int64_t d_model = model.d_model;
  for (int t = 0; t < step.num_tokens; ++t) {
    const Stored* row = static_cast<const Stored*>(model.embedding) + step.tokens[t] * d_model;
    for_lanes(d_model, [&](int64_t i, int count) {
      store_up_to(step.x + t * d_model + i, load_up_to(row + i, count), count);
    });
  }
}

template <typename T>
void trunk(const Model& model, const Step& step, int layer) {
  const int num_tiles = lay_out(model, step);
#pragma omp parallel num_threads(model.num_threads)
  run_trunk<T>(model, step, layer, num_tiles);
}

template <typename T>
void experts(const ExpertWeights& weights, const ExpertCall& call) {
#pragma omp parallel num_threads(weights.num_threads)
  run_experts<T>(weights, call);
}

// All layers, with their experts here: the calls of both kinds one after another, in one parallel region.
template <typename T>
void layers(const Model& model, const Step& step, const ExpertWeights* weights, const ExpertCall& call) {
  const int num_tiles = lay_out(model, step);
  embed<T>(model, step);
#pragma omp parallel num_threads(model.num_threads)
  for (int layer = 0; layer < model.num_layers; ++layer) {
    run_trunk<T>(model, step, layer, num_tiles);
    run_experts<T>(weights[layer], call);
  }
}

// Moves the wanted rows of `size` numbers to the front. Rows ascend, so none is overwritten before it was moved.
template <typename T>
void gather_rows(T* values, int64_t size, const int32_t* rows, int num_rows) {
  for (int i = 0; i < num_rows; ++i) std::memmove(values + i * size, values + rows[i] * size, sizeof(T) * size);
}

// Logits of the wanted rows.
template <typename T>
void finish(const Model& model, const Step& step, const int32_t* rows, int num_rows, float* logits) {
  const int64_t d_model = model.d_model, blocks = count_input_blocks(d_model);
#pragma omp parallel num_threads(model.num_threads)
  {
    norm_all<T>(model, step, model.norm, true);
    if constexpr (kIsInt8<T>) {
#pragma omp single
      {
        gather_rows(step.rounded, blocks * kInputBlock, rows, num_rows);
        gather_rows(step.rounded_scales, blocks, rows, num_rows);
      }
      project_int8(int8_matrix(model.head, model.head_scales), model.vocab_size, d_model, rounded_rows(step), num_rows,
                   logits, model.vocab_size);
    } else {
#pragma omp single
      gather_rows(static_cast<T*>(step.normed_cast), d_model, rows, num_rows);
      project<T>(model.head, model.vocab_size, d_model, step.normed_cast, num_rows, logits, model.vocab_size,
                 model.num_threads);
    }
  }
}

// Calls body.template operator()<T>() for the type of a model's matrices.
template <typename Body>
void with_type(int32_t dtype, Body body) {
  switch (dtype) {
    case kFloat32: body.template operator()<float>(); break;
    case kBfloat16: body.template operator()<Bf16>(); break;
    default: body.template operator()<Int8>();
  }
}

}  // namespace

extern "C" {

// Must fit cpu_library.py; checked when the library is loaded.
int32_t dsmoe_layout(int32_t* numbers) {
  const int32_t found[] = {sizeof(Rule), sizeof(RouterWeights), sizeof(LayerWeights), sizeof(Model),
                           sizeof(Step), sizeof(ExpertWeights), sizeof(ExpertCall), sizeof(PiecePlace),
                           sizeof(PieceCut), kBlockSize, kStreamInputs, kSumBlock};
  std::copy(std::begin(found), std::end(found), numbers);
  return int32_t(std::size(found));
}

void dsmoe_embed(const Model* model, const Step* step) {
  with_type(model->dtype, [&]<typename T>() { embed<T>(*model, *step); });
}

void dsmoe_trunk(const Model* model, const Step* step, int32_t layer) {
  with_type(model->dtype, [&]<typename T>() { trunk<T>(*model, *step, layer); });
}

void dsmoe_experts(const ExpertWeights* weights, const ExpertCall* call) {
  with_type(weights->dtype, [&]<typename T>() { experts<T>(*weights, *call); });
}

void dsmoe_layers(const Model* model, const Step* step, const ExpertWeights* weights, const ExpertCall* call) {
  with_type(model->dtype, [&]<typename T>() { layers<T>(*model, *step, weights, *call); });
}

void dsmoe_finish(const Model* model, const Step* step, const int32_t* rows, int32_t num_rows, float* logits) {
  with_type(model->dtype, [&]<typename T>() { finish<T>(*model, *step, rows, num_rows, logits); });
}

int64_t dsmoe_measure_pieces(const PieceCut* cut) { return measure_pieces(*cut); }

void dsmoe_cut_pieces(const PieceCut* cut) { cut_pieces(*cut); }

void dsmoe_add_pieces(const PieceCut* cut, const void* const* answers, int32_t dtype, int32_t by_pair, int32_t d_model,
                      int32_t num_threads, float* y) {
  if (dtype == kFloat32)
    add_pieces<float>(*cut, answers, by_pair, d_model, num_threads, y);
  else
    add_pieces<Bf16>(*cut, answers, by_pair, d_model, num_threads, y);
}

}  // extern "C"
