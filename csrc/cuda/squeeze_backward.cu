// squeeze, backward: writes the gradient of every hidden state once, du_n = g_n dv + w dp_n + alpha_n beta df, and reads no
// hidden state. A CTA finds what its tokens weigh once, for all of its features and Transformer blocks. A thread keeps dv and df of
// its features and a few tokens in registers while it loops over the blocks.
//
// Order of summation: w dp_n, then g_n dv, then beta (alpha_n df), each added by a fused multiply-add.

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kRounds = 2;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// Tokens that a thread holds at a time; more without dv, which occupies registers.
template <bool FUSED>
constexpr int kTokens = FUSED ? 4 : 8;

// Tokens of a CTA.
template <bool FUSED>
constexpr int kCtaTokens = kWarps * kRounds * kTokens<FUSED>;

struct Grads {
  void* into[kMaxBlocks];
};

// The weights of a token.
struct Weights {
  bool real;  // false: padding
  float beta;
  float pool;  // w
};

__device__ Weights weights_of(const SqueezeBackward& a, int64_t b, int64_t l, int64_t m) {
  const int64_t rank = a.batch.packed ? l - a.batch.starts[b] : a.batch.ranks ? a.batch.ranks[b * a.batch.size + l] : l;
  Weights weights = {rank >= 0, 0.0f, 0.0f};
  if (a.grad_squeezed && (weights.real || a.official)) {
    weights.beta = factors_of(a.factors, a.batch, b, m)[a.official ? l : rank];
  }
  if (a.grad_pooled && weights.real) {
    const int64_t length = length_of(a.batch, b);
    if (a.pooling == Pooling::kMean) {
      weights.pool = 1.0f / float(length);
    } else {
      weights.pool = rank == pooled_rank(a.pooling, length) ? 1.0f : 0.0f;
    }
  }
  return weights;
}

// Weights of a CTA's tokens in shared memory. Its features lie in parts ``first`` and up.
template <int COUNT>
struct Shared {
  bool real[COUNT];
  float pool[COUNT];
  float beta[kMaxParts][COUNT];
  int64_t sentence[COUNT];  // if packed
};

// Fills ``shared`` for the tokens from l on, of which those at ``size`` and later do not exist, and parts [first, last].
template <int COUNT>
__device__ void find_weights(
    const SqueezeBackward& a, int64_t b, int64_t l, int64_t size, int64_t first, int64_t last, Shared<COUNT>& shared) {
  for (int i = threadIdx.x; i < COUNT * int(last - first + 1); i += kThreads) {
    const int j = i % COUNT, part = i / COUNT;
    if (l + j >= size) continue;
    const int64_t own = a.batch.packed ? sentence_of(a.batch, l + j) : b;
    const Weights weights = weights_of(a, own, l + j, first + part);
    shared.beta[part][j] = weights.beta;
    if (part > 0) continue;
    shared.real[j] = weights.real;
    shared.pool[j] = weights.pool;
    shared.sentence[j] = own;
  }
  __syncthreads();
}

// Writes the rows of TOKENS tokens of sentence b, from l on, which have weights ``at`` and up.
template <class T, int W, bool FUSED, int TOKENS>
__device__ void write_rows(
    const SqueezeBackward& a, const Grads& grads, int64_t b, int64_t l, int64_t m, int64_t d,
    const Shared<kCtaTokens<FUSED>>& shared, int64_t part, int at) {
  Weights weights[TOKENS];
#pragma unroll
  for (int j = 0; j < TOKENS; ++j) weights[j] = {shared.real[at + j], shared.beta[part][at + j], shared.pool[at + j]};
  float df[W] = {};
  Piece<T, W> dv[TOKENS];
  if (a.grad_squeezed) load_floats(a.grad_squeezed + b * a.size + d, df);
  if (FUSED) {
    const int64_t from = b * a.grad_fused.stride_b + l * a.grad_fused.stride_l + d;
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) {
      if (!weights[j].real) continue;
      dv[j] = load_piece<T, W>(static_cast<const T*>(a.grad_fused.data) + from + j * a.grad_fused.stride_l);
    }
  }
  const int64_t to = (a.batch.packed ? l : b * a.batch.size + l) * a.size + d;
  const float* alpha = a.alpha + m * a.num_blocks;
  for (int n = 0; n < a.num_blocks; ++n) {
    if (grads.into[n] == nullptr) continue;
    T* into = static_cast<T*>(grads.into[n]) + to;
    const int64_t place = (b * a.num_blocks + n) * a.size + d;
    float gates[W] = {}, pooled[W] = {}, share[W];
    if (FUSED) load_floats(a.gates + place, gates);
    if (a.grad_pooled) load_floats(a.grad_pooled + place, pooled);
    const float factor = a.grad_squeezed ? alpha[n] : 0.0f;
#pragma unroll
    for (int i = 0; i < W; ++i) share[i] = factor * df[i];
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) {
      float value[W];
#pragma unroll
      for (int i = 0; i < W; ++i) {
        value[i] = weights[j].pool != 0.0f ? weights[j].pool * pooled[i] : 0.0f;
        if (FUSED && weights[j].real) value[i] = fmaf(gates[i], widen(dv[j].values[i]), value[i]);
        if (a.official || weights[j].real) value[i] = fmaf(weights[j].beta, share[i], value[i]);
      }
      store_piece(value, into + j * a.size);
    }
  }
}

