// A batch's real tokens and their factors beta, listed by the host.
#pragma once

#include <map>
#include <vector>

#include "batch.h"

namespace s2sent::cpu {

// Owns the memory of a Batch.
struct RealTokens {
  std::vector<int64_t> starts;
  std::vector<int64_t> places;

  // Packed [T, D]: sentence b is tokens [ends[b], ends[b + 1]); the caller has checked ends.
  Batch packed(const int32_t* ends, int64_t sentences);

  // [B, L, D]
  Batch padded(const Mask& mask, int64_t sentences, int64_t size);
};

// Owns the memory of Factors.
struct TokenFactors {
  TokenFactors(const TokenFactors&) = delete;

  // Profile "official": one table [M, L] for all sentences.
  TokenFactors(const Batch& batch, const float* official);

  // Profile "paper": 6 / sqrt(N l) c(y_m, r, l), computed in float64 and rounded once; one table for each length.
  TokenFactors(const Batch& batch, int64_t num_blocks, const std::vector<int64_t>& y);

  Factors view() const { return {beta_.data(), strides_.data()}; }

 private:
  std::vector<const float*> beta_;
  std::vector<int64_t> strides_;
  std::map<int64_t, std::vector<float>> tables_;
};

}  // namespace s2sent::cpu
