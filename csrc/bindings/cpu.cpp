// The ops on CPU tensors. torch's thread pool shares the items of every kernel.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "../cpu/launch.h"
#include "../cpu/tokens.h"
#include "memory.h"
#include "plan.h"

namespace s2sent::ops::cpu {
namespace {

// Types and constants. The kernels are qualified below: the ops have the same names.
using s2sent::cpu::Batch, s2sent::cpu::RealTokens, s2sent::cpu::TokenFactors;
using s2sent::cpu::Squeeze, s2sent::cpu::SqueezeBackward, s2sent::cpu::Fuse, s2sent::cpu::FuseBackward;
using s2sent::cpu::kGateFeatures, s2sent::cpu::kGateSentences, s2sent::cpu::kProductColumns;

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
      STD_TORCH_CHECK(ends[b] >= (b ? ends[b - 1] : 0), "s2sent_native: cu_seqlens decreases");
    }
    STD_TORCH_CHECK(
        ends[0] == 0 && ends[count] == sentences.tokens(), "s2sent_native: cu_seqlens does not span the tokens");
    batch = real.packed(ends, count);
  }

  RealBatch(const RealBatch&) = delete;
};

TokenFactors factors_of(
    const Sentences& sentences, const Batch& batch, int64_t num_blocks, int64_t parts, const Ints& y,
    const Optional& official) {
  if (official) return {batch, sentences.check.floats(official, {parts, batch.size}, "beta")};
  STD_TORCH_CHECK(int64_t(y.size()) == parts, "s2sent_native: expected a frequency for every part");
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
int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Tokens of a sentence: L, or the average if packed.
int64_t typical_length(const Sentences& sentences) {
  return sentences.packed ? sentences.tokens() / std::max<int64_t>(1, sentences.count) : sentences.length();
}

// Shares the items of excite, with scratch for ``copies`` of an item's gates.
template <class Work>
void share_gate(const Gate& args, int64_t copies, const Work& work) {
  const int64_t sentences = kGateSentences, features = kGateFeatures;
  const int64_t items = (args.sentences + sentences - 1) / sentences * ((args.size + features - 1) / features);
  const int64_t scratch_size = features * (args.width + copies * std::min(args.sentences, sentences) * args.num_blocks);
  share(items, grain_of(args.num_blocks * features * args.width), scratch_size, work);
}

void share_bottleneck(const Gate& args) {
  share(args.width, grain_of(args.sentences * args.size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::bottleneck(args, begin, end);
  });
}

void share_excite(const Gate& args) {
  share_gate(args, 1, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::excite(args, begin, end, scratch);
  });
}

void share_squeeze(const Sentences& sentences, Squeeze& args, const TokenFactors& factors) {
  const std::unique_ptr<float[]> sums(new float[size_t(sentences.count * args.num * args.size)]);
  args.factors = factors.view();
  args.sums = sums.get();
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num, grain, 2 * args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::sum_tokens(args, begin, end, scratch);
  });
  share(sentences.count, grain_of(args.num * args.size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::sum_blocks(args, begin, end);
  });
}

void share_fuse(const Sentences& sentences, const Fuse& args) {
  const int64_t grain = grain_of(args.num_blocks * args.size);
  share(sentences.tokens(), grain, args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::fuse(args, begin, end, scratch);
  });
}

}  // namespace

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling,
    const Tensor& squeezed, const Optional& pooled) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  Squeeze args = squeeze_arguments<Squeeze>(
      sentences, dtype_of(hidden_states[0]), hidden, first_block, num_blocks, alpha, beta.has_value(), pooling,
      squeezed, pooled);
  args.batch = real.batch;
  share_squeeze(sentences, args, factors_of(sentences, real.batch, num_blocks, args.parts, y, beta));
}

void squeeze_backward(
    const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates,
    const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Optional& beta, int64_t pooling, const Tensors& grads) {
  STD_TORCH_CHECK(!grads.empty(), "s2sent_native: gradients do not fit");
  const Sentences sentences(grads[0], shape, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<void*> into = gradients_into(sentences.check, grads, shape);
  SqueezeBackward args = squeeze_backward_arguments<SqueezeBackward>(
      sentences, grads, into, alpha, beta.has_value(), pooling, grad_squeezed, grad_pooled, grad_fused, gates);
  const TokenFactors factors = factors_of(sentences, real.batch, args.num_blocks, args.parts, y, beta);
  args.batch = real.batch;
  args.factors = factors.view();
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num_blocks, grain, 3 * args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::squeeze_backward(args, begin, end, scratch);
  });
}

// ---------------------------------------------------------------- gate

void gate(
    const Tensor& squeezed, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& gates) {
  const Gate args =
      gate_arguments(squeezed, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps, bottleneck, gates);
  share_bottleneck(args);
  share_excite(args);
}

void gate_pool(
    const Tensor& squeezed, const Tensor& pooled, S2SENT_GATE_PARAMETERS int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& output) {
  const Gate args =
      gate_pool_arguments(squeezed, pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, output);
  share_bottleneck(args);
  share_excite(args);
}

