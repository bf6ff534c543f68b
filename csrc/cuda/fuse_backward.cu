// The gates' gradient: dg_n = sum_r dv u_n over real tokens.
//
// Order of summation: tokens come in groups of kTogether, which are dealt to kSlots warps in turn, each group one chain of
// fused multiply-adds, added to the warp's running sum, which every kChunk groups is added to another; the last few tokens of a
// sentence come one by one; then the warps as a tree. How many blocks and features a thread takes changes none of it.

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kTogether = 4;
constexpr int kSlots = 4;
constexpr int kChunk = 128;
constexpr int kThreads = kSlots * kWarp;
constexpr int kBlocksEach = 2;  // that share a read of dv

template <class T, int W>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(
    const __grid_constant__ FuseBackward a, const __grid_constant__ Blocks blocks, int64_t tiles, int64_t groups) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x % tiles, n0 = blockIdx.x / tiles % groups * kBlocksEach, b = blockIdx.x / tiles / groups;
  const int64_t d = (tile * kWarp + lane) * W;
  const bool inside = d < a.size;
  const int64_t length = inside ? length_of(a.batch, b) : 0;
  const Sentence fused(a.batch, a.grad_fused, b);
  const T* v = static_cast<const T*>(a.grad_fused.data) + d;
  float outer[kBlocksEach][W] = {}, inner[kBlocksEach][W] = {};
  int seen = 0;
  for (int64_t r0 = warp * kTogether; r0 < length; r0 += kSlots * kTogether) {
    if (r0 + kTogether <= length) {
      Piece<T, W> dv[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) dv[j] = load_piece<T, W>(v + fused.real(r0 + j));
      // A block past the last is the last again, so that no branch keeps the loads from running side by side.
#pragma unroll
      for (int k = 0; k < kBlocksEach; ++k) {
        const Rows rows = blocks.rows[min(n0 + k, a.num_blocks - 1)];
        const Sentence sentence(a.batch, rows, b);
        const T* u = static_cast<const T*>(rows.data) + d;
        Piece<T, W> piece[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) piece[j] = load_piece<T, W>(u + sentence.real(r0 + j));
#pragma unroll
        for (int i = 0; i < W; ++i) {
          float sum = widen(dv[0].values[i]) * widen(piece[0].values[i]);
#pragma unroll
          for (int j = 1; j < kTogether; ++j) sum = fmaf(widen(dv[j].values[i]), widen(piece[j].values[i]), sum);
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
    if (++seen == kChunk) {
      seen = 0;
#pragma unroll
      for (int k = 0; k < kBlocksEach; ++k) {
#pragma unroll
        for (int i = 0; i < W; ++i) outer[k][i] += inner[k][i], inner[k][i] = 0.0f;
      }
    }
  }
  __shared__ float shared[kSlots - 1][kBlocksEach][W][kWarp];
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
  const int64_t tiles = pieces(a.size, W * kWarp), groups = pieces(a.num_blocks, kBlocksEach);
  const unsigned grid = unsigned(a.batch.sentences * groups * tiles);
  backward_kernel<T, W><<<grid, kThreads, 0, stream>>>(a, blocks, tiles, groups);
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
  S2SENT_DTYPE(args.dtype, [&] { return launch<T>(args, stream); })
}

}  // namespace s2sent::cuda
