// The arguments of every stage, shared by the CPU and CUDA kernels. Pointers are host memory on the CPU and device memory on
// CUDA, except where marked "host". Tensors are float32 and dense unless their dtype is given.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

#ifdef __CUDACC__
#define S2SENT_HD __host__ __device__ __forceinline__
#else
#define S2SENT_HD inline __attribute__((always_inline))
#endif

namespace s2sent {

constexpr int64_t kMaxBlocks = 128;    // N on CUDA: pointers to the hidden states are kernel arguments
constexpr int64_t kMaxParts = 32;      // M on CUDA: the number of frequency pairs
constexpr int64_t kProductRows = 256;  // rows of a partial sum of Product

// ---------------------------------------------------------------- options

// Numbers of the options across the op boundary. Python asserts at load that its own words have the same order.
enum class Pooling : int { kNone, kMean, kCls, kLast };
enum class Activation : uint8_t { kTanh, kRelu };

constexpr const char* kPoolings[] = {"mean", "cls", "last"};  // the word of Pooling(i + 1)
constexpr const char* kActivations[] = {"tanh", "relu"};      // the word of Activation(i)
constexpr int kNumPoolings = sizeof kPoolings / sizeof *kPoolings;
constexpr int kNumActivations = sizeof kActivations / sizeof *kActivations;
static_assert(kNumPoolings == int(Pooling::kLast), "a word for every pooling but kNone");
static_assert(kNumActivations == int(Activation::kRelu) + 1, "a word for every activation");

// s = act(t). tanh is computed in float64 and rounded once; relu(NaN) is NaN.
S2SENT_HD float activate(Activation activation, float t) {
  switch (activation) {
    case Activation::kTanh: return float(std::tanh(double(t)));
    case Activation::kRelu: return t < 0.0f ? 0.0f : t;
  }
  __builtin_unreachable();
}

// The derivative of activate, from its result.
S2SENT_HD float slope(Activation activation, float s) {
  switch (activation) {
    case Activation::kTanh: return 1.0f - s * s;
    case Activation::kRelu: return s > 0.0f ? 1.0f : 0.0f;
  }
  __builtin_unreachable();
}

// The rank of the one real token that p copies, in a sentence of ``length`` of them. Callers handle kNone and kMean, which copy
// no token; the result for them is arbitrary.
S2SENT_HD int64_t pooled_rank(Pooling pooling, int64_t length) {
  switch (pooling) {
    case Pooling::kCls: return 0;
    case Pooling::kLast:
    case Pooling::kNone:
    case Pooling::kMean: return length - 1;
  }
  __builtin_unreachable();
}

// ---------------------------------------------------------------- arguments

// Which tokens of [B, L] are real, as a caller stores it: numbers of one type, nonzero at real tokens.
enum class MaskType : uint8_t { kByte, kInt32, kInt64, kFloat32 };

struct Mask {
  const void* data = nullptr;  // null: all tokens are real
  MaskType type = MaskType::kByte;

  S2SENT_HD explicit operator bool() const { return data != nullptr; }

  S2SENT_HD bool operator[](int64_t i) const {
    switch (type) {
      case MaskType::kByte: return static_cast<const uint8_t*>(data)[i] != 0;
      case MaskType::kInt32: return static_cast<const int32_t*>(data)[i] != 0;
      case MaskType::kInt64: return static_cast<const int64_t*>(data)[i] != 0;
      case MaskType::kFloat32: return static_cast<const float*>(data)[i] != 0.0f;
    }
    __builtin_unreachable();
  }
};

// A tensor [B, L, D] or packed [T, D], dense in D. Strides are in elements.
struct Rows {
  const void* data;
  int64_t stride_b;  // 0 if packed
  int64_t stride_l;
};

// f and p. Batch describes which tokens are real, Factors holds beta; each device has its own.
template <class Batch, class Factors>
struct Squeeze {
  Batch batch;
  DType dtype;
  int64_t num;          // hidden states in this call: all N, or one of them
  int64_t first_block;  // index of hidden[0] among the N blocks
  int64_t num_blocks;   // N
  int64_t size;         // D
  int64_t parts;        // M
  Pooling pooling;
  const Rows* hidden;  // host [num]
  const float* alpha;  // [M, N]
  Factors factors;
  bool official;    // f sums over all L positions, padding included
  float* sums;      // scratch [B, num, D]: S_n = sum_l beta u_n
  float* pooled;    // p [B, N, D] or null
  float* squeezed;  // f [B, D]; added to unless first_block is 0
};

// du_n = g_n dv + w dp_n + alpha_n beta df.
template <class Batch, class Factors>
struct SqueezeBackward {
  Batch batch;
  DType dtype;
  int64_t num_blocks;  // N
  int64_t size;        // D
  int64_t parts;       // M
  Pooling pooling;
  const float* alpha;  // [M, N]
  Factors factors;
  bool official;
  const float* grad_squeezed;  // df [B, D] or null
  const float* grad_pooled;    // dp [B, N, D] or null
  Rows grad_fused;             // dv; data is null if there is none
  const float* gates;          // g [B, N, D] with dv
  void* const* grads;          // host [N]: dense du_n, or null if not needed
};

// The gate's tensors, in the order of GateParameters in formula/call.py. struct Gate, the ops' schemas and signatures, and the
// checks of tensors expand this table. X(Tensor, or Optional if it may be missing, name, shape)
#define S2SENT_FOR_EACH_GATE_TENSOR(X) \
  X(Tensor, down_weight, H, D)    /* W1 */ \
  X(Tensor, down_bias, H)         /* b1 */ \
  X(Tensor, up_weight, N * D, H)  /* W2 */ \
  X(Tensor, up_bias, N * D)       /* b2 */ \
  X(Optional, norm_weight, N * D) /* as the next three missing without a norm */ \
  X(Optional, norm_bias, N * D) \
  X(Optional, running_mean, N * D) \
  X(Optional, running_var, N * D) \
  X(Optional, block_prior, N)     /* c */ \
  X(Optional, gate_scale, )       /* tau, a scalar */

// s, and from it g, or o = sum_n g p, or their gradients.
struct Gate {
  int64_t sentences;   // B
  int64_t num_blocks;  // N
  int64_t size;        // D
  int64_t width;       // H
  Activation activation;
  float eps;
  const float* squeezed;  // f [B, D]
#define S2SENT_FIELD(type, name, ...) const float* name;  // null if missing
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_FIELD)
#undef S2SENT_FIELD
  const float* inverse_std;  // 1 / std [N D] of the batch, whose mean is in running_mean; null with running statistics
  float* bottleneck;         // s [B, H]
  float* gates;              // g [B, N, D] or null
  const float* pooled;       // p [B, N, D] or null
  void* output;              // o [B, D] with p
  DType dtype;               // of o and do

