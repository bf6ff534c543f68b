// The ops on CUDA tensors.

#include "on_cuda.h"

namespace s2sent::ops::cuda {

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
  require(
      !grads.empty() && int64_t(grads.size()) <= kMaxBlocks, "gradients do not fit");
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

void gate_in_training(
    const Tensor& squeezed, const Optional& pooled, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation,
    double eps, double momentum, const Tensor& bottleneck, const Tensor& mean, const Tensor& inverse_std,
    const Tensor& result) {
  BatchStatistics args = gate_in_training_arguments(
      squeezed, pooled, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps, momentum, bottleneck, mean, inverse_std,
      result);
  check_maximum(args.gate.num_blocks);
  const Checks check(squeezed);
  const Stream stream(check);
  Scratch scratch;
  scratch.want(args.z, args.gate.sentences * args.gate.num_blocks * args.gate.size);
  scratch.allocate(check);
  launch_gate_in_training(args, stream);
}

Tensors gate_backward(
    const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled,
    S2SENT_GATE_PARAMETERS const Optional& mean, const Optional& inverse_std, int64_t activation, double eps) {
  const Checks check(squeezed);
  const Gate gate = gate_backward_arguments(
      grad_gates, grad_output, squeezed, pooled, S2SENT_GATE_ARGUMENTS mean, inverse_std, activation, eps);
  check_maximum(gate.num_blocks);
  const Stream stream(check);
  GateBackward back(gate, check);
  Tensors results = back.results_with_inputs(check, pooled.has_value());
  Scratch scratch;
  back.want(scratch);
  scratch.allocate(check);
  back.connect();
  launch_gate_backward(back, stream);
  return results;
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
  const Frequencies frequencies = {args.num_blocks, args.parts, y};
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

}  // namespace s2sent::ops::cuda