void gate_backward(
    const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled,
    S2SENT_GATE_PARAMETERS int64_t activation, double eps, const Tensor& bottleneck, const Optional& grad_pooled,
    const Tensor& grad_logits, const Tensor& grad_normed, const Optional& normed) {
  const Gate args = gate_backward_arguments(
      grad_gates, grad_output, squeezed, pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, grad_pooled,
      grad_logits, grad_normed, normed);
  share_bottleneck(args);
  share_gate(args, 2, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::excite_backward(args, begin, end, scratch);
  });
}

// x [B, rows] @ weight [rows, columns]
void multiply(const Tensor& x, const Tensor& weight, const Tensor& result) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "s2sent_native: expected two matrices");
  const int64_t count = x.size(0), columns = weight.size(1), chunks = product_chunks(weight);
  const std::unique_ptr<float[]> partial(new float[size_t(chunks * count * columns)]);
  const Product args = product_arguments(x, weight, partial.get(), result);
  const int64_t tiles = (columns + kProductColumns - 1) / kProductColumns;
  share(chunks * tiles, grain_of(count * columns * 64), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::multiply_rows(args, begin, end);
  });
  share(count, grain_of(chunks * columns), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::sum_products(args, begin, end);
  });
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& fused) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  Fuse args = fuse_arguments<Fuse>(sentences, hidden_states[0], hidden, gates, fused);
  args.batch = real.batch;
  share_fuse(sentences, args);
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& grad_gates) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  FuseBackward args = fuse_backward_arguments<FuseBackward>(
      sentences, hidden_states[0], hidden, grad_fused, grad_gates);
  args.batch = real.batch;
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num_blocks, grain, args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::fuse_backward(args, begin, end, scratch);
  });
}

// ---------------------------------------------------------------- a plan's calls

Tensors planned_pool(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling,
    bool keep) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kAnyBlocks);
  if (!call.sentences) return {};
  const Sentences& sentences = *call.sentences;
  Gate& gate = call.gate;
  const Ints wide = {gate.sentences, gate.size}, blocks = {gate.sentences, gate.num_blocks, gate.size};
  Tensors results = {empty(sentences.check, wide, hidden_states[0].scalar_type())};
  Squeeze squeeze = call.squeeze<Squeeze>(pooling_of(pooling));
  Scratch scratch;
  if (keep) {
    results.push_back(empty(sentences.check, wide, ScalarType::Float));
    results.push_back(empty(sentences.check, blocks, ScalarType::Float));
    squeeze.squeezed = static_cast<float*>(results[1].mutable_data_ptr());
    squeeze.pooled = static_cast<float*>(results[2].mutable_data_ptr());
  } else {
    scratch.want(squeeze.squeezed, gate.sentences * gate.size);
    scratch.want(squeeze.pooled, call.rows());
  }
  scratch.want(gate.bottleneck, gate.sentences * gate.width);
  scratch.allocate(sentences.check);
  const RealBatch real(sentences);
  squeeze.batch = real.batch;
  share_squeeze(sentences, squeeze, {real.batch, gate.num_blocks, call.plan->y});
  gate.squeezed = squeeze.squeezed;
  gate.pooled = squeeze.pooled;
  gate.output = results[0].mutable_data_ptr();
  gate.dtype = call.dtype;
  share_bottleneck(gate);
  share_excite(gate);
  return results;
}

Tensors planned_select(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, bool keep) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kAnyBlocks);
  if (!call.sentences) return {};
  const Sentences& sentences = *call.sentences;
  Gate& gate = call.gate;
  Tensors results = {empty(sentences.check, sentences.shape, hidden_states[0].scalar_type())};
  Squeeze squeeze = call.squeeze<Squeeze>(Pooling::kNone);
  Scratch scratch;
  if (keep) {
    results.push_back(empty(sentences.check, {gate.sentences, gate.size}, ScalarType::Float));
    results.push_back(empty(sentences.check, {gate.sentences, gate.num_blocks, gate.size}, ScalarType::Float));
    squeeze.squeezed = static_cast<float*>(results[1].mutable_data_ptr());
    gate.gates = static_cast<float*>(results[2].mutable_data_ptr());
  } else {
    scratch.want(squeeze.squeezed, gate.sentences * gate.size);
    scratch.want(gate.gates, call.rows());
  }
  scratch.want(gate.bottleneck, gate.sentences * gate.width);
  scratch.allocate(sentences.check);
  const RealBatch real(sentences);
  squeeze.batch = real.batch;
  share_squeeze(sentences, squeeze, {real.batch, gate.num_blocks, call.plan->y});
  gate.squeezed = squeeze.squeezed;
  share_bottleneck(gate);
  share_excite(gate);
  Fuse fuse = {real.batch, call.dtype, gate.num_blocks, gate.size, call.hidden.data(), gate.gates, nullptr};
  fuse.fused = results[0].mutable_data_ptr();
  share_fuse(sentences, fuse);
  return results;
}

}  // namespace s2sent::ops::cpu
