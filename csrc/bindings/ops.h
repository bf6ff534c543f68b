// The ops in one table: their schemas beside their C++ signatures. register.cpp registers what stands here, cpu.cpp and cuda.cpp
// define it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../stages.h"

namespace s2sent::ops {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// The gate's tensors (stages.h) in the middle of a schema, of parameters and of arguments. Each expansion ends with a comma.
#define S2SENT_SCHEMA_Tensor "Tensor "
#define S2SENT_SCHEMA_Optional "Tensor? "
#define S2SENT_SCHEMA(type, name, ...) S2SENT_SCHEMA_##type #name ", "
#define S2SENT_PARAMETER(type, name, ...) const type &name,
#define S2SENT_ARGUMENT(type, name, ...) name,
#define S2SENT_GATE_SCHEMA S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_SCHEMA)
#define S2SENT_GATE_PARAMETERS S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_PARAMETER)
#define S2SENT_GATE_ARGUMENTS S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_ARGUMENT)

// X(name, result, schema of the arguments and the result, parameters)
#define S2SENT_FOR_EACH_OP(X) \
  X(squeeze, void, \
    "(Tensor[] hidden_states, int first_block, int num_blocks, Tensor? mask, Tensor? cu_seqlens, Tensor alpha, int[] y, " \
    "Tensor? beta, int pooling, Tensor(a!) squeezed, Tensor(b!)? pooled) -> ()", \
    (const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask, \
     const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling, \
     const Tensor& squeezed, const Optional& pooled)) \
  X(squeeze_backward, void, \
    "(Tensor? grad_squeezed, Tensor? grad_pooled, Tensor? grad_fused, Tensor? gates, int[] shape, Tensor? mask, " \
    "Tensor? cu_seqlens, Tensor alpha, int[] y, Tensor? beta, int pooling, Tensor(a!)[] grads) -> ()", \
    (const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates, \
     const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, \
     const Optional& beta, int64_t pooling, const Tensors& grads)) \
  X(gate, void, \
    "(Tensor squeezed, " S2SENT_GATE_SCHEMA "int num_blocks, int activation, float eps, Tensor(a!) bottleneck, " \
    "Tensor(b!) gates) -> ()", \
    (const Tensor& squeezed, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, double eps, \
     const Tensor& bottleneck, const Tensor& gates)) \
  X(gate_pool, void, \
    "(Tensor squeezed, Tensor pooled, " S2SENT_GATE_SCHEMA "int activation, float eps, Tensor(a!) bottleneck, " \
    "Tensor(b!) output) -> ()", \
    (const Tensor& squeezed, const Tensor& pooled, S2SENT_GATE_PARAMETERS int64_t activation, double eps, \
     const Tensor& bottleneck, const Tensor& output)) \
  /* From grad_gates, or from grad_output with pooled and grad_pooled. */ \
  X(gate_backward, void, \
    "(Tensor? grad_gates, Tensor? grad_output, Tensor squeezed, Tensor? pooled, " S2SENT_GATE_SCHEMA "int activation, " \
    "float eps, Tensor(a!) bottleneck, Tensor(b!)? grad_pooled, Tensor(c!) grad_logits, Tensor(d!) grad_normed, " \
    "Tensor(e!)? normed) -> ()", \
    (const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled, \
     S2SENT_GATE_PARAMETERS int64_t activation, double eps, const Tensor& bottleneck, const Optional& grad_pooled, \
     const Tensor& grad_logits, const Tensor& grad_normed, const Optional& normed)) \
  X(multiply, void, \
    "(Tensor x, Tensor weight, Tensor(a!) result) -> ()", \
    (const Tensor& x, const Tensor& weight, const Tensor& result)) \
  X(fuse, void, \
    "(Tensor[] hidden_states, Tensor gates, Tensor? mask, Tensor? cu_seqlens, Tensor(a!) fused) -> ()", \
    (const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens, \
     const Tensor& fused)) \
  X(fuse_backward, void, \
    "(Tensor grad_fused, Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, Tensor(a!) grad_gates) -> ()", \
    (const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, \
     const Tensor& grad_gates))

// The whole selector of a plan (plan.h) in one call, without gradients. Both return nothing where a tensor is not what the
// kernels read; they check all that memory safety needs.
#define S2SENT_FOR_EACH_PLANNED_OP(X) \
  /* o, and f and p if they are to be kept */ \
  X(planned_pool, Tensors, \
    "(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, int plan, int pooling, bool keep) -> Tensor[]", \
    (const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling, \
     bool keep)) \
  /* v, and f and g if they are to be kept */ \
  X(planned_select, Tensors, \
    "(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, int plan, bool keep) -> Tensor[]", \
    (const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, bool keep))

// On CUDA alone. select: v, f and g in one pass over the hidden states. Returns false, and writes nothing, if the kernel does not
// support the batch or, unless ``always``, if the other ops are as fast.
#define S2SENT_FOR_EACH_CUDA_OP(X) \
  X(select, bool, \
    "(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, Tensor alpha, int[] y, " S2SENT_GATE_SCHEMA \
    "int activation, float eps, bool always, Tensor(a!) squeezed, Tensor(b!) gates, Tensor(c!) fused) -> bool", \
    (const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, \
     const Ints& y, S2SENT_GATE_PARAMETERS int64_t activation, double eps, bool always, const Tensor& squeezed, \
     const Tensor& gates, const Tensor& fused))

#define S2SENT_DECLARE(name, result, schema, parameters) result name parameters;

namespace cpu {
S2SENT_FOR_EACH_OP(S2SENT_DECLARE)
S2SENT_FOR_EACH_PLANNED_OP(S2SENT_DECLARE)
}

namespace cuda {
S2SENT_FOR_EACH_OP(S2SENT_DECLARE)
S2SENT_FOR_EACH_PLANNED_OP(S2SENT_DECLARE)
S2SENT_FOR_EACH_CUDA_OP(S2SENT_DECLARE)
}

#undef S2SENT_DECLARE

}  // namespace s2sent::ops
