// The ops on CUDA tensors: arguments into the launchers' structs, scratch memory from torch's allocator, on its current stream.
// Nothing here waits for the GPU.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"
#include "cuda/launch.h"

namespace s2sent::ops::cuda {
namespace {

using namespace s2sent::cuda;  // the launchers; an op of the same name stands in ops::cuda

// The device of the tensors, made current, and its stream.
struct Stream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Stream(const Checks& check) : guard(check.index) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(check.index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  operator cudaStream_t() const { return stream; }
};

void launched(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "s2sent_native: ", name, ": ", cudaGetErrorString(error));
}

Tensor scratch(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>{count}, dtype);
}

float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

// A batch's description, and the memory behind its list of real tokens and their factors.
struct Sentences {
  Checks check;
  Ints shape;  // of a hidden state
  Batch batch = {};
  Factors factors = {};
  Optional lists, table;

  Sentences(const Tensor& first, const Ints& shape, const Optional& mask, const Optional& cu_seqlens)
      : check(first), shape(shape) {
    STD_TORCH_CHECK(shape.size() == (cu_seqlens ? 2 : 3), "s2sent_native: hidden states have a wrong rank");
    batch.packed = cu_seqlens.has_value();
    batch.sentences = batch.packed ? cu_seqlens->numel() - 1 : shape[0];
    batch.size = batch.packed ? 0 : shape[1];
    batch.tokens = batch.packed ? shape[0] : shape[0] * shape[1];
    if (batch.packed) {
      check.dense(*cu_seqlens, {batch.sentences + 1}, ScalarType::Int, "cu_seqlens");
      batch.starts = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    } else if (mask) {
      check.dense(*mask, {batch.sentences, batch.size}, ScalarType::Bool, "attention_mask");
      batch.mask = static_cast<const bool*>(mask->const_data_ptr());
    }
  }

  Sentences(const Sentences&) = delete;

  int64_t size() const { return shape.back(); }

  // Lists the real tokens, and fills ``factors`` where they are wanted: from ``official`` [M, L], or for frequencies y.
  void find(
      const Tensor& like, bool wanted, int64_t num_blocks, int64_t parts, const Ints& y, const Optional& official,
      cudaStream_t stream) {
    TokenFinder finder = {};
    if (batch.mask) {
      lists = scratch(like, 2 * (batch.sentences + batch.tokens), ScalarType::Int);
      finder.lengths = static_cast<int32_t*>(lists->mutable_data_ptr());
      finder.firsts = finder.lengths + batch.sentences;
      finder.places = finder.firsts + batch.sentences;
      finder.ranks = finder.places + batch.tokens;
    }
    if (wanted && official) {
      factors = {check.floats(official, {parts, batch.size}, "beta"), 0, batch.size};
    } else if (wanted) {
      STD_TORCH_CHECK(
          int64_t(y.size()) == parts && parts <= kMaxParts, "s2sent_native: expected a frequency for every part");
      const bool shared = !batch.packed && !batch.mask;
      const int64_t tokens = shared ? batch.size : batch.tokens;
      table = scratch(like, parts * tokens, ScalarType::Float);
      finder.beta = floats_of(table);
      finder.stride_b = shared || batch.packed ? 0 : parts * batch.size;
      finder.stride_m = batch.packed ? tokens : batch.size;
      factors = {finder.beta, finder.stride_b, finder.stride_m};
    }
    if (!finder.lengths && !finder.beta) return;
    finder.batch = batch;
    finder.num_blocks = num_blocks;
    finder.parts = parts;
    finder.y = y.data();
    launched(find_tokens(finder, stream), "find_tokens");
    batch.lengths = finder.lengths;
    batch.firsts = finder.firsts;
    batch.places = finder.places;
    batch.ranks = finder.ranks;
  }

  Rows rows(const Tensor& tensor, ScalarType dtype) const {
    check.rows(tensor, shape, dtype);
    if (batch.packed) return {tensor.const_data_ptr(), 0, tensor.stride(0)};
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  }

