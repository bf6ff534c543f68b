// Shared by the ops on CPU tensors. torch's thread pool shares the items of every kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "../cpu/launch.h"
#include "../cpu/tokens.h"
#include "gradients.h"
#include "plan.h"

namespace s2sent::ops::cpu {

// Types and constants. The ops qualify the kernels, which have the same names.
using s2sent::cpu::Batch, s2sent::cpu::RealTokens, s2sent::cpu::TokenFactors;
using s2sent::cpu::Squeeze, s2sent::cpu::SqueezeBackward, s2sent::cpu::Fuse, s2sent::cpu::FuseBackward;
using s2sent::cpu::kCascadeScratch, s2sent::cpu::kGateFeatures, s2sent::cpu::kGateSentences, s2sent::cpu::kProductColumns;

constexpr int64_t kAnyBlocks = std::numeric_limits<int64_t>::max();  // the CPU kernels take any N

// A batch's real tokens; owns their memory.
struct RealBatch {
  RealTokens real;
  Batch batch;

  explicit RealBatch(const Sentences& sentences) {
    const int32_t* ends = sentences.starts;
    const int64_t count = sentences.count;
    if (!sentences.packed) {
      batch = real.padded(sentences.mask, count, sentences.length());
      return;
    }
    for (int64_t b = 0; b <= count; ++b) {
      require(ends[b] >= (b ? ends[b - 1] : 0), "cu_seqlens decreases");
    }
    require(
        ends[0] == 0 && ends[count] == sentences.tokens(), "cu_seqlens does not span the tokens");
    batch = real.packed(ends, count);
  }

  RealBatch(const RealBatch&) = delete;
};

inline TokenFactors factors_of(
    const Sentences& sentences, const Batch& batch, int64_t num_blocks, int64_t parts, const Ints& y,
    const Optional& official) {
  if (official) return {batch, sentences.check.floats(official, {parts, batch.size}, "beta")};
  check_frequencies(y, parts);
  return {batch, num_blocks, y};
}

// Calls work(begin, end, scratch) on the threads of torch's pool; each gets ``scratch_size`` floats.
template <class Work>
void share(int64_t items, int64_t grain, int64_t scratch_size, const Work& work) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[size_t(scratch_size)]);
    work(begin, end, scratch.get());
  });
}

// The fewest items a thread gets, if each reads ``elements``: fewer do not pay for waking a thread.
inline int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Tokens of a sentence: L, or the average if packed.
inline int64_t typical_length(const Sentences& sentences) {
  return sentences.packed ? sentences.tokens() / std::max<int64_t>(1, sentences.count) : sentences.length();
}

// Shares the items of excite, with scratch for ``copies`` of an item's gates.
template <class Work>
inline void share_gate(const Gate& args, int64_t copies, const Work& work) {
  const int64_t sentences = kGateSentences, features = kGateFeatures;
  const int64_t items = (args.sentences + sentences - 1) / sentences * ((args.size + features - 1) / features);
  const int64_t scratch_size = features * (args.width + copies * std::min(args.sentences, sentences) * args.num_blocks);
  share(items, grain_of(args.num_blocks * features * args.width), scratch_size, work);
}

inline void share_bottleneck(const Gate& args) {
  share(args.width, grain_of(args.sentences * args.size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::bottleneck(args, begin, end);
  });
}

inline void share_excite(const Gate& args) {
  share_gate(args, 1, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::excite(args, begin, end, scratch);
  });
}

inline void share_statistics(const BatchStatistics& args) {
  const int64_t tiles = (args.gate.size + kGateFeatures - 1) / kGateFeatures, work = args.gate.width + args.gate.sentences;
  const int64_t grain = grain_of(kGateFeatures * args.gate.width * args.gate.sentences);
  share(args.gate.num_blocks * tiles, grain, kGateFeatures * work, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::batch_statistics(args, begin, end, scratch);
  });
}

// The gate with the statistics of the batch.
inline void share_gate_in_training(BatchStatistics& args) {
  args.use();
  share_bottleneck(args.gate);
  share_statistics(args);
  share_excite(args.gate);
}

inline void share_product(const Product& args) {
  const int64_t chunks = product_chunks(args.rows), tiles = (args.columns + kProductColumns - 1) / kProductColumns;
  share(chunks * tiles, grain_of(args.sentences * args.columns * 64), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::multiply_rows(args, begin, end);
  });
  share(args.sentences, grain_of(chunks * args.columns), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::sum_products(args, begin, end);
  });
}

// dp, df, and the gradients of the gate's tensors.
inline void share_gate_backward(const GateBackward& back) {
  const GateGradients& args = back.args;
  const int64_t B = args.gate.sentences, N = args.gate.num_blocks, D = args.gate.size, H = args.gate.width;
  share_bottleneck(args.gate);
  share_gate(args.gate, 2, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::excite_backward(args.gate, begin, end, scratch);
  });
  const int64_t tiles = (N * D + kGateFeatures - 1) / kGateFeatures;
  share(tiles, grain_of(kGateFeatures * B * H), kGateFeatures * B + H, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::up_gradients(args, begin, end, scratch);
  });
  share_product(back.to_down);
  share(H + N + 1, grain_of(B * D), B + D, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::down_gradients(args, begin, end, scratch);
  });
  share_product(back.to_squeezed);
}

inline void share_squeeze_backward(const Sentences& sentences, SqueezeBackward& args, const TokenFactors& factors) {
  args.factors = factors.view();
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num_blocks, grain, 3 * args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::squeeze_backward(args, begin, end, scratch);
  });
}

inline void share_squeeze(const Sentences& sentences, Squeeze& args, const TokenFactors& factors) {
  const std::unique_ptr<float[]> sums(new float[size_t(sentences.count * args.num * args.size)]);
  args.factors = factors.view();
  args.sums = sums.get();
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num, grain, 2 * kCascadeScratch * args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::sum_tokens(args, begin, end, scratch);
  });
  share(sentences.count, grain_of(args.num * args.size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::sum_blocks(args, begin, end);
  });
}

inline void share_fuse(const Sentences& sentences, const Fuse& args) {
  const int64_t grain = grain_of(args.num_blocks * args.size);
  share(sentences.tokens(), grain, args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::fuse(args, begin, end, scratch);
  });
}

inline void share_fuse_backward(const Sentences& sentences, const FuseBackward& args) {
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num_blocks, grain, kCascadeScratch * args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::fuse_backward(args, begin, end, scratch);
  });
}

}  // namespace s2sent::ops::cpu
