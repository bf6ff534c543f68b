// gate in training: the mean and 1 / std over the batch of every z = W2 s + b2, and the running statistics. A CTA has the z of
// kWarp columns, a lane's column in four warps, and of all sentences.
//
// Order of summation: W2 s as in gate.cuh, so that it is the z of excite. A warp adds its kEach sentences of a tile as a tree,
// its tiles ascending, then the warps form a tree. The mean is summed as differences from each warp's first z, so that a mean far
// from 0 costs no digits; the variance as squared differences from the mean.

#include "gate.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kEach = 8;                   // sentences of a warp in a tile
constexpr int kTile = kEach * kGateWarps;  // sentences
static_assert(kEach == 8 && kGateWarps == 4, "trees are spelled out");

// A strip of W2's rows, and of s; one in use and one in flight.
struct Strips {
  float up[2][kWarp][kGateStride];
  float s[2][kTile][kGateStride];
};

// Starts copying columns [h0, h0 + kGateWidth) of 32 rows of a matrix [rows, width]; 0 outside it.
__device__ void copy_rows(
    const float* matrix, int64_t first, int64_t rows, int64_t h0, int64_t width, bool wide, float (*to)[kGateStride]) {
  const auto from = [&](int row, int column) {
    const int64_t r = first + row, h = h0 + column;
    return r < rows && h < width ? matrix + r * width + h : nullptr;
  };
  if (wide) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = threadIdx.x / 8 + i * (kGateThreads / 8), column = threadIdx.x % 8 * 4;
      const float* place = from(row, column);
      __pipeline_memcpy_async(to[row] + column, place ? place : matrix, 16, place ? 0 : 16);
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < 8; ++i) {
      const int row = threadIdx.x / kWarp + i * kGateWarps, column = threadIdx.x % kWarp;
      const float* place = from(row, column);
      __pipeline_memcpy_async(to[row] + column, place ? place : matrix, 4, place ? 0 : 4);
    }
  }
}

__device__ inline float tree(const float (&x)[kEach]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// The numbers of the four warps of a thread's column, for all of them.
__device__ inline void exchange(float own, float (*shared)[kWarp], float (&all)[kGateWarps]) {
  __syncthreads();
  shared[threadIdx.x / kWarp][threadIdx.x % kWarp] = own;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGateWarps; ++i) all[i] = shared[i][threadIdx.x % kWarp];
}

__global__ void __launch_bounds__(kGateThreads, 4) statistics_kernel(
    const __grid_constant__ BatchStatistics a, bool wide_up, bool wide_s) {
  wait_for_previous();
  __shared__ __align__(16) Strips strips;
  __shared__ float shared[kGateWarps][kWarp];
  const Gate& gate = a.gate;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t all = gate.num_blocks * gate.size, j0 = int64_t(blockIdx.x) * kWarp, j = j0 + lane, B = gate.sentences;
  const int64_t per_tile = (gate.width + kGateWidth - 1) / kGateWidth, tiles = (B + kTile - 1) / kTile;
  const float bias = j < all ? gate.up_bias[j] : 0.0f;
  const auto copy = [&](int64_t step) {
    if (step < tiles * per_tile) {
      const int64_t tile = step / per_tile, h0 = step % per_tile * kGateWidth;
      copy_rows(gate.up_weight, j0, all, h0, gate.width, wide_up, strips.up[step % 2]);
      copy_rows(gate.bottleneck, tile * kTile, B, h0, gate.width, wide_s, strips.s[step % 2]);
    }
    __pipeline_commit();
  };

  // z, and its differences from the warp's first one.
  float reference = 0.0f, sum = 0.0f;
  copy(0);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t b0 = tile * kTile + warp * kEach;
    float even[kEach] = {}, odd[kEach] = {};
    for (int64_t strip = 0; strip < per_tile; ++strip) {
      const int64_t step = tile * per_tile + strip;
      __pipeline_wait_prior(0);
      __syncthreads();  // this strip is complete, and no thread reads the former one any more
      copy(step + 1);
      const float* own = strips.up[step % 2][lane];
      const float(*s)[kGateStride] = strips.s[step % 2] + warp * kEach;
#pragma unroll 2
      for (int i = 0; i < kGateWidth; i += 4) {
        const float4 w = *reinterpret_cast<const float4*>(own + i);
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          const float4 x = *reinterpret_cast<const float4*>(s[k] + i);
          even[k] = fmaf(w.x, x.x, even[k]), odd[k] = fmaf(w.y, x.y, odd[k]);
          even[k] = fmaf(w.z, x.z, even[k]), odd[k] = fmaf(w.w, x.w, odd[k]);
        }
      }
    }
    float apart[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const bool inside = b0 + k < B && j < all;
      const float z = even[k] + odd[k] + bias;
      if (inside) a.z[(b0 + k) * all + j] = z;
      if (tile == 0 && k == 0) reference = inside ? z : 0.0f;
      apart[k] = inside ? z - reference : 0.0f;
    }
    sum += tree(apart);
  }
  float references[kGateWarps], sums[kGateWarps];
  exchange(reference, shared, references);
  exchange(sum, shared, sums);
  const int64_t others = B % kTile;  // sentences of the last tile, if it is not full
#pragma unroll
  for (int i = 0; i < kGateWarps; ++i) {
    const int64_t count = B / kTile * kEach + max(int64_t(0), min(int64_t(kEach), others - i * kEach));
    sums[i] += (references[i] - references[0]) * float(count);
    if (count == 0) sums[i] = 0.0f;
  }
  const float mean = references[0] + ((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(B);

  float squares = 0.0f;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float apart[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t b = tile * kTile + warp * kEach + k;
      apart[k] = b < B && j < all ? a.z[b * all + j] - mean : 0.0f;  // which this thread wrote
      apart[k] *= apart[k];
    }
    squares += tree(apart);
  }
  exchange(squares, shared, sums);
  if (warp || j >= all) return;
  const float total = (sums[0] + sums[1]) + (sums[2] + sums[3]), momentum = float(a.momentum);
  a.mean[j] = mean;
  a.inverse_std[j] = 1.0f / sqrtf(total / float(B) + gate.eps);
  a.running_mean[j] = fmaf(momentum, mean, (1.0f - momentum) * a.running_mean[j]);
  a.running_var[j] = fmaf(momentum, total / float(B - 1), (1.0f - momentum) * a.running_var[j]);
}

}  // namespace

cudaError_t batch_statistics(const BatchStatistics& args, cudaStream_t stream) {
  const int64_t grid = pieces(args.gate.num_blocks * args.gate.size, kWarp);
  if (args.gate.sentences < 2 || grid == 0) return cudaErrorInvalidValue;
  const bool four = args.gate.width % 4 == 0;
  return launch_early(
      statistics_kernel, unsigned(grid), kGateThreads, 0, stream, args, four && aligned(args.gate.up_weight),
      four && aligned(args.gate.bottleneck));
}

}  // namespace s2sent::cuda
