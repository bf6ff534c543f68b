// gate, backward: the gradients inside the gate from dg, or from do and p, which also gives dp. The gates are recomputed from s.
//
// Order of summation: sum_n g dg, and sum_n of the logits' gradient times e, over the Transformer blocks ascending; W2 s and the s-norm as in gate.cuh.

#include "gate.cuh"

namespace s2sent::cuda {
namespace {

#define S2SENT_READ(name, scalar, cpu, T, ...) \
  case DType::name: return widen(static_cast<const T*>(a.grad_output)[i]);

// A number of do.
__device__ inline float output_gradient(const Gate& a, int64_t i) {
  switch (a.dtype) { S2SENT_FOR_EACH_DTYPE(S2SENT_READ) }
  __builtin_unreachable();
}
#undef S2SENT_READ

template <class Shape>
__global__ void __launch_bounds__(kGateThreads, 3) backward_kernel(const __grid_constant__ Gate a, unsigned tiles) {
  constexpr int S = Shape::kSentences, F = Shape::kFeatures;
  extern __shared__ __align__(16) float memory[];
  float* weights = memory + Shape::weights_place(a.width);
  float* sigmoids = weights + a.num_blocks * S * F;
  const int64_t d0 = int64_t(blockIdx.x % tiles) * F, b0 = int64_t(blockIdx.x / tiles) * S;
  const Scale scale = weigh<Shape, true>(a, b0, d0, memory, weights, sigmoids);
  __syncthreads();
  for (int i = threadIdx.x; i < S * F; i += kGateThreads) {
    const int64_t b = b0 + i / F, d = d0 + i % F;
    if (b >= a.sentences || d >= a.size) continue;
    float* own = weights + i;
    const float* e = sigmoids + i;
    const int64_t place = b * a.num_blocks * a.size + d;
    const float output = a.pooled ? output_gradient(a, b * a.size + d) : 0.0f;
    float total = 0.0f, mean = 0.0f, products = 0.0f;
    if (scale.large) exponentiate(own, a.num_blocks, S * F);
    for (int64_t n = 0; n < a.num_blocks; ++n) total += own[n * S * F];
    const float inverse = 1.0f / total;
#pragma unroll 2
    for (int64_t n = 0; n < a.num_blocks; ++n) {
      const float g = divide(own[n * S * F], total, inverse);
      const int64_t to = place + n * a.size;
      const float grad = a.pooled ? output * a.pooled[to] : a.grad_gates[to];
      if (a.pooled) a.grad_pooled[to] = g * output;
      own[n * S * F] = g;
      mean = fmaf(g, grad, mean);
    }
#pragma unroll 2
    for (int64_t n = 0; n < a.num_blocks; ++n) {
      const int64_t to = place + n * a.size;
      const float grad = a.pooled ? output * a.pooled[to] : a.grad_gates[to];
      const float logit = own[n * S * F] * (grad - mean), s = e[n * S * F];
      if (a.block_prior) a.grad_logits[to] = logit;
      a.grad_normed[to] = scale.tau * logit * s * (1.0f - s);
      products = fmaf(logit, s, products);
    }
    if (a.gate_scale) a.grad_scale[b * a.size + d] = products;
  }
}

}  // namespace

cudaError_t excite_backward(const Gate& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.size == 0) return cudaSuccess;
  return with_shape<1>(args, 2, [&](auto shape) {
    using Shape = decltype(shape);
    const size_t bytes = size_t(shape.bytes(args, 2));
    const cudaError_t error = allow_shared_memory(backward_kernel<Shape>, bytes);
    if (error != cudaSuccess) return error;
    const unsigned tiles = unsigned(pieces(args.size, Shape::kFeatures));
    const unsigned grid = unsigned(shape.ctas(args));
    return launch_early(backward_kernel<Shape>, grid, kGateThreads, bytes, stream, args, tiles);
  });
}

}  // namespace s2sent::cuda
