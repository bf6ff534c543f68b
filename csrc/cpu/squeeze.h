// The C interface of squeeze.cpp. Every launch takes a range of items, so that the caller's threads may share them.
#pragma once

#include "batch.h"

namespace s2sent {

struct Squeeze {
  Batch batch;
  DType dtype;
  int64_t num;          // hidden states here: N of them, or one block of N
  int64_t first_block;  // which block hidden[0] is
  int64_t num_blocks;   // N
  int64_t size;         // D
  int64_t parts;        // M
  Pooling pooling;
  const Rows* hidden;               // [num]
  const float* alpha;               // [M, N]
  const float* const* beta;         // [B] each sentence's [M, beta_stride[b]]
  const int64_t* beta_stride;       // [B]
  bool official;                    // f sees all L positions, padding too
  float* sums;                      // [B, num, D] S_n = sum_l beta u_n
  float* pooled;                    // [B, N, D] or null
  float* squeezed;                  // [B, D]
};

// Items are (b, n): S_n and p_n. ``scratch`` holds 2 D floats.
void sum_tokens(const Squeeze& args, int64_t begin, int64_t end, float* scratch);

// Items are b: f = sum_n alpha_n S_n, going on from what stands there unless first_block is 0.
void sum_blocks(const Squeeze& args, int64_t begin, int64_t end);

struct SqueezeBackward {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  int64_t parts;
  Pooling pooling;
  const float* alpha;
  const float* const* beta;
  const int64_t* beta_stride;
  bool official;
  const float* grad_squeezed;  // df [B, D] or null
  const float* grad_pooled;    // dp [B, N, D] or null
  const Rows* grad_fused;      // dv or null
  const float* gates;          // g [B, N, D], with dv
  void* const* grads;          // [N] dense du_n, or null where none is wanted
};

// Items are (b, n): du_n = g_n dv + w dp_n + alpha_n beta df. ``scratch`` holds 3 D floats.
void squeeze_backward(const SqueezeBackward& args, int64_t begin, int64_t end, float* scratch);

}  // namespace s2sent
