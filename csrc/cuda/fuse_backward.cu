// fuse, backward: the gradient of the gates, dg_n = sum_r dv u_n over real tokens. Order of summation: order.h; an accumulator is
// a warp. The number of Transformer blocks and features that a thread handles does not affect it.

#include "order.h"
#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kThreads = kGradAccumulators * kWarp;
constexpr int kBlocksEach = 2;  // Transformer blocks that share a load of dv

template <class T, int W>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(
    const __grid_constant__ FuseBackward a, const __grid_constant__ Blocks blocks, int64_t tiles, int64_t block_tiles) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x % tiles, n0 = blockIdx.x / tiles % block_tiles * kBlocksEach;
  const int64_t b = blockIdx.x / tiles / block_tiles;
  const int64_t d = (tile * kWarp + lane) * W;
  const bool inside = d < a.size;
  const int64_t length = inside ? length_of(a.batch, b) : 0;
  const Sentence fused(a.batch, a.grad_fused, b);
  const T* v = static_cast<const T*>(a.grad_fused.data) + d;
  float outer[kBlocksEach][W] = {}, inner[kBlocksEach][W] = {};
  int groups = 0;
  for (int64_t r0 = warp * kGradGroupTokens; r0 < length; r0 += kGradAccumulators * kGradGroupTokens) {
    if (r0 + kGradGroupTokens <= length) {
      Piece<T, W> dv[kGradGroupTokens];
#pragma unroll
      for (int j = 0; j < kGradGroupTokens; ++j) dv[j] = load_piece<T, W>(v + fused.real(r0 + j));
      // Blocks are clamped to the last one, so that no branch separates the loads.
#pragma unroll
      for (int k = 0; k < kBlocksEach; ++k) {
        const Rows rows = blocks.rows[min(n0 + k, a.num_blocks - 1)];
        const Sentence sentence(a.batch, rows, b);
        const T* u = static_cast<const T*>(rows.data) + d;
        Piece<T, W> piece[kGradGroupTokens];
#pragma unroll
        for (int j = 0; j < kGradGroupTokens; ++j) piece[j] = load_piece<T, W>(u + sentence.real(r0 + j));
#pragma unroll
        for (int i = 0; i < W; ++i) {
          float sum = widen(dv[0].values[i]) * widen(piece[0].values[i]);
#pragma unroll
          for (int j = 1; j < kGradGroupTokens; ++j) sum = fmaf(widen(dv[j].values[i]), widen(piece[j].values[i]), sum);
          inner[k][i] += sum;
        }
      }
    } else {
      for (int64_t r = r0; r < length; ++r) {
        const Piece<T, W> dv = load_piece<T, W>(v + fused.real(r));
#pragma unroll
        for (int k = 0; k < kBlocksEach; ++k) {
          const Rows rows = blocks.rows[min(n0 + k, a.num_blocks - 1)];
          const Sentence sentence(a.batch, rows, b);
          const Piece<T, W> piece = load_piece<T, W>(static_cast<const T*>(rows.data) + d + sentence.real(r));
#pragma unroll
          for (int i = 0; i < W; ++i) inner[k][i] = fmaf(widen(dv.values[i]), widen(piece.values[i]), inner[k][i]);
        }
      }
    }
    if (++groups == kGradChunkGroups) {
      groups = 0;
#pragma unroll
      for (int k = 0; k < kBlocksEach; ++k) {
#pragma unroll
        for (int i = 0; i < W; ++i) outer[k][i] += inner[k][i], inner[k][i] = 0.0f;
      }
    }
  }
  __shared__ float shared[kGradAccumulators - 1][kBlocksEach][W][kWarp];
#pragma unroll
  for (int k = 0; k < kBlocksEach; ++k) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      outer[k][i] += inner[k][i];
      if (warp) shared[warp - 1][k][i][lane] = outer[k][i];
    }
  }
  __syncthreads();
  if (warp || !inside) return;
#pragma unroll
  for (int k = 0; k < kBlocksEach; ++k) {
    if (n0 + k >= a.num_blocks) break;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      outer[k][i] = (outer[k][i] + shared[0][k][i][lane]) + (shared[1][k][i][lane] + shared[2][k][i][lane]);
    }
    store_floats(outer[k], a.grad_gates + (b * a.num_blocks + n0 + k) * a.size + d);
  }
}

template <class T, int W>
void launch(const FuseBackward& a, cudaStream_t stream) {
  const Blocks blocks(a.hidden, a.num_blocks);
  const int64_t tiles = pieces(a.size, W * kWarp), block_tiles = pieces(a.num_blocks, kBlocksEach);
  const unsigned grid = unsigned(a.batch.sentences * block_tiles * tiles);
  backward_kernel<T, W><<<grid, kThreads, 0, stream>>>(a, blocks, tiles, block_tiles);
}

template <class T>
cudaError_t launch(const FuseBackward& a, cudaStream_t stream) {
  if (wide<T>(a.size, a.hidden, a.num_blocks) && wide<T>(a.grad_fused) && aligned(a.grad_gates)) {
    launch<T, kWide<T>>(a, stream);
  } else {
    launch<T, 1>(a, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t fuse_backward(const FuseBackward& args, cudaStream_t stream) {
  if (args.batch.sentences == 0) return cudaSuccess;
  if (args.num_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  return with_storage(args.dtype, [&](auto storage) { return launch<typename decltype(storage)::type>(args, stream); });
}

}  // namespace s2sent::cuda
