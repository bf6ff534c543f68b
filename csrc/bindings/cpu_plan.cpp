// A plan's calls on CPU tensors.

#include "on_cpu.h"

namespace s2sent::ops::cpu {

Tensors planned_pool(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling,
    bool keep) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kAnyBlocks);
  if (!call.sentences) return {};
  const Sentences& sentences = *call.sentences;
  Gate& gate = call.gate;
  Tensors results = {empty(sentences.check, {gate.sentences, gate.size}, hidden_states[0].scalar_type())};
  Squeeze squeeze = call.squeeze<Squeeze>(pooling_of(pooling));
  Scratch scratch;
  call.want(keep, scratch, results, squeeze.squeezed, squeeze.pooled);
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

Tensors planned_pool_in_training(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling,
    double momentum) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kAnyBlocks);
  if (!call.trains()) return {};
  const Sentences& sentences = *call.sentences;
  BatchStatistics args = call.statistics(momentum);
  Squeeze squeeze = call.squeeze<Squeeze>(pooling_of(pooling));
  Tensors results = call.results_in_training(hidden_states[0].scalar_type(), squeeze, args);
  Scratch scratch;
  scratch.want(args.gate.bottleneck, args.gate.sentences * args.gate.width);
  scratch.allocate(sentences.check);
  const RealBatch real(sentences);
  squeeze.batch = real.batch;
  share_squeeze(sentences, squeeze, {real.batch, args.gate.num_blocks, call.plan->y});
  share_gate_in_training(args);
  return results;
}

Tensors planned_pool_backward(
    const Tensor& grad_output, const Tensor& squeezed, const Tensor& pooled, const Optional& mean,
    const Optional& inverse_std, const Ints& shape, const Optional& mask, const Optional& cu_seqlens, int64_t plan,
    int64_t pooling, const Ints& needed) {
  Planned call(plan, grad_output, shape, mask, cu_seqlens, kAnyBlocks);
  if (!call.sentences || !grad_output.is_contiguous()) return {};
  const Sentences& sentences = *call.sentences;
  call.read_gradients(squeezed, pooled, grad_output);
  use_statistics(sentences.check, mean, inverse_std, call.gate);
  SqueezeBackward args = call.squeeze_backward<SqueezeBackward>(pooling_of(pooling));
  HiddenGradients hidden(sentences, needed, args.num_blocks, grad_output.scalar_type());
  GateBackward back(call.gate, sentences.check);
  Scratch scratch;
  back.want(scratch);
  scratch.allocate(sentences.check);
  back.connect();
  share_gate_backward(back);
  if (hidden.any) {
    const RealBatch real(sentences);
    args.batch = real.batch;
    args.grad_squeezed = back.to_squeezed.result;
    args.grad_pooled = back.args.gate.grad_pooled;
    args.grads = hidden.into.data();
    share_squeeze_backward(sentences, args, {real.batch, args.num_blocks, call.plan->y});
  }
  return hidden.results_before(back.results);
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
  call.want(keep, scratch, results, squeeze.squeezed, gate.gates);
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

Tensors planned_select_backward(
    const Tensor& grad_fused, const Tensor& squeezed, const Tensor& gates, const Tensors& hidden_states,
    const Optional& mask, const Optional& cu_seqlens, int64_t plan, const Ints& needed) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kAnyBlocks);
  if (!call.takes(grad_fused)) return {};
  const Sentences& sentences = *call.sentences;
  const RealBatch real(sentences);
  call.read_gradients(squeezed, std::nullopt, std::nullopt);
  FuseBackward fuse = call.fuse_backward<FuseBackward>(grad_fused);
  SqueezeBackward args = call.squeeze_backward<SqueezeBackward>(Pooling::kNone);
  args.gates = sentences.check.floats(gates, {sentences.count, args.num_blocks, args.size}, "gates");
  HiddenGradients hidden(sentences, needed, args.num_blocks, grad_fused.scalar_type());
  GateBackward back(call.gate, sentences.check);
  Scratch scratch;
  scratch.want(fuse.grad_gates, call.rows());
  back.want(scratch);
  scratch.allocate(sentences.check);
  fuse.batch = args.batch = real.batch;
  back.args.gate.grad_gates = fuse.grad_gates;
  back.connect();
  share_fuse_backward(sentences, fuse);
  share_gate_backward(back);
  if (hidden.any) {
    args.grad_squeezed = back.to_squeezed.result;
    args.grad_fused = fuse.grad_fused;
    args.grads = hidden.into.data();
    share_squeeze_backward(sentences, args, {real.batch, args.num_blocks, call.plan->y});
  }
  return hidden.results_before(back.results);
}

}  // namespace s2sent::ops::cpu
