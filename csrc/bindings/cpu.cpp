// The ops on CPU tensors: arguments into the kernels' structs, and their items shared between torch's threads.

#include <memory>

#include "bindings.h"
#include "cpu/fuse.h"
#include "cpu/gate.h"
#include "cpu/squeeze.h"
#include "cpu/tokens.h"

namespace s2sent::ops::cpu {
namespace {

// A batch's description and the memory behind it.
struct Sentences {
  Checks check;
  Ints shape;  // of a hidden state
  RealTokens real;
  Batch batch;

  Sentences(const Tensor& first, const Ints& shape, const Optional& mask, const Optional& cu_seqlens)
      : check(first), shape(shape) {
    STD_TORCH_CHECK(shape.size() == (cu_seqlens ? 2 : 3), "s2sent_native: hidden states have a wrong rank");
    if (cu_seqlens) {
      const int64_t count = cu_seqlens->numel() - 1;
      check.dense(*cu_seqlens, {count + 1}, ScalarType::Int, "cu_seqlens");
      const int32_t* ends = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
      for (int64_t b = 0; b <= count; ++b) {
        STD_TORCH_CHECK(ends[b] >= (b ? ends[b - 1] : 0), "s2sent_native: cu_seqlens decreases");
      }
      STD_TORCH_CHECK(ends[0] == 0 && ends[count] == shape[0], "s2sent_native: cu_seqlens does not span the tokens");
      batch = real.packed(ends, count);
      return;
    }
    if (mask) check.dense(*mask, {shape[0], shape[1]}, ScalarType::Bool, "attention_mask");
    batch = real.padded(mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, shape[0], shape[1]);
  }

  Sentences(const Sentences&) = delete;

  int64_t size() const { return shape.back(); }

  Rows rows(const Tensor& tensor, ScalarType dtype) const {
    check.rows(tensor, shape, dtype);
    if (batch.packed) return {tensor.const_data_ptr(), 0, tensor.stride(0)};
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  }

  std::vector<Rows> rows(const Tensors& tensors) const {
    std::vector<Rows> all;
    for (const Tensor& tensor : tensors) all.push_back(rows(tensor, tensors[0].scalar_type()));
    return all;
  }
};

TokenFactors factors_of(
    const Sentences& sentences, int64_t num_blocks, int64_t parts, const Ints& y, const Optional& official) {
  if (official) return {sentences.batch, sentences.check.floats(official, {parts, sentences.batch.size}, "beta")};
  STD_TORCH_CHECK(int64_t(y.size()) == parts, "s2sent_native: expected a frequency for every part");
  return {sentences.batch, num_blocks, y};
}

// Calls work(begin, end, scratch) on the threads of torch's pool, with ``scratch_size`` floats each.
template <class Work>
void share(int64_t items, int64_t grain, int64_t scratch_size, const Work& work) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[size_t(scratch_size)]);
    work(begin, end, scratch.get());
  });
}

// Items a thread takes at least, where each reads ``elements``: fewer are not worth waking a thread.
int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Calls work for the items of gate.h, with ``copies`` of the item's gates in the scratch.
template <class Work>
void share_gate(const Gate& args, int64_t copies, const Work& work) {
  const int64_t sentences = kGateSentences, features = kGateFeatures;
  const int64_t items = (args.sentences + sentences - 1) / sentences * ((args.size + features - 1) / features);
  const int64_t scratch_size = features * (args.width + copies * std::min(args.sentences, sentences) * args.num_blocks);
  share(items, grain_of(args.num_blocks * features * args.width), scratch_size, work);
}

}  // namespace

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta,
    int64_t pooling, const Tensor& squeezed, const Optional& pooled) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(hidden_states[0], shape_of(hidden_states[0]), mask, cu_seqlens);
  const Batch& batch = sentences.batch;
  const int64_t num = int64_t(hidden_states.size()), size = sentences.size(), parts = alpha.size(0);
  check_squeeze(first_block, num, num_blocks, parts, size, pooling);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  const TokenFactors factors = factors_of(sentences, num_blocks, parts, y, beta);
  const std::unique_ptr<float[]> sums(new float[size_t(batch.sentences * num * size)]);
  Squeeze args = {
      batch,
      dtype_of(hidden_states[0]),
      num,
      first_block,
      num_blocks,
      size,
      parts,
      pooled ? Pooling(pooling) : Pooling::kNone,
      hidden.data(),
      sentences.check.floats(alpha, {parts, num_blocks}, "alpha"),
      factors.beta.data(),
      factors.strides.data(),
      beta.has_value(),
      sums.get(),
      pooled ? sentences.check.written(*pooled, {batch.sentences, num_blocks, size}, "pooled") : nullptr,
      sentences.check.written(squeezed, {batch.sentences, size}, "squeezed"),
  };
  const int64_t tokens = batch.packed ? sentences.shape[0] / std::max<int64_t>(1, batch.sentences) : batch.size;
  share(batch.sentences * num, grain_of(tokens * size), 2 * size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::sum_tokens(args, begin, end, scratch);
  });
  share(batch.sentences, grain_of(num * size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::sum_blocks(args, begin, end);
  });
}

