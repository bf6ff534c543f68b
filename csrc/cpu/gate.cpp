// gate: s = act(W1 f + b1), z = W2 s + b2, e = sigmoid(norm(z)), g = s-norm(tau e + c), and o = sum_n g p.
//
// Order of summation: W1 f in kLanes running sums over features, then these as a tree; W2 s in two running sums, over even
// and odd h; the s-norm and o over the Transformer blocks ascending. No sum runs over sentences, so that a sentence has the
// same bits in every batch. But in training W1 f and W2 s are summed in float64 (and W2 s over h ascending), and so are the
// statistics of the batch, over its sentences. product.cpp and gate_gradients.cpp compute the products of the backward pass.

#include <algorithm>
#include <cmath>

#include "launch.h"

namespace s2sent::cpu {
namespace {

// Eight floats at any address: two vector registers, one, or half of one, depending on the x86-64 level.
typedef float Vector __attribute__((vector_size(32)));
typedef float UnalignedVector __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kVector = 8;
constexpr int64_t kLanes = 4 * kVector;
static_assert(kGateFeatures == 4 * kVector, "excite holds an item's z of one sentence in four vectors");

S2SENT_INLINE float dot(const float* x, const float* y, int64_t size) {
  Vector a0 = {}, a1 = {}, a2 = {}, a3 = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    const UnalignedVector *px = reinterpret_cast<const UnalignedVector*>(x + d);
    const UnalignedVector *py = reinterpret_cast<const UnalignedVector*>(y + d);
    a0 += px[0] * py[0];
    a1 += px[1] * py[1];
    a2 += px[2] * py[2];
    a3 += px[3] * py[3];
  }
  const Vector a = (a0 + a1) + (a2 + a3);
  float rest = 0.0f;
  for (; d < size; ++d) rest += x[d] * y[d];
  return (((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]))) + rest;
}

// Summed in float64, in kVector running sums, for a gate in training.
S2SENT_INLINE float dot_exactly(const float* x, const float* y, int64_t size) {
  double sums[kVector] = {};
  int64_t d = 0;
  for (; d + kVector <= size; d += kVector) {
    for (int64_t i = 0; i < kVector; ++i) sums[i] += double(x[d + i]) * double(y[d + i]);
  }
  double rest = 0.0;
  for (; d < size; ++d) rest += double(x[d]) * double(y[d]);
  return float((((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))) + rest);
}

