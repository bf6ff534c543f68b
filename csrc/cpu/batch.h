// What the CPU kernels share: a batch's real tokens, the storage types, and which instruction sets a kernel is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#include "../stages.h"

// A kernel is compiled for three levels of x86-64 and the right one chosen when the library is loaded. All of them give the
// same bits: vectors run over features, which no sum runs over, and -ffp-contract=off forbids fused multiply-adds. What such a
// kernel calls must be inlined into it, or it would be compiled for the lowest level only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define S2SENT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2SENT_CLONES
#endif
#define S2SENT_INLINE inline __attribute__((always_inline))

namespace s2sent {

// Storage types: converted by integer arithmetic, which vectorises on every level, unlike the compiler's own types.
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
  const float normal = from_bits(magnitude + (exponent == 0x0f800000 ? 224u << 23 : 112u << 23));  // inf and NaN stay so
  const float tiny = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);                  // subnormal
  return from_bits(to_bits(exponent == 0 ? tiny : normal) | uint32_t(value.bits & 0x8000) << 16);
}

// To nearest, ties to even.
S2SENT_INLINE void store(float value, float* to) { *to = value; }

S2SENT_INLINE void store(float value, BFloat16* to) {
  const uint32_t bits = to_bits(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

S2SENT_INLINE void store(float value, Float16* to) {
  const uint32_t all = to_bits(value), sign = all & 0x80000000, bits = all ^ sign;
  const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const float shift = from_bits(126u << 23);  // its unit in the last place is float16's smallest number
  const uint32_t tiny = to_bits(from_bits(bits) + shift) - (126u << 23);
  const uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = bits >= (143u << 23) ? large : bits < (113u << 23) ? tiny : normal;
  to->bits = uint16_t(half | sign >> 16);
}

// Which tokens are real. The r-th real token of sentence b stands at place (places ? places[starts[b] + r] : r) of it.
struct Batch {
  int64_t sentences;
  int64_t size;  // L; 0 where packed
  bool packed;
  const int64_t* starts;  // [B + 1] real tokens before each sentence
  const int64_t* places;  // [starts[B]] or null

  int64_t length(int64_t b) const { return starts[b + 1] - starts[b]; }
};

// A tensor [B, L, D] or [T, D], dense in D.
struct Rows {
  const void* data;
  int64_t stride_b;
  int64_t stride_l;

  // Where the r-th real token of sentence b begins, in elements.
  int64_t real(const Batch& batch, int64_t b, int64_t r) const {
    if (batch.packed) return (batch.starts[b] + r) * stride_l;
    return b * stride_b + (batch.places ? batch.places[batch.starts[b] + r] : r) * stride_l;
  }
};

}  // namespace s2sent