void squeeze_backward(
    const Optional& grad_squeezed, const Optional& grad_pooled,
    const Optional& grad_fused, const Optional& gates, const Ints& shape,
    const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Optional& beta, int64_t pooling, const Tensors& grads) {
  STD_TORCH_CHECK(
      !grads.empty() && grad_fused.has_value() == gates.has_value(), "s2sent_native: gradients do not fit");
  const Sentences sentences(grads[0], shape, mask, cu_seqlens);
  const Batch& batch = sentences.batch;
  const int64_t num_blocks = int64_t(grads.size()), size = sentences.size(), parts = alpha.size(0);
  check_squeeze(0, num_blocks, num_blocks, parts, size, pooling);
  const TokenFactors factors = factors_of(sentences, num_blocks, parts, y, beta);
  const std::vector<void*> into = gradients_into(sentences.check, grads, shape);
  std::optional<Rows> fused;
  if (grad_fused) fused = sentences.rows(*grad_fused, grads[0].scalar_type());
  const SqueezeBackward args = {
      batch,
      dtype_of(grads[0]),
      num_blocks,
      size,
      parts,
      Pooling(pooling),
      sentences.check.floats(alpha, {parts, num_blocks}, "alpha"),
      factors.beta.data(),
      factors.strides.data(),
      beta.has_value(),
      sentences.check.floats(grad_squeezed, {batch.sentences, size}, "grad_squeezed"),
      sentences.check.floats(grad_pooled, {batch.sentences, num_blocks, size}, "grad_pooled"),
      fused ? &*fused : nullptr,
      sentences.check.floats(gates, {batch.sentences, num_blocks, size}, "gates"),
      into.data(),
  };
  const int64_t tokens = batch.packed ? shape[0] / std::max<int64_t>(1, batch.sentences) : batch.size;
  share(batch.sentences * num_blocks, grain_of(tokens * size), 3 * size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::squeeze_backward(args, begin, end, scratch);
  });
}

// ---------------------------------------------------------------- gate

void gate(
    const Tensor& squeezed, const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight,
    const Tensor& up_bias, const Optional& norm_weight, const Optional& norm_bias,
    const Optional& running_mean, const Optional& running_var,
    const Optional& prior, int64_t num_blocks, bool relu, double eps, const Tensor& bottleneck,
    const Optional& gates, const Optional& pooled, const Optional& output,
    const Optional& grad_gates, const Optional& grad_output,
    const Optional& grad_pooled, const Optional& grad_logits,
    const Optional& grad_normed, const Optional& normed) {
  const Gate args = gate_arguments(
      squeezed, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, running_mean, running_var, prior,
      num_blocks, relu, eps, bottleneck, gates, pooled, output, grad_gates, grad_output, grad_pooled, grad_logits,
      grad_normed, normed);
  share(args.width, grain_of(args.sentences * args.size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::bottleneck(args, begin, end);
  });
  if (grad_logits) {
    share_gate(args, 2, [&](int64_t begin, int64_t end, float* scratch) {
      s2sent::excite_backward(args, begin, end, scratch);
    });
  } else {
    share_gate(args, 1, [&](int64_t begin, int64_t end, float* scratch) { s2sent::excite(args, begin, end, scratch); });
  }
}

// x [B, rows] @ weight [rows, columns], each sentence's sum in one order.
void multiply(const Tensor& x, const Tensor& weight, const Tensor& result) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "s2sent_native: expected two matrices");
  const int64_t count = x.size(0), columns = weight.size(1), chunks = product_chunks(weight);
  const std::unique_ptr<float[]> partial(new float[size_t(chunks * count * columns)]);
  const Product args = product_arguments(x, weight, partial.get(), result);
  const int64_t tiles = (columns + kProductColumns - 1) / kProductColumns;
  share(chunks * tiles, grain_of(count * columns * 64), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::multiply_rows(args, begin, end);
  });
  share(count, grain_of(chunks * columns), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::sum_products(args, begin, end);
  });
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& fused) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(hidden_states[0], shape_of(hidden_states[0]), mask, cu_seqlens);
  const Batch& batch = sentences.batch;
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size();
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  sentences.check.dense(fused, sentences.shape, hidden_states[0].scalar_type(), "fused");
  const Fuse args = {
      batch,
      dtype_of(hidden_states[0]),
      num_blocks,
      size,
      hidden.data(),
      sentences.check.floats(gates, {batch.sentences, num_blocks, size}, "gates"),
      fused.mutable_data_ptr(),
  };
  const int64_t rows = batch.packed ? sentences.shape[0] : batch.sentences * batch.size;
  share(rows, grain_of(num_blocks * size), size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::fuse(args, begin, end, scratch);
  });
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& grad_gates) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(hidden_states[0], shape_of(hidden_states[0]), mask, cu_seqlens);
  const Batch& batch = sentences.batch;
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size();
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  const FuseBackward args = {
      batch,
      dtype_of(hidden_states[0]),
      num_blocks,
      size,
      hidden.data(),
      sentences.rows(grad_fused, hidden_states[0].scalar_type()),
      sentences.check.written(grad_gates, {batch.sentences, num_blocks, size}, "grad_gates"),
  };
  const int64_t tokens = batch.packed ? sentences.shape[0] / std::max<int64_t>(1, batch.sentences) : batch.size;
  share(batch.sentences * num_blocks, grain_of(tokens * size), size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::fuse_backward(args, begin, end, scratch);
  });
}

}  // namespace s2sent::ops::cpu
