// gate: s = act(W1 f + b1), z = W2 s + b2, g = s-norm(sigmoid(norm(z))), and o = sum_n g p.
//
// Order of summation: W1 f in slices of slice_of(D) features, in a slice its quarters, in a quarter four running sums
// over every fourth feature; these and the quarters as trees, the slices ascending; o over the blocks ascending; the rest as
// gate.cuh says.

#include <type_traits>

#include "gate.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kSentences = 4;  // that share a read of W1
constexpr int kWarps = 8;

// A warp a row of W1: eight slices at a time, four lanes each.
__global__ void __launch_bounds__(kWarps * kWarp) bottleneck_kernel(const __grid_constant__ Gate a, int64_t tiles) {
  const int lane = threadIdx.x % kWarp, quarter = lane % 4;
  const int64_t h = blockIdx.x % tiles * kWarps + threadIdx.x / kWarp, b0 = blockIdx.x / tiles * kSentences;
  if (h >= a.width) return;
  const int64_t slice = slice_of(a.size);
  const float* weight = a.down_weight + h * a.size;
  const float* f[kSentences];
#pragma unroll
  for (int k = 0; k < kSentences; ++k) f[k] = a.squeezed + min(b0 + k, a.sentences - 1) * a.size;
  float total[kSentences] = {};
  for (int64_t start = 0; start < a.size; start += 8 * slice) {
    const int64_t first = start + lane / 4 * slice + quarter * (slice / 4), stop = min(first + slice / 4, a.size);
    float sum[kSentences][4] = {};
#pragma unroll 2
    for (int64_t d = first; d < stop; d += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (d + j >= stop) break;
        const float w = weight[d + j];
#pragma unroll
        for (int k = 0; k < kSentences; ++k) sum[k][j] = fmaf(w, f[k][d + j], sum[k][j]);
      }
    }
#pragma unroll
    for (int k = 0; k < kSentences; ++k) {
      float part = (sum[k][0] + sum[k][1]) + (sum[k][2] + sum[k][3]);
      part += __shfl_xor_sync(~0u, part, 1);
      part += __shfl_xor_sync(~0u, part, 2);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[k] += __shfl_sync(~0u, part, 4 * i);
    }
  }
#pragma unroll
  for (int k = 0; k < kSentences; ++k) {
    if (lane == k && b0 + k < a.sentences) a.bottleneck[(b0 + k) * a.width + h] = activate(a, total[k] + a.down_bias[h]);
  }
}

template <class T, int S>
__global__ void __launch_bounds__(kGateThreads, 4) excite_kernel(const __grid_constant__ Gate a, int64_t tiles) {
  extern __shared__ __align__(16) char bytes[];
  GateMemory<S>& memory = *reinterpret_cast<GateMemory<S>*>(bytes);
  float* weights = reinterpret_cast<float*>(bytes + sizeof(GateMemory<S>));
  const int64_t d0 = blockIdx.x % tiles * kWarp, b0 = blockIdx.x / tiles * S;
  weigh<S, false>(a, b0, d0, memory, weights, nullptr);
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t d = d0 + lane;
  if (d >= a.size) return;
  for (int k = threadIdx.x / kWarp; k < S && b0 + k < a.sentences; k += kGateWarps) {
    const float* own = weights + k * kWarp + lane;
    float total = 0.0f, sum = 0.0f;
    for (int64_t n = 0; n < a.num_blocks; ++n) total += own[n * S * kWarp];
    const int64_t place = (b0 + k) * a.num_blocks * a.size + d;
#pragma unroll 4
    for (int64_t n = 0; n < a.num_blocks; ++n) {
      const float g = own[n * S * kWarp] / total;
      if (a.gates) a.gates[place + n * a.size] = g;
      if (a.pooled) sum = fmaf(g, a.pooled[place + n * a.size], sum);
    }
    if (a.pooled) narrow(sum, static_cast<T*>(a.output) + (b0 + k) * a.size + d);
  }
}

}  // namespace

cudaError_t bottleneck(const Gate& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.width == 0) return cudaSuccess;
  const int64_t tiles = pieces(args.width, kWarps);
  const unsigned grid = unsigned(tiles * pieces(args.sentences, kSentences));
  bottleneck_kernel<<<grid, kWarps * kWarp, 0, stream>>>(args, tiles);
  return cudaGetLastError();
}

cudaError_t excite(const Gate& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.size == 0) return cudaSuccess;
  S2SENT_DTYPE(args.dtype, [&] {
    return with_sentences(args.num_blocks, [&](auto sentences) {
      constexpr int S = decltype(sentences)::value;
      const size_t bytes = gate_bytes<S>(args.num_blocks, 1);
      const cudaError_t error = allow_shared_memory(excite_kernel<T, S>, bytes);
      if (error != cudaSuccess) return error;
      const int64_t tiles = pieces(args.size, kWarp);
      const unsigned grid = unsigned(tiles * pieces(args.sentences, S));
      excite_kernel<T, S><<<grid, kGateThreads, bytes, stream>>>(args, tiles);
      return cudaGetLastError();
    });
  })
}

}  // namespace s2sent::cuda
