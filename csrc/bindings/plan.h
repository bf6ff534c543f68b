// What the calls of one selector have in common, kept between them: the gate's tensors and the constants of the DCT.
//
// A plan holds the tensors themselves and no copy, so that a call reads what they hold then. It looks at their memory, dtype and
// shape at every call.
#pragma once

#include <memory>

#include "arguments.h"

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
int64_t keep(std::shared_ptr<const Plan> plan);
void forget(int64_t number);
std::shared_ptr<const Plan> plan_of(int64_t number);

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

  Planned(const Planned&) = delete;

  int64_t rows() const { return gate.sentences * gate.num_blocks * gate.size; }  // numbers in [B, N, D]

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
};

}  // namespace s2sent::ops
