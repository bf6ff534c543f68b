// gate, backward: the gradients of its tensors, sums over the sentences, from dy, the gradient of the norm's output.
//
//     dz = w dy / std, or with statistics of the batch  w / std (dy - mean_b dy - z' mean_b (dy z')),  z' = (z - mean) / std
//     whose mean over b is then subtracted: it is 0 but for the rounding of the mean, which dz would enlarge by 1 / std
//     dW2 = dz^T s,  db2 = sum_b dz,  dw = sum_b dy z',  db = sum_b dy of the norm,  dW1 = ddown^T f,  db1 = sum_b ddown
//
// A CTA computes kLeft columns of dz times all of s, or of ddown times kRight columns of f. It alone has its columns of dz, which
// replaces dy.
//
// Order of summation: dW2 and dW1 are chains of fused multiply-adds over sum chunks of kChunkTiles tiles of kTile sentences,
// ascending, then the chunks ascending. Sums of a column: a warp's sentences of a tile as a tree, its tiles ascending, then the
// warps as a tree. dc and dtau: each of kThreads running sums adds every kThreads-th feature's sum, in float64, then these as a
// tree. A feature's sum for dtau: a warp adds every kWarps-th sentence, ascending in float64, then the warps are added as a tree.

#include <cuda_pipeline.h>

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTile = 32;              // sentences
constexpr int kEach = kTile / kWarps;  // sentences of a tile that a thread loads: warp, warp + kWarps, ...
constexpr int kLeft = kWarp;           // columns of the left matrix, one for each lane
constexpr int kRight = 64;
constexpr int kChunkTiles = 8;
static_assert(kEach == 8 && kWarps == 4 && kLeft * kRight == 16 * kThreads, "trees and tiles of 4 x 4 are spelled out");

// Two tiles of either matrix: one in use, one in flight.
struct Tiles {
  float left[2][kTile][kLeft];
  float right[2][kTile][kRight];
};

struct Matrix {
  const float* data;  // [B, columns]
  int64_t columns;
  bool wide;  // rows begin at multiples of 16 bytes
};

__device__ inline float tree(const float (&x)[kEach]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// The sentence of a thread's i-th number of a tile.
__device__ inline int64_t sentence(int64_t tile, int i) { return tile * kTile + threadIdx.x / kWarp + kWarps * i; }

// A column [B] of a matrix; 0 past the batch.
__device__ inline void load_column(
    const float* data, int64_t stride, int64_t tile, int64_t sentences, float (&to)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t b = sentence(tile, i);
    to[i] = b < sentences ? data[b * stride] : 0.0f;
  }
}

// Starts copying a tile of the right matrix, columns from q0 on; 0 outside it.
__device__ inline void prefetch(
    const Matrix& right, int64_t tile, int64_t sentences, int64_t q0, float (*to)[kRight]) {
  const auto from = [&](int row, int column) {
    const int64_t b = tile * kTile + row, q = q0 + column;
    return b < sentences && q < right.columns ? right.data + b * right.columns + q : nullptr;
  };
  if (right.wide) {
#pragma unroll
    for (int i = 0; i < kTile * kRight / 4 / kThreads; ++i) {
      const int row = (threadIdx.x + i * kThreads) / (kRight / 4), column = threadIdx.x % (kRight / 4) * 4;
      const float* place = from(row, column);
      __pipeline_memcpy_async(to[row] + column, place ? place : right.data, 16, place ? 0 : 16);
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < kTile * kRight / kThreads; ++i) {
      const int row = (threadIdx.x + i * kThreads) / kRight, column = threadIdx.x % kRight;
      const float* place = from(row, column);
      __pipeline_memcpy_async(to[row] + column, place ? place : right.data, 4, place ? 0 : 4);
    }
  }
  __pipeline_commit();
}

// A thread's 4 x 4 numbers of left^T right: rows row(), columns column() of the CTA's tile.
struct Outer {
  float sum[4][4] = {};

  static __device__ int row() { return (threadIdx.x % kWarp / 8 + threadIdx.x / kWarp / 2 * 4) * 4; }
  static __device__ int column() { return (threadIdx.x % 8 + threadIdx.x / kWarp % 2 * 8) * 4; }

  __device__ void store(float* to, int64_t p0, int64_t rows, int64_t q0, int64_t columns) const {
    const bool wide = columns % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t p = p0 + row() + i, q = q0 + column();
      if (p >= rows) break;
      if (wide) {
        if (q < columns) store_floats(sum[i], to + p * columns + q);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (q + j < columns) to[p * columns + q + j] = sum[i][j];
      }
    }
  }
};