  // Backward only. Its input is dg, or do with p.
  const float* grad_gates;  // dg [B, N, D] or null
  const void* grad_output;  // do [B, D] with p
  float* grad_pooled;       // dp [B, N, D] with p
  float* grad_logits;       // [B, N, D]: the gradient of tau e + c; arbitrary without c
  float* grad_scale;        // [B, D]: sum_n grad_logits e, with tau
  float* grad_normed;       // [B, N, D]: the gradient of the norm's output, or of z without a norm
  float* normed;            // [B, N, D]: (z - mean) / std, with a norm
};

// The batch's mean and 1 / std of every z, for a gate with a norm; moves the running statistics towards them.
struct BatchStatistics {
  Gate gate;
  double momentum;
  float* z;             // scratch [B, N, D], on CUDA alone
  float* mean;          // [N D]
  float* inverse_std;   // [N D]
  float* running_mean;  // [N D]
  float* running_var;   // [N D]

  // Has the gate read what the kernel writes. Before any kernel: on the CPU, a gate in training computes s otherwise.
  void use() {
    gate.running_mean = mean;
    gate.inverse_std = inverse_std;
  }
};

// The gradients of the gate's tensors, from what excite_backward left, and ddown, that of W1 f + b1.
struct GateGradients {
  Gate gate;               // up_gradients turns its grad_normed into dz
  const float* grad_down;  // ddown [B, H]; read by down_gradients alone
  float* prior_sums;       // [N, D] sums of grad_logits over the sentences, with c
  float* scale_sums;       // [D] sums of grad_scale over the sentences, with tau
#define S2SENT_FIELD(type, name, ...) float* name;  // null if missing; the running statistics have no gradient
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_FIELD)
#undef S2SENT_FIELD
};

// x @ weight, or with s times the activation's slope at s.
struct Product {
  int64_t sentences;  // B
  int64_t rows;
  int64_t columns;
  const float* x;           // [B, rows]
  const float* weight;      // [rows, columns]
  const float* bottleneck;  // s [B, columns] or null
  Activation activation;
  float* partial;  // scratch [ceil(rows / kProductRows), B, columns]
  float* result;   // [B, columns]
};

// v = sum_n g_n u_n, 0 at padding.
template <class Batch>
struct Fuse {
  Batch batch;
  DType dtype;
  int64_t num_blocks;  // N
  int64_t size;        // D
  const Rows* hidden;  // host [N]
  const float* gates;  // g [B, N, D]
  void* fused;         // v, dense, shaped like a hidden state
};

// dg_n = sum_l dv u_n over real tokens.
template <class Batch>
struct FuseBackward {
  Batch batch;
  DType dtype;
  int64_t num_blocks;  // N
  int64_t size;        // D
  const Rows* hidden;  // host [N]
  Rows grad_fused;     // dv
  float* grad_gates;   // dg [B, N, D]
};

// ---------------------------------------------------------------- kernels that both devices declare alike

// The argument structs that depend on a device. X(name, its template's arguments)
#define S2SENT_FOR_EACH_ARGUMENTS(X) \
  X(Squeeze, Batch, Factors) \
  X(SqueezeBackward, Batch, Factors) \
  X(Fuse, Batch) \
  X(FuseBackward, Batch)

// X(name, its arguments): on the CPU void name(const Arguments&, int64_t begin, int64_t end, float* scratch), on CUDA
// cudaError_t name(const Arguments&, cudaStream_t). What one device alone has, or has in another form, is in its launch.h.
#define S2SENT_FOR_EACH_KERNEL(X) \
  X(squeeze_backward, SqueezeBackward) /* du */ \
  X(excite, Gate)                      /* g, or o */ \
  X(excite_backward, Gate)             /* dp and the gradients inside the gate */ \
  X(batch_statistics, BatchStatistics) /* of z */ \
  X(up_gradients, GateGradients)       /* dz; dW2, db2 and the norm's; sums for dc and dtau */ \
  X(down_gradients, GateGradients)     /* dW1, db1, dc, dtau */ \
  X(fuse, Fuse)                        /* v */ \
  X(fuse_backward, FuseBackward)       /* dg */

}  // namespace s2sent
