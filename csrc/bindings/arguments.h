// Tensors to the argument structs of stages.h, for both devices. A device adds what it holds itself: Batch, Factors, scratch.
#pragma once

#include "checks.h"

namespace s2sent::ops {

// The layout of a batch: [B, L, D] with or without a mask, or packed [T, D] with cu_seqlens.
struct Sentences {
  Checks check;
  Ints shape;  // of a hidden state
  bool packed;
  int64_t count;                    // B
  const int32_t* starts = nullptr;  // [B + 1] if packed
  Mask mask;                        // [B, L]

  Sentences(const Tensor& first, const Ints& shape, const Optional& attention_mask, const Optional& cu_seqlens)
      : check(first), shape(shape), packed(cu_seqlens.has_value()) {
    require(shape.size() == (packed ? 2 : 3), "hidden states have a wrong rank");
    require(shape.back() > 0, "hidden states have no features");
    require(are_sizes({shape[0], packed ? 1 : shape[1], shape.back()}), "a hidden state is too large");
    require(!packed || cu_seqlens->numel() > 0, "cu_seqlens is empty");
    count = packed ? cu_seqlens->numel() - 1 : shape[0];
    if (packed) {
      check.dense(*cu_seqlens, {count + 1}, ScalarType::Int, "cu_seqlens");
      starts = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    } else if (attention_mask) {
      check.dense(*attention_mask, {count, shape[1]}, attention_mask->scalar_type(), "attention_mask");
      mask = {attention_mask->const_data_ptr(), mask_type_of(*attention_mask)};
    }
  }

  int64_t size() const { return shape.back(); }                            // D
  int64_t length() const { return packed ? 0 : shape[1]; }                 // L
  int64_t tokens() const { return packed ? shape[0] : count * shape[1]; }  // T, or B L

  Rows rows(const Tensor& tensor, ScalarType dtype) const {
    check.rows(tensor, shape, dtype);
    if (packed) return {tensor.const_data_ptr(), 0, tensor.stride(0)};
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  }

