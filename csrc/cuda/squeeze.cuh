// Shared by the kernels that compute squeeze's sums: a group's terms, and what is written for a sentence and Transformer block.
// Order of summation: order.h. The number of features that a thread handles does not affect it.
#pragma once

#include "order.h"
#include "tokens.cuh"

namespace s2sent::cuda {

// A running sum of W features, and the outer sum that it is added to at the end of a sum chunk.
template <int W>
struct Sums {
  float outer[W] = {}, inner[W] = {};

  __device__ void close() {
#pragma unroll
    for (int i = 0; i < W; ++i) outer[i] += inner[i], inner[i] = 0.0f;
  }
};

// An accumulator: its share of sum_r beta_r u_r if SUM, and of sum_r u_r if POOL.
template <class T, int W, bool SUM, bool POOL>
struct Accumulator {
  Sums<W> sums, pools;
  int groups = 0;  // of the sum chunk

  __device__ void add_group(const Piece<T, W> (&u)[kGroupTokens], const float (&factor)[kGroupTokens]) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      float x[kGroupTokens];
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) x[j] = widen(u[j].values[i]);
      if (SUM) {
        float low = factor[0] * x[0], high = factor[kGroupHalf] * x[kGroupHalf];
#pragma unroll
        for (int j = 1; j < kGroupHalf; ++j) {
          low = fmaf(factor[j], x[j], low);
          high = fmaf(factor[j + kGroupHalf], x[j + kGroupHalf], high);
        }
        sums.inner[i] += low + high;
      }
      if (POOL) pools.inner[i] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
  }

  // A token of an incomplete group.
  __device__ void add_token(const Piece<T, W>& u, float factor) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float x = widen(u.values[i]);
      if (SUM) sums.inner[i] = fmaf(factor, x, sums.inner[i]);
      if (POOL) pools.inner[i] += x;
    }
  }

  __device__ void end_group() {
    if (++groups == kChunkGroups) {
      groups = 0;
      end();
    }
  }

  __device__ void end() {
    if (SUM) sums.close();
    if (POOL) pools.close();
  }
};

// A group's factors, 16 bytes at a time where ``quads``.
__device__ inline void load_factors(const float* beta, bool quads, float (&factor)[kGroupTokens]) {
  if (quads) {
    load_floats(beta, factor);
  } else {
#pragma unroll
    for (int j = 0; j < kGroupTokens; ++j) factor[j] = beta[j];
  }
}

// The accumulators' tree: the first one's sums, and the others' from shared [kAccumulators - 1, W, kWarp].
template <int W>
__device__ void add_accumulators(float (&sums)[W], const float (*shared)[W][kWarp]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < W; ++i) sums[i] = (sums[i] + shared[0][i][lane]) + (shared[1][i][lane] + shared[2][i][lane]);
}

template <int W>
__device__ void share_sums(const float (&sums)[W], float (*shared)[W][kWarp], int accumulator) {
#pragma unroll
  for (int i = 0; i < W; ++i) shared[accumulator - 1][i][threadIdx.x % kWarp] = sums[i];
}

// Writes S_n, and p_n if it is wanted, of sentence b at features from d on. ``sums`` and ``pools``: over all real tokens.
template <class T, int W, bool MEAN>
__device__ void write_sums(
    const Squeeze& a, const Rows& rows, int64_t b, int64_t n, int64_t d, int64_t length, const float (&sums)[W],
    float (&pools)[W]) {
  store_floats(sums, a.sums + (b * a.num + n) * a.size + d);
  if (a.pooled == nullptr) return;
  if (MEAN) {
    const float weight = 1.0f / float(length > 1 ? length : 1);
#pragma unroll
    for (int i = 0; i < W; ++i) pools[i] *= weight;
  } else if (length > 0) {
    const Sentence sentence(a.batch, rows, b);
    const Piece<T, W> u = load_piece<T, W>(static_cast<const T*>(rows.data) + d + sentence.real(pooled_rank(a.pooling, length)));
#pragma unroll
    for (int i = 0; i < W; ++i) pools[i] = widen(u.values[i]);
  }
  store_floats(pools, a.pooled + (b * a.num_blocks + a.first_block + n) * a.size + d);
}

// The same sums by persistent CTAs that read the hidden states through a ring in shared memory, in sm90/squeeze.cu. False, and
// nothing is launched, if this device or build has no such kernel, or the batch is too small to gain by it.
bool stream_sums(const Squeeze& a, cudaStream_t stream, cudaError_t& error);

}  // namespace s2sent::cuda
