// The ops on CUDA tensors, on torch's current stream with scratch memory from torch's allocator. Nothing here waits for the GPU.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../cuda/launch.h"
#include "memory.h"
#include "plan.h"

namespace s2sent::ops::cuda {
namespace {

// Types. The launchers are qualified below: the ops have the same names.
using s2sent::cuda::Batch, s2sent::cuda::Factors, s2sent::cuda::TokenFinder;
using s2sent::cuda::Select, s2sent::cuda::SelectPlan;
using s2sent::cuda::Squeeze, s2sent::cuda::SqueezeBackward, s2sent::cuda::Fuse, s2sent::cuda::FuseBackward;

// Makes the tensors' device current, and holds its stream.
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

void check_launch(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "s2sent_native: ", name, ": ", cudaGetErrorString(error));
}

void check_maximum(int64_t num_blocks) {
  STD_TORCH_CHECK(num_blocks <= kMaxBlocks, "s2sent_native: too many blocks for the CUDA kernels");
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Batch batch_of(const Sentences& sentences) {
  Batch batch = {};
  batch.sentences = sentences.count;
  batch.size = sentences.length();
  batch.tokens = sentences.tokens();
  batch.packed = sentences.packed;
  batch.starts = sentences.starts;
  batch.mask = sentences.mask;
  return batch;
}

// beta of the M parts: from ``official`` [M, L], or for the frequencies y.
struct Frequencies {
  int64_t num_blocks;  // N
  int64_t parts;       // M
  const Ints& y;
  const Optional& official;
};

// A batch's real tokens and, if frequencies are given, their factors: ``want`` scratch memory for them, then ``find``.
struct RealBatch {
  Batch batch;
  Factors factors = {};

  explicit RealBatch(const Sentences& sentences) : batch(batch_of(sentences)) {}

  RealBatch(const RealBatch&) = delete;

  void want(Scratch& scratch, const Sentences& sentences, const Frequencies* frequencies) {
    if (batch.mask) {
      scratch.want(finder_.lengths, batch.sentences);
      scratch.want(finder_.firsts, batch.sentences);
      scratch.want(finder_.places, batch.tokens);
      scratch.want(finder_.ranks, batch.tokens);
    }
    if (frequencies) want_factors(scratch, sentences, *frequencies);
  }

  void find(cudaStream_t stream) {
    if (finder_.parts) factors = {finder_.beta, finder_.stride_b, finder_.stride_m};
    if (!batch.mask && !finder_.parts) return;
    finder_.batch = batch;
    check_launch(s2sent::cuda::find_tokens(finder_, stream), "find_tokens");
    batch.lengths = finder_.lengths;
    batch.firsts = finder_.firsts;
    batch.places = finder_.places;
    batch.ranks = finder_.ranks;
  }

 private:
  TokenFinder finder_ = {};

  void want_factors(Scratch& scratch, const Sentences& sentences, const Frequencies& from) {
    if (from.official) {
      factors = {sentences.check.floats(from.official, {from.parts, batch.size}, "beta"), 0, batch.size};
      return;
    }
    STD_TORCH_CHECK(
        int64_t(from.y.size()) == from.parts && from.parts <= kMaxParts,
        "s2sent_native: expected a frequency for every part");
    const bool shared = !batch.packed && !batch.mask;
    const int64_t tokens = shared ? batch.size : batch.tokens;
    finder_.num_blocks = from.num_blocks;
    finder_.parts = from.parts;
    finder_.y = from.y.data();
    finder_.stride_b = shared || batch.packed ? 0 : from.parts * batch.size;
    finder_.stride_m = batch.packed ? tokens : batch.size;
    scratch.want(finder_.beta, from.parts * tokens);
  }
};

std::vector<Rows> rows_of(const Sentences& sentences, const Tensors& tensors) {
  check_maximum(int64_t(tensors.size()));
  return sentences.rows(tensors);
}

}  // namespace

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling,
    const Tensor& squeezed, const Optional& pooled) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const Tensor& first = hidden_states[0];
  const std::vector<Rows> hidden = rows_of(sentences, hidden_states);
  Squeeze args = squeeze_arguments<Squeeze>(
      sentences, dtype_of(first), hidden, first_block, num_blocks, alpha, beta.has_value(), pooling, squeezed, pooled);
  const Stream stream(sentences.check);
  const Frequencies frequencies = {num_blocks, args.parts, y, beta};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, &frequencies);
  scratch.want(args.sums, sentences.count * args.num * args.size);
  scratch.allocate(sentences.check);
  real.find(stream);
  args.batch = real.batch;
  args.factors = real.factors;
  check_launch(s2sent::cuda::squeeze(args, stream), "squeeze");
}

