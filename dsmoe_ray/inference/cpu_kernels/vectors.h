// Vectors of 16 floats, the two stored number types, and the element-wise functions built on them.
//
// Written with the compiler's portable vectors, which become AVX-512, AVX2, NEON or plain code; only products of
// bfloat16 pairs use an instruction by name. Every function treats its 16 lanes alike, so that a value does not depend
// on the lane it lies in: the exact numerics of the engine rest on that.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define DSMOE_BF16_PAIRS 1
#endif

namespace dsmoe {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecInt __attribute__((vector_size(64)));
typedef uint32_t VecBits __attribute__((vector_size(64)));
typedef uint16_t VecHalf __attribute__((vector_size(32)));

struct Bf16 {
  uint16_t bits;
};

// Names a model whose matrices are int8; see int8.h.
struct Int8 {};

// What a model's embedding and cache are held in, and what attention gives, by the type of its matrices.
template <typename T>
struct TypesOf {
  using Cache = T;
  using Attended = T;
};

template <>
struct TypesOf<Int8> {
  using Cache = Bf16;
  using Attended = float;
};

template <typename T>
constexpr bool kIsInt8 = std::is_same_v<T, Int8>;

inline float to_float(Bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float to_float(float value) { return value; }

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* source) {
  Vec out;
  std::memcpy(&out, source, sizeof out);
  return out;
}

inline Vec load(const Bf16* source) {
  VecHalf half;
  std::memcpy(&half, source, sizeof half);
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}

// The first `count` lanes; the others are zero.
template <typename T>
inline Vec load_part(const T* source, int count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, source, sizeof(T) * count);
  return load(lanes);
}

// Holds a value in a register: compilers would rather read it from memory again with each use, and loads are scarce.
inline Vec keep(Vec value) {
#ifdef __AVX512F__
  asm("" : "+v"(value));
#endif
  return value;
}

inline void store(float* target, Vec value) { std::memcpy(target, &value, sizeof value); }

// Round to nearest, ties to even; a NaN stays one.
inline void store(Bf16* target, Vec value) {
  VecBits bits = (VecBits)value;
  VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  VecInt is_nan = value != value;
  rounded = ((VecBits)is_nan & 0x7fc0) | (~(VecBits)is_nan & rounded);
  VecHalf half = __builtin_convertvector(rounded, VecHalf);
  std::memcpy(target, &half, sizeof half);
}

template <typename T>
inline void store_part(T* target, Vec value, int count) {
  T lanes[kLanes];
  store(lanes, value);
  std::memcpy(target, lanes, sizeof(T) * count);
}

typedef float VecHalf8 __attribute__((vector_size(32)));
typedef float VecHalf4 __attribute__((vector_size(16)));

// One order of additions for all sums over lanes: halves onto each other.
inline float sum_lanes(Vec value) {
  VecHalf8 eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  VecHalf4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return four[0] + four[1];
}

inline float max_lanes(Vec value) {
  VecHalf8 a = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7);
  VecHalf8 b = __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  VecHalf8 eight = a > b ? a : b;
  VecHalf4 c = __builtin_shufflevector(eight, eight, 0, 1, 2, 3), d = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  VecHalf4 four = c > d ? c : d;
  four = four > __builtin_shufflevector(four, four, 2, 3, 0, 1) ? four : __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return four[0] > four[1] ? four[0] : four[1];
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// Calls body(offset, count) for each run of up to 16 of `size` elements.
template <typename Body>
inline void for_lanes(int64_t size, Body body) {
  for (int64_t offset = 0; offset < size; offset += kLanes)
    body(offset, size - offset < kLanes ? int(size - offset) : kLanes);
}

template <typename T>
inline Vec load_up_to(const T* source, int count) {
  return count == kLanes ? load(source) : load_part(source, count);
}

template <typename T>
inline void store_up_to(T* target, Vec value, int count) {
  if (count == kLanes)
    store(target, value);
  else
    store_part(target, value, count);
}

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2 and a polynomial for exp(r); error below 2 units in the last place.
inline Vec exp(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = max(min(x, splat(88.0f)), splat(-87.3f));
  Vec shifted = x * 1.44269504088896341f + shift;
  VecInt n = (VecInt)shifted - (VecInt)shift;
  Vec whole = shifted - shift;
  Vec r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Vec)((n + 127) << 23);
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// The error function as a quotient of polynomials on [-4, 4], beyond which it is one in float32.
inline Vec erf(Vec x) {
  x = max(min(x, splat(4.0f)), splat(-4.0f));
  Vec s = x * x;
  Vec p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  Vec q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p / q;
}

inline Vec gelu(Vec x) { return x * 0.5f * (1.0f + erf(x * 0.70710678118654752f)); }

}  // namespace dsmoe