// left^T right over all sentences. ``left`` loads a tile with fetch(tile); take(tile, i) is that of a thread's i-th sentence.
template <class Left>
__device__ Outer multiply(Left& left, const Matrix& right, int64_t sentences, int64_t q0, Tiles& tiles) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t count = (sentences + kTile - 1) / kTile;
  Outer outer, inner;
  if (count == 0) return outer;
  __syncthreads();  // the tiles' former readers
  prefetch(right, 0, sentences, q0, tiles.right[0]);
  left.fetch(0);
  for (int64_t tile = 0; tile < count; ++tile) {
    const int now = int(tile % 2);
#pragma unroll
    for (int i = 0; i < kEach; ++i) tiles.left[now][warp + kWarps * i][lane] = left.take(tile, i);
    left.taken();
    __pipeline_wait_prior(0);
    __syncthreads();  // this tile is complete, and no thread reads the former one any more
    if (tile + 1 < count) {
      prefetch(right, tile + 1, sentences, q0, tiles.right[1 - now]);
      left.fetch(tile + 1);
    }
#pragma unroll 8
    for (int k = 0; k < kTile; ++k) {
      float x[4], y[4];
      load_floats(tiles.left[now][k] + Outer::row(), x);
      load_floats(tiles.right[now][k] + Outer::column(), y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) inner.sum[i][j] = fmaf(x[i], y[j], inner.sum[i][j]);
      }
    }
    if ((tile + 1) % kChunkTiles && tile + 1 < count) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) outer.sum[i][j] += inner.sum[i][j], inner.sum[i][j] = 0.0f;
    }
  }
  return outer;
}

// The warps' sums of every column, added; for all threads. ``shared``: kWarps kLeft floats.
__device__ inline float over_warps(float sum, float (*shared)[kLeft]) {
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
  shared[threadIdx.x / kWarp][lane] = sum;
  __syncthreads();
  return (shared[0][lane] + shared[1][lane]) + (shared[2][lane] + shared[3][lane]);
}

// ---------------------------------------------------------------- dW2

// A thread's column of dy, and what is summed beside it.
struct Column {
  const GateGradients& a;
  int64_t column, stride, sentences;  // j of [N D], N D, and B; no sentences past the last column
  bool norm, batch, sums, prior;
  float scale, mean = 0.0f, mean_product = 0.0f, center = 0.0f;
  float dy[kEach], normed[kEach], logits[kEach], dz[kEach];
  float sum = 0.0f, products = 0.0f, centers = 0.0f, sum_logits = 0.0f, sum_dz = 0.0f;

  __device__ Column(const GateGradients& a, int64_t j)
      : a(a), column(j), stride(a.gate.num_blocks * a.gate.size), sentences(j < stride ? a.gate.sentences : 0),
        norm(a.gate.norm_weight), batch(a.gate.inverse_std), sums(true), prior(a.block_prior), scale(1.0f) {
    if (j >= stride) return;
    if (batch) {
      scale = a.gate.norm_weight[j] * a.gate.inverse_std[j];
    } else if (norm) {
      scale = a.gate.norm_weight[j] * rsqrtf(a.gate.running_var[j] + a.gate.eps);
    }
  }

  __device__ void fetch(int64_t tile) {
    load_column(a.gate.grad_normed + column, stride, tile, sentences, dy);
    if (norm && (sums || batch)) load_column(a.gate.normed + column, stride, tile, sentences, normed);
    if (prior && sums) load_column(a.gate.grad_logits + column, stride, tile, sentences, logits);
  }

  // Adds the tile to the sums.
  __device__ void add() {
    sum += tree(dy);
    if (prior) sum_logits += tree(logits);
    if (!norm) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) dz[i] = dy[i] * normed[i];
    products += tree(dz);
    if (batch) centers += tree(normed);
  }

  __device__ float take(int64_t tile, int i) {
    const int64_t b = sentence(tile, i);
    if (i == 0 && sums) add();
    float value = dy[i];
    if (batch) value = (value - mean) - (normed[i] - center) * mean_product;
    value = b < sentences ? value * scale : 0.0f;
    if (norm && b < sentences) a.gate.grad_normed[b * stride + column] = value;
    dz[i] = value;
    return value;
  }

  __device__ void taken() { sum_dz += tree(dz); }
};

// The same column once its dz is written.
struct WrittenColumn {
  const float* data;
  int64_t stride, sentences;
  float values[kEach];

  __device__ void fetch(int64_t tile) { load_column(data, stride, tile, sentences, values); }
  __device__ float take(int64_t, int i) { return values[i]; }
  __device__ void taken() {}
};

// Sums of grad_scale over the sentences, for the kWarp features of the CTA's ``index``-th tile.
__device__ void sum_scales(const GateGradients& a, int64_t index) {
  __shared__ double shared[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t d = index * kWarp + lane, D = a.gate.size;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t b = warp; b < a.gate.sentences; b += kWarps) sum += d < D ? double(a.gate.grad_scale[b * D + d]) : 0.0;
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && d < D) {
    a.scale_sums[d] = float((shared[0][lane] + shared[1][lane]) + (shared[2][lane] + shared[3][lane]));
  }
}

