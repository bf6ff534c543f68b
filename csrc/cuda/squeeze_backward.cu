// squeeze, backward: writes the gradient of every hidden state once, du_n = g_n dv + w dp_n + alpha_n beta df, and reads no
// hidden state. With dv, a thread keeps dv and df of its features and a few tokens in registers while it loops over the Transformer
// blocks. Without dv, a token's row depends on the token by two weights alone. Then a CTA writes whole rows of one gradient, a
// stretch of memory, and all CTAs write the gradients one after the other: the memory takes long stretches faster than pieces of
// all gradients in turn. Either way a CTA finds what its tokens weigh once.
//
// Order of summation: w dp_n, then g_n dv, then beta (alpha_n df), each added by a fused multiply-add.

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kRounds = 2;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokens = 4;                               // that a thread holds at a time
constexpr int kCtaTokens = kWarps * kRounds * kTokens;  // of a CTA, with dv
constexpr int kMaxStretch = 64;                          // of a CTA, without
constexpr int64_t kMaxPart = kMaxStretch / 4;            // tokens of it that are stored at a time,
constexpr int64_t kPartBytes = 12 << 10;                 // of some so many bytes (bench/NOTES.md)
constexpr int kMaxThreads = 768;                         // of such a CTA, which has whole rows
constexpr int kFewThreads = 256;                         // one row needs fewer: as many rows at once as these hold

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
  for (int i = threadIdx.x; i < COUNT * int(last - first + 1); i += int(blockDim.x)) {
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

// One gradient's rows of TOKENS tokens of sentence b, from l on, which have weights ``at`` and up.
template <class T, int W, int TOKENS>
__device__ void write_rows(
    const SqueezeBackward& a, const Grads& grads, int64_t b, int64_t l, int64_t m, int64_t d,
    const Shared<kCtaTokens>& shared, int64_t part, int at) {
  Weights weights[TOKENS];
#pragma unroll
  for (int j = 0; j < TOKENS; ++j) weights[j] = {shared.real[at + j], shared.beta[part][at + j], shared.pool[at + j]};
  float df[W] = {};
  Piece<T, W> dv[TOKENS];
  if (a.grad_squeezed) load_floats(a.grad_squeezed + b * a.size + d, df);
  const int64_t from = b * a.grad_fused.stride_b + l * a.grad_fused.stride_l + d;
#pragma unroll
  for (int j = 0; j < TOKENS; ++j) {
    if (!weights[j].real) continue;
    dv[j] = load_piece<T, W>(static_cast<const T*>(a.grad_fused.data) + from + j * a.grad_fused.stride_l);
  }
  const int64_t to = (a.batch.packed ? l : b * a.batch.size + l) * a.size + d;
  const float* alpha = a.alpha + m * a.num_blocks;
  for (int n = 0; n < a.num_blocks; ++n) {
    if (grads.into[n] == nullptr) continue;
    T* into = static_cast<T*>(grads.into[n]) + to;
    const int64_t place = (b * a.num_blocks + n) * a.size + d;
    float gates[W] = {}, pooled[W] = {}, share[W];
    load_floats(a.gates + place, gates);
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
        if (weights[j].real) value[i] = fmaf(gates[i], widen(dv[j].values[i]), value[i]);
        if (a.official || weights[j].real) value[i] = fmaf(weights[j].beta, share[i], value[i]);
      }
      store_piece(value, into + j * a.size);
    }
  }
}

// With dv.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 3) fused_kernel(
    const __grid_constant__ SqueezeBackward a, const __grid_constant__ Grads grads, int64_t tiles, int64_t token_tiles) {
  __shared__ Shared<kCtaTokens> shared;
  // Tiles of features, and of tokens of a sentence or of the packed batch.
  const int64_t index = blockIdx.x, tile = index % tiles, begin = index / tiles % token_tiles * kCtaTokens;
  int64_t b = index / tiles / token_tiles;
  const int64_t size = a.batch.packed ? a.batch.tokens : a.batch.size, part = a.size / a.parts;
  const int64_t d0 = tile * kWarp * W, d = d0 + threadIdx.x % kWarp * W, m0 = d0 / part;
  find_weights(a, b, begin, size, m0, (min(a.size, d0 + kWarp * W) - 1) / part, shared);
  if (d >= a.size) return;
  const int64_t m = d / part;
  int64_t l = begin + threadIdx.x / kWarp * (kRounds * kTokens);
  const int64_t stop = min(size, l + kRounds * kTokens);
  for (; l < stop; l += kTokens) {
    const int at = int(l - begin);
    if (a.batch.packed) b = shared.sentence[at];
    if (l + kTokens <= (a.batch.packed ? min(stop, int64_t(a.batch.starts[b + 1])) : stop)) {
      write_rows<T, W, kTokens>(a, grads, b, l, m, d, shared, m - m0, at);
      continue;
    }
    for (int64_t k = l; k < min(stop, l + kTokens); ++k) {
      if (a.batch.packed) b = shared.sentence[k - begin];
      write_rows<T, W, 1>(a, grads, b, k, m, d, shared, m - m0, int(k - begin));
    }
  }
}