  std::vector<Rows> rows(const Tensors& tensors) const {
    std::vector<Rows> all;
    for (const Tensor& tensor : tensors) all.push_back(rows(tensor, tensors[0].scalar_type()));
    return all;
  }
};

inline Sentences sentences_of(const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens) {
  require(!hidden_states.empty(), "expected a hidden state");
  return {hidden_states[0], shape_of(hidden_states[0]), mask, cu_seqlens};
}

// ---------------------------------------------------------------- squeeze

template <class Squeeze>
Squeeze squeeze_arguments(
    const Sentences& sentences, DType dtype, const std::vector<Rows>& hidden, int64_t first_block, int64_t num_blocks,
    const Tensor& alpha, bool official, int64_t pooling, const Tensor& squeezed, const Optional& pooled) {
  const Checks& check = sentences.check;
  Squeeze args = {};
  args.dtype = dtype;
  args.num = int64_t(hidden.size());
  args.first_block = first_block;
  args.num_blocks = num_blocks;
  args.size = sentences.size();
  args.parts = alpha.size(0);
  check_blocks(first_block, args.num, num_blocks, args.parts, args.size);
  args.pooling = pooling_of(pooling);
  require(!pooled || args.pooling != Pooling::kNone, "pooled has no pooling");
  args.hidden = hidden.data();
  args.alpha = check.floats(alpha, {args.parts, num_blocks}, "alpha");
  args.official = official;
  args.pooled = check.written(pooled, {sentences.count, num_blocks, args.size}, "pooled");
  args.squeezed = check.written(squeezed, {sentences.count, args.size}, "squeezed");
  return args;
}

// Where each hidden state's gradient is written; null if it is not needed.
inline std::vector<void*> gradients_into(const Checks& check, const Tensors& grads, const Ints& shape) {
  std::vector<void*> into;
  for (const Tensor& grad : grads) {
    const bool needed = grad.numel() != 0;
    if (needed) check.dense(grad, shape, grads[0].scalar_type(), "a hidden state's gradient");
    into.push_back(needed ? grad.mutable_data_ptr() : nullptr);
  }
  return into;
}

template <class SqueezeBackward>
SqueezeBackward squeeze_backward_arguments(
    const Sentences& sentences, const Tensors& grads, const std::vector<void*>& into, const Tensor& alpha,
    bool official, int64_t pooling, const Optional& grad_squeezed, const Optional& grad_pooled,
    const Optional& grad_fused, const Optional& gates) {
  const Checks& check = sentences.check;
  SqueezeBackward args = {};
  args.dtype = dtype_of(grads[0]);
  args.num_blocks = int64_t(grads.size());
  args.size = sentences.size();
  args.parts = alpha.size(0);
  args.pooling = pooling_of(pooling);
  check_blocks(0, args.num_blocks, args.num_blocks, args.parts, args.size);
  require(
      grad_fused.has_value() == gates.has_value() && (!grad_pooled || args.pooling != Pooling::kNone),
      "gradients do not fit");
  const Ints blocks = {sentences.count, args.num_blocks, args.size};
  args.alpha = check.floats(alpha, {args.parts, args.num_blocks}, "alpha");
  args.official = official;
  args.grad_squeezed = check.floats(grad_squeezed, {sentences.count, args.size}, "grad_squeezed");
  args.grad_pooled = check.floats(grad_pooled, blocks, "grad_pooled");
  if (grad_fused) args.grad_fused = sentences.rows(*grad_fused, grads[0].scalar_type());
  args.gates = check.floats(gates, blocks, "gates");
  args.grads = into.data();
  return args;
}

// ---------------------------------------------------------------- gate

// Everything that all gate ops read.
inline Gate gate_inputs(
    const Tensor& squeezed, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, double eps) {
  require(
      squeezed.dim() == 2 && squeezed.size(1) > 0 && down_weight.dim() == 2 && num_blocks > 0,
      "the gate's arguments do not fit");
  require(
      are_sizes({squeezed.size(0), num_blocks, squeezed.size(1), down_weight.size(0)}),
      "the gate's tensors are too large");
  require(
      !norm_weight || (norm_bias && running_mean && running_var), "expected all of the norm's tensors");
  const Checks check(squeezed);
  Gate args = {};
  args.sentences = squeezed.size(0);
  args.num_blocks = num_blocks;
  args.size = squeezed.size(1);
  args.width = down_weight.size(0);
  args.activation = activation_of(activation);
  args.eps = float(eps);
  const int64_t N = num_blocks, D = args.size, H = args.width;
  args.squeezed = check.floats(squeezed, {args.sentences, D}, "squeezed");
#define S2SENT_CHECK(type, name, ...) args.name = check.floats(name, {__VA_ARGS__}, #name);
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_CHECK)
#undef S2SENT_CHECK
  return args;
}

inline Gate gate_arguments(
    const Tensor& squeezed, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& gates) {
  const Checks check(squeezed);
  Gate args = gate_inputs(squeezed, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps);
  args.bottleneck = check.written(bottleneck, {args.sentences, args.width}, "bottleneck");
  args.gates = check.written(gates, {args.sentences, num_blocks, args.size}, "gates");
  return args;
}

inline Gate gate_pool_arguments(
    const Tensor& squeezed, const Tensor& pooled, S2SENT_GATE_PARAMETERS int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& output) {
  require(pooled.dim() == 3, "the gate's arguments do not fit");
  const Checks check(squeezed);
  Gate args = gate_inputs(squeezed, S2SENT_GATE_ARGUMENTS pooled.size(1), activation, eps);
  args.bottleneck = check.written(bottleneck, {args.sentences, args.width}, "bottleneck");
  args.pooled = check.floats(pooled, {args.sentences, args.num_blocks, args.size}, "pooled");
  args.dtype = dtype_of(output);
  check.dense(output, {args.sentences, args.size}, output.scalar_type(), "output");
  args.output = output.mutable_data_ptr();
  return args;
}

