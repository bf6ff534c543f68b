// Shared by the gate's forward and backward kernels: exp(tau e + c) of a tile of features of every Transformer block, for a few
// sentences.
//
// Order of summation: W2 s in two running sums, over even and odd h, which are then added; the s-norm over the blocks ascending.
// No sum runs over sentences, so that a sentence has the same bits in every batch.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "order.h"
#include "tokens.cuh"

namespace s2sent::cuda {

constexpr int kGateWarps = 4;
constexpr int kGateThreads = kGateWarps * kWarp;
constexpr int kGateWidth = 32;               // columns of a tile of W2
constexpr int kGateStride = kGateWidth + 4;  // padded, so that 16-byte loads of eight rows hit different banks
constexpr int64_t kGateMemory = 99 << 10;    // bytes of shared memory that every architecture grants a CTA

// The work of a CTA: S sentences and F features of every Transformer block. Each warp buffers BUFFERS tiles of W2, in use or in
// flight. RESIDENT: s is in shared memory; false only if H is too large for that.
template <int S, int F, int BUFFERS, bool RESIDENT = true>
struct GateShape {
  static constexpr int kSentences = S, kFeatures = F, kBuffers = BUFFERS;
  static constexpr int kBlocks = kWarp / F;  // blocks that a warp handles at a time: a lane has a row of W2
  static constexpr bool kResident = RESIDENT;

