// squeeze: f and, in the same pass, the pooled p. Order of summation: order.h; an accumulator is a warp. The number of features
// that a thread handles does not affect it.

#include "order.h"
#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kThreads = kAccumulators * kWarp;

template <int W>
struct Sums {
  float outer[W] = {}, inner[W] = {};

  __device__ void close() {
#pragma unroll
    for (int i = 0; i < W; ++i) outer[i] += inner[i], inner[i] = 0.0f;
  }
};

// This warp's share of sum_r beta_r u_r and of sum_r u_r over ``count`` tokens; the r-th begins at data + row(r).
template <class T, int W, bool SUM, bool POOL, class Row>
__device__ void sum_tokens(
    const T* data, int64_t count, const Row& row, const float* beta, Sums<W>& sums, Sums<W>& pools) {
  int groups = 0;
  for (int64_t r = threadIdx.x / kWarp * kGroupTokens; r < count; r += kAccumulators * kGroupTokens) {
    if (r + kGroupTokens <= count) {
      Piece<T, W> u[kGroupTokens];
      float factor[kGroupTokens];
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) {
        u[j] = load_piece<T, W>(data + row(r + j));
        if (SUM) factor[j] = beta[r + j];
      }
#pragma unroll
      for (int i = 0; i < W; ++i) {
        float x[kGroupTokens];
#pragma unroll
        for (int j = 0; j < kGroupTokens; ++j) x[j] = widen(u[j].values[i]);
        if (SUM) {
          float low = factor[0] * x[0], high = factor[kGroupHalf] * x[kGroupHalf];
#pragma unroll
          for (int j = 1; j < kGroupHalf; ++j) {
            low = fmaf(factor[j], x[j], low);
            high = fmaf(factor[j + kGroupHalf], x[j + kGroupHalf], high);
          }
          sums.inner[i] += low + high;
        }
        if (POOL) pools.inner[i] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      }
    } else {
      for (int64_t k = r; k < count; ++k) {
        const Piece<T, W> u = load_piece<T, W>(data + row(k));
        const float factor = SUM ? beta[k] : 0.0f;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float x = widen(u.values[i]);
          if (SUM) sums.inner[i] = fmaf(factor, x, sums.inner[i]);
          if (POOL) pools.inner[i] += x;
        }
      }
    }
    if (++groups == kChunkGroups) {
      groups = 0;
      if (SUM) sums.close();
      if (POOL) pools.close();
    }
  }
  if (SUM) sums.close();
  if (POOL) pools.close();
}

// Adds the warps' sums as a tree. The first warp holds the result.
template <int W>
__device__ void gather(float (&sums)[W]) {
  __shared__ float shared[kAccumulators - 1][W][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();
  if (warp) {
#pragma unroll
    for (int i = 0; i < W; ++i) shared[warp - 1][i][lane] = sums[i];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < W; ++i) sums[i] = (sums[i] + shared[0][i][lane]) + (shared[1][i][lane] + shared[2][i][lane]);
  }
}

template <class T, int W, bool MEAN, bool OFFICIAL>
__global__ void __launch_bounds__(kThreads, W == 4 && !MEAN && !OFFICIAL ? 4 : 0) sum_tokens_kernel(  // 4: spills on sm_120
    const __grid_constant__ Squeeze a, const __grid_constant__ Blocks blocks, unsigned tiles) {
  wait_for_previous();
  const unsigned index = blockIdx.x / tiles, num = unsigned(a.num), n = index % num;  // a 64-bit division is slow
  const int64_t tile = blockIdx.x % tiles, b = index / num;
  const int64_t d = (tile * kWarp + threadIdx.x % kWarp) * W;
  const bool inside = d < a.size;
  const Rows rows = blocks.rows[n];
  const Sentence sentence(a.batch, rows, b);
  const T* data = static_cast<const T*>(rows.data) + d;
  const int64_t length = length_of(a.batch, b);
  Sums<W> sums, pools;
  if (inside) {
    const float* beta = factors_of(a.factors, a.batch, b, unsigned(d) / (unsigned(a.size) / unsigned(a.parts)));
    const auto real = [&](int64_t r) { return sentence.real(r); };
    const auto any = [&](int64_t l) { return sentence.any(l); };
    if (OFFICIAL) {  // f and p sum different tokens: two passes
      sum_tokens<T, W, true, false>(data, a.batch.size, any, beta, sums, pools);
      if (MEAN) sum_tokens<T, W, false, true>(data, length, real, nullptr, sums, pools);
    } else {
      sum_tokens<T, W, true, MEAN>(data, length, real, beta, sums, pools);
    }
  }
  gather(sums.outer);
  if (MEAN) gather(pools.outer);
  if (!inside || threadIdx.x >= kWarp) return;
  store_floats(sums.outer, a.sums + (b * a.num + n) * a.size + d);
  if (a.pooled == nullptr) return;
  if (MEAN) {
    const float weight = 1.0f / float(length > 1 ? length : 1);
#pragma unroll
    for (int i = 0; i < W; ++i) pools.outer[i] *= weight;
  } else if (length > 0) {
    const Piece<T, W> u = load_piece<T, W>(data + sentence.real(pooled_rank(a.pooling, length)));
#pragma unroll
    for (int i = 0; i < W; ++i) pools.outer[i] = widen(u.values[i]);
  }
  store_floats(pools.outer, a.pooled + (b * a.num_blocks + a.first_block + n) * a.size + d);
}

