// Shared by the CPU kernels: instruction sets, storage types, and a batch's real tokens and their factors.
#pragma once

#include <cstdint>
#include <cstring>

#include "../stages.h"

// A kernel is compiled for three x86-64 levels; the loader picks one. All levels give the same bits: vectors run over features,
// no sum does, and -ffp-contract=off forbids fused multiply-adds. Functions called by a kernel must be inlined into it, or they
// are compiled for the lowest level only. (ThreadSanitizer's calls in the function that picks would come before they are linked.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(__SANITIZE_THREAD__)
#define S2SENT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2SENT_CLONES
#endif
#define S2SENT_INLINE inline __attribute__((always_inline))

namespace s2sent::cpu {

// Storage types. Integer arithmetic converts them, because it vectorises on every level; the compiler's own types do not.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

S2SENT_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

S2SENT_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

S2SENT_INLINE float load(float value) { return value; }

S2SENT_INLINE float load(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

S2SENT_INLINE float load(Float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const float normal = from_bits(magnitude + (exponent == 0x0f800000 ? 224u << 23 : 112u << 23));  // keeps inf and NaN
  const float tiny = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);                  // subnormal
  return from_bits(to_bits(exponent == 0 ? tiny : normal) | uint32_t(value.bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even.
S2SENT_INLINE void store(float value, float* to) { *to = value; }

S2SENT_INLINE void store(float value, BFloat16* to) {
  const uint32_t bits = to_bits(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

S2SENT_INLINE void store(float value, Float16* to) {
  const uint32_t all = to_bits(value), sign = all & 0x80000000, bits = all ^ sign;
  const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const float shift = from_bits(126u << 23);  // its last bit is float16's smallest number
  const uint32_t tiny = to_bits(from_bits(bits) + shift) - (126u << 23);
  const uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = bits >= (143u << 23) ? large : bits < (113u << 23) ? tiny : normal;
  to->bits = uint16_t(half | sign >> 16);
}

// Which tokens are real. The r-th real token of sentence b is at position (places ? places[starts[b] + r] : r) of it.
struct Batch {
  int64_t sentences;  // B
  int64_t size;       // L; 0 if packed
  bool packed;
  const int64_t* starts;  // [B + 1] real tokens before each sentence
  const int64_t* places;  // [starts[B]] or null

  int64_t length(int64_t b) const { return starts[b + 1] - starts[b]; }
};

// Offset of the r-th real token of sentence b, in elements.
S2SENT_INLINE int64_t real_row(const Rows& rows, const Batch& batch, int64_t b, int64_t r) {
  if (batch.packed) return (batch.starts[b] + r) * rows.stride_l;
  return b * rows.stride_b + (batch.places ? batch.places[batch.starts[b] + r] : r) * rows.stride_l;
}

// beta of each sentence's tokens.
struct Factors {
  const float* const* beta;  // [B], each [M, strides[b]]
  const int64_t* strides;    // [B]
};

}  // namespace s2sent::cpu

#define S2SENT_CLONE(dtype, scalar, T, cuda, map, name, Arguments) \
  S2SENT_CLONES void name##_##dtype(const Arguments& args, int64_t begin, int64_t end, float* scratch) { \
    name##_items<T>(args, begin, end, scratch); \
  }
#define S2SENT_CASE(dtype, scalar, T, cuda, map, name, Arguments) \
  case DType::dtype: return name##_##dtype(args, begin, end, scratch);

// Defines the kernel ``name``, which runs name_items<T> for the storage type T of args.dtype. GCC clones no templates, hence
// a function for every type.
#define S2SENT_KERNEL(name, Arguments) \
  namespace { \
  S2SENT_FOR_EACH_DTYPE(S2SENT_CLONE, name, Arguments) \
  } \
  void name(const Arguments& args, int64_t begin, int64_t end, float* scratch) { \
    switch (args.dtype) { S2SENT_FOR_EACH_DTYPE(S2SENT_CASE, name, Arguments) } \
  }
