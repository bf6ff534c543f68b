// The interface of the CPU kernels. A call computes the items [begin, end), so that the caller's threads can share them; no sum
// runs over items. ``scratch`` belongs to the calling thread.
#pragma once

#include "batch.h"
#include "cascade.h"

namespace s2sent::cpu {

#define S2SENT_ALIAS(name, ...) using name = s2sent::name<__VA_ARGS__>;
S2SENT_FOR_EACH_ARGUMENTS(S2SENT_ALIAS)
#undef S2SENT_ALIAS

// A kernel's file tells what its items are and how much scratch it needs.
#define S2SENT_DECLARE(name, Arguments) void name(const Arguments& args, int64_t begin, int64_t end, float* scratch);
S2SENT_FOR_EACH_KERNEL(S2SENT_DECLARE)
#undef S2SENT_DECLARE

// Items (b, n): S_n and p_n. Scratch: 2 kCascadeScratch D floats.
void sum_tokens(const Squeeze& args, int64_t begin, int64_t end, float* scratch);

// Items b: f = sum_n alpha_n S_n, added to what ``squeezed`` holds unless first_block is 0.
void sum_blocks(const Squeeze& args, int64_t begin, int64_t end);

// Items h: s.
void bottleneck(const Gate& args, int64_t begin, int64_t end);

constexpr int64_t kGateSentences = 16;  // sentences of an item, which share its slice of W2
constexpr int64_t kGateFeatures = 32;   // features of an item, for every Transformer block

constexpr int64_t kProductColumns = 256;  // columns of an item of multiply_rows

// Items (kProductRows rows, kProductColumns columns), columns fastest: partial sums of x @ weight.
void multiply_rows(const Product& args, int64_t begin, int64_t end);

// Items b: the sum of the partial sums.
void sum_products(const Product& args, int64_t begin, int64_t end);

}  // namespace s2sent::cpu