void squeeze_backward(
    const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates,
    const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Optional& beta, int64_t pooling, const Tensors& grads) {
  STD_TORCH_CHECK(
      !grads.empty() && int64_t(grads.size()) <= kMaxBlocks, "s2sent_native: gradients do not fit");
  const Sentences sentences(grads[0], shape, mask, cu_seqlens);
  const std::vector<void*> into = gradients_into(sentences.check, grads, shape);
  SqueezeBackward args = squeeze_backward_arguments<SqueezeBackward>(
      sentences, grads, into, alpha, beta.has_value(), pooling, grad_squeezed, grad_pooled, grad_fused, gates);
  const Stream stream(sentences.check);
  const Frequencies frequencies = {args.num_blocks, args.parts, y, beta};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, grad_squeezed ? &frequencies : nullptr);
  scratch.allocate(sentences.check);
  real.find(stream);
  args.batch = real.batch;
  args.factors = real.factors;
  check_launch(s2sent::cuda::squeeze_backward(args, stream), "squeeze_backward");
}

// ---------------------------------------------------------------- gate

void gate(
    const Tensor& squeezed, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& gates) {
  check_maximum(num_blocks);
  const Gate args =
      gate_arguments(squeezed, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps, bottleneck, gates);
  const Stream stream{Checks(squeezed)};
  check_launch(s2sent::cuda::bottleneck(args, stream), "bottleneck");
  check_launch(s2sent::cuda::excite(args, stream), "excite");
}

void gate_pool(
    const Tensor& squeezed, const Tensor& pooled, S2SENT_GATE_PARAMETERS int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& output) {
  const Gate args =
      gate_pool_arguments(squeezed, pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, output);
  check_maximum(args.num_blocks);
  const Stream stream{Checks(squeezed)};
  check_launch(s2sent::cuda::bottleneck(args, stream), "bottleneck");
  check_launch(s2sent::cuda::excite(args, stream), "excite");
}

void gate_backward(
    const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled,
    S2SENT_GATE_PARAMETERS int64_t activation, double eps, const Tensor& bottleneck, const Optional& grad_pooled,
    const Tensor& grad_logits, const Tensor& grad_normed, const Optional& normed) {
  const Gate args = gate_backward_arguments(
      grad_gates, grad_output, squeezed, pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, grad_pooled,
      grad_logits, grad_normed, normed);
  check_maximum(args.num_blocks);
  const Stream stream{Checks(squeezed)};
  check_launch(s2sent::cuda::bottleneck(args, stream), "bottleneck");
  check_launch(s2sent::cuda::excite_backward(args, stream), "excite_backward");
}

// x [B, rows] @ weight [rows, columns]
void multiply(const Tensor& x, const Tensor& weight, const Tensor& result) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "s2sent_native: expected two matrices");
  const Stream stream{Checks(x)};
  const Tensor partial = empty(Checks(x), {product_chunks(weight) * x.size(0) * weight.size(1)}, ScalarType::Float);
  const Product args = product_arguments(x, weight, floats_of(partial), result);
  check_launch(s2sent::cuda::multiply(args, stream), "multiply");
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& fused) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const std::vector<Rows> hidden = rows_of(sentences, hidden_states);
  Fuse args = fuse_arguments<Fuse>(sentences, hidden_states[0], hidden, gates, fused);
  args.batch = batch_of(sentences);
  const Stream stream(sentences.check);
  check_launch(s2sent::cuda::fuse(args, stream), "fuse");
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& grad_gates) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const Tensor& first = hidden_states[0];
  const std::vector<Rows> hidden = rows_of(sentences, hidden_states);
  FuseBackward args = fuse_backward_arguments<FuseBackward>(sentences, first, hidden, grad_fused, grad_gates);
  const Stream stream(sentences.check);
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, nullptr);
  scratch.allocate(sentences.check);
  real.find(stream);
  args.batch = real.batch;
  check_launch(s2sent::cuda::fuse_backward(args, stream), "fuse_backward");
}

// ---------------------------------------------------------------- the whole selector

bool select(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    S2SENT_GATE_PARAMETERS int64_t activation, double eps, bool always, const Tensor& squeezed, const Tensor& gates,
    const Tensor& fused) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const Checks& check = sentences.check;
  const Tensor& first = hidden_states[0];
  const std::vector<Rows> hidden = rows_of(sentences, hidden_states);
  Select args = {};
  args.batch = batch_of(sentences);
  args.dtype = dtype_of(first);
  args.num_blocks = int64_t(hidden.size());
  args.size = sentences.size();
  args.parts = alpha.size(0);
  check_blocks(0, args.num_blocks, args.num_blocks, args.parts, args.size);
  args.hidden = hidden.data();
  args.alpha = check.floats(alpha, {args.parts, args.num_blocks}, "alpha");
  args.gate = gate_inputs(squeezed, S2SENT_GATE_ARGUMENTS args.num_blocks, activation, eps);
  args.gate.gates = check.written(gates, {sentences.count, args.num_blocks, args.size}, "gates");
  args.squeezed = check.written(squeezed, {sentences.count, args.size}, "squeezed");
  check.dense(fused, sentences.shape, first.scalar_type(), "fused");
  args.fused = fused.mutable_data_ptr();
  const Stream stream(check);
  std::shared_ptr<const SelectPlan> plan;
  check_launch(s2sent::cuda::plan(args, always, plan), "select");
  if (!plan) return false;
  const Optional none;
  const Frequencies frequencies = {args.num_blocks, args.parts, y, none};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, &frequencies);
  scratch.allocate(check);
  real.find(stream);
  args.batch = real.batch;
  args.factors = real.factors;
  check_launch(s2sent::cuda::select(args, *plan, stream), "select");
  return true;
}