// The batch's statistics, as ``gate_in_training`` has left them, in place of the running ones.
inline void use_statistics(const Checks& check, const Optional& mean, const Optional& inverse_std, Gate& gate) {
  if (!mean && !inverse_std) return;
  require(
      mean && inverse_std && gate.norm_weight, "expected the statistics of a gate with a norm");
  gate.running_mean = check.floats(mean, {gate.num_blocks * gate.size}, "mean");
  gate.inverse_std = check.floats(inverse_std, {gate.num_blocks * gate.size}, "inverse_std");
}

// From grad_gates, or from grad_output and pooled.
inline Gate gate_backward_arguments(
    const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled,
    S2SENT_GATE_PARAMETERS const Optional& mean, const Optional& inverse_std, int64_t activation, double eps) {
  const bool pools = pooled.has_value();
  require(
      grad_gates.has_value() != pools && grad_output.has_value() == pools && (pools ? pooled : grad_gates)->dim() == 3,
      "the gate's gradients do not fit");
  const Checks check(squeezed);
  Gate args =
      gate_inputs(squeezed, S2SENT_GATE_ARGUMENTS (pools ? pooled : grad_gates)->size(1), activation, eps);
  use_statistics(check, mean, inverse_std, args);
  const Ints blocks = {args.sentences, args.num_blocks, args.size};
  args.pooled = check.floats(pooled, blocks, "pooled");
  args.grad_gates = check.floats(grad_gates, blocks, "grad_gates");
  if (!pools) return args;
  args.dtype = dtype_of(*grad_output);
  check.dense(*grad_output, {args.sentences, args.size}, grad_output->scalar_type(), "grad_output");
  args.grad_output = grad_output->const_data_ptr();
  return args;
}

inline void check_batch(const Gate& gate) {
  require(
      gate.sentences > 1 && gate.norm_weight, "the statistics need a norm and two sentences");
}

// g, or o with pooled; the statistics, and the running ones moved.
inline BatchStatistics gate_in_training_arguments(
    const Tensor& squeezed, const Optional& pooled, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation,
    double eps, double momentum, const Tensor& bottleneck, const Tensor& mean, const Tensor& inverse_std,
    const Tensor& result) {
  const Checks check(squeezed);
  BatchStatistics args = {};
  args.gate = pooled ? gate_pool_arguments(squeezed, *pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, result)
                     : gate_arguments(
                           squeezed, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps, bottleneck, result);
  check_batch(args.gate);
  const Ints columns = {args.gate.num_blocks * args.gate.size};
  args.momentum = momentum;
  args.mean = check.written(mean, columns, "mean");
  args.inverse_std = check.written(inverse_std, columns, "inverse_std");
  args.running_mean = check.written(running_mean, columns, "running_mean");
  args.running_var = check.written(running_var, columns, "running_var");
  return args;
}

// ---------------------------------------------------------------- fuse

template <class Fuse>
Fuse fuse_arguments(
    const Sentences& sentences, const Tensor& first, const std::vector<Rows>& hidden, const Tensor& gates,
    const Tensor& fused) {
  const Checks& check = sentences.check;
  Fuse args = {};
  args.dtype = dtype_of(first);
  args.num_blocks = int64_t(hidden.size());
  args.size = sentences.size();
  args.hidden = hidden.data();
  args.gates = check.floats(gates, {sentences.count, args.num_blocks, args.size}, "gates");
  check.dense(fused, sentences.shape, first.scalar_type(), "fused");
  args.fused = fused.mutable_data_ptr();
  return args;
}

template <class FuseBackward>
FuseBackward fuse_backward_arguments(
    const Sentences& sentences, const Tensor& first, const std::vector<Rows>& hidden, const Tensor& grad_fused,
    const Tensor& grad_gates) {
  FuseBackward args = {};
  args.dtype = dtype_of(first);
  args.num_blocks = int64_t(hidden.size());
  args.size = sentences.size();
  args.hidden = hidden.data();
  args.grad_fused = sentences.rows(grad_fused, first.scalar_type());
  args.grad_gates = sentences.check.written(grad_gates, {sentences.count, args.num_blocks, args.size}, "grad_gates");
  return args;
}

}  // namespace s2sent::ops
