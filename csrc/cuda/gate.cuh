// What the gate's forward and backward share: exp(e + c) of a tile of features of every block, for a few sentences.
//
// Order of summation: W2 s in two running sums over even and odd h, and these added; the s-norm over the blocks ascending.
// Sentences and features only stand side by side, so that one has the bits that it has alone.
#pragma once

#include "tokens.cuh"

namespace s2sent::cuda {

constexpr int kGateWarps = 4;
constexpr int kGateThreads = kGateWarps * kWarp;
constexpr int kGateWidth = 32;  // of W2's columns, at a time

// Sentences of a program, S: as many as its shared memory holds N blocks of.
template <class Launch>
cudaError_t with_sentences(int64_t num_blocks, const Launch& launch) {
  if (num_blocks <= 16) return launch(std::integral_constant<int, 16>());
  if (num_blocks <= 64) return launch(std::integral_constant<int, 4>());
  if (num_blocks <= kMaxBlocks) return launch(std::integral_constant<int, 2>());
  return cudaErrorInvalidValue;
}

template <int S>
struct GateMemory {
  float up[kGateWarps][kWarp][kGateWidth + 1];  // rows of W2
  float s[kGateWarps][kGateWidth][S];
};

// Bytes of shared memory: GateMemory, then ``copies`` of [N, S, 32].
template <int S>
size_t gate_bytes(int64_t num_blocks, int copies) {
  return sizeof(GateMemory<S>) + size_t(num_blocks) * copies * S * kWarp * sizeof(float);
}

template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// W1 f is summed in slices of this many features.
__host__ __device__ constexpr int64_t slice_of(int64_t size) { return size % 48 == 0 ? 48 : 64; }

// s from W1 f + b1. tanh in float64 and rounded once; relu(NaN) is NaN.
__device__ inline float activate(const Gate& a, float t) {
  return a.relu ? (t < 0.0f ? 0.0f : t) : float(tanh(double(t)));
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// What turns W2 s into e at ``row`` of [N, D]. Without a norm these are numbers that change nothing.
struct Unit {
  float bias, mean, variance, scale, shift;

  Unit() = default;
  __device__ Unit(const Gate& a, int row) : bias(a.up_bias[row]) {
    const bool norm = a.norm_weight;
    mean = norm ? a.running_mean[row] : 0.0f;
    variance = norm ? a.running_var[row] : 0.0f;
    rescale(a, row);
  }

  __device__ void rescale(const Gate& a, int row) {
    scale = a.norm_weight ? a.norm_weight[row] : 1.0f;
    shift = a.norm_weight ? a.norm_bias[row] : 0.0f;
  }

  // Apart, so that several units are asked for before the first is waited for.
  __device__ float inverse(const Gate& a) const { return a.norm_weight ? 1.0f / sqrtf(variance + a.eps) : 1.0f; }
  // The mean first, since it and z may both be far from 0.
  __device__ float normed(float sum, float inverse) const { return (sum + bias - mean) * inverse; }
  __device__ float open(float normed) const { return sigmoid(fmaf(normed, scale, shift)); }
};

// weights [N, S, 32] = exp(e + c) of features from d0 and sentences from b0; sigmoids [N, S, 32] = e where not null, and then
// a.normed too. The caller waits before it reads what another warp wrote.
template <int S, bool BACKWARD>
__device__ void weigh(const Gate& a, int64_t b0, int64_t d0, GateMemory<S>& memory, float* weights, float* sigmoids) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int rows = int(min(int64_t(kWarp), a.size - d0)), sentences = int(min(int64_t(S), a.sentences - b0));
  auto& up = memory.up[warp];
  auto& s = memory.s[warp];
  for (int64_t n = warp; n < a.num_blocks; n += kGateWarps) {
    const int64_t row = n * a.size + d0;
    float even[S] = {}, odd[S] = {};
    for (int64_t h0 = 0; h0 < a.width; h0 += kGateWidth) {
      const int64_t h = h0 + lane;
      __syncwarp();
#pragma unroll 8
      for (int j = 0; j < kWarp; ++j) {
        up[j][lane] = j < rows && h < a.width ? a.up_weight[(row + j) * a.width + h] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < S; ++k) {
        s[lane][k] = k < sentences && h < a.width ? a.bottleneck[(b0 + k) * a.width + h] : 0.0f;
      }
      __syncwarp();
#pragma unroll 2
      for (int i = 0; i < kGateWidth; i += 2) {
        const float x = up[lane][i], y = up[lane][i + 1];
#pragma unroll
        for (int k = 0; k < S; ++k) even[k] = fmaf(x, s[i][k], even[k]), odd[k] = fmaf(y, s[i + 1][k], odd[k]);
      }
    }
    const bool inside = lane < rows;
    const Unit unit(a, int(row) + (inside ? lane : 0));
    const float inverse = unit.inverse(a), prior = a.prior ? a.prior[n] : 0.0f;
#pragma unroll
    for (int k = 0; k < S; ++k) {
      const float z = unit.normed(even[k] + odd[k], inverse);
      if (BACKWARD && a.norm_weight && inside && k < sentences) {
        a.normed[(b0 + k) * a.num_blocks * a.size + row + lane] = z;
      }
      const float e = unit.open(z);
      if (BACKWARD) sigmoids[(n * S + k) * kWarp + lane] = e;
      weights[(n * S + k) * kWarp + lane] = expf(e + prior);
    }
  }
}

}  // namespace s2sent::cuda
