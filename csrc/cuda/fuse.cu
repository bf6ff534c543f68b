// fuse: v from the gates and the hidden states, 0 at padding.
//
// Order of summation: the Transformer blocks ascending, one chain of fused multiply-adds.

#include <type_traits>

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// TOKENS: held by a thread at a time. ROUNDS: how many times. Small for a small batch, which would have too few CTAs otherwise.
template <int TOKENS, int ROUNDS>
struct Shape {
  static constexpr int kTokens = TOKENS, kRounds = ROUNDS, kCtaTokens = kWarps * ROUNDS * TOKENS;
};

// v of TOKENS real tokens of one sentence, from ``first`` on.
template <class T, int W, int TOKENS>
__device__ void fuse_tokens(const Fuse& a, const Blocks& blocks, int64_t b, int64_t l, int64_t first, int64_t d) {
  constexpr int kAtOnce = TOKENS == 1 ? 4 : 2;  // Transformer blocks whose loads are issued before the first is added
  float sum[TOKENS][W] = {};
  const float* gates = a.gates + b * a.num_blocks * a.size + d;
  const int num = int(a.num_blocks);
  const auto add = [&](int n0, auto all) {  // kAtOnce blocks, or fewer at the end
    constexpr bool whole = decltype(all)::value;
    Piece<T, W> piece[kAtOnce][TOKENS];
    float g[kAtOnce][W];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int n = whole ? n0 + k : min(n0 + k, num - 1);  // clamped, so that no branch separates the loads
      const Rows& rows = blocks.rows[n];
      const T* u = static_cast<const T*>(rows.data) + (a.batch.packed ? first : l) * rows.stride_l + d;
      if (!a.batch.packed) u += b * rows.stride_b;
#pragma unroll
      for (int j = 0; j < TOKENS; ++j) piece[k][j] = load_piece<T, W>(u + j * rows.stride_l);
      load_floats(gates + int64_t(n) * a.size, g[k]);
    }
    issue_loads();
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool exists = whole || n0 + k < num;
#pragma unroll
      for (int j = 0; j < TOKENS; ++j) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float more = fmaf(g[k][i], widen(piece[k][j].values[i]), sum[j][i]);
          sum[j][i] = exists ? more : sum[j][i];
        }
      }
    }
  };
  int n0 = 0;
#pragma unroll 1
  for (; n0 + kAtOnce <= num; n0 += kAtOnce) add(n0, std::true_type());
  if (n0 < num) add(n0, std::false_type());
#pragma unroll
  for (int j = 0; j < TOKENS; ++j) store_piece(sum[j], static_cast<T*>(a.fused) + (first + j) * a.size + d);
}

template <class T, int W, class Shape>
__global__ void __launch_bounds__(kThreads, W == 1 ? 4 : 0) fuse_kernel(
    const __grid_constant__ Fuse a, const __grid_constant__ Blocks blocks, unsigned tiles, unsigned token_tiles) {
  constexpr int kTokens = Shape::kTokens, kRounds = Shape::kRounds;
  wait_for_previous();
  // Tiles of features, and of tokens of a sentence or of the packed batch.
  const unsigned tile = blockIdx.x % tiles, token_tile = blockIdx.x / tiles % token_tiles;
  int64_t b = blockIdx.x / tiles / token_tiles;
  const int64_t d = (int64_t(tile) * kWarp + threadIdx.x % kWarp) * W;
  if (d >= a.size) return;
  const int64_t size = a.batch.packed ? a.batch.tokens : a.batch.size;
  int64_t l = int64_t(token_tile) * Shape::kCtaTokens + threadIdx.x / kWarp * (kRounds * kTokens);
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

template <class Shape>
int64_t token_tiles_of(const Fuse& a) {
  return pieces(a.batch.packed ? a.batch.tokens : a.batch.size, Shape::kCtaTokens);
}

template <class T, int W, class Shape>
cudaError_t launch(const Fuse& a, cudaStream_t stream) {
  const Blocks blocks(a.hidden, a.num_blocks);
  const unsigned tiles = unsigned(pieces(a.size, W * kWarp)), token_tiles = unsigned(token_tiles_of<Shape>(a));
  const unsigned grid = tiles * token_tiles * unsigned(a.batch.packed ? 1 : a.batch.sentences);
  return launch_early(fuse_kernel<T, W, Shape>, grid, kThreads, 0, stream, a, blocks, tiles, token_tiles);
}

template <class T, int W>
cudaError_t launch(const Fuse& a, cudaStream_t stream) {
  using Large = Shape<4, 2>;
  using Small = Shape<1, 1>;
  int processors = 0;
  const cudaError_t error = multiprocessors(processors);
  if (error != cudaSuccess) return error;
  const int64_t ctas = pieces(a.size, W * kWarp) * token_tiles_of<Large>(a) * (a.batch.packed ? 1 : a.batch.sentences);
  return ctas >= 4 * processors ? launch<T, W, Large>(a, stream) : launch<T, W, Small>(a, stream);
}

template <class T>
cudaError_t launch(const Fuse& a, cudaStream_t stream) {
  if (a.size % 8 == 0 && wide<T>(a.size, a.hidden, a.num_blocks) && aligned(a.gates) && aligned(a.fused)) {
    return launch<T, kWide<T>>(a, stream);
  }
  return launch<T, 1>(a, stream);
}

}  // namespace

cudaError_t fuse(const Fuse& args, cudaStream_t stream) {
  if (args.batch.tokens == 0 || args.batch.sentences == 0) return cudaSuccess;
  if (args.num_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  return with_storage(args.dtype, [&](auto storage) { return launch<typename decltype(storage)::type>(args, stream); });
}

}  // namespace s2sent::cuda