template <class T, int W, bool FUSED>
__global__ void __launch_bounds__(kThreads, 3) backward_kernel(
    const __grid_constant__ SqueezeBackward a, const __grid_constant__ Grads grads, int64_t tiles, int64_t token_tiles) {
  constexpr int TOKENS = kTokens<FUSED>, COUNT = kCtaTokens<FUSED>;
  __shared__ Shared<COUNT> shared;
  // Tiles of features, and of tokens of a sentence or of the packed batch.
  const int64_t index = blockIdx.x, tile = index % tiles, begin = index / tiles % token_tiles * COUNT;
  int64_t b = index / tiles / token_tiles;
  const int64_t size = a.batch.packed ? a.batch.tokens : a.batch.size, part = a.size / a.parts;
  const int64_t d0 = tile * kWarp * W, d = d0 + threadIdx.x % kWarp * W, m0 = d0 / part;
  find_weights(a, b, begin, size, m0, (min(a.size, d0 + kWarp * W) - 1) / part, shared);
  if (d >= a.size) return;
  const int64_t m = d / part;
  int64_t l = begin + threadIdx.x / kWarp * (kRounds * TOKENS);
  const int64_t stop = min(size, l + kRounds * TOKENS);
  for (; l < stop; l += TOKENS) {
    const int at = int(l - begin);
    if (a.batch.packed) b = shared.sentence[at];
    if (l + TOKENS <= (a.batch.packed ? min(stop, int64_t(a.batch.starts[b + 1])) : stop)) {
      write_rows<T, W, FUSED, TOKENS>(a, grads, b, l, m, d, shared, m - m0, at);
      continue;
    }
    for (int64_t k = l; k < min(stop, l + TOKENS); ++k) {
      if (a.batch.packed) b = shared.sentence[k - begin];
      write_rows<T, W, FUSED, 1>(a, grads, b, k, m, d, shared, m - m0, int(k - begin));
    }
  }
}

template <class T, int W, bool FUSED>
void launch(const SqueezeBackward& a, cudaStream_t stream) {
  Grads grads = {};
  for (int64_t n = 0; n < a.num_blocks; ++n) grads.into[n] = a.grads[n];
  const int64_t tiles = pieces(a.size, W * kWarp);
  const int64_t token_tiles = pieces(a.batch.packed ? a.batch.tokens : a.batch.size, kCtaTokens<FUSED>);
  const int64_t grid = tiles * token_tiles * (a.batch.packed ? 1 : a.batch.sentences);
  backward_kernel<T, W, FUSED><<<unsigned(grid), kThreads, 0, stream>>>(a, grads, tiles, token_tiles);
}

template <class T, int W>
void launch(const SqueezeBackward& a, cudaStream_t stream) {
  if (a.grad_fused.data) {
    launch<T, W, true>(a, stream);
  } else {
    launch<T, W, false>(a, stream);
  }
}

template <class T>
cudaError_t launch(const SqueezeBackward& a, cudaStream_t stream) {
  bool wide_enough = wide<T>(a.size / a.parts, &a.grad_fused, 1) && aligned(a.gates) && aligned(a.grad_squeezed) &&
      aligned(a.grad_pooled);
  for (int64_t n = 0; n < a.num_blocks; ++n) wide_enough = wide_enough && aligned(a.grads[n]);
  wide_enough ? launch<T, kWide<T>>(a, stream) : launch<T, 1>(a, stream);
  return cudaGetLastError();
}

}  // namespace

cudaError_t squeeze_backward(const SqueezeBackward& args, cudaStream_t stream) {
  if (args.batch.tokens == 0 || args.batch.sentences == 0) return cudaSuccess;
  if (args.num_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  return with_storage(args.dtype, [&](auto storage) { return launch<typename decltype(storage)::type>(args, stream); });
}

}  // namespace s2sent::cuda
