// The C interface of the CUDA kernels. Every launcher takes a stream, neither allocates nor waits, and returns the launch's
// error. Pointers are device memory but where they say host. An empty batch is no launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../stages.h"

namespace s2sent::cuda {

constexpr int64_t kMaxBlocks = 128;  // their pointers travel as a kernel's arguments
constexpr int64_t kMaxParts = 32;    // as many as there are frequency pairs

// sm_.. that the kernels were compiled for.
std::vector<int64_t> architectures();

// Why the kernels cannot run on a device, or nothing.
std::string refusal(int device);

// Which tokens are real: those of starts where packed, those of mask, or all.
struct Batch {
  int64_t sentences;
  int64_t size;  // L; 0 where packed
  int64_t tokens;  // B L, or T where packed
  bool packed;
  const int32_t* starts;   // packed: [B + 1]
  const bool* mask;        // [B, L] or null
  const int32_t* lengths;  // [B] real tokens, with a mask, once find_tokens ran
  const int32_t* firsts;   // [B] place of the first, or -1 where they do not stand side by side, likewise
  const int32_t* places;   // [B, L] place of the r-th real token, likewise
  const int32_t* ranks;    // [B, L] r of a real token, -1 of padding, likewise
};

// A tensor [B, L, D] or [T, D], dense in D; strides in elements.
struct Rows {
  const void* data;
  int64_t stride_b;
  int64_t stride_l;
};

// beta: of the r-th real token of sentence b, or of its l-th where a table is given, at
// [(packed ? starts[b] : b stride_b) + m stride_m + r].
struct Factors {
  const float* beta;
  int64_t stride_b;
  int64_t stride_m;
};

// One launch: lengths, firsts, places and ranks of a mask, and beta of profile ``paper``: 6 / sqrt(N l) c(y_m, r, l) in float64
// and rounded once.
struct TokenFinder {
  Batch batch;
  int32_t* lengths;  // with a mask, else null
  int32_t* firsts;
  int32_t* places;
  int32_t* ranks;
  int64_t num_blocks;
  int64_t parts;
  const int64_t* y;  // host [M]
  float* beta;       // or null
  int64_t stride_b;  // as in Factors; 0 where one table [M, L] is every sentence's
  int64_t stride_m;
};
cudaError_t find_tokens(const TokenFinder& args, cudaStream_t stream);

struct Squeeze {
  Batch batch;
  DType dtype;
  int64_t num;          // hidden states here: N of them, or one block of N
  int64_t first_block;  // which block hidden[0] is
  int64_t num_blocks;   // N
  int64_t size;         // D
  int64_t parts;        // M
  Pooling pooling;
  const Rows* hidden;  // host [num]
  const float* alpha;  // [M, N]
  Factors factors;
  bool official;    // f sees all L positions, padding too
  float* sums;      // scratch [B, num, D]: S_n = sum_l beta u_n
  float* pooled;    // p [B, N, D] or null
  float* squeezed;  // f [B, D]; goes on from what stands there unless first_block is 0
};
cudaError_t squeeze(const Squeeze& args, cudaStream_t stream);

struct SqueezeBackward {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  int64_t parts;
  Pooling pooling;
  const float* alpha;
  Factors factors;
  bool official;
  const float* grad_squeezed;  // df [B, D] or null
  const float* grad_pooled;    // dp [B, N, D] or null
  Rows grad_fused;             // dv; its data may be null
  const float* gates;          // g [B, N, D], with dv
  void* const* grads;          // host [N] dense du_n, or null where none is wanted
};
cudaError_t squeeze_backward(const SqueezeBackward& args, cudaStream_t stream);

cudaError_t bottleneck(const Gate& args, cudaStream_t stream);       // s
cudaError_t excite(const Gate& args, cudaStream_t stream);           // g, or o
cudaError_t excite_backward(const Gate& args, cudaStream_t stream);  // dp and the gradients inside the gate
cudaError_t multiply(const Product& args, cudaStream_t stream);

struct Fuse {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  const Rows* hidden;  // host [N]
  const float* gates;  // g [B, N, D]
  void* fused;         // v, dense, like a hidden state
};
cudaError_t fuse(const Fuse& args, cudaStream_t stream);

struct Select {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  int64_t parts;
  const Rows* hidden;  // host [N]
  const float* alpha;  // [M, N]
  Factors factors;
  Gate gate;        // its gates are written
  float* squeezed;  // f [B, D]
  void* fused;      // v, dense, like a hidden state
};
// One launch that reads each hidden state once. There is a plan for it where it takes such a batch (factors are not looked at)
// and, unless ``always``, where it is then the faster way.
struct SelectPlan;
cudaError_t plan(const Select& args, bool always, std::shared_ptr<const SelectPlan>& plan);
cudaError_t select(const Select& args, const SelectPlan& plan, cudaStream_t stream);

struct FuseBackward {
  Batch batch;
  DType dtype;
  int64_t num_blocks;
  int64_t size;
  const Rows* hidden;  // host [N]
  Rows grad_fused;     // dv
  float* grad_gates;   // dg [B, N, D]
};
cudaError_t fuse_backward(const FuseBackward& args, cudaStream_t stream);

}  // namespace s2sent::cuda