  std::vector<Rows> rows(const Tensors& tensors) const {
    STD_TORCH_CHECK(int64_t(tensors.size()) <= kMaxBlocks, "s2sent_native: too many blocks for the CUDA kernels");
    std::vector<Rows> all;
    for (const Tensor& tensor : tensors) all.push_back(rows(tensor, tensors[0].scalar_type()));
    return all;
  }
};

}  // namespace

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling,
    const Tensor& squeezed, const Optional& pooled) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Tensor& first = hidden_states[0];
  Sentences sentences(first, shape_of(first), mask, cu_seqlens);
  const int64_t num = int64_t(hidden_states.size()), size = sentences.size(), parts = alpha.size(0);
  check_squeeze(first_block, num, num_blocks, parts, size, pooling);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  const Stream stream(sentences.check);
  sentences.find(first, true, num_blocks, parts, y, beta, stream);
  const Batch& batch = sentences.batch;
  const Tensor sums = scratch(first, batch.sentences * num * size, ScalarType::Float);
  const Squeeze args = {
      batch,
      dtype_of(first),
      num,
      first_block,
      num_blocks,
      size,
      parts,
      pooled ? Pooling(pooling) : Pooling::kNone,
      hidden.data(),
      sentences.check.floats(alpha, {parts, num_blocks}, "alpha"),
      sentences.factors,
      beta.has_value(),
      floats_of(sums),
      sentences.check.written(pooled, {batch.sentences, num_blocks, size}, "pooled"),
      sentences.check.written(squeezed, {batch.sentences, size}, "squeezed"),
  };
  launched(s2sent::cuda::squeeze(args, stream), "squeeze");
}

void squeeze_backward(
    const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates,
    const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Optional& beta, int64_t pooling, const Tensors& grads) {
  STD_TORCH_CHECK(
      !grads.empty() && grad_fused.has_value() == gates.has_value() && int64_t(grads.size()) <= kMaxBlocks,
      "s2sent_native: gradients do not fit");
  Sentences sentences(grads[0], shape, mask, cu_seqlens);
  const int64_t num_blocks = int64_t(grads.size()), size = sentences.size(), parts = alpha.size(0);
  check_squeeze(0, num_blocks, num_blocks, parts, size, pooling);
  const std::vector<void*> into = gradients_into(sentences.check, grads, shape);
  Rows fused = {};
  if (grad_fused) fused = sentences.rows(*grad_fused, grads[0].scalar_type());
  const Stream stream(sentences.check);
  sentences.find(grads[0], grad_squeezed.has_value(), num_blocks, parts, y, beta, stream);
  const Batch& batch = sentences.batch;
  const SqueezeBackward args = {
      batch,
      dtype_of(grads[0]),
      num_blocks,
      size,
      parts,
      Pooling(pooling),
      sentences.check.floats(alpha, {parts, num_blocks}, "alpha"),
      sentences.factors,
      beta.has_value(),
      sentences.check.floats(grad_squeezed, {batch.sentences, size}, "grad_squeezed"),
      sentences.check.floats(grad_pooled, {batch.sentences, num_blocks, size}, "grad_pooled"),
      fused,
      sentences.check.floats(gates, {batch.sentences, num_blocks, size}, "gates"),
      into.data(),
  };
  launched(s2sent::cuda::squeeze_backward(args, stream), "squeeze_backward");
}

// ---------------------------------------------------------------- gate

void gate(
    const Tensor& squeezed, const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight,
    const Tensor& up_bias, const Optional& norm_weight, const Optional& norm_bias, const Optional& running_mean,
    const Optional& running_var, const Optional& prior, int64_t num_blocks, bool relu, double eps,
    const Tensor& bottleneck, const Optional& gates, const Optional& pooled, const Optional& output,
    const Optional& grad_gates, const Optional& grad_output, const Optional& grad_pooled, const Optional& grad_logits,
    const Optional& grad_normed, const Optional& normed) {
  STD_TORCH_CHECK(num_blocks <= kMaxBlocks, "s2sent_native: too many blocks for the CUDA kernels");
  const Gate args = gate_arguments(
      squeezed, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, running_mean, running_var, prior,
      num_blocks, relu, eps, bottleneck, gates, pooled, output, grad_gates, grad_output, grad_pooled, grad_logits,
      grad_normed, normed);
  const Stream stream{Checks(squeezed)};
  launched(s2sent::cuda::bottleneck(args, stream), "bottleneck");
  if (grad_logits) {
    launched(excite_backward(args, stream), "excite_backward");
  } else {
    launched(excite(args, stream), "excite");
  }
}

