// The order of every sum that more than one CUDA kernel computes. Changing a number here changes bits, on every path alike.
#pragma once

#include <cstdint>

namespace s2sent::cuda {

// squeeze, in squeeze.cu and sm90/: a sentence's real tokens in ascending order form groups of kGroupTokens. Group i is added to
// running sum i % kAccumulators. Within a group the first and the second half are chains of fused multiply-adds and their sum is
// added. After kChunkGroups groups a running sum is added to an outer sum and cleared; that sum chunk bounds how many terms a
// running sum holds, and so its rounding error: 16 groups, as many terms as PyTorch's running sums. So sentences of up to 512
// tokens are one chunk. The tokens of an incomplete last group are added one by one. Then the
// accumulators form a tree, (0 + 1) + (2 + 3), and the Transformer blocks are added ascending, weighted by alpha.
constexpr int kGroupTokens = 8;
constexpr int kGroupHalf = kGroupTokens / 2;
constexpr int kAccumulators = 4;
constexpr int kChunkGroups = 16;
static_assert(kGroupTokens == 8 && kAccumulators == 4, "the kernels spell these trees out");

// fuse_backward.cu: as squeeze, but a group is one chain of fused multiply-adds.
constexpr int kGradGroupTokens = 4;
constexpr int kGradAccumulators = 4;
constexpr int kGradChunkGroups = 16;
static_assert(kGradAccumulators == 4, "the kernel spells this tree out");

// W1 f, in gate.cu and sm90/: slices of slice_of(D) features; a slice has kQuarters quarters, a quarter kRunningSums running sums
// over every kRunningSums-th feature. Running sums and quarters are added as trees, slices ascending.
constexpr int64_t kLongSlice = 64, kShortSlice = 48;
constexpr int kQuarters = 4;
constexpr int kRunningSums = 4;
__host__ __device__ constexpr int64_t slice_of(int64_t size) {
  return size % kShortSlice == 0 ? kShortSlice : kLongSlice;
}

}  // namespace s2sent::cuda
