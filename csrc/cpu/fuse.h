// The C interface of fuse.cpp.
#pragma once

#include "batch.h"

namespace s2sent {

struct Fuse {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  const Rows* hidden;  // [N]
  const float* gates;  // g [B, N, D]
  void* fused;         // v, dense, like a hidden state
};

// Items are rows of v: b * L + l, or t. ``scratch`` holds D floats.
void fuse(const Fuse& args, int64_t begin, int64_t end, float* scratch);

struct FuseBackward {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  const Rows* hidden;  // [N]
  Rows grad_fused;     // dv
  float* grad_gates;   // dg [B, N, D]
};

// Items are (b, n): dg_n = sum_l dv u_n. ``scratch`` holds D floats.
void fuse_backward(const FuseBackward& args, int64_t begin, int64_t end, float* scratch);

}  // namespace s2sent