// ---------------------------------------------------------------- a plan's calls

Tensors planned_pool(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling,
    bool keep) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kMaxBlocks);
  if (!call.sentences) return {};
  const Sentences& sentences = *call.sentences;
  const Stream stream(sentences.check);
  Gate& gate = call.gate;
  Tensors results = {empty(sentences.check, {gate.sentences, gate.size}, hidden_states[0].scalar_type())};
  Squeeze squeeze = call.squeeze<Squeeze>(pooling_of(pooling));
  const Optional none;
  const Frequencies frequencies = {gate.num_blocks, squeeze.parts, call.plan->y, none};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, &frequencies);
  scratch.want(squeeze.sums, call.rows());
  scratch.want(gate.bottleneck, gate.sentences * gate.width);
  if (keep) {
    results.push_back(empty(sentences.check, {gate.sentences, gate.size}, ScalarType::Float));
    results.push_back(empty(sentences.check, {gate.sentences, gate.num_blocks, gate.size}, ScalarType::Float));
    squeeze.squeezed = floats_of(results[1]);
    squeeze.pooled = floats_of(results[2]);
  } else {
    scratch.want(squeeze.squeezed, gate.sentences * gate.size);
    scratch.want(squeeze.pooled, call.rows());
  }
  scratch.allocate(sentences.check);
  real.find(stream);
  squeeze.batch = real.batch;
  squeeze.factors = real.factors;
  gate.squeezed = squeeze.squeezed;
  gate.pooled = squeeze.pooled;
  gate.output = results[0].mutable_data_ptr();
  gate.dtype = call.dtype;
  check_launch(s2sent::cuda::squeeze(squeeze, stream), "squeeze");
  check_launch(s2sent::cuda::bottleneck(gate, stream), "bottleneck");
  check_launch(s2sent::cuda::excite(gate, stream), "excite");
  return results;
}

Tensors planned_select(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, bool keep) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kMaxBlocks);
  if (!call.sentences) return {};
  const Sentences& sentences = *call.sentences;
  const Stream stream(sentences.check);
  Gate& gate = call.gate;
  Tensors results = {empty(sentences.check, sentences.shape, hidden_states[0].scalar_type())};
  Squeeze squeeze = call.squeeze<Squeeze>(Pooling::kNone);
  const Optional none;
  const Frequencies frequencies = {gate.num_blocks, squeeze.parts, call.plan->y, none};
  Select once = {};
  once.batch = batch_of(sentences);
  once.dtype = call.dtype;
  once.num_blocks = gate.num_blocks;
  once.size = gate.size;
  once.parts = squeeze.parts;
  once.hidden = call.hidden.data();
  once.alpha = squeeze.alpha;
  once.gate = gate;
  once.fused = results[0].mutable_data_ptr();
  std::shared_ptr<const SelectPlan> one_pass;
  check_launch(s2sent::cuda::plan(once, false, one_pass), "select");
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, &frequencies);
  if (!one_pass) {
    scratch.want(squeeze.sums, call.rows());
    scratch.want(gate.bottleneck, gate.sentences * gate.width);
  }
  if (keep) {
    results.push_back(empty(sentences.check, {gate.sentences, gate.size}, ScalarType::Float));
    results.push_back(empty(sentences.check, {gate.sentences, gate.num_blocks, gate.size}, ScalarType::Float));
    squeeze.squeezed = floats_of(results[1]);
    gate.gates = floats_of(results[2]);
  } else {
    scratch.want(squeeze.squeezed, gate.sentences * gate.size);
    scratch.want(gate.gates, call.rows());
  }
  scratch.allocate(sentences.check);
  real.find(stream);
  if (one_pass) {
    once.batch = real.batch;
    once.factors = real.factors;
    once.squeezed = squeeze.squeezed;
    once.gate.gates = gate.gates;
    check_launch(s2sent::cuda::select(once, *one_pass, stream), "select");
    return results;
  }
  squeeze.batch = real.batch;
  squeeze.factors = real.factors;
  gate.squeezed = squeeze.squeezed;
  check_launch(s2sent::cuda::squeeze(squeeze, stream), "squeeze");
  check_launch(s2sent::cuda::bottleneck(gate, stream), "bottleneck");
  check_launch(s2sent::cuda::excite(gate, stream), "excite");
  Fuse fuse = {};
  fuse.batch = real.batch;
  fuse.dtype = call.dtype;
  fuse.num_blocks = gate.num_blocks;
  fuse.size = gate.size;
  fuse.hidden = call.hidden.data();
  fuse.gates = gate.gates;
  fuse.fused = results[0].mutable_data_ptr();
  check_launch(s2sent::cuda::fuse(fuse, stream), "fuse");
  return results;
}

}  // namespace s2sent::ops::cuda
