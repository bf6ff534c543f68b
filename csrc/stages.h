// What both devices' C interfaces share: the names of dtypes and poolings, and the arguments of the gate, whose pointers are
// host memory there and device memory here.
#pragma once

#include <cstdint>

namespace s2sent {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };
enum class Pooling : int { kNone, kMean, kCls, kLast };

// Everything is float32 and dense, but o.
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
  const float* prior;  // [N] or null
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

struct Product {
  int64_t sentences;
  int64_t rows;
  int64_t columns;
  const float* x;       // [B, rows]
  const float* weight;  // [rows, columns]
  float* partial;       // scratch [ceil(rows / kProductRows), B, columns]
  float* result;        // [B, columns] x @ weight
};

constexpr int64_t kProductRows = 256;  // of a partial sum

}  // namespace s2sent
