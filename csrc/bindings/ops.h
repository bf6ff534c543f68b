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
  /* g, or o with pooled; the batch's statistics, and the running ones moved in place. */ \
  X(gate_in_training, void, \
    "(Tensor squeezed, Tensor? pooled, " S2SENT_GATE_SCHEMA "int num_blocks, int activation, float eps, " \
    "float momentum, Tensor(a!) bottleneck, Tensor(b!) mean, Tensor(c!) inverse_std, Tensor(d!) result) -> ()", \
    (const Tensor& squeezed, const Optional& pooled, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, \
     double eps, double momentum, const Tensor& bottleneck, const Tensor& mean, const Tensor& inverse_std, \
     const Tensor& result)) \
  /* dp (empty without p), df, and the gradients of the gate's tensors (empty for those that have none), from grad_gates, or \
     from grad_output and pooled. */ \
  X(gate_backward, Tensors, \
    "(Tensor? grad_gates, Tensor? grad_output, Tensor squeezed, Tensor? pooled, " S2SENT_GATE_SCHEMA "Tensor? mean, " \
    "Tensor? inverse_std, int activation, float eps) -> Tensor[]", \
    (const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled, \
     S2SENT_GATE_PARAMETERS const Optional& mean, const Optional& inverse_std, int64_t activation, double eps)) \
  X(fuse, void, \
    "(Tensor[] hidden_states, Tensor gates, Tensor? mask, Tensor? cu_seqlens, Tensor(a!) fused) -> ()", \
    (const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens, \
     const Tensor& fused)) \
  X(fuse_backward, void, \
    "(Tensor grad_fused, Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, Tensor(a!) grad_gates) -> ()", \
    (const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, \
     const Tensor& grad_gates))

// The whole selector of a plan (plan.h) in one call, forward or backward. All return nothing where a tensor is not what the
// kernels read; they check all that memory safety needs. Gradients are those of the hidden states (empty where not needed), then
// those of the gate's tensors (empty for those that have none).
#define S2SENT_FOR_EACH_PLANNED_OP(X) \
  /* o, and f and p if they are to be kept */ \
  X(planned_pool, Tensors, \
    "(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, int plan, int pooling, bool keep) -> Tensor[]", \
    (const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling, \
     bool keep)) \
  /* o, f, p, and mean and 1 / std of the batch; moves the running statistics */ \
  X(planned_pool_in_training, Tensors, \
    "(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, int plan, int pooling, float momentum) -> Tensor[]", \
    (const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, int64_t pooling, \
     double momentum)) \
  /* From do and what was kept. shape: a hidden state's */ \
  X(planned_pool_backward, Tensors, \
    "(Tensor grad_output, Tensor squeezed, Tensor pooled, Tensor? mean, Tensor? inverse_std, int[] shape, Tensor? mask, " \
    "Tensor? cu_seqlens, int plan, int pooling, int[] needed) -> Tensor[]", \
    (const Tensor& grad_output, const Tensor& squeezed, const Tensor& pooled, const Optional& mean, \
     const Optional& inverse_std, const Ints& shape, const Optional& mask, const Optional& cu_seqlens, int64_t plan, \
     int64_t pooling, const Ints& needed)) \
  /* v, and f and g if they are to be kept */ \
  X(planned_select, Tensors, \
    "(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, int plan, bool keep) -> Tensor[]", \
    (const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens, int64_t plan, bool keep)) \
  /* From dv and what was kept */ \
  X(planned_select_backward, Tensors, \
    "(Tensor grad_fused, Tensor squeezed, Tensor gates, Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, " \
    "int plan, int[] needed) -> Tensor[]", \
    (const Tensor& grad_fused, const Tensor& squeezed, const Tensor& gates, const Tensors& hidden_states, \
     const Optional& mask, const Optional& cu_seqlens, int64_t plan, const Ints& needed))

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