// The CTAs from ``column_ctas`` on sum the scale's gradient.
__global__ void __launch_bounds__(kThreads, 4) up_kernel(
    const __grid_constant__ GateGradients a, unsigned column_ctas, bool wide) {
  wait_for_previous();
  if (blockIdx.x >= column_ctas) return sum_scales(a, blockIdx.x - column_ctas);
  __shared__ __align__(16) Tiles tiles;
  __shared__ float shared[kWarps][kLeft];
  const Gate& gate = a.gate;
  const int64_t all = gate.num_blocks * gate.size, p0 = int64_t(blockIdx.x) * kLeft, j = p0 + threadIdx.x % kWarp;
  const Matrix right = {gate.bottleneck, gate.width, wide};
  Column left(a, j);
  const bool writes = threadIdx.x < kLeft && j < all;
  if (left.batch) {
    for (int64_t tile = 0; tile * kTile < gate.sentences; ++tile) {
      left.fetch(tile);
      left.add();
    }
    left.sums = false;
  }
  Outer outer;
  if (!left.batch) outer = multiply(left, right, gate.sentences, 0, tiles);
  const float sum = over_warps(left.sum, shared), sum_logits = over_warps(left.sum_logits, shared);
  const float products = over_warps(left.products, shared);
  if (left.batch) {
    left.center = over_warps(left.centers, shared) / float(gate.sentences);
    left.mean = sum / float(gate.sentences);
    left.mean_product = fmaf(-left.center, sum, products) / float(gate.sentences);
    outer = multiply(left, right, gate.sentences, 0, tiles);
  }
  const float sum_dz = over_warps(left.sum_dz, shared);
  outer.store(a.up_weight, p0, all, 0, gate.width);
  if (writes) {
    a.up_bias[j] = sum_dz;
    if (left.norm) a.norm_weight[j] = products, a.norm_bias[j] = sum;
    if (left.prior) a.prior_sums[j] = sum_logits;
  }
  // dz is there, written by the threads that read it now.
  WrittenColumn again = {gate.grad_normed + j, all, left.sentences, {}};
  for (int64_t q0 = kRight; q0 < gate.width; q0 += kRight) {
    multiply(again, right, gate.sentences, q0, tiles).store(a.up_weight, p0, all, q0, gate.width);
  }
}

// ---------------------------------------------------------------- dW1, dc, dtau

// A thread's column of ddown.
struct DownColumn : WrittenColumn {
  float sum = 0.0f;

  __device__ void taken() { sum += tree(values); }
};

// Of D numbers.
__device__ void sum_features(const float* from, int64_t size, float* to) {
  __shared__ double shared[kThreads];
  double sum = 0.0;
  for (int64_t d = threadIdx.x; d < size; d += kThreads) sum += double(from[d]);
  shared[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *to = float(shared[0]);
}

// The CTAs from ``products`` on: dc, then dtau.
__device__ void sum_vectors(const GateGradients& a, int64_t index) {
  const int64_t N = a.block_prior ? a.gate.num_blocks : 0, D = a.gate.size;
  if (index < N) return sum_features(a.prior_sums + index * D, D, a.block_prior + index);
  sum_features(a.scale_sums, D, a.gate_scale);
}

__global__ void __launch_bounds__(kThreads, 4) down_kernel(
    const __grid_constant__ GateGradients a, unsigned tiles_right, unsigned products, bool wide) {
  wait_for_previous();
  if (blockIdx.x >= products) return sum_vectors(a, blockIdx.x - products);
  __shared__ __align__(16) Tiles tiles;
  __shared__ float shared[kWarps][kLeft];
  const Gate& gate = a.gate;
  const int64_t p0 = int64_t(blockIdx.x / tiles_right) * kLeft, q0 = int64_t(blockIdx.x % tiles_right) * kRight;
  const int64_t h = p0 + threadIdx.x % kWarp;
  DownColumn left = {{a.grad_down + h, gate.width, h < gate.width ? gate.sentences : 0, {}}};
  const Outer outer = multiply(left, {gate.squeezed, gate.size, wide}, gate.sentences, q0, tiles);
  outer.store(a.down_weight, p0, gate.width, q0, gate.size);
  if (q0 != 0) return;
  const float sum = over_warps(left.sum, shared);
  if (threadIdx.x < kLeft && h < gate.width) a.down_bias[h] = sum;
}

}  // namespace

cudaError_t up_gradients(const GateGradients& args, cudaStream_t stream) {
  const int64_t column_ctas = pieces(args.gate.num_blocks * args.gate.size, kLeft);
  const int64_t grid = column_ctas + (args.gate_scale ? pieces(args.gate.size, kWarp) : 0);
  if (grid == 0) return cudaSuccess;
  const bool wide = args.gate.width % 4 == 0 && aligned(args.gate.bottleneck);
  return launch_early(up_kernel, unsigned(grid), kThreads, 0, stream, args, unsigned(column_ctas), wide);
}

cudaError_t down_gradients(const GateGradients& args, cudaStream_t stream) {
  const int64_t tiles = pieces(args.gate.size, kRight), products = pieces(args.gate.width, kLeft) * tiles;
  const int64_t grid = products + (args.block_prior ? args.gate.num_blocks : 0) + (args.gate_scale ? 1 : 0);
  if (grid == 0) return cudaSuccess;
  const bool wide = args.gate.size % 4 == 0 && aligned(args.gate.squeezed);
  return launch_early(
      down_kernel, unsigned(grid), kThreads, 0, stream, args, unsigned(tiles), unsigned(products), wide);
}

}  // namespace s2sent::cuda
