// The ops on CPU tensors. All tensors are checked before memory is allocated for a batch's sentences: one that is written has as
// many, so that a wrong shape costs nothing.

#include <algorithm>

#include "on_cpu.h"

namespace s2sent::ops::cpu {

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling,
    const Tensor& squeezed, const Optional& pooled) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  Squeeze args = squeeze_arguments<Squeeze>(
      sentences, dtype_of(hidden_states[0]), hidden, first_block, num_blocks, alpha, beta.has_value(), pooling,
      squeezed, pooled);
  const RealBatch real(sentences);
  args.batch = real.batch;
  share_squeeze(sentences, args, factors_of(sentences, real.batch, num_blocks, args.parts, y, beta));
}

void squeeze_backward(
    const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates,
    const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Optional& beta, int64_t pooling, const Tensors& grads) {
  require(!grads.empty(), "gradients do not fit");
  const Sentences sentences(grads[0], shape, mask, cu_seqlens);
  const std::vector<void*> into = gradients_into(sentences.check, grads, shape);
  if (std::all_of(into.begin(), into.end(), [](void* each) { return each == nullptr; })) return;
  SqueezeBackward args = squeeze_backward_arguments<SqueezeBackward>(
      sentences, grads, into, alpha, beta.has_value(), pooling, grad_squeezed, grad_pooled, grad_fused, gates);
  const RealBatch real(sentences);
  args.batch = real.batch;
  share_squeeze_backward(sentences, args, factors_of(sentences, real.batch, args.num_blocks, args.parts, y, beta));
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

void gate_in_training(
    const Tensor& squeezed, const Optional& pooled, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation,
    double eps, double momentum, const Tensor& bottleneck, const Tensor& mean, const Tensor& inverse_std,
    const Tensor& result) {
  BatchStatistics args = gate_in_training_arguments(
      squeezed, pooled, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps, momentum, bottleneck, mean, inverse_std,
      result);
  share_gate_in_training(args);
}

Tensors gate_backward(
    const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled,
    S2SENT_GATE_PARAMETERS const Optional& mean, const Optional& inverse_std, int64_t activation, double eps) {
  const Checks check(squeezed);
  const Gate gate = gate_backward_arguments(
      grad_gates, grad_output, squeezed, pooled, S2SENT_GATE_ARGUMENTS mean, inverse_std, activation, eps);
  GateBackward back(gate, check);
  Tensors results = back.results_with_inputs(check, pooled.has_value());
  Scratch scratch;
  back.want(scratch);
  scratch.allocate(check);
  back.connect();
  share_gate_backward(back);
  return results;
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& fused) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  Fuse args = fuse_arguments<Fuse>(sentences, hidden_states[0], hidden, gates, fused);
  const RealBatch real(sentences);
  args.batch = real.batch;
  share_fuse(sentences, args);
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& grad_gates) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  FuseBackward args = fuse_backward_arguments<FuseBackward>(
      sentences, hidden_states[0], hidden, grad_fused, grad_gates);
  const RealBatch real(sentences);
  args.batch = real.batch;
  share_fuse_backward(sentences, args);
}

}  // namespace s2sent::ops::cpu
