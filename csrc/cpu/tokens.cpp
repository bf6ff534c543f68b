#include "tokens.h"

#include <algorithm>
#include <cmath>

namespace s2sent::cpu {
namespace {

std::vector<float> table(int64_t length, int64_t num_blocks, const std::vector<int64_t>& y) {
  const double pi = 3.14159265358979323846, period = double(length);
  std::vector<float> values(y.size() * size_t(length), 0.0f);
  for (size_t m = 0; m < y.size(); ++m) {
    if (y[m] >= length) continue;
    float* to = values.data() + m * size_t(length);
    size_t same = 0;
    while (y[same] != y[m]) ++same;
    if (same < m) {
      std::copy_n(values.data() + same * size_t(length), length, to);
      continue;
    }
    const double norm = 1.0 + (std::sqrt(2.0) - 1.0) * (y[m] > 0), scale = 6.0 / std::sqrt(double(num_blocks) * period);
    for (int64_t r = 0; r < length; ++r) {
      const int64_t half_steps = y[m] * (2 * r + 1) % (4 * length);
      to[r] = float(scale * (std::cos(double(half_steps) * (pi / 2) / period) * norm / std::sqrt(period)));
    }
  }
  return values;
}

}  // namespace

Batch RealTokens::packed(const int32_t* ends, int64_t sentences) {
  starts.assign(ends, ends + sentences + 1);
  return {sentences, 0, true, starts.data(), nullptr};
}

Batch RealTokens::padded(const Mask& mask, int64_t sentences, int64_t size) {
  starts.assign(size_t(sentences) + 1, 0);
  places.reserve(mask ? size_t(sentences * size) + 1 : 0);  // data() of an empty list must not be null
  for (int64_t b = 0; b < sentences; ++b) {
    for (int64_t l = 0; mask && l < size; ++l) {
      if (mask[b * size + l]) places.push_back(l);
    }
    starts[b + 1] = mask ? int64_t(places.size()) : starts[b] + size;
  }
  return {sentences, size, false, starts.data(), mask ? places.data() : nullptr};
}

TokenFactors::TokenFactors(const Batch& batch, const float* official)
    : beta_(size_t(batch.sentences), official), strides_(size_t(batch.sentences), batch.size) {}

TokenFactors::TokenFactors(const Batch& batch, int64_t num_blocks, const std::vector<int64_t>& y) {
  for (int64_t b = 0; b < batch.sentences; ++b) {
    const int64_t length = batch.length(b);
    if (!tables_.count(length)) tables_[length] = table(length, num_blocks, y);
    beta_.push_back(tables_[length].data());
    strides_.push_back(length);
  }
}

}  // namespace s2sent::cpu
