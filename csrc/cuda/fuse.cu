// fuse: v from the gates and the hidden states, 0 at padding.
//
// Order of summation: the blocks ascending, one chain of fused multiply-adds.

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kTokens = 4;  // that a thread holds at a time
constexpr int kRounds = 2;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlockTokens = kWarps * kRounds * kTokens;

// v of TOKENS tokens of one sentence, from ``first`` on, all of them real.
template <class T, int W, int TOKENS>
__device__ void fuse_tokens(const Fuse& a, const Blocks& blocks, int64_t b, int64_t l, int64_t first, int64_t d) {
  float sum[TOKENS][W] = {};
  const float* gates = a.gates + b * a.num_blocks * a.size + d;
#pragma unroll 2
  for (int n = 0; n < a.num_blocks; ++n) {
    const Rows rows = blocks.rows[n];
    const T* u = static_cast<const T*>(rows.data) + (a.batch.packed ? first : l) * rows.stride_l + d;
    if (!a.batch.packed) u += b * rows.stride_b;
    Piece<T, W> piece[TOKENS];
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) piece[j] = load_piece<T, W>(u + j * rows.stride_l);
    float g[W];
    load_floats(gates + int64_t(n) * a.size, g);
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) {
#pragma unroll
      for (int i = 0; i < W; ++i) sum[j][i] = fmaf(g[i], widen(piece[j].values[i]), sum[j][i]);
    }
  }
#pragma unroll
  for (int j = 0; j < TOKENS; ++j) store_piece(sum[j], static_cast<T*>(a.fused) + (first + j) * a.size + d);
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads, W == 1 ? 4 : 0) fuse_kernel(
    const __grid_constant__ Fuse a, const __grid_constant__ Blocks blocks, int64_t tiles, int64_t chunks) {
  // Chunks of tokens: of a sentence, or of the packed batch.
  const int64_t index = blockIdx.x, tile = index % tiles, chunk = index / tiles % chunks;
  int64_t b = index / tiles / chunks;
  const int64_t d = (tile * kWarp + threadIdx.x % kWarp) * W;
  if (d >= a.size) return;
  const int64_t size = a.batch.packed ? a.batch.tokens : a.batch.size;
  int64_t l = chunk * kBlockTokens + threadIdx.x / kWarp * (kRounds * kTokens);
  const int64_t stop = min(size, l + kRounds * kTokens);
  if (l >= stop) return;
  if (a.batch.packed) b = sentence_of(a.batch, l);
  for (; l < stop; l += kTokens) {
    const int64_t first = a.batch.packed ? l : b * size + l;
    bool together = l + kTokens <= stop;
    if (a.batch.packed) {
      while (l >= a.batch.starts[b + 1]) ++b;
      together = together && l + kTokens <= a.batch.starts[b + 1];
    } else if (a.batch.mask) {
      for (int j = 0; j < kTokens; ++j) together = together && a.batch.mask[first + j];
    }
    if (together) {
      fuse_tokens<T, W, kTokens>(a, blocks, b, l, first, d);
      continue;
    }
    for (int64_t k = l; k < min(stop, l + kTokens); ++k) {
      const int64_t row = first + (k - l);
      if (a.batch.packed) {
        while (k >= a.batch.starts[b + 1]) ++b;
      } else if (a.batch.mask && !a.batch.mask[row]) {
        const float nothing[W] = {};
        store_piece(nothing, static_cast<T*>(a.fused) + row * a.size + d);
        continue;
      }
      fuse_tokens<T, W, 1>(a, blocks, b, k, row, d);
    }
  }
}

template <class T, int W>
void launch(const Fuse& a, cudaStream_t stream) {
  const Blocks blocks(a.hidden, a.num_blocks);
  const int64_t tiles = pieces(a.size, W * kWarp);
  const int64_t chunks = pieces(a.batch.packed ? a.batch.tokens : a.batch.size, kBlockTokens);
  const int64_t grid = tiles * chunks * (a.batch.packed ? 1 : a.batch.sentences);
  fuse_kernel<T, W><<<unsigned(grid), kThreads, 0, stream>>>(a, blocks, tiles, chunks);
}

template <class T>
cudaError_t launch(const Fuse& a, cudaStream_t stream) {
  if (a.size % 8 == 0 && wide<T>(a.size, a.hidden, a.num_blocks) && aligned(a.gates) && aligned(a.fused)) {
    launch<T, kWide<T>>(a, stream);
  } else {
    launch<T, 1>(a, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t fuse(const Fuse& args, cudaStream_t stream) {
  if (args.batch.tokens == 0 || args.batch.sentences == 0) return cudaSuccess;
  if (args.num_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  S2SENT_DTYPE(args.dtype, [&] { return launch<T>(args, stream); })
}

}  // namespace s2sent::cuda
