// The C interface of gate.cpp. Everything is float32 and dense, but o.
#pragma once

#include "batch.h"

namespace s2sent {

constexpr int64_t kGateSentences = 16;  // of an item of excite: they share its slice of W2
constexpr int64_t kGateFeatures = 32;   // of every block, of an item

struct Gate {
  int64_t sentences;   // B
  int64_t num_blocks;  // N
  int64_t size;        // D
  int64_t width;       // H
  bool relu;           // else tanh
  float eps;
  const float* squeezed;      // f [B, D]
  const float* down_weight;   // [H, D]
  const float* down_bias;     // [H]
  const float* up_weight;     // [N D, H]
  const float* up_bias;       // [N D]
  const float* norm_weight;   // [N D], with the next three, or null
  const float* norm_bias;
  const float* running_mean;
  const float* running_var;
  const float* prior;  // [N], its maximum already subtracted, or null
  float* bottleneck;   // s [B, H]
  float* gates;        // g [B, N, D] or null
  const float* pooled; // p [B, N, D] or null
  void* output;        // o [B, D] with p
  DType dtype;         // of o
};

// Items are h: s.
void bottleneck(const Gate& args, int64_t begin, int64_t end);

// Items are (sentences kGateSentences at a time, features kGateFeatures at a time), features first.
// ``scratch`` holds kGateFeatures (H + kGateSentences N) floats.
void excite(const Gate& args, int64_t begin, int64_t end, float* scratch);

}  // namespace s2sent
