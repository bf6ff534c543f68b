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