// x [B, rows] @ weight [rows, columns], each sentence's sum in one order.
void multiply(const Tensor& x, const Tensor& weight, const Tensor& result) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "s2sent_native: expected two matrices");
  const Stream stream{Checks(x)};
  const Tensor partial = scratch(x, product_chunks(weight) * x.size(0) * weight.size(1), ScalarType::Float);
  const Product args = product_arguments(x, weight, floats_of(partial), result);
  launched(s2sent::cuda::multiply(args, stream), "multiply");
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& fused) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(hidden_states[0], shape_of(hidden_states[0]), mask, cu_seqlens);
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size();
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  sentences.check.dense(fused, sentences.shape, hidden_states[0].scalar_type(), "fused");
  const Fuse args = {
      sentences.batch,
      dtype_of(hidden_states[0]),
      num_blocks,
      size,
      hidden.data(),
      sentences.check.floats(gates, {sentences.batch.sentences, num_blocks, size}, "gates"),
      fused.mutable_data_ptr(),
  };
  const Stream stream(sentences.check);
  launched(s2sent::cuda::fuse(args, stream), "fuse");
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& grad_gates) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Tensor& first = hidden_states[0];
  Sentences sentences(first, shape_of(first), mask, cu_seqlens);
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size();
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  const Rows fused = sentences.rows(grad_fused, first.scalar_type());
  const Stream stream(sentences.check);
  sentences.find(first, false, num_blocks, 0, {}, std::nullopt, stream);
  const FuseBackward args = {
      sentences.batch,
      dtype_of(first),
      num_blocks,
      size,
      hidden.data(),
      fused,
      sentences.check.written(grad_gates, {sentences.batch.sentences, num_blocks, size}, "grad_gates"),
  };
  launched(s2sent::cuda::fuse_backward(args, stream), "fuse_backward");
}

// ---------------------------------------------------------------- the whole selector

bool select(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight, const Tensor& up_bias,
    const Optional& norm_weight, const Optional& norm_bias, const Optional& running_mean, const Optional& running_var,
    const Optional& prior, bool relu, double eps, bool always, const Tensor& squeezed, const Tensor& gates,
    const Tensor& fused) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Tensor& first = hidden_states[0];
  Sentences sentences(first, shape_of(first), mask, cu_seqlens);
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size(), parts = alpha.size(0);
  check_squeeze(0, num_blocks, num_blocks, parts, size, 0);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  const Gate gate = gate_arguments(
      squeezed, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, running_mean, running_var, prior,
      num_blocks, relu, eps, std::nullopt, gates, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
      std::nullopt, std::nullopt, std::nullopt);
  sentences.check.dense(fused, sentences.shape, first.scalar_type(), "fused");
  Select args = {
      sentences.batch,
      dtype_of(first),
      num_blocks,
      size,
      parts,
      hidden.data(),
      sentences.check.floats(alpha, {parts, num_blocks}, "alpha"),
      {},
      gate,
      sentences.check.written(squeezed, {sentences.batch.sentences, size}, "squeezed"),
      fused.mutable_data_ptr(),
  };
  const Stream stream(sentences.check);
  std::shared_ptr<const SelectPlan> plan;
  launched(s2sent::cuda::plan(args, always, plan), "select");
  if (!plan) return false;
  sentences.find(first, true, num_blocks, parts, y, std::nullopt, stream);
  args.batch = sentences.batch;
  args.factors = sentences.factors;
  launched(s2sent::cuda::select(args, *plan, stream), "select");
  return true;
}

}  // namespace s2sent::ops::cuda