// e^x to about an ulp for x <= 88, 0 below -87, NaN for NaN. Branchless, so that it vectorises.
S2SENT_INLINE float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = bounded * 1.44269504f + magic;
  const float k = shifted - magic;
  const float r = (bounded - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const float power = from_bits((to_bits(shifted) - to_bits(magic) + 127) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

S2SENT_INLINE float sigmoid(float x) {
  const float negative = -x > 87.0f ? 87.0f : -x;
  return 1.0f / (1.0f + exponential(negative));
}

#if defined(__clang__)
#define S2SENT_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int Indices __attribute__((vector_size(32)));
#define S2SENT_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Indices{__VA_ARGS__})
#endif

// Transposes 8 x 8 numbers: swaps single numbers, then pairs, then fours between two rows.
S2SENT_INLINE void turn_eight(const float* rows, int64_t width, float* __restrict columns) {
  Vector a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const UnalignedVector*>(rows + i * width);
  for (int i = 0; i < 8; i += 2) {
    b[i] = S2SENT_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = S2SENT_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = S2SENT_SHUFFLE(b[i + k], b[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * k + 1] = S2SENT_SHUFFLE(b[i + k], b[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Vector low = S2SENT_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Vector high = S2SENT_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<UnalignedVector*>(columns + i * kGateFeatures) = low;
    *reinterpret_cast<UnalignedVector*>(columns + (i + 4) * kGateFeatures) = high;
  }
}

// ``count`` rows of W2 transposed to columns [H, kGateFeatures]; the remaining columns are 0.
S2SENT_INLINE void turn(const float* up_weight, int64_t count, int64_t width, float* __restrict columns) {
  if (count < kGateFeatures) std::fill(columns, columns + width * kGateFeatures, 0.0f);
  for (int64_t d = 0; d < count; d += 8) {
    const float* rows = up_weight + d * width;
    int64_t h = 0;
    for (; d + 8 <= count && h + 8 <= width; h += 8) turn_eight(rows + h, width, columns + h * kGateFeatures + d);
    for (; h < width; ++h) {
      for (int64_t i = 0; i < std::min(int64_t(8), count - d); ++i) columns[h * kGateFeatures + d + i] = rows[i * width + h];
    }
  }
}

S2SENT_INLINE void multiply(const float* columns, const float* s, int64_t width, float* __restrict z) {
  Vector a0 = {}, a1 = {}, a2 = {}, a3 = {}, b0 = {}, b1 = {}, b2 = {}, b3 = {};
  const UnalignedVector* w = reinterpret_cast<const UnalignedVector*>(columns);
  int64_t h = 0;
  for (; h + 2 <= width; h += 2, w += 8) {
    const float x = s[h], y = s[h + 1];
    a0 += w[0] * x;
    a1 += w[1] * x;
    a2 += w[2] * x;
    a3 += w[3] * x;
    b0 += w[4] * y;
    b1 += w[5] * y;
    b2 += w[6] * y;
    b3 += w[7] * y;
  }
  if (h < width) {
    const float x = s[h];
    a0 += w[0] * x;
    a1 += w[1] * x;
    a2 += w[2] * x;
    a3 += w[3] * x;
  }
  UnalignedVector* to = reinterpret_cast<UnalignedVector*>(z);
  to[0] = a0 + b0;
  to[1] = a1 + b1;
  to[2] = a2 + b2;
  to[3] = a3 + b3;
}

// z of a gate in training, rounded once: the differences of a batch's z may be tiny, and the norm enlarges them.
S2SENT_INLINE void multiply_exactly(
    const float* columns, const float* s, int64_t width, const float* bias, float* __restrict z) {
  double sum[kGateFeatures];
  for (int64_t j = 0; j < kGateFeatures; ++j) sum[j] = double(bias[j]);
  for (int64_t h = 0; h < width; ++h) {
    const double x = double(s[h]);
    for (int64_t j = 0; j < kGateFeatures; ++j) sum[j] += double(columns[h * kGateFeatures + j]) * x;
  }
  for (int64_t j = 0; j < kGateFeatures; ++j) z[j] = float(sum[j]);
}

// exp(x - max_n x) in place of x [N, F]: where tau is large, exp(tau e) may underflow for every block.
S2SENT_INLINE void exponentiate(float* __restrict x, int64_t num_blocks) {
  float most[kGateFeatures];
  std::copy_n(x, kGateFeatures, most);
  for (int64_t n = 1; n < num_blocks; ++n) {
    for (int64_t j = 0; j < kGateFeatures; ++j) most[j] = x[n * kGateFeatures + j] > most[j] ? x[n * kGateFeatures + j] : most[j];
  }
  for (int64_t n = 0; n < num_blocks; ++n) {
    for (int64_t j = 0; j < kGateFeatures; ++j) x[n * kGateFeatures + j] = exponential(x[n * kGateFeatures + j] - most[j]);
  }
}

// g [N, F] in place of exp(tau e + c).
S2SENT_INLINE void normalise(float* __restrict g, int64_t num_blocks) {
  float total[kGateFeatures] = {};
  for (int64_t n = 0; n < num_blocks; ++n) {
    for (int64_t j = 0; j < kGateFeatures; ++j) total[j] += g[n * kGateFeatures + j];
  }
  for (int64_t n = 0; n < num_blocks; ++n) {
    for (int64_t j = 0; j < kGateFeatures; ++j) g[n * kGateFeatures + j] = g[n * kGateFeatures + j] / total[j];
  }
}

// An item of excite and its scratch memory.
struct Item {
  int64_t d, count;     // features [d, d + count)
  int64_t first, last;  // sentences
  float* columns;       // [H, F] of W2
  float* weights;       // [sentences, N, F] exp(tau e + c), then g
  float* sigmoids;      // [sentences, N, F] e, backward only

  S2SENT_INLINE Item(const Gate& a, int64_t item, float* scratch) {
    const int64_t tiles = (a.size + kGateFeatures - 1) / kGateFeatures;
    d = item % tiles * kGateFeatures;
    count = std::min(kGateFeatures, a.size - d);
    first = item / tiles * kGateSentences;
    last = std::min(a.sentences, first + kGateSentences);
    columns = scratch;
    weights = columns + kGateFeatures * a.width;
    sigmoids = weights + (last - first) * a.num_blocks * kGateFeatures;
  }
};

S2SENT_INLINE float inverse_std(const Gate& a, int64_t row) {
  return a.inverse_std ? a.inverse_std[row] : 1.0f / std::sqrt(a.running_var[row] + a.eps);
}

// g of an item; with BACKWARD also e and the normalised z.
template <bool BACKWARD>
S2SENT_INLINE void weigh(const Gate& a, const Item& item) {
  const int64_t d = item.d, count = item.count, first = item.first, last = item.last, F = kGateFeatures;
  float* columns = item.columns;
  const float largest = a.block_prior ? *std::max_element(a.block_prior, a.block_prior + a.num_blocks) : 0.0f;  // c is unbounded
  for (int64_t n = 0; n < a.num_blocks; ++n) {
    const int64_t row = n * a.size + d;
    turn(a.up_weight + row * a.width, count, a.width, columns);
    float bias[kGateFeatures] = {}, mean[kGateFeatures] = {}, inverse[kGateFeatures] = {};
    float center[kGateFeatures] = {}, scale[kGateFeatures], shift[kGateFeatures] = {};  // y = (z - center) scale + shift
    std::fill(scale, scale + F, 1.0f);
    for (int64_t j = 0; j < count; ++j) bias[j] = a.up_bias[row + j];
    if (a.norm_weight) {
      for (int64_t j = 0; j < count; ++j) {
        mean[j] = a.running_mean[row + j];
        inverse[j] = inverse_std(a, row + j);
        scale[j] = a.norm_weight[row + j] * inverse[j];
        center[j] = a.inverse_std ? mean[j] : 0.0f;
        shift[j] = a.inverse_std ? a.norm_bias[row + j] : a.norm_bias[row + j] - mean[j] * scale[j];
      }
    }
    const float prior = a.block_prior ? a.block_prior[n] - largest : 0.0f;
    for (int64_t b = first; b < last; ++b) {
      float* __restrict z = item.weights + ((b - first) * a.num_blocks + n) * F;
      const float* s = a.bottleneck + b * a.width;
      if (a.inverse_std) {
        multiply_exactly(columns, s, a.width, bias, z);
      } else {
        multiply(columns, s, a.width, z);
        for (int64_t j = 0; j < F; ++j) z[j] = z[j] + bias[j];
      }
      if (BACKWARD && a.norm_weight) {
        float* __restrict normed = a.normed + b * a.num_blocks * a.size + row;
        for (int64_t j = 0; j < count; ++j) normed[j] = (z[j] - mean[j]) * inverse[j];
      }
      if (a.norm_weight) {
        for (int64_t j = 0; j < F; ++j) z[j] = (z[j] - center[j]) * scale[j] + shift[j];
      }
      for (int64_t j = 0; j < F; ++j) z[j] = sigmoid(z[j]);
      if (BACKWARD) std::copy_n(z, F, item.sigmoids + ((b - first) * a.num_blocks + n) * F);
      if (a.gate_scale) {
        const float scale = *a.gate_scale;
        for (int64_t j = 0; j < F; ++j) z[j] = z[j] * scale + prior;
      } else {
        for (int64_t j = 0; j < F; ++j) z[j] = exponential(z[j] + prior);
      }
    }
  }
  for (int64_t b = first; b < last; ++b) {
    float* own = item.weights + (b - first) * a.num_blocks * F;
    if (a.gate_scale) exponentiate(own, a.num_blocks);
    normalise(own, a.num_blocks);
  }
}

template <class T>
S2SENT_INLINE void excite_items(const Gate& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t F = kGateFeatures;
  for (int64_t index = begin; index < end; ++index) {
    const Item item(a, index, scratch);
    const int64_t d = item.d, count = item.count;
    weigh<false>(a, item);
    for (int64_t b = item.first; b < item.last; ++b) {
      const float* g = item.weights + (b - item.first) * a.num_blocks * F;
      float sum[kGateFeatures] = {};
      for (int64_t n = 0; n < a.num_blocks; ++n) {
        const int64_t place = (b * a.num_blocks + n) * a.size + d;
        if (a.gates) std::memcpy(a.gates + place, g + n * F, size_t(count) * sizeof(float));
        if (a.pooled) {
          for (int64_t j = 0; j < count; ++j) sum[j] += g[n * F + j] * a.pooled[place + j];
        }
      }
      if (a.pooled) {
        T* to = static_cast<T*>(a.output) + b * a.size + d;
        for (int64_t j = 0; j < count; ++j) store(sum[j], to + j);
      }
    }
  }
}

template <class T>
S2SENT_INLINE void load_all(const void* from, int64_t first, int64_t count, float* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = load(static_cast<const T*>(from)[first + j]);
}

#define S2SENT_LOAD(name, scalar, T, ...) \
  case DType::name: return load_all<T>(a.grad_output, first, count, to);

// ``count`` numbers of do.
S2SENT_INLINE void load_gradient(const Gate& a, int64_t first, int64_t count, float* to) {
  switch (a.dtype) { S2SENT_FOR_EACH_DTYPE(S2SENT_LOAD) }
}
#undef S2SENT_LOAD

}  // namespace

// Items (kGateSentences sentences, kGateFeatures features), features fastest: g, or o.
// Scratch: kGateFeatures (H + kGateSentences N) floats.
S2SENT_KERNEL(excite, Gate)

// Items as in excite: dp and the gradients inside the gate. Scratch: kGateFeatures (H + 2 kGateSentences N) floats.
S2SENT_CLONES void excite_backward(const Gate& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t F = kGateFeatures;
  for (int64_t index = begin; index < end; ++index) {
    const Item item(a, index, scratch);
    weigh<true>(a, item);
    for (int64_t b = item.first; b < item.last; ++b) {
      const int64_t own = (b - item.first) * a.num_blocks * F;
      float mean[kGateFeatures] = {}, output[kGateFeatures];  // sum_n g dg; do
      float products[kGateFeatures] = {};                     // sum_n grad_logits e
      if (a.pooled) load_gradient(a, b * a.size + item.d, item.count, output);
      for (int64_t n = 0; n < a.num_blocks; ++n) {
        const int64_t place = (b * a.num_blocks + n) * a.size + item.d;
        const float* g = item.weights + own + n * F;
        for (int64_t j = 0; j < item.count; ++j) {
          float grad;
          if (a.pooled) {
            a.grad_pooled[place + j] = g[j] * output[j];
            grad = output[j] * a.pooled[place + j];
          } else {
            grad = a.grad_gates[place + j];
          }
          a.grad_logits[place + j] = grad;
          mean[j] += g[j] * grad;
        }
      }
      const float scale = a.gate_scale ? *a.gate_scale : 1.0f;
      for (int64_t n = 0; n < a.num_blocks; ++n) {
        const int64_t place = (b * a.num_blocks + n) * a.size + item.d;
        const float *g = item.weights + own + n * F, *e = item.sigmoids + own + n * F;
#pragma GCC ivdep
        for (int64_t j = 0; j < item.count; ++j) {
          const float logit = g[j] * (a.grad_logits[place + j] - mean[j]);
          a.grad_logits[place + j] = logit;
          a.grad_normed[place + j] = scale * logit * e[j] * (1.0f - e[j]);
          products[j] += logit * e[j];
        }
      }
      if (a.gate_scale) std::copy_n(products, item.count, a.grad_scale + b * a.size + item.d);
    }
  }
}

// Items (block, kGateFeatures features), features fastest. Scratch: kGateFeatures (H + B) floats.
S2SENT_CLONES void batch_statistics(const BatchStatistics& a, int64_t begin, int64_t end, float* scratch) {
  const Gate& gate = a.gate;
  const int64_t F = kGateFeatures, tiles = (gate.size + F - 1) / F;
  float *columns = scratch, *z = scratch + F * gate.width;  // W2's; z [B, F]
  const double all = double(gate.sentences);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t d = item % tiles * F, row = item / tiles * gate.size + d, count = std::min(F, gate.size - d);
    turn(gate.up_weight + row * gate.width, count, gate.width, columns);
    float bias[kGateFeatures] = {};
    std::copy_n(gate.up_bias + row, count, bias);
    double mean[kGateFeatures] = {}, squares[kGateFeatures] = {};
    for (int64_t b = 0; b < gate.sentences; ++b) {
      float* __restrict own = z + b * F;
      multiply_exactly(columns, gate.bottleneck + b * gate.width, gate.width, bias, own);
      for (int64_t j = 0; j < F; ++j) mean[j] += double(own[j]);
    }
    for (int64_t j = 0; j < F; ++j) mean[j] /= all;
    for (int64_t b = 0; b < gate.sentences; ++b) {
      for (int64_t j = 0; j < F; ++j) {
        const double apart = double(z[b * F + j]) - mean[j];
        squares[j] += apart * apart;
      }
    }
    const double keep = 1.0 - a.momentum;
    for (int64_t j = 0; j < count; ++j) {
      a.mean[row + j] = float(mean[j]);
      a.inverse_std[row + j] = float(1.0 / std::sqrt(squares[j] / all + double(gate.eps)));
      a.running_mean[row + j] = float(keep * a.running_mean[row + j] + a.momentum * mean[j]);
      a.running_var[row + j] = float(keep * a.running_var[row + j] + a.momentum * (squares[j] / (all - 1.0)));
    }
  }
}

S2SENT_CLONES void bottleneck(const Gate& a, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t b = 0; b < a.sentences; ++b) {
      const float *weight = a.down_weight + h * a.size, *f = a.squeezed + b * a.size;
      const float t = (a.inverse_std ? dot_exactly(weight, f, a.size) : dot(weight, f, a.size)) + a.down_bias[h];
      a.bottleneck[b * a.width + h] = activate(a.activation, t);
    }
  }
}

}  // namespace s2sent::cpu
