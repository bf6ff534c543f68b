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
