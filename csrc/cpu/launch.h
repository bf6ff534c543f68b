// The interface of the CPU kernels. A call computes the items [begin, end), so that the caller's threads can share them; no sum
// runs over items. ``scratch`` belongs to the calling thread.
#pragma once

#include "batch.h"

namespace s2sent::cpu {

using Squeeze = s2sent::Squeeze<Batch, Factors>;
using SqueezeBackward = s2sent::SqueezeBackward<Batch, Factors>;
using Fuse = s2sent::Fuse<Batch>;
using FuseBackward = s2sent::FuseBackward<Batch>;

// Items (b, n): S_n and p_n. Scratch: 2 D floats.
void sum_tokens(const Squeeze& args, int64_t begin, int64_t end, float* scratch);

// Items b: f = sum_n alpha_n S_n, added to what ``squeezed`` holds unless first_block is 0.
void sum_blocks(const Squeeze& args, int64_t begin, int64_t end);

// Items (b, n): du_n. Scratch: 3 D floats.
void squeeze_backward(const SqueezeBackward& args, int64_t begin, int64_t end, float* scratch);

// Items h: s.
void bottleneck(const Gate& args, int64_t begin, int64_t end);

constexpr int64_t kGateSentences = 16;  // sentences of an item, which share its slice of W2
constexpr int64_t kGateFeatures = 32;   // features of an item, for every Transformer block

// Items (kGateSentences sentences, kGateFeatures features), features fastest: g, or o.
// Scratch: kGateFeatures (H + kGateSentences N) floats.
void excite(const Gate& args, int64_t begin, int64_t end, float* scratch);

// Items as in excite: dp and the gradients inside the gate. Scratch: kGateFeatures (H + 2 kGateSentences N) floats.
void excite_backward(const Gate& args, int64_t begin, int64_t end, float* scratch);

constexpr int64_t kProductColumns = 256;  // columns of an item of multiply_rows

// Items (kProductRows rows, kProductColumns columns), columns fastest: partial sums of x @ weight.
void multiply_rows(const Product& args, int64_t begin, int64_t end);

// Items b: the sum of the partial sums.
void sum_products(const Product& args, int64_t begin, int64_t end);

// Items are rows of v: b L + l, or t if packed. Scratch: D floats.
void fuse(const Fuse& args, int64_t begin, int64_t end, float* scratch);

// Items (b, n): dg_n. Scratch: D floats.
void fuse_backward(const FuseBackward& args, int64_t begin, int64_t end, float* scratch);

}  // namespace s2sent::cpu
