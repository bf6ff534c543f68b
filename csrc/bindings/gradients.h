// Backward passes on either device: their results, their scratch memory, and the arguments of their kernels.
#pragma once

#include "arguments.h"
#include "memory.h"

namespace s2sent::ops {

inline int64_t product_chunks(int64_t rows) { return (rows + kProductRows - 1) / kProductRows; }

// The gate's. The caller gives its tensors, its statistics, f, and dg or do with p. Then it sets where dp and df are written; else
// they are scratch memory too. Then ``want``, the scratch's ``allocate``, ``connect``.
struct GateBackward {
  GateGradients args = {};
  Product to_down = {};      // ddown = dz W2, times the activation's slope
  Product to_squeezed = {};  // df = ddown W1
  Tensors results;           // the gradients of the gate's tensors, in order; empty ones for those that have none

  GateBackward(const Gate& gate, const Checks& check) {
    args.gate = gate;
    nothing_.emplace(empty(check, {0}, ScalarType::Float));
    const int64_t N = gate.num_blocks, D = gate.size, H = gate.width;
#define S2SENT_RESULT(type, name, ...) add_result(check, gate.name, {__VA_ARGS__}, args.name);
    S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_RESULT)
#undef S2SENT_RESULT
  }

  GateBackward(const GateBackward&) = delete;

  // dp (empty without p) and df before them.
  Tensors results_with_inputs(const Checks& check, bool pools) {
    Gate& gate = args.gate;
    const int64_t B = gate.sentences, D = gate.size;
    Tensors all = {*nothing_, empty(check, {B, D}, ScalarType::Float)};
    if (pools) all[0] = empty(check, {B, gate.num_blocks, D}, ScalarType::Float);
    if (pools) gate.grad_pooled = static_cast<float*>(all[0].mutable_data_ptr());
    to_squeezed.result = static_cast<float*>(all[1].mutable_data_ptr());
    all.insert(all.end(), results.begin(), results.end());
    return all;
  }

  void want(Scratch& scratch) {
    Gate& gate = args.gate;
    const int64_t B = gate.sentences, D = gate.size, H = gate.width, blocks = gate.num_blocks * D;
    scratch.want(gate.bottleneck, B * H);
    if (gate.pooled && !gate.grad_pooled) scratch.want(gate.grad_pooled, B * blocks);
    scratch.want(gate.grad_logits, B * blocks);
    scratch.want(gate.grad_normed, B * blocks);
    if (gate.norm_weight) scratch.want(gate.normed, B * blocks);
    if (gate.block_prior) scratch.want(args.prior_sums, blocks);
    if (gate.gate_scale) scratch.want(gate.grad_scale, B * D);
    if (gate.gate_scale) scratch.want(args.scale_sums, D);
    scratch.want(to_down.result, B * H);
    scratch.want(partial_, std::max(product_chunks(blocks) * B * H, product_chunks(H) * B * D));
    if (!to_squeezed.result) scratch.want(to_squeezed.result, B * D);
  }

  void connect() {
    const Gate& gate = args.gate;
    args.grad_down = to_down.result;
    to_down.sentences = to_squeezed.sentences = gate.sentences;
    to_down.partial = to_squeezed.partial = partial_;
    to_down.rows = gate.num_blocks * gate.size;
    to_down.columns = to_squeezed.rows = gate.width;
    to_squeezed.columns = gate.size;
    to_down.x = gate.grad_normed;
    to_down.weight = gate.up_weight;
    to_down.bottleneck = gate.bottleneck;
    to_down.activation = gate.activation;
    to_squeezed.x = args.grad_down;
    to_squeezed.weight = gate.down_weight;
  }

 private:
  float* partial_ = nullptr;
  Optional nothing_;

  void add_result(const Checks& check, const float* tensor, const Ints& shape, float*& into) {
    const bool has_gradient = tensor && &into != &args.running_mean && &into != &args.running_var;
    results.push_back(has_gradient ? empty(check, shape, ScalarType::Float) : *nothing_);
    if (has_gradient) into = static_cast<float*>(results.back().mutable_data_ptr());
  }
};

// Those of the hidden states that ``needed`` marks; empty ones for the others.
struct HiddenGradients {
  Tensors results;
  std::vector<void*> into;  // null if not needed
  bool any = false;

  HiddenGradients(const Sentences& sentences, const Ints& needed, int64_t num_blocks, ScalarType dtype) {
    require(int64_t(needed.size()) == num_blocks, "expected whether each gradient is needed");
    const Tensor nothing = empty(sentences.check, {0}, dtype);
    for (const int64_t need : needed) {
      results.push_back(need ? empty(sentences.check, sentences.shape, dtype) : nothing);
      into.push_back(need ? results.back().mutable_data_ptr() : nullptr);
      any = any || need;
    }
  }

  Tensors results_before(const Tensors& others) const {
    Tensors all = results;
    all.insert(all.end(), others.begin(), others.end());
    return all;
  }
};

}  // namespace s2sent::ops
