// The interface of the CUDA kernels. Every launcher takes a stream, neither allocates nor waits, and returns the error of its
// launches. Pointers are device memory unless marked "host". An empty batch launches nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../stages.h"

namespace s2sent::cuda {

// The architectures that the kernels were compiled for, as 90 for sm_90.
std::vector<int64_t> architectures();

// Why the kernels cannot run on a device, or "".
std::string refusal(int device);

// Which tokens are real: those of starts if packed, those of mask, or all.
struct Batch {
  int64_t sentences;  // B
  int64_t size;       // L; 0 if packed
  int64_t tokens;     // B L, or T if packed
  bool packed;
  const int32_t* starts;  // packed: [B + 1]
  Mask mask;              // [B, L]
  // Written by find_tokens if there is a mask, else null.
  const int32_t* lengths;  // [B] number of real tokens
  const int32_t* firsts;   // [B] position of the first real token, or -1 if they are not contiguous
  const int32_t* places;   // [B, L] position of the r-th real token
  const int32_t* ranks;    // [B, L] rank r of a real token, -1 at padding
};

// beta at [(packed ? starts[b] : b stride_b) + m stride_m + r], for the r-th real token of sentence b; for its r-th token if the
// profile is "official".
struct Factors {
  const float* beta;
  int64_t stride_b;  // 0 if all sentences share one table
  int64_t stride_m;
};

#define S2SENT_ALIAS(name, ...) using name = s2sent::name<__VA_ARGS__>;
S2SENT_FOR_EACH_ARGUMENTS(S2SENT_ALIAS)
#undef S2SENT_ALIAS

// Writes a mask's lengths, firsts, places and ranks, and beta of profile "paper": 6 / sqrt(N l) c(y_m, r, l), computed in
// float64 and rounded once.
struct TokenFinder {
  Batch batch;
  int32_t* lengths;  // null without a mask, as the next three
  int32_t* firsts;
  int32_t* places;
  int32_t* ranks;
  int64_t num_blocks;  // N
  int64_t parts;       // M
  const int64_t* y;    // host [M]
  float* beta;         // or null
  int64_t stride_b;    // as in Factors
  int64_t stride_m;
};
cudaError_t find_tokens(const TokenFinder& args, cudaStream_t stream);

#define S2SENT_DECLARE(name, Arguments) cudaError_t name(const Arguments& args, cudaStream_t stream);
S2SENT_FOR_EACH_KERNEL(S2SENT_DECLARE)
#undef S2SENT_DECLARE
cudaError_t squeeze(const Squeeze& args, cudaStream_t stream);  // f and p
cudaError_t bottleneck(const Gate& args, cudaStream_t stream);  // s
cudaError_t multiply(const Product& args, cudaStream_t stream);

// v, f and g in one pass over the hidden states.
struct Select {
  Batch batch;
  DType dtype;
  int64_t num_blocks;  // N
  int64_t size;        // D
  int64_t parts;       // M
  const Rows* hidden;  // host [N]
  const float* alpha;  // [M, N]
  Factors factors;
  Gate gate;        // writes gate.gates
  float* squeezed;  // f [B, D]
  void* fused;      // v, dense, shaped like a hidden state
};

// Sets ``plan`` if the kernel supports the batch and, unless ``always``, is expected to be faster than the kernels above; else
// leaves it null. Does not read args.factors.
struct SelectPlan;
cudaError_t plan(const Select& args, bool always, std::shared_ptr<const SelectPlan>& plan);
cudaError_t select(const Select& args, const SelectPlan& plan, cudaStream_t stream);

}  // namespace s2sent::cuda
