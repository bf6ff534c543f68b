// The C++ signatures of the ops; register.cpp has their schemas. Every device implements all of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace s2sent::ops {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// The gate's tensors, in one order: in schemas, in signatures, and handed on.
#define S2SENT_GATE_SCHEMA \
  "Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor? norm_weight, Tensor? norm_bias, " \
  "Tensor? running_mean, Tensor? running_var, Tensor? block_prior"
#define S2SENT_GATE_PARAMETERS \
  const Tensor &down_weight, const Tensor &down_bias, const Tensor &up_weight, const Tensor &up_bias, \
      const Optional &norm_weight, const Optional &norm_bias, const Optional &running_mean, \
      const Optional &running_var, const Optional &prior
#define S2SENT_GATE_ARGUMENTS \
  down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, running_mean, running_var, prior

#define S2SENT_OPS \
  void squeeze( \
      const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask, \
      const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling, \
      const Tensor& squeezed, const Optional& pooled); \
  void squeeze_backward( \
      const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates, \
      const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, \
      const Optional& beta, int64_t pooling, const Tensors& grads); \
  void gate( \
      const Tensor& squeezed, S2SENT_GATE_PARAMETERS, int64_t num_blocks, int64_t activation, double eps, \
      const Tensor& bottleneck, const Tensor& gates); \
  void gate_pool( \
      const Tensor& squeezed, const Tensor& pooled, S2SENT_GATE_PARAMETERS, int64_t activation, double eps, \
      const Tensor& bottleneck, const Tensor& output); \
  void gate_backward( \
      const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled, \
      S2SENT_GATE_PARAMETERS, int64_t activation, double eps, const Tensor& bottleneck, const Optional& grad_pooled, \
      const Tensor& grad_logits, const Tensor& grad_normed, const Optional& normed); \
  void multiply(const Tensor& x, const Tensor& weight, const Tensor& result); \
  void fuse( \
      const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens, \
      const Tensor& fused); \
  void fuse_backward( \
      const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, \
      const Tensor& grad_gates);

namespace cpu {
S2SENT_OPS
}

namespace cuda {
S2SENT_OPS
bool select(
    const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    S2SENT_GATE_PARAMETERS, int64_t activation, double eps, bool always, const Tensor& squeezed, const Tensor& gates,
    const Tensor& fused);
}

#undef S2SENT_OPS

}  // namespace s2sent::ops
