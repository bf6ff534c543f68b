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

  // Of the backward alone: with dg, or with do and p.
  const float* grad_gates;   // dg [B, N, D] or null
  const float* grad_output;  // do [B, D], with p
  float* grad_pooled;        // dp [B, N, D], with p
  float* grad_logits;        // [B, N, D] of e + c
  float* grad_normed;        // [B, N, D] of the norm's result, or of z where there is none
  float* normed;             // [B, N, D] (z - mean) / std, with a norm
};

// Items are h: s.
void bottleneck(const Gate& args, int64_t begin, int64_t end);

// Items are (sentences kGateSentences at a time, features kGateFeatures at a time), features first.
// ``scratch`` holds kGateFeatures (H + kGateSentences N) floats.
void excite(const Gate& args, int64_t begin, int64_t end, float* scratch);

// Items as of excite: dp and the gradients inside the gate. ``scratch`` holds kGateFeatures (H + 2 kGateSentences N) floats.
void excite_backward(const Gate& args, int64_t begin, int64_t end, float* scratch);

constexpr int64_t kProductRows = 256;     // of an item of multiply_rows
constexpr int64_t kProductColumns = 256;

struct Product {
  int64_t sentences;
  int64_t rows;
  int64_t columns;
  const float* x;       // [B, rows]
  const float* weight;  // [rows, columns]
  float* partial;       // [chunks of rows, B, columns]
  float* result;        // [B, columns]
};

// Items are (kProductRows rows at a time, kProductColumns columns at a time), columns first: partial sums of x @ weight.
void multiply_rows(const Product& args, int64_t begin, int64_t end);

// Items are sentences: the chunks' sum.
void sum_products(const Product& args, int64_t begin, int64_t end);

}  // namespace s2sent
