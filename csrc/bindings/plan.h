// What the calls of one selector have in common, kept between them: the gate's tensors and the constants of the DCT.
//
// A plan holds the tensors themselves and no copy, so that a call reads what they hold then. It looks at their memory, dtype and
// shape at every call.
#pragma once

#include <memory>
#include <tuple>

#include "arguments.h"
#include "memory.h"

namespace s2sent::ops {

struct Plan {
#define S2SENT_HELD(type, name, ...) type name;
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_HELD)
#undef S2SENT_HELD
  Tensor alpha;  // [M, N]
  Ints y;        // [M] frequencies along the tokens
  Activation activation;
  double eps;

  int64_t parts() const { return alpha.size(0); }       // M
  int64_t num_blocks() const { return alpha.size(1); }  // N
};

// Plans by number. An unknown number has none.
std::shared_ptr<const Plan> plan_of(int64_t number);

// The number of a plan, and its owner: a tensor of one number whose memory, once let go, lets the plan go. Python may let its
// objects go at any moment, also while something records the ops that a thread calls: an op that forgets would be recorded.
std::tuple<int64_t, Tensor> keep(std::shared_ptr<const Plan> plan);

inline const float* data_of(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline const float* data_of(const Optional& tensor) { return tensor ? data_of(*tensor) : nullptr; }

// A call of a plan whose tensors all are what the kernels read: hidden states of one dtype and shape, dense in D, on the device of
// the gate's tensors, and these float32. Otherwise ``sentences`` is empty, and the caller's way through Python serves the call.
struct Planned {
  std::shared_ptr<const Plan> plan;
  std::optional<Sentences> sentences;
  std::vector<Rows> hidden;
  DType dtype;
  Gate gate = {};

  Planned(
      int64_t number, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
      int64_t maximum_blocks);

  // A backward pass that reads no hidden state, only their ``shape``, and gradients that are as ``like``.
  Planned(
      int64_t number, const Tensor& like, const Ints& shape, const Optional& mask, const Optional& cu_seqlens,
      int64_t maximum_blocks);

  Planned(const Planned&) = delete;

  int64_t rows() const { return gate.sentences * gate.num_blocks * gate.size; }  // numbers in [B, N, D]

  // f and p, or f and g: further results if they are kept, else scratch memory.
  void want(bool keep, Scratch& scratch, Tensors& results, float*& squeezed, float*& blocks) const {
    if (!keep) {
      scratch.want(squeezed, gate.sentences * gate.size);
      scratch.want(blocks, rows());
      return;
    }
    results.push_back(empty(sentences->check, {gate.sentences, gate.size}, ScalarType::Float));
    squeezed = static_cast<float*>(results.back().mutable_data_ptr());
    results.push_back(empty(sentences->check, {gate.sentences, gate.num_blocks, gate.size}, ScalarType::Float));
    blocks = static_cast<float*>(results.back().mutable_data_ptr());
  }

  // Without batch, factors, and what it writes.
  template <class Squeeze>
  Squeeze squeeze(Pooling pooling) const {
    Squeeze args = {};
    args.dtype = dtype;
    args.num = args.num_blocks = gate.num_blocks;
    args.size = gate.size;
    args.parts = plan->parts();
    args.pooling = pooling;
    args.hidden = hidden.data();
    args.alpha = data_of(plan->alpha);
    return args;
  }

  // The same, and without gradients.
  template <class SqueezeBackward>
  SqueezeBackward squeeze_backward(Pooling pooling) const {
    SqueezeBackward args = {};
    args.dtype = dtype;
    args.num_blocks = gate.num_blocks;
    args.size = gate.size;
    args.parts = plan->parts();
    args.pooling = pooling;
    args.alpha = data_of(plan->alpha);
    return args;
  }

  template <class FuseBackward>
  FuseBackward fuse_backward(const Tensor& grad_fused) const {
    FuseBackward args = {};
    args.dtype = dtype;
    args.num_blocks = gate.num_blocks;
    args.size = gate.size;
    args.hidden = hidden.data();
    args.grad_fused = sentences->rows(grad_fused, grad_fused.scalar_type());
    return args;
  }

  // Whether the kernels read the call's tensors and the gradient of v.
  bool takes(const Tensor& grad_fused) const;

  // Whether they do, and there is a batch with statistics.
  bool trains() const { return sentences && gate.sentences > 1 && gate.norm_weight; }

  // Without what it writes, apart from the running statistics.
  BatchStatistics statistics(double momentum) const;

  // o, f, p, mean and 1 / std, which ``squeeze`` and ``args`` then write.
  template <class Squeeze>
  Tensors results_in_training(ScalarType type, Squeeze& squeeze, BatchStatistics& args) const {
    Gate& to = args.gate;
    const Checks& check = sentences->check;
    const Ints wide = {to.sentences, to.size}, columns = {to.num_blocks * to.size};
    Tensors results = {
        empty(check, wide, type), empty(check, wide, ScalarType::Float),
        empty(check, {to.sentences, to.num_blocks, to.size}, ScalarType::Float),
        empty(check, columns, ScalarType::Float), empty(check, columns, ScalarType::Float)};
    const auto floats = [&](size_t i) { return static_cast<float*>(results[i].mutable_data_ptr()); };
    to.output = results[0].mutable_data_ptr();
    to.dtype = dtype;
    to.squeezed = squeeze.squeezed = floats(1);
    to.pooled = squeeze.pooled = floats(2);
    args.mean = floats(3);
    args.inverse_std = floats(4);
    return results;
  }

  // The arguments of the gate's backward pass from dg or, with p, from do.
  void read_gradients(const Tensor& squeezed, const Optional& pooled, const Optional& grad_output);

 private:
  bool fits(const Checks& check, int64_t size, int64_t maximum_blocks) const;
  void fill(const Tensor& like, const Ints& shape, const Optional& mask, const Optional& cu_seqlens);
};

}  // namespace s2sent::ops