constexpr int kSumThreads = 256;
constexpr int kAtOnce = 6;  // Transformer blocks whose loads are issued before the first is added

__global__ void __launch_bounds__(kSumThreads) sum_blocks_kernel(const __grid_constant__ Squeeze a, unsigned tiles) {
  wait_for_previous();
  const int64_t b = blockIdx.x / tiles, d = int64_t(blockIdx.x % tiles) * kSumThreads + threadIdx.x;
  if (d >= a.size) return;
  const unsigned part = unsigned(d) / (unsigned(a.size) / unsigned(a.parts));
  const float* alpha = a.alpha + part * a.num_blocks + a.first_block;
  const float* sums = a.sums + b * a.num * a.size + d;
  float f = a.first_block == 0 ? 0.0f : a.squeezed[b * a.size + d];
  for (int64_t n0 = 0; n0 < a.num; n0 += kAtOnce) {
    const int last = int(min(int64_t(kAtOnce), a.num - n0)) - 1;
    float weight[kAtOnce], sum[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {  // clamped to the last block, so that no branch separates the loads
      weight[j] = alpha[n0 + min(j, last)];
      sum[j] = sums[(n0 + min(j, last)) * a.size];
    }
    issue_loads();
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) f = j <= last ? fmaf(weight[j], sum[j], f) : f;
  }
  a.squeezed[b * a.size + d] = f;
}

template <class T, int W>
cudaError_t launch_sums(const Squeeze& a, cudaStream_t stream) {
  const Blocks blocks(a.hidden, a.num);
  const unsigned tiles = unsigned(pieces(a.size, W * kWarp)), grid = unsigned(a.batch.sentences * a.num) * tiles;
  const auto with = [&](auto kernel) { return launch_early(kernel, grid, kThreads, 0, stream, a, blocks, tiles); };
  if (a.pooled && a.pooling == Pooling::kMean) {
    return a.official ? with(sum_tokens_kernel<T, W, true, true>) : with(sum_tokens_kernel<T, W, true, false>);
  }
  return a.official ? with(sum_tokens_kernel<T, W, false, true>) : with(sum_tokens_kernel<T, W, false, false>);
}

template <class T>
cudaError_t launch(const Squeeze& a, cudaStream_t stream) {
  const bool whole = wide<T>(a.size / a.parts, a.hidden, a.num) && aligned(a.sums) && aligned(a.pooled);
  const cudaError_t error = whole ? launch_sums<T, kWide<T>>(a, stream) : launch_sums<T, 1>(a, stream);
  if (error != cudaSuccess) return error;
  const unsigned tiles = unsigned(pieces(a.size, kSumThreads)), grid = unsigned(a.batch.sentences) * tiles;
  return launch_early(sum_blocks_kernel, grid, kSumThreads, 0, stream, a, tiles);
}

}  // namespace

cudaError_t squeeze(const Squeeze& args, cudaStream_t stream) {
  if (args.batch.sentences == 0 || args.num == 0) return cudaSuccess;
  if (args.num > kMaxBlocks) return cudaErrorInvalidValue;
  return with_storage(args.dtype, [&](auto storage) { return launch<typename decltype(storage)::type>(args, stream); });
}

}  // namespace s2sent::cuda
