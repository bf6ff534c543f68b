// Shared by the ops on CUDA tensors, which run on torch's current stream with scratch memory from torch's allocator. Nothing here
// waits for the GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../cuda/launch.h"
#include "gradients.h"
#include "plan.h"

namespace s2sent::ops::cuda {

// Types. The ops qualify the launchers, which have the same names.
using s2sent::cuda::Batch, s2sent::cuda::Factors, s2sent::cuda::TokenFinder;
using s2sent::cuda::Select, s2sent::cuda::SelectPlan;
using s2sent::cuda::Squeeze, s2sent::cuda::SqueezeBackward, s2sent::cuda::Fuse, s2sent::cuda::FuseBackward;

// Makes the tensors' device current, and holds its stream.
struct Stream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Stream(const Checks& check) : guard(check.index) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(check.index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  operator cudaStream_t() const { return stream; }
};

inline void check_launch(cudaError_t error, const char* name) {
  require(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

inline void check_maximum(int64_t num_blocks) {
  require(num_blocks <= kMaxBlocks, "too many blocks for the CUDA kernels");
}

inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline Batch batch_of(const Sentences& sentences) {
  Batch batch = {};
  batch.sentences = sentences.count;
  batch.size = sentences.length();
  batch.tokens = sentences.tokens();
  batch.packed = sentences.packed;
  batch.starts = sentences.starts;
  batch.mask = sentences.mask;
  return batch;
}

// beta of the M parts: from ``official`` [M, L], or for the frequencies y.
struct Frequencies {
  int64_t num_blocks;  // N
  int64_t parts;       // M
  const Ints& y;
  Optional official = {};
};

// A batch's real tokens and, if frequencies are given, their factors: ``want`` scratch memory for them, then ``find``.
struct RealBatch {
  Batch batch;
  Factors factors = {};

  explicit RealBatch(const Sentences& sentences) : batch(batch_of(sentences)) {}

  RealBatch(const RealBatch&) = delete;

  void want(Scratch& scratch, const Sentences& sentences, const Frequencies* frequencies) {
    if (batch.mask) {
      scratch.want(finder_.lengths, batch.sentences);
      scratch.want(finder_.firsts, batch.sentences);
      scratch.want(finder_.places, batch.tokens);
      scratch.want(finder_.ranks, batch.tokens);
    }
    if (frequencies) want_factors(scratch, sentences, *frequencies);
  }

  void find(cudaStream_t stream) {
    if (finder_.parts) factors = {finder_.beta, finder_.stride_b, finder_.stride_m};
    if (!batch.mask && !finder_.parts) return;
    finder_.batch = batch;
    check_launch(s2sent::cuda::find_tokens(finder_, stream), "find_tokens");
    batch.lengths = finder_.lengths;
    batch.firsts = finder_.firsts;
    batch.places = finder_.places;
    batch.ranks = finder_.ranks;
  }

 private:
  TokenFinder finder_ = {};

  void want_factors(Scratch& scratch, const Sentences& sentences, const Frequencies& from) {
    if (from.official) {
      factors = {sentences.check.floats(from.official, {from.parts, batch.size}, "beta"), 0, batch.size};
      return;
    }
    check_frequencies(from.y, from.parts);
    require(from.parts <= kMaxParts, "too many parts for the CUDA kernels");
    const bool shared = !batch.packed && !batch.mask;
    const int64_t tokens = shared ? batch.size : batch.tokens;
    finder_.num_blocks = from.num_blocks;
    finder_.parts = from.parts;
    finder_.y = from.y.data();
    finder_.stride_b = shared || batch.packed ? 0 : from.parts * batch.size;
    finder_.stride_m = batch.packed ? tokens : batch.size;
    scratch.want(finder_.beta, from.parts * tokens);
  }
};

// The gate with the statistics of the batch.
inline void launch_gate_in_training(BatchStatistics& args, cudaStream_t stream) {
  args.use();
  check_launch(s2sent::cuda::bottleneck(args.gate, stream), "bottleneck");
  check_launch(s2sent::cuda::batch_statistics(args, stream), "batch_statistics");
  check_launch(s2sent::cuda::excite(args.gate, stream), "excite");
}

// dp, df, and the gradients of the gate's tensors.
inline void launch_gate_backward(const GateBackward& back, cudaStream_t stream) {
  check_launch(s2sent::cuda::bottleneck(back.args.gate, stream), "bottleneck");
  check_launch(s2sent::cuda::excite_backward(back.args.gate, stream), "excite_backward");
  check_launch(s2sent::cuda::up_gradients(back.args, stream), "up_gradients");
  check_launch(s2sent::cuda::multiply(back.to_down, stream), "multiply");
  check_launch(s2sent::cuda::down_gradients(back.args, stream), "down_gradients");
  check_launch(s2sent::cuda::multiply(back.to_squeezed, stream), "multiply");
}

inline std::vector<Rows> rows_of(const Sentences& sentences, const Tensors& tensors) {
  check_maximum(int64_t(tensors.size()));
  return sentences.rows(tensors);
}

}  // namespace s2sent::ops::cuda
