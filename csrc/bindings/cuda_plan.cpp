// A plan's calls on CUDA tensors.

#include "on_cuda.h"

namespace s2sent::ops::cuda {

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
  const Frequencies frequencies = {gate.num_blocks, squeeze.parts, call.plan->y};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, &frequencies);
  scratch.want(squeeze.sums, call.rows());
  scratch.want(gate.bottleneck, gate.sentences * gate.width);
  call.want(keep, scratch, results, squeeze.squeezed, squeeze.pooled);
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

Tensors planned_pool_in_training(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling,
    double momentum) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kMaxBlocks);
  if (!call.trains()) return {};
  const Sentences& sentences = *call.sentences;
  const Stream stream(sentences.check);
  BatchStatistics args = call.statistics(momentum);
  Squeeze squeeze = call.squeeze<Squeeze>(pooling_of(pooling));
  Tensors results = call.results_in_training(hidden_states[0].scalar_type(), squeeze, args);
  const Frequencies frequencies = {squeeze.num_blocks, squeeze.parts, call.plan->y};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, &frequencies);
  scratch.want(squeeze.sums, call.rows());
  scratch.want(args.gate.bottleneck, args.gate.sentences * args.gate.width);
  scratch.want(args.z, call.rows());
  scratch.allocate(sentences.check);
  real.find(stream);
  squeeze.batch = real.batch;
  squeeze.factors = real.factors;
  check_launch(s2sent::cuda::squeeze(squeeze, stream), "squeeze");
  launch_gate_in_training(args, stream);
  return results;
}

Tensors planned_pool_backward(
    const Tensor& grad_output, const Tensor& squeezed, const Tensor& pooled, const Optional& mean,
    const Optional& inverse_std, const Ints& shape, const Optional& mask, const Optional& cu_seqlens, int64_t plan,
    int64_t pooling, const Ints& needed) {
  Planned call(plan, grad_output, shape, mask, cu_seqlens, kMaxBlocks);
  if (!call.sentences || !grad_output.is_contiguous()) return {};
  const Sentences& sentences = *call.sentences;
  const Stream stream(sentences.check);
  call.read_gradients(squeezed, pooled, grad_output);
  use_statistics(sentences.check, mean, inverse_std, call.gate);
  SqueezeBackward args = call.squeeze_backward<SqueezeBackward>(pooling_of(pooling));
  HiddenGradients hidden(sentences, needed, args.num_blocks, grad_output.scalar_type());
  GateBackward back(call.gate, sentences.check);
  const Frequencies frequencies = {args.num_blocks, args.parts, call.plan->y};
  Scratch scratch;
  RealBatch real(sentences);
  if (hidden.any) real.want(scratch, sentences, &frequencies);
  back.want(scratch);
  scratch.allocate(sentences.check);
  back.connect();
  launch_gate_backward(back, stream);
  if (hidden.any) {
    real.find(stream);
    args.batch = real.batch;
    args.factors = real.factors;
    args.grad_squeezed = back.to_squeezed.result;
    args.grad_pooled = back.args.gate.grad_pooled;
    args.grads = hidden.into.data();
    check_launch(s2sent::cuda::squeeze_backward(args, stream), "squeeze_backward");
  }
  return hidden.results_before(back.results);
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
  const Frequencies frequencies = {gate.num_blocks, squeeze.parts, call.plan->y};
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
  call.want(keep, scratch, results, squeeze.squeezed, gate.gates);
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

Tensors planned_select_backward(
    const Tensor& grad_fused, const Tensor& squeezed, const Tensor& gates, const Tensors& hidden_states,
    const Optional& mask, const Optional& cu_seqlens, int64_t plan, const Ints& needed) {
  Planned call(plan, hidden_states, mask, cu_seqlens, kMaxBlocks);
  if (!call.takes(grad_fused)) return {};
  const Sentences& sentences = *call.sentences;
  const Stream stream(sentences.check);
  call.read_gradients(squeezed, std::nullopt, std::nullopt);
  FuseBackward fuse = call.fuse_backward<FuseBackward>(grad_fused);
  SqueezeBackward args = call.squeeze_backward<SqueezeBackward>(Pooling::kNone);
  args.gates = sentences.check.floats(gates, {sentences.count, args.num_blocks, args.size}, "gates");
  HiddenGradients hidden(sentences, needed, args.num_blocks, grad_fused.scalar_type());
  GateBackward back(call.gate, sentences.check);
  const Frequencies frequencies = {args.num_blocks, args.parts, call.plan->y};
  Scratch scratch;
  RealBatch real(sentences);
  real.want(scratch, sentences, hidden.any ? &frequencies : nullptr);
  scratch.want(fuse.grad_gates, call.rows());
  back.want(scratch);
  scratch.allocate(sentences.check);
  real.find(stream);
  fuse.batch = args.batch = real.batch;
  back.args.gate.grad_gates = fuse.grad_gates;
  back.connect();
  check_launch(s2sent::cuda::fuse_backward(fuse, stream), "fuse_backward");
  launch_gate_backward(back, stream);
  if (hidden.any) {
    args.factors = real.factors;
    args.grad_squeezed = back.to_squeezed.result;
    args.grad_fused = fuse.grad_fused;
    args.grads = hidden.into.data();
    check_launch(s2sent::cuda::squeeze_backward(args, stream), "squeeze_backward");
  }
  return hidden.results_before(back.results);
}

}  // namespace s2sent::ops::cuda
