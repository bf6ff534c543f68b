// squeeze: f and, in the same pass, the pooled p. Order of summation: order.h; an accumulator is a warp. The number of features
// that a thread handles does not affect it.

#include "squeeze.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kThreads = kAccumulators * kWarp;

// This warp's share of sum_r beta_r u_r and of sum_r u_r over ``count`` tokens; the r-th begins at data + row(r).
template <class T, int W, bool SUM, bool POOL, class Row>
__device__ void sum_tokens(
    const T* data, int64_t count, const Row& row, const float* beta, Sums<W>& sums, Sums<W>& pools) {
  Accumulator<T, W, SUM, POOL> own;
  const bool quads = aligned(beta);
  for (int64_t r = threadIdx.x / kWarp * kGroupTokens; r < count; r += kAccumulators * kGroupTokens) {
    if (r + kGroupTokens <= count) {
      Piece<T, W> u[kGroupTokens];
      float factor[kGroupTokens];
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) u[j] = load_piece<T, W>(data + row(r + j));
      if (SUM) load_factors(beta + r, quads, factor);
      own.add_group(u, factor);
    } else {
      for (int64_t k = r; k < count; ++k) own.add_token(load_piece<T, W>(data + row(k)), SUM ? beta[k] : 0.0f);
    }
    own.end_group();
  }
  own.end();
  if (SUM) sums = own.sums;
  if (POOL) pools = own.pools;
}

// Adds the warps' sums as a tree. The first warp holds the result.
template <int W>
__device__ void gather(float (&sums)[W]) {
  __shared__ float shared[kAccumulators - 1][W][kWarp];
  const int warp = threadIdx.x / kWarp;
  __syncthreads();
  if (warp) share_sums(sums, shared, warp);
  __syncthreads();
  if (warp == 0) add_accumulators(sums, shared);
}

// CTAs of a multiprocessor at least; 0 leaves the registers to the compiler, with which some variants would spill.
template <int W, bool MEAN, bool OFFICIAL>
constexpr int kMinCtas = W == 1 ? 0 : OFFICIAL ? 1 : W == 4 ? (MEAN ? 1 : 4) : 0;

template <class T, int W, bool MEAN, bool OFFICIAL>
__global__ void __launch_bounds__(kThreads, kMinCtas<W, MEAN, OFFICIAL>) sum_tokens_kernel(
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
  write_sums<T, W, MEAN>(a, rows, b, n, d, length, sums.outer, pools.outer);
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
  cudaError_t error = cudaSuccess;
  if (!(whole && stream_sums(a, stream, error)) && error == cudaSuccess) {
    error = whole ? launch_sums<T, kWide<T>>(a, stream) : launch_sums<T, 1>(a, stream);
  }
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
