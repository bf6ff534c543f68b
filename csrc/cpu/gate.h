// The C interface of gate.cpp; its arguments stand in stages.h.
#pragma once

#include "batch.h"

namespace s2sent {

constexpr int64_t kGateSentences = 16;  // of an item of excite: they share its slice of W2
constexpr int64_t kGateFeatures = 32;   // of every block, of an item

// Items are h: s.
void bottleneck(const Gate& args, int64_t begin, int64_t end);

// Items are (sentences kGateSentences at a time, features kGateFeatures at a time), features first.
// ``scratch`` holds kGateFeatures (H + kGateSentences N) floats.
void excite(const Gate& args, int64_t begin, int64_t end, float* scratch);

// Items as of excite: dp and the gradients inside the gate. ``scratch`` holds kGateFeatures (H + 2 kGateSentences N) floats.
void excite_backward(const Gate& args, int64_t begin, int64_t end, float* scratch);

constexpr int64_t kProductColumns = 256;  // and kProductRows rows, of an item of multiply_rows

// Items are (kProductRows rows at a time, kProductColumns columns at a time), columns first: partial sums of x @ weight.
void multiply_rows(const Product& args, int64_t begin, int64_t end);

// Items are sentences: the chunks' sum.
void sum_products(const Product& args, int64_t begin, int64_t end);

}  // namespace s2sent
