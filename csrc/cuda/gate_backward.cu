// The gradients inside the gate, from dg, or from do and p, and then dp too; the gates are recomputed from s.
//
// Order of summation: sum_n g dg over the blocks ascending; the rest as gate.cuh says.

#include <type_traits>

#include "gate.cuh"

namespace s2sent::cuda {
namespace {

template <int S>
__global__ void __launch_bounds__(kGateThreads, 2) backward_kernel(const __grid_constant__ Gate a, int64_t tiles) {
  extern __shared__ __align__(16) char bytes[];
  GateMemory<S>& memory = *reinterpret_cast<GateMemory<S>*>(bytes);
  float* weights = reinterpret_cast<float*>(bytes + sizeof(GateMemory<S>));
  float* sigmoids = weights + a.num_blocks * S * kWarp;
  const int64_t d0 = blockIdx.x % tiles * kWarp, b0 = blockIdx.x / tiles * S;
  weigh<S, true>(a, b0, d0, memory, weights, sigmoids);
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t d = d0 + lane;
  if (d >= a.size) return;
  for (int k = threadIdx.x / kWarp; k < S && b0 + k < a.sentences; k += kGateWarps) {
    float* own = weights + k * kWarp + lane;
    const float* e = sigmoids + k * kWarp + lane;
    const int64_t place = (b0 + k) * a.num_blocks * a.size + d;
    const float output = a.pooled ? a.grad_output[(b0 + k) * a.size + d] : 0.0f;
    float total = 0.0f, mean = 0.0f;
    for (int64_t n = 0; n < a.num_blocks; ++n) total += own[n * S * kWarp];
#pragma unroll 2
    for (int64_t n = 0; n < a.num_blocks; ++n) {
      const float g = own[n * S * kWarp] / total;
      const int64_t to = place + n * a.size;
      const float grad = a.pooled ? output * a.pooled[to] : a.grad_gates[to];
      if (a.pooled) a.grad_pooled[to] = g * output;
      own[n * S * kWarp] = g;
      mean = fmaf(g, grad, mean);
    }
#pragma unroll 2
    for (int64_t n = 0; n < a.num_blocks; ++n) {
      const int64_t to = place + n * a.size;
      const float grad = a.pooled ? output * a.pooled[to] : a.grad_gates[to];
      const float logit = own[n * S * kWarp] * (grad - mean), s = e[n * S * kWarp];
      a.grad_logits[to] = logit;
      a.grad_normed[to] = logit * s * (1.0f - s);
    }
  }
}

}  // namespace

cudaError_t excite_backward(const Gate& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.size == 0) return cudaSuccess;
  return with_sentences(args.num_blocks, [&](auto sentences) {
    constexpr int S = decltype(sentences)::value;
    const size_t bytes = gate_bytes<S>(args.num_blocks, 2);
    const cudaError_t error = allow_shared_memory(backward_kernel<S>, bytes);
    if (error != cudaSuccess) return error;
    const int64_t tiles = pieces(args.size, kWarp);
    const unsigned grid = unsigned(tiles * pieces(args.sentences, S));
    backward_kernel<S><<<grid, kGateThreads, bytes, stream>>>(args, tiles);
    return cudaGetLastError();
  });
}

}  // namespace s2sent::cuda
