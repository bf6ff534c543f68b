// What both halves of the bindings share: the checks that a kernel's memory safety rests on, and the ops' signatures.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "stages.h"

namespace s2sent::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// Checks tensors against the device of an op's first one.
struct Checks {
  bool cuda;
  int32_t index;

  explicit Checks(const Tensor& first) : cuda(first.is_cuda()), index(cuda ? first.get_device_index() : 0) {
    STD_TORCH_CHECK(cuda || first.is_cpu(), "s2sent_native: expected CPU or CUDA tensors");
  }

  bool here(const Tensor& tensor) const {
    return cuda ? tensor.is_cuda() && tensor.get_device_index() == index : tensor.is_cpu();
  }

  static void shape(const Tensor& tensor, const Ints& shape, const char* name) {
    bool same = tensor.dim() == int64_t(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(int64_t(i)) == shape[i];
    STD_TORCH_CHECK(same, "s2sent_native: ", name, " has another shape than its kernel expects");
  }

  void dense(const Tensor& tensor, const Ints& expected, ScalarType dtype, const char* name) const {
    shape(tensor, expected, name);
    STD_TORCH_CHECK(
        here(tensor) && tensor.is_contiguous() && tensor.scalar_type() == dtype, "s2sent_native: ", name,
        " must be a contiguous tensor of its kernel's dtype, on the device of the others");
  }

  const float* floats(const Tensor& tensor, const Ints& expected, const char* name) const {
    dense(tensor, expected, ScalarType::Float, name);
    return static_cast<const float*>(tensor.const_data_ptr());
  }

  const float* floats(const Optional& tensor, const Ints& expected, const char* name) const {
    return tensor ? floats(*tensor, expected, name) : nullptr;
  }

  float* written(const Tensor& tensor, const Ints& expected, const char* name) const {
    dense(tensor, expected, ScalarType::Float, name);
    return static_cast<float*>(tensor.mutable_data_ptr());
  }

  float* written(const Optional& tensor, const Ints& expected, const char* name) const {
    return tensor ? written(*tensor, expected, name) : nullptr;
  }

  // ``tensor`` has the shape of a hidden state and is dense in D.
  void rows(const Tensor& tensor, const Ints& expected, ScalarType dtype) const {
    shape(tensor, expected, "a hidden state or its gradient");
    const bool adjacent = expected.back() == 1 || tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1;
    STD_TORCH_CHECK(
        here(tensor) && tensor.scalar_type() == dtype && adjacent,
        "s2sent_native: hidden states must be tensors of one dtype on one device, dense in their features");
  }
};

inline Ints shape_of(const Tensor& tensor) {
  Ints shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "s2sent_native: expected float32, bfloat16 or float16");
  }
}

// What the numbers of a squeeze, or of its backward, must be for the kernels.
inline void check_squeeze(int64_t first_block, int64_t num, int64_t num_blocks, int64_t parts, int64_t size, int64_t pooling) {
  STD_TORCH_CHECK(
      first_block >= 0 && first_block + num <= num_blocks && parts > 0 && size % parts == 0 && pooling >= 0 && pooling <= 3,
      "s2sent_native: blocks, parts or pooling do not fit");
}

// Where each hidden state's gradient goes; null where none is wanted.
inline std::vector<void*> gradients_into(const Checks& check, const Tensors& grads, const Ints& shape) {
  std::vector<void*> into;
  for (const Tensor& grad : grads) {
    const bool wanted = grad.numel() != 0;
    if (wanted) check.dense(grad, shape, grads[0].scalar_type(), "a hidden state's gradient");
    into.push_back(wanted ? grad.mutable_data_ptr() : nullptr);
  }
  return into;
}

inline int64_t product_chunks(const Tensor& weight) { return (weight.size(0) + kProductRows - 1) / kProductRows; }

// ``partial`` holds product_chunks x B x columns floats.
inline Product product_arguments(const Tensor& x, const Tensor& weight, float* partial, const Tensor& result) {
  const Checks check(x);
  const int64_t count = x.size(0), rows = weight.size(0), columns = weight.size(1);
  return {
      count,
      rows,
      columns,
      check.floats(x, {count, rows}, "x"),
      check.floats(weight, {rows, columns}, "weight"),
      partial,
      check.written(result, {count, columns}, "result"),
  };
}

