// gate: s = act(W1 f + b1), z = W2 s + b2, e = sigmoid(norm(z)), g = s-norm(tau e + c), and o = sum_n g p.
//
// Order of summation: W1 f as in order.h, W2 s and the s-norm as in gate.cuh; o over the Transformer blocks ascending.

#include "gate.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kRows = 4;    // rows of W1 in a CTA
constexpr int kSlices = 8;  // slices of a row in a warp: four lanes each
constexpr int kHalves = 2;  // warps that share a row
constexpr int kWarps = kRows * kHalves;
static_assert(kWarp == kSlices * kQuarters && kRunningSums == 4, "a lane has a quarter of a slice, as a float4");

// Four numbers of a row from d on; 0 past its end.
__device__ inline float4 load_four(const float* row, int64_t d, int64_t size, bool wide) {
  if (wide) return d < size ? *reinterpret_cast<const float4*>(row + d) : float4();
  const auto one = [&](int64_t i) { return i < size ? row[i] : 0.0f; };
  return make_float4(one(d), one(d + 1), one(d + 2), one(d + 3));
}

// S sentences share each load of W1. QUARTER: features in a quarter of a slice.
template <int S, int QUARTER>
__global__ void __launch_bounds__(kWarps * kWarp) bottleneck_kernel(
    const __grid_constant__ Gate a, unsigned tiles, bool wide) {
  wait_for_previous();
  __shared__ float shares[kHalves * kSlices][kRows * S];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slice = warp / kRows * kSlices + lane / 4;
  const int64_t h0 = int64_t(blockIdx.x % tiles) * kRows, b0 = int64_t(blockIdx.x / tiles) * S;
  const float* weight = a.down_weight + min(h0 + warp % kRows, a.width - 1) * a.size;
  float total = 0.0f;  // in the first threads: a row and sentence each
  for (int64_t start = 0; start < a.size; start += kHalves * kSlices * 4 * QUARTER) {
    const int64_t first = start + (slice * 4 + lane % 4) * QUARTER;
    float4 w[QUARTER / 4], f[S][QUARTER / 4];
#pragma unroll
    for (int i = 0; i < QUARTER / 4; ++i) w[i] = load_four(weight, first + 4 * i, a.size, wide);
#pragma unroll
    for (int k = 0; k < S; ++k) {
      const float* squeezed = a.squeezed + min(b0 + k, a.sentences - 1) * a.size;
#pragma unroll
      for (int i = 0; i < QUARTER / 4; ++i) f[k][i] = load_four(squeezed, first + 4 * i, a.size, wide);
    }
#pragma unroll
    for (int k = 0; k < S; ++k) {
      float4 sum = {};
#pragma unroll
      for (int i = 0; i < QUARTER / 4; ++i) {
        sum.x = fmaf(w[i].x, f[k][i].x, sum.x), sum.y = fmaf(w[i].y, f[k][i].y, sum.y);
        sum.z = fmaf(w[i].z, f[k][i].z, sum.z), sum.w = fmaf(w[i].w, f[k][i].w, sum.w);
      }
      float share = (sum.x + sum.y) + (sum.z + sum.w);
      share += __shfl_xor_sync(~0u, share, 1);
      share += __shfl_xor_sync(~0u, share, 2);
      if (lane % 4 == 0) shares[slice][warp % kRows * S + k] = share;
    }
    __syncthreads();
    if (threadIdx.x < kRows * S) {
#pragma unroll
      for (int i = 0; i < kHalves * kSlices; ++i) total += shares[i][threadIdx.x];
    }
    __syncthreads();
  }
  const int64_t h = h0 + threadIdx.x / S, b = b0 + threadIdx.x % S;
  if (threadIdx.x >= kRows * S || h >= a.width || b >= a.sentences) return;
  a.bottleneck[b * a.width + h] = activate(a.activation, total + a.down_bias[h]);
}

constexpr int kAtOnce = 12;  // Transformer blocks whose p a thread loads ahead

template <class T, class Shape>
__global__ void __launch_bounds__(kGateThreads, 3) excite_kernel(const __grid_constant__ Gate a, unsigned tiles) {
  constexpr int S = Shape::kSentences, F = Shape::kFeatures;
  extern __shared__ __align__(16) float memory[];
  float* weights = memory + Shape::weights_place(a.width);
  const int64_t d0 = int64_t(blockIdx.x % tiles) * F, b0 = int64_t(blockIdx.x / tiles) * S;
  const Scale scale = weigh<Shape, false>(a, b0, d0, memory, weights, nullptr);
  __syncthreads();
  for (int i = threadIdx.x; i < S * F; i += kGateThreads) {
    const int64_t b = b0 + i / F, d = d0 + i % F;
    if (b >= a.sentences || d >= a.size) continue;
    float* own = weights + i;
    if (scale.large) exponentiate(own, a.num_blocks, S * F);
    float total = 0.0f, sum = 0.0f;
#pragma unroll 4
    for (int64_t n = 0; n < a.num_blocks; ++n) total += own[n * S * F];
    const float inverse = 1.0f / total;
    const int64_t place = b * a.num_blocks * a.size + d;
    for (int64_t n0 = 0; n0 < a.num_blocks; n0 += kAtOnce) {
      const int count = int(min(int64_t(kAtOnce), a.num_blocks - n0));
      float pooled[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) pooled[j] = a.pooled && j < count ? a.pooled[place + (n0 + j) * a.size] : 0.0f;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (j >= count) break;
        const float g = divide(own[(n0 + j) * S * F], total, inverse);
        if (a.gates) a.gates[place + (n0 + j) * a.size] = g;
        sum = fmaf(g, pooled[j], sum);
      }
    }
    if (a.pooled) narrow(sum, static_cast<T*>(a.output) + b * a.size + d);
  }
}

template <int S, int QUARTER>
cudaError_t launch_bottleneck(const Gate& a, cudaStream_t stream) {
  const bool wide = a.size % 4 == 0 && aligned(a.down_weight) && aligned(a.squeezed);
  const unsigned tiles = unsigned(pieces(a.width, kRows)), grid = tiles * unsigned(pieces(a.sentences, S));
  return launch_early(bottleneck_kernel<S, QUARTER>, grid, kWarps * kWarp, 0, stream, a, tiles, wide);
}

template <int S>
cudaError_t launch_bottleneck(const Gate& a, cudaStream_t stream) {
  return slice_of(a.size) == kShortSlice ? launch_bottleneck<S, kShortSlice / kQuarters>(a, stream)
                                         : launch_bottleneck<S, kLongSlice / kQuarters>(a, stream);
}

}  // namespace

cudaError_t bottleneck(const Gate& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.width == 0) return cudaSuccess;
  return args.sentences == 1 ? launch_bottleneck<1>(args, stream) : launch_bottleneck<4>(args, stream);
}

cudaError_t excite(const Gate& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.size == 0) return cudaSuccess;
  return with_storage(args.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return with_shape<2>(args, 1, [&](auto shape) {
      using Shape = decltype(shape);
      const size_t bytes = size_t(shape.bytes(args, 1));
      const cudaError_t error = allow_shared_memory(excite_kernel<T, Shape>, bytes);
      if (error != cudaSuccess) return error;
      const unsigned tiles = unsigned(pieces(args.size, Shape::kFeatures)), grid = unsigned(shape.ctas(args));
      return launch_early(excite_kernel<T, Shape>, grid, kGateThreads, bytes, stream, args, tiles);
    });
  });
}

}  // namespace s2sent::cuda
