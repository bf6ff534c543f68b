// squeeze: f and, in the same pass, the pooled p; and the gradient of every hidden state.
//
// Order of summation, which decides every bit: a sentence's real tokens in ascending order form runs of kRun. Within a run
// kTogether tokens are summed as a tree and added to a running sum, the last few one by one. The runs are added as cascade.h
// says; then the Transformer blocks ascending, weighted by alpha.

#include "cascade.h"
#include "launch.h"

#include <algorithm>

namespace s2sent::cpu {
namespace {

constexpr int64_t kTogether = 8;
constexpr int64_t kRun = 16 * kTogether;

// sums += sum_j beta[j] u_j, pools += sum_j u_j over features [from, to) of kTogether tokens.
template <class T, bool SUM, bool POOL>
S2SENT_INLINE void add_tokens(
    const T* const* u, const float* beta, float* __restrict sums, float* __restrict pools, int64_t from, int64_t to) {
  const T *u0 = u[0], *u1 = u[1], *u2 = u[2], *u3 = u[3], *u4 = u[4], *u5 = u[5], *u6 = u[6], *u7 = u[7];
  const float b0 = beta[0], b1 = beta[1], b2 = beta[2], b3 = beta[3];
  const float b4 = beta[4], b5 = beta[5], b6 = beta[6], b7 = beta[7];
#pragma GCC ivdep
  for (int64_t d = from; d < to; ++d) {
    const float x0 = load(u0[d]), x1 = load(u1[d]), x2 = load(u2[d]), x3 = load(u3[d]);
    const float x4 = load(u4[d]), x5 = load(u5[d]), x6 = load(u6[d]), x7 = load(u7[d]);
    if (SUM) {
      sums[d] += ((b0 * x0 + b1 * x1) + (b2 * x2 + b3 * x3)) + ((b4 * x4 + b5 * x5) + (b6 * x6 + b7 * x7));
    }
    if (POOL) pools[d] += ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7));
  }
}

template <class T, bool SUM, bool POOL>
S2SENT_INLINE void add_token(
    const T* u, float beta, float* __restrict sums, float* __restrict pools, int64_t from, int64_t to) {
#pragma GCC ivdep
  for (int64_t d = from; d < to; ++d) {
    const float x = load(u[d]);
    if (SUM) sums[d] += beta * x;
    if (POOL) pools[d] += x;
  }
}

// S, the sum for p, or both, over ``count`` tokens of which the r-th begins at row(r). Scratch: 2 kCascadeScratch D floats.
template <class T, bool SUM, bool POOL, class Row>
S2SENT_INLINE void sum_sentence(
    const Squeeze& a, const T* data, int64_t count, Row row, const float* beta, int64_t beta_stride, float* sums,
    float* pools, float* scratch) {
  const int64_t size = a.size, part = size / a.parts;
  const auto sum_run = [&](int64_t from, int64_t stop, SumRows into) __attribute__((always_inline)) {
    if (SUM) std::fill(into.sums, into.sums + size, 0.0f);
    if (POOL) std::fill(into.pools, into.pools + size, 0.0f);
    int64_t r = from;
    for (; r + kTogether <= stop; r += kTogether) {
      const T* u[kTogether];
      for (int64_t j = 0; j < kTogether; ++j) u[j] = data + row(r + j);
      if (SUM) {
        for (int64_t m = 0; m < a.parts; ++m) {
          add_tokens<T, SUM, POOL>(u, beta + m * beta_stride + r, into.sums, into.pools, m * part, (m + 1) * part);
        }
      } else {
        const float unused[kTogether] = {};
        add_tokens<T, SUM, POOL>(u, unused, into.sums, into.pools, 0, size);
      }
    }
    for (; r < stop; ++r) {
      const T* u = data + row(r);
      for (int64_t m = 0; m < a.parts; ++m) {
        const float factor = SUM ? beta[m * beta_stride + r] : 0.0f;
        add_token<T, SUM, POOL>(u, factor, into.sums, into.pools, m * part, (m + 1) * part);
      }
    }
  };
  cascade(count, kRun, {SUM ? sums : nullptr, POOL ? pools : nullptr}, size, scratch, sum_run);
}

template <class T>
S2SENT_INLINE void sum_tokens_items(const Squeeze& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.num, n = item % a.num, length = a.batch.length(b);
    const Rows& hidden = a.hidden[n];
    const T* data = static_cast<const T*>(hidden.data);
    float* sums = a.sums + item * a.size;
    float* pools = a.pooled ? a.pooled + (b * a.num_blocks + a.first_block + n) * a.size : nullptr;
    const auto real = [&](int64_t r) { return real_row(hidden, a.batch, b, r); };
    const auto any = [&](int64_t l) { return b * hidden.stride_b + l * hidden.stride_l; };
    if (a.official) {  // f and p sum different tokens: two passes
      sum_sentence<T, true, false>(
          a, data, a.batch.size, any, a.factors.beta[b], a.factors.strides[b], sums, nullptr, scratch);
      if (a.pooling == Pooling::kMean) {
        sum_sentence<T, false, true>(a, data, length, real, nullptr, 0, nullptr, pools, scratch);
      }
    } else if (a.pooling == Pooling::kMean) {
      sum_sentence<T, true, true>(a, data, length, real, a.factors.beta[b], a.factors.strides[b], sums, pools, scratch);
    } else {
      sum_sentence<T, true, false>(a, data, length, real, a.factors.beta[b], a.factors.strides[b], sums, nullptr, scratch);
    }
    if (pools == nullptr) continue;
    if (a.pooling == Pooling::kMean) {
      const float weight = 1.0f / float(std::max<int64_t>(length, 1));
      for (int64_t d = 0; d < a.size; ++d) pools[d] *= weight;
    } else if (length == 0) {
      std::fill(pools, pools + a.size, 0.0f);
    } else {
      const T* u = data + real(pooled_rank(a.pooling, length));
      for (int64_t d = 0; d < a.size; ++d) pools[d] = load(u[d]);
    }
  }
}