inline Gate gate_arguments(
    const Tensor& squeezed, const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight,
    const Tensor& up_bias, const Optional& norm_weight, const Optional& norm_bias, const Optional& running_mean,
    const Optional& running_var, const Optional& prior, int64_t num_blocks, bool relu, double eps,
    const Optional& bottleneck, const Optional& gates, const Optional& pooled, const Optional& output,
    const Optional& grad_gates, const Optional& grad_output, const Optional& grad_pooled, const Optional& grad_logits,
    const Optional& grad_normed, const Optional& normed) {
  STD_TORCH_CHECK(
      squeezed.dim() == 2 && down_weight.dim() == 2 && num_blocks > 0 &&
          (pooled.has_value() == output.has_value() || grad_logits),
      "s2sent_native: the gate's arguments do not fit");
  STD_TORCH_CHECK(
      !norm_weight || (norm_bias && running_mean && running_var), "s2sent_native: expected all of the norm's tensors");
  STD_TORCH_CHECK(
      !grad_logits ||
          (grad_normed && (!norm_weight || normed) && (pooled ? grad_output && grad_pooled : !!grad_gates)),
      "s2sent_native: the gate's gradients do not fit");
  const Checks check(squeezed);
  const int64_t count = squeezed.size(0), size = squeezed.size(1), width = down_weight.size(0), both = num_blocks * size;
  if (output) check.dense(*output, {count, size}, output->scalar_type(), "output");
  return {
      count,
      num_blocks,
      size,
      width,
      relu,
      float(eps),
      check.floats(squeezed, {count, size}, "squeezed"),
      check.floats(down_weight, {width, size}, "down_weight"),
      check.floats(down_bias, {width}, "down_bias"),
      check.floats(up_weight, {both, width}, "up_weight"),
      check.floats(up_bias, {both}, "up_bias"),
      check.floats(norm_weight, {both}, "norm_weight"),
      check.floats(norm_bias, {both}, "norm_bias"),
      check.floats(running_mean, {both}, "running_mean"),
      check.floats(running_var, {both}, "running_var"),
      check.floats(prior, {num_blocks}, "block_prior"),
      check.written(bottleneck, {count, width}, "bottleneck"),
      check.written(gates, {count, num_blocks, size}, "gates"),
      check.floats(pooled, {count, num_blocks, size}, "pooled"),
      output ? output->mutable_data_ptr() : nullptr,
      output ? dtype_of(*output) : DType::kFloat32,
      check.floats(grad_gates, {count, num_blocks, size}, "grad_gates"),
      check.floats(grad_output, {count, size}, "grad_output"),
      check.written(grad_pooled, {count, num_blocks, size}, "grad_pooled"),
      check.written(grad_logits, {count, num_blocks, size}, "grad_logits"),
      check.written(grad_normed, {count, num_blocks, size}, "grad_normed"),
      check.written(normed, {count, num_blocks, size}, "normed"),
  };
}

// The ops of a device; bindings.cpp has their schemas.
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
      const Tensor& squeezed, const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight, \
      const Tensor& up_bias, const Optional& norm_weight, const Optional& norm_bias, const Optional& running_mean, \
      const Optional& running_var, const Optional& prior, int64_t num_blocks, bool relu, double eps, \
      const Tensor& bottleneck, const Optional& gates, const Optional& pooled, const Optional& output, \
      const Optional& grad_gates, const Optional& grad_output, const Optional& grad_pooled, \
      const Optional& grad_logits, const Optional& grad_normed, const Optional& normed); \
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
    const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight, const Tensor& up_bias,
    const Optional& norm_weight, const Optional& norm_bias, const Optional& running_mean, const Optional& running_var,
    const Optional& prior, bool relu, double eps, bool always, const Tensor& squeezed, const Tensor& gates,
    const Tensor& fused);
}
#undef S2SENT_OPS

}  // namespace s2sent::ops