// Without dv: rows of block blocks[i], whose gradient is into[i].
struct Wanted {
  void* into[kMaxBlocks];
  uint8_t blocks[kMaxBlocks];
};

// How the rows are divided. A CTA has a tile of ``columns`` pieces of W features, of ``tokens`` tokens of a sentence or of the
// packed batch, which it stores ``part`` at a time; a gradient has ``ctas`` of them.
struct Stretch {
  unsigned tiles, token_tiles, ctas;
  int columns, tokens, part;
};

// Copies contiguous shared memory, a multiple of 16 bytes, to device memory, after all threads have written it. One thread calls.
__device__ inline void start_store(void* to, const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t place = uint32_t(__cvta_generic_to_shared(from));
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n\tcp.async.bulk.commit_group;" ::"l"(to), "r"(place),
               "r"(bytes)
               : "memory");
#endif
}

// Waits until at most COUNT of this thread's stores still read shared memory.
template <int COUNT>
__device__ inline void wait_for_stores() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(COUNT) : "memory");
#endif
}

// Makes this thread's writes to shared memory visible to such copies.
__device__ inline void publish_to_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// STAGED: a part's rows [part, D] are collected in one of two buffers in shared memory and stored by one copy, which the memory
// takes faster than the threads' own stores. Needs whole rows in a CTA, and sm_90.
template <class T, int W, bool STAGED>
__global__ void __launch_bounds__(kMaxThreads, 1) stretch_kernel(
    const __grid_constant__ SqueezeBackward a, const __grid_constant__ Wanted wanted, const __grid_constant__ Stretch by) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kStaged = STAGED;
#else
  constexpr bool kStaged = false;  // also where a newer GPU runs code that was compiled for an older one
#endif
  __shared__ Shared<kMaxStretch> shared;
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned which = blockIdx.x / by.ctas, index = blockIdx.x % by.ctas;
  const int n = wanted.blocks[which], column = int(threadIdx.x) % by.columns;
  const int row = int(threadIdx.x) / by.columns, rows = int(blockDim.x) / by.columns;  // every rows-th token from ``row`` on
  const int64_t begin = int64_t(index / by.tiles % by.token_tiles) * by.tokens;
  const int64_t d = (int64_t(index % by.tiles) * by.columns + column) * W;
  int64_t b = index / by.tiles / by.token_tiles, own = -1;
  const int64_t size = a.batch.packed ? a.batch.tokens : a.batch.size;
  const unsigned m = unsigned(d) / (unsigned(a.size) / unsigned(a.parts));
  float pooled[W] = {}, share[W] = {};  // dp_n, alpha_n df
  const auto load = [&] {
    own = b;
    if (a.grad_pooled) load_floats(a.grad_pooled + (b * a.num_blocks + n) * a.size + d, pooled);
    if (!a.grad_squeezed) return;
    load_floats(a.grad_squeezed + b * a.size + d, share);
    const float factor = a.alpha[m * a.num_blocks + n];
#pragma unroll
    for (int i = 0; i < W; ++i) share[i] *= factor;
  };
  const bool inside = d < a.size;
  if (inside && !a.batch.packed) load();  // in flight while the weights are found
  const int count = int(min(int64_t(by.tokens), size - begin));
  find_weights(a, b, begin, begin + count, 0, a.parts - 1, shared);
  if (!inside) return;  // never if staged
  T* into = static_cast<T*>(wanted.into[which]) + (b * size + begin) * a.size;  // b is 0 if packed
  T* stage = reinterpret_cast<T*>(memory);
  T* other = stage + by.part * int(a.size);
  for (int j0 = 0; j0 < count; j0 += by.part) {
    if (kStaged && j0 >= 2 * by.part) {  // until the buffer's last part is stored
      if (threadIdx.x == 0) wait_for_stores<1>();
      __syncthreads();
    }
    const int end = min(count, j0 + by.part);
#pragma unroll 4
    for (int j = j0 + row; j < end; j += rows) {
      if (a.batch.packed && shared.sentence[j] != own) b = shared.sentence[j], load();
      const float pool = shared.pool[j], beta = shared.beta[m][j];
      const bool real = a.official || shared.real[j];
      float value[W];
#pragma unroll
      for (int i = 0; i < W; ++i) {
        value[i] = pool != 0.0f ? pool * pooled[i] : 0.0f;
        if (real) value[i] = fmaf(beta, share[i], value[i]);
      }
      store_piece(value, kStaged ? stage + (j - j0) * int(a.size) + d : into + j * a.size + d);
    }
    if (kStaged) {
      publish_to_copies();
      __syncthreads();
      if (threadIdx.x == 0) start_store(into + j0 * a.size, stage, (end - j0) * int(a.size) * int(sizeof(T)));
      T* const used = stage;
      stage = other, other = used;
    }
  }
  if (kStaged && threadIdx.x == 0) wait_for_stores<0>();
}