  // Shared memory in floats: tiles of W2, s [S, columns] from s_place(), ``copies`` of [N, S, F] from weights_place().
  __host__ __device__ static constexpr int s_place() { return BUFFERS * kGateWarps * kWarp * kGateStride; }
  __host__ __device__ static constexpr int weights_place(int64_t width) {
    return s_place() + (RESIDENT ? S * int((width + kGateWidth - 1) / kGateWidth * kGateWidth) : 0);
  }
  static int64_t bytes(const Gate& a, int copies) {
    return (weights_place(a.width) + copies * a.num_blocks * S * F) * int64_t(sizeof(float));
  }
  static int64_t ctas(const Gate& a) { return pieces(a.size, F) * pieces(a.sentences, S); }
};

// Calls ``launch`` with the shape that reads W2 least often and still gives every multiprocessor two CTAs, else with the shape of
// the most CTAs. The choice does not change bits.
template <int BUFFERS, class Launch>
cudaError_t with_shape(const Gate& a, int copies, const Launch& launch) {
  int processors = 0;
  const cudaError_t error = multiprocessors(processors);
  if (error != cudaSuccess) return error;
  const auto fits = [&](auto shape, int64_t most_blocks) {
    return a.num_blocks <= most_blocks && shape.bytes(a, copies) <= kGateMemory && shape.ctas(a) >= 2 * processors;
  };
  constexpr GateShape<16, 32, BUFFERS> large;
  constexpr GateShape<4, 32, BUFFERS> middle;
  constexpr GateShape<4, 8, BUFFERS> small;
  constexpr GateShape<1, 8, BUFFERS> least;
  if (fits(large, 16)) return launch(large);
  if (fits(middle, 64)) return launch(middle);
  if (fits(small, kMaxBlocks)) return launch(small);
  if (a.num_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  return least.bytes(a, copies) <= kGateMemory ? launch(least) : launch(GateShape<1, 8, BUFFERS, false>());
}

template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// weight / total, correctly rounded, from the reciprocal of total: one division serves several weights.
__device__ inline float divide(float weight, float total, float inverse) {
  const float quotient = weight * inverse;
  return fmaf(fmaf(-quotient, total, weight), inverse, quotient);
}

// The largest c. It is subtracted from every c, which is unbounded, before exp. Whole warps must call this.
__device__ inline float largest_prior(const Gate& a) {
  float most = -INFINITY;
  for (int64_t n = threadIdx.x % kWarp; a.block_prior && n < a.num_blocks; n += kWarp) most = fmaxf(most, a.block_prior[n]);
#pragma unroll
  for (int i = 1; i < kWarp; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
  return most;
}

// Where |tau| is at most this, exp(tau e + c) cannot underflow for every block if tau's share of a logit is at most 0.
constexpr float kPlainScale = 40.0f;

// tau, which is 1 without a gate scale.
struct Scale {
  float tau = 1.0f;
  float bound = 0.0f;  // of tau e, whose e lies between 0 and 1; subtracted like the largest c
  bool large = false;  // then ``exponentiate`` subtracts the largest logit instead

  Scale() = default;
  __device__ explicit Scale(const Gate& a) {
    if (!a.gate_scale) return;
    tau = *a.gate_scale;
    large = fabsf(tau) > kPlainScale;
    bound = large ? 0.0f : fmaxf(tau, 0.0f);
  }
  // exp of the logit, or the logit itself.
  __device__ float weight(float e, float prior) const {
    const float logit = fmaf(tau, e, prior);
    return large ? logit : expf(logit);
  }
};

// exp of the logits of N blocks, less the largest of them, in place.
__device__ inline void exponentiate(float* logits, int64_t num_blocks, int64_t stride) {
  float most = -INFINITY;
  for (int64_t n = 0; n < num_blocks; ++n) most = fmaxf(most, logits[n * stride]);
  for (int64_t n = 0; n < num_blocks; ++n) logits[n * stride] = expf(logits[n * stride] - most);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The parameters that turn W2 s into e at ``row`` of [N, D]. Without a norm they are those of the identity.
struct Unit {
  float bias, mean, variance, scale, shift;

  Unit() = default;
  __device__ Unit(const Gate& a, int row) : bias(a.up_bias[row]) {
    const bool norm = a.norm_weight;
    mean = norm ? a.running_mean[row] : 0.0f;
    variance = norm ? a.running_var[row] : 0.0f;
    scale = norm ? a.norm_weight[row] : 1.0f;
    shift = norm ? a.norm_bias[row] : 0.0f;
  }

  // Not computed by the constructor, so that the loads of several units are in flight together.
  __device__ float inverse(const Gate& a) const { return a.norm_weight ? rsqrtf(variance + a.eps) : 1.0f; }
  // Subtracts the mean first: it and z may both be large.
  __device__ float normed(float sum, float inverse) const { return (sum + bias - mean) * inverse; }
  __device__ float open(float normed) const { return sigmoid(fmaf(normed, scale, shift)); }
};

// Starts copying a tile of W2: rows of features from d0 on, of blocks from n0 on; columns from h0 on. 0 outside W2.
template <int F>
__device__ void prefetch(const Gate& a, int64_t n0, int64_t d0, int64_t h0, float (*tile)[kGateStride]) {
  const int lane = threadIdx.x % kWarp;
  const bool wide = a.width % 4 == 0 && reinterpret_cast<uintptr_t>(a.up_weight) % 16 == 0;
  const auto row = [&](int j, int64_t h) {  // null outside W2
    const int64_t n = n0 + j / F, d = d0 + j % F;
    return n < a.num_blocks && d < a.size && h < a.width ? a.up_weight + (n * a.size + d) * a.width + h : nullptr;
  };
  if (wide) {
#pragma unroll
    for (int i = 0; i < kWarp; i += 4) {
      const int j = i + lane / 8, column = lane % 8 * 4;
      const float* from = row(j, h0 + column);
      __pipeline_memcpy_async(tile[j] + column, from ? from : a.up_weight, 16, from ? 0 : 16);
    }
  } else {
#pragma unroll 4
    for (int j = 0; j < kWarp; ++j) {
      const float* from = row(j, h0 + lane);
      __pipeline_memcpy_async(tile[j] + lane, from ? from : a.up_weight, 4, from ? 0 : 4);
    }
  }
}

// weights [N, S, F] = exp(tau e + c) of features from d0 on and sentences from b0 on, or if tau is large their logits. With BACKWARD
// also sigmoids [N, S, F] = e, and a.normed. ``memory`` holds tiles of W2 and s, laid out by GateShape. The caller synchronises before it reads weights.
template <class Shape, bool BACKWARD>
__device__ Scale weigh(const Gate& a, int64_t b0, int64_t d0, float* memory, float* weights, float* sigmoids) {
  constexpr int S = Shape::kSentences, F = Shape::kFeatures, kBuffers = Shape::kBuffers;
  using Tiles = float[kGateWarps][kWarp][kGateStride];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int sentences = int(min(int64_t(S), a.sentences - b0));
  const int strips = int((a.width + kGateWidth - 1) / kGateWidth), columns = strips * kGateWidth;
  const int steps = (int(a.num_blocks) + Shape::kBlocks - 1) / Shape::kBlocks;
  const int tiles = steps > warp ? (steps - warp + kGateWarps - 1) / kGateWarps * strips : 0;
  Tiles* up = reinterpret_cast<Tiles*>(memory);
  float* s = memory + Shape::s_place();
  const auto prefetch_tile = [&](int i) {  // the i-th of this warp
    if (i < tiles) {
      const int64_t n0 = (warp + i / strips * kGateWarps) * Shape::kBlocks;
      prefetch<F>(a, n0, d0, i % strips * kGateWidth, up[i % kBuffers][warp]);
    }
    __pipeline_commit();
  };
#pragma unroll
  for (int i = 0; i < kBuffers; ++i) prefetch_tile(i);
  wait_for_previous();  // for bottleneck, which does not write W2. (Not launched if H is 0; then W2 is empty.)
  const float largest = largest_prior(a);
  const Scale scale(a);
  const auto load = [&](int k, int h) {
    return k < sentences && h < a.width ? a.bottleneck[(b0 + k) * a.width + h] : 0.0f;
  };
  for (int h = threadIdx.x; Shape::kResident && h < columns; h += kGateThreads) {
#pragma unroll
    for (int k = 0; k < S; ++k) s[k * columns + h] = load(k, h);
  }
  __syncthreads();
  int tile = 0;
  for (int step = warp; step < steps; step += kGateWarps) {
    const int64_t n = step * Shape::kBlocks + lane / F, d = d0 + lane % F;
    const bool inside = n < a.num_blocks && d < a.size;
    const int64_t row = inside ? n * a.size + d : 0;
    Unit unit(a, int(row));  // loaded ahead of the product
    if (a.inverse_std) unit.variance = a.inverse_std[row];
    const float prior = (a.block_prior && inside ? a.block_prior[n] - largest : 0.0f) - scale.bound;
    float even[S] = {}, odd[S] = {};
    for (int h0 = 0; h0 < columns; h0 += kGateWidth, ++tile) {
      __pipeline_wait_prior(kBuffers - 1);
      __syncwarp();
      const float* own = up[tile % kBuffers][warp][lane];
#pragma unroll(S > 4 ? 1 : 4)
      for (int i = 0; i < kGateWidth; i += 4) {
        const float4 w = *reinterpret_cast<const float4*>(own + i);
#pragma unroll
        for (int k = 0; k < S; ++k) {
          float4 x;
          if constexpr (Shape::kResident) {
            x = *reinterpret_cast<const float4*>(s + k * columns + h0 + i);
          } else {
            x = make_float4(load(k, h0 + i), load(k, h0 + i + 1), load(k, h0 + i + 2), load(k, h0 + i + 3));
          }
          even[k] = fmaf(w.x, x.x, even[k]), odd[k] = fmaf(w.y, x.y, odd[k]);
          even[k] = fmaf(w.z, x.z, even[k]), odd[k] = fmaf(w.w, x.w, odd[k]);
        }
      }
      __syncwarp();
      prefetch_tile(tile + kBuffers);
    }
    const float inverse = a.inverse_std ? unit.variance : unit.inverse(a);
#pragma unroll
    for (int k = 0; k < S; ++k) {
      const float z = unit.normed(even[k] + odd[k], inverse);
      if (BACKWARD && a.norm_weight && inside && k < sentences) a.normed[(b0 + k) * a.num_blocks * a.size + row] = z;
      const float e = unit.open(z);
      if (n >= a.num_blocks) continue;
      if (BACKWARD) sigmoids[(n * S + k) * F + lane % F] = e;
      weights[(n * S + k) * F + lane % F] = scale.weight(e, prior);
    }
  }
  return scale;
}

}  // namespace s2sent::cuda