// to = g dv + pool + beta * share. pool and share may be rows of zeros.
template <class T, bool FUSED>
S2SENT_INLINE void gradient_row(
    T* __restrict to, const float* gates, const T* fused, const float* pool, const float* share, const float* beta,
    int64_t beta_stride, int64_t parts, int64_t part) {
  for (int64_t m = 0; m < parts; ++m) {
    const float factor = beta ? beta[m * beta_stride] : 0.0f;
#pragma GCC ivdep
    for (int64_t d = m * part; d < (m + 1) * part; ++d) {
      float value = pool[d];
      if (FUSED) value = gates[d] * load(fused[d]) + value;
      store(value + factor * share[d], to + d);
    }
  }
}

template <class T>
S2SENT_INLINE void squeeze_backward_items(const SqueezeBackward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = a.size, part = size / a.parts;
  float *share = scratch, *pool = scratch + size, *zeros = scratch + 2 * size;
  std::fill(zeros, zeros + size, 0.0f);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.num_blocks, n = item % a.num_blocks, length = a.batch.length(b);
    if (a.grads[n] == nullptr) continue;
    const float* gates = a.gates ? a.gates + item * size : nullptr;
    const float* beta = a.grad_squeezed ? a.factors.beta[b] : nullptr;
    for (int64_t d = 0; d < size; ++d) {
      share[d] = a.grad_squeezed ? a.alpha[d / part * a.num_blocks + n] * a.grad_squeezed[b * size + d] : 0.0f;
    }
    const float weight = a.pooling == Pooling::kMean ? 1.0f / float(std::max<int64_t>(length, 1)) : 1.0f;
    for (int64_t d = 0; d < size; ++d) pool[d] = a.grad_pooled ? weight * a.grad_pooled[item * size + d] : 0.0f;

    // All rows of this sentence; r counts the real ones.
    const int64_t first = a.batch.packed ? a.batch.starts[b] : b * a.batch.size;
    const int64_t rows = a.batch.packed ? length : a.batch.size;
    const int64_t* places = a.batch.places ? a.batch.places + a.batch.starts[b] : nullptr;
    int64_t r = 0;
    for (int64_t l = 0; l < rows; ++l) {
      T* to = static_cast<T*>(a.grads[n]) + (first + l) * size;
      const bool real = places == nullptr || (r < length && places[r] == l);
      if (!real && !a.official) {
        std::memset(to, 0, size_t(size) * sizeof(T));
        continue;
      }
      const bool pooled = real && a.grad_pooled &&
          (a.pooling == Pooling::kMean || r == pooled_rank(a.pooling, length));
      const float* row_pool = pooled ? pool : zeros;
      const float* row_beta = beta ? beta + (a.official ? l : r) : nullptr;
      if (real && a.grad_fused.data) {
        const T* fused = static_cast<const T*>(a.grad_fused.data) + real_row(a.grad_fused, a.batch, b, r);
        gradient_row<T, true>(to, gates, fused, row_pool, share, row_beta, a.factors.strides[b], a.parts, part);
      } else {
        gradient_row<T, false>(to, nullptr, nullptr, row_pool, share, row_beta, a.factors.strides[b], a.parts, part);
      }
      r += real;
    }
  }
}

}  // namespace

S2SENT_KERNEL(sum_tokens, Squeeze)

// Items (b, n): du_n. Scratch: 3 D floats.
S2SENT_KERNEL(squeeze_backward, SqueezeBackward)

S2SENT_CLONES void sum_blocks(const Squeeze& a, int64_t begin, int64_t end) {
  const int64_t part = a.size / a.parts;
  for (int64_t b = begin; b < end; ++b) {
    float* f = a.squeezed + b * a.size;
    if (a.first_block == 0) std::fill(f, f + a.size, 0.0f);
    for (int64_t n = 0; n < a.num; ++n) {
      const float* sums = a.sums + (b * a.num + n) * a.size;
      for (int64_t m = 0; m < a.parts; ++m) {
        const float alpha = a.alpha[m * a.num_blocks + a.first_block + n];
#pragma GCC ivdep
        for (int64_t d = m * part; d < (m + 1) * part; ++d) f[d] += alpha * sums[d];
      }
    }
  }
}

}  // namespace s2sent::cpu