template <class T, int W>
cudaError_t launch_fused(const SqueezeBackward& a, cudaStream_t stream) {
  Grads grads = {};
  for (int64_t n = 0; n < a.num_blocks; ++n) grads.into[n] = a.grads[n];
  const int64_t tiles = pieces(a.size, W * kWarp);
  const int64_t token_tiles = pieces(a.batch.packed ? a.batch.tokens : a.batch.size, kCtaTokens);
  const int64_t grid = tiles * token_tiles * (a.batch.packed ? 1 : a.batch.sentences);
  fused_kernel<T, W><<<unsigned(grid), kThreads, 0, stream>>>(a, grads, tiles, token_tiles);
  return cudaGetLastError();
}

template <class T, int W>
cudaError_t launch_stretches(const SqueezeBackward& a, cudaStream_t stream) {
  Wanted wanted = {};
  unsigned count = 0;
  for (int64_t n = 0; n < a.num_blocks; ++n) {
    if (a.grads[n]) wanted.into[count] = a.grads[n], wanted.blocks[count++] = uint8_t(n);
  }
  if (count == 0) return cudaSuccess;
  const int64_t row = a.size * int64_t(sizeof(T)), fit = kPartBytes / row;
  Stretch by = {};
  by.part = int(fit < 1 ? 1 : fit < kMaxPart ? fit : kMaxPart);
  by.tokens = 4 * by.part;
  by.tiles = unsigned(pieces(a.size / W, kMaxThreads));
  by.columns = int(pieces(a.size / W, by.tiles));
  by.token_tiles = unsigned(pieces(a.batch.packed ? a.batch.tokens : a.batch.size, by.tokens));
  by.ctas = by.tiles * by.token_tiles * unsigned(a.batch.packed ? 1 : a.batch.sentences);
  const int threads = by.columns * (by.columns < kFewThreads ? kFewThreads / by.columns : 1);
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  if (major >= 9 && W > 1 && by.tiles == 1) {  // then the two buffers and the weights fit a CTA's 48 KB
    const size_t bytes = 2 * size_t(by.part) * size_t(row);
    stretch_kernel<T, W, true><<<count * by.ctas, unsigned(threads), bytes, stream>>>(a, wanted, by);
  } else {
    stretch_kernel<T, W, false><<<count * by.ctas, unsigned(threads), 0, stream>>>(a, wanted, by);
  }
  return cudaGetLastError();
}

template <class T, int W>
cudaError_t launch(const SqueezeBackward& a, cudaStream_t stream) {
  return a.grad_fused.data ? launch_fused<T, W>(a, stream) : launch_stretches<T, W>(a, stream);
}

template <class T>
cudaError_t launch(const SqueezeBackward& a, cudaStream_t stream) {
  bool wide_enough = wide<T>(a.size / a.parts, &a.grad_fused, 1) && aligned(a.gates) && aligned(a.grad_squeezed) &&
      aligned(a.grad_pooled);
  for (int64_t n = 0; n < a.num_blocks; ++n) wide_enough = wide_enough && aligned(a.grads[n]);
  return wide_enough ? launch<T, kWide<T>>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace

cudaError_t squeeze_backward(const SqueezeBackward& args, cudaStream_t stream) {
  if (args.batch.tokens == 0 || args.batch.sentences == 0) return cudaSuccess;
  if (args.num_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  return with_storage(args.dtype, [&](auto storage) { return launch<typename decltype(storage)::type>(args, stream); });
}

}  // namespace s2sent::cuda
