// x @ weight in an order that does not depend on the number of sentences.
//
// Order of summation: sum chunks of kProductRows rows; within a chunk kWarps running sums over adjacent rows, then these as a
// tree; then the chunks ascending.

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSentences = 8;
constexpr int kRows = int(kProductRows) / kWarps;

// What ``sum`` of the result's ``index`` is in the result.
__device__ inline float finish(const Product& a, int64_t index, float sum) {
  return a.bottleneck ? sum * slope(a.activation, a.bottleneck[index]) : sum;
}

// Writes the result itself if there is one chunk.
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Product a, int64_t chunks, int64_t tiles) {
  wait_for_previous();
  __shared__ float x[kProductRows][kSentences];
  __shared__ float sums[kWarps - 1][kSentences][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x % tiles, chunk = blockIdx.x / tiles % chunks;
  const int64_t b0 = blockIdx.x / tiles / chunks * kSentences;
  const int64_t start = chunk * kProductRows, column = tile * kWarp + lane;
  const int count = int(min(kProductRows, a.rows - start));
  for (int k = 0; k < kSentences; ++k) {
    for (int r = threadIdx.x; r < count; r += kThreads) {
      x[r][k] = b0 + k < a.sentences ? a.x[(b0 + k) * a.rows + start + r] : 0.0f;
    }
  }
  __syncthreads();
  float sum[kSentences] = {};
  if (column < a.columns) {
    const float* weight = a.weight + start * a.columns + column;
#pragma unroll 16
    for (int r = warp * kRows; r < min(count, (warp + 1) * kRows); ++r) {
      const float w = weight[r * a.columns];
#pragma unroll
      for (int k = 0; k < kSentences; ++k) sum[k] = fmaf(x[r][k], w, sum[k]);
    }
  }
  if (warp) {
#pragma unroll
    for (int k = 0; k < kSentences; ++k) sums[warp - 1][k][lane] = sum[k];
  }
  __syncthreads();
  if (warp || column >= a.columns) return;
#pragma unroll
  for (int k = 0; k < kSentences; ++k) {
    if (b0 + k >= a.sentences) break;
    const float all = (sum[k] + sums[0][k][lane]) + (sums[1][k][lane] + sums[2][k][lane]);
    const int64_t index = (b0 + k) * a.columns + column;
    if (chunks > 1) {
      a.partial[chunk * a.sentences * a.columns + index] = all;
    } else {
      a.result[index] = finish(a, index, all);
    }
  }
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ Product a, int64_t chunks) {
  wait_for_previous();
  const int64_t index = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, all = a.sentences * a.columns;
  if (index >= all) return;
  float sum = 0.0f;
#pragma unroll 12
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += a.partial[chunk * all + index];
  a.result[index] = finish(a, index, sum);
}

}  // namespace

cudaError_t multiply(const Product& args, cudaStream_t stream) {
  if (args.sentences == 0 || args.columns == 0) return cudaSuccess;
  const int64_t chunks = pieces(args.rows, kProductRows), tiles = pieces(args.columns, kWarp);
  if (chunks > 0) {
    const int64_t grid = tiles * chunks * pieces(args.sentences, kSentences);
    const cudaError_t error = launch_early(rows_kernel, unsigned(grid), kThreads, 0, stream, args, chunks, tiles);
    if (error != cudaSuccess || chunks == 1) return error;
  }
  const int64_t grid = pieces(args.sentences * args.columns, kSumThreads);
  return launch_early(sum_kernel, unsigned(grid), kSumThreads, 0, stream, args, chunks);
}

}  // namespace s2sent::cuda
