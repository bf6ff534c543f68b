// Lists of a batch's real tokens, and the factors that weigh them, on the CPU.
#pragma once

#include <map>
#include <vector>

#include "batch.h"

namespace s2sent {

// The memory behind a Batch.
struct RealTokens {
  std::vector<int64_t> starts;
  std::vector<int64_t> places;

  // Packed [T, D]: sentence b is tokens [ends[b], ends[b + 1]), which the caller has checked.
  Batch packed(const int32_t* ends, int64_t sentences);

  // [B, L, D]; ``mask`` [B, L] or null.
  Batch padded(const bool* mask, int64_t sentences, int64_t size);
};

// beta [M, length] of each sentence.
struct TokenFactors {
  std::vector<const float*> beta;
  std::vector<int64_t> strides;

  TokenFactors(const TokenFactors&) = delete;

  // Profile ``official``: one table [M, L] for all.
  TokenFactors(const Batch& batch, const float* official);

  // Profile ``paper``: 6 / sqrt(N l) c(y_m, r, l) in float64 and rounded once, one table a length.
  TokenFactors(const Batch& batch, int64_t num_blocks, const std::vector<int64_t>& y);

 private:
  std::map<int64_t, std::vector<float>> tables_;
};

}  // namespace s2sent
