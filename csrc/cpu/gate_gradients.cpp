// gate, backward: the gradients of its tensors, sums over the sentences, from dy, the gradient of the norm's output.
//
//     dz = w dy / std, or with statistics of the batch  w / std (dy - mean_b dy - z' mean_b (dy z')),  z' = (z - mean) / std
//     whose mean over b is then subtracted: it is 0 but for the rounding of the mean, which dz would enlarge by 1 / std
//     dW2 = dz^T s,  db2 = sum_b dz,  dw = sum_b dy z',  db = sum_b dy of the norm,  dW1 = ddown^T f,  db1 = sum_b ddown
//
// Order of summation: the sentences ascending; in float64 but for dW2 and dW1, whose sum chunks of kProductRows sentences are
// those of rows.h and are then added ascending. dc and dtau add the sentences' sums over the features ascending, in float64.

#include <algorithm>
#include <cmath>

#include "launch.h"
#include "rows.h"

namespace s2sent::cpu {
namespace {

// to[c] = sum_b x[b] rows[b, c]. Scratch: ``columns`` floats.
S2SENT_INLINE void sum_sentences(
    const float* x, const float* rows, int64_t sentences, int64_t columns, float* to, float* scratch) {
  std::fill(to, to + columns, 0.0f);
  for (int64_t b = 0; b < sentences; b += kProductRows) {
    float* sum = b == 0 ? to : scratch;
    if (b != 0) std::fill(sum, sum + columns, 0.0f);
    add_rows(x + b, rows + b * columns, std::min(kProductRows, sentences - b), columns, 0, columns, sum);
    for (int64_t c = 0; b != 0 && c < columns; ++c) to[c] += sum[c];
  }
}

// Writes the sums of dy, dy z', the logits' and the scale's gradient over the sentences; holds what dz needs beside dy.
struct Columns {
  float scale[kGateFeatures], mean[kGateFeatures] = {}, mean_product[kGateFeatures] = {}, center[kGateFeatures] = {};

  S2SENT_INLINE Columns(const GateGradients& a, int64_t first, int64_t count) {
    const Gate& gate = a.gate;
    const int64_t all = gate.num_blocks * gate.size;
    double sum[kGateFeatures] = {}, products[kGateFeatures] = {}, centers[kGateFeatures] = {}, logits[kGateFeatures] = {};
    for (int64_t b = 0; b < gate.sentences; ++b) {
      const int64_t place = b * all + first;
      const float* dy = gate.grad_normed + place;
      for (int64_t j = 0; j < count; ++j) sum[j] += double(dy[j]);
      for (int64_t j = 0; gate.norm_weight && j < count; ++j) products[j] += double(dy[j]) * double(gate.normed[place + j]);
      for (int64_t j = 0; gate.inverse_std && j < count; ++j) centers[j] += double(gate.normed[place + j]);
      for (int64_t j = 0; a.block_prior && j < count; ++j) logits[j] += double(gate.grad_logits[place + j]);
    }
    for (int64_t j = 0; gate.gate_scale && j < std::min(count, gate.size - first); ++j) {  // columns of the lowest block
      double shares = 0.0;
      for (int64_t b = 0; b < gate.sentences; ++b) shares += double(gate.grad_scale[b * gate.size + first + j]);
      a.scale_sums[first + j] = float(shares);
    }
    std::fill(scale, scale + kGateFeatures, 1.0f);
    for (int64_t j = 0; a.block_prior && j < count; ++j) a.prior_sums[first + j] = float(logits[j]);
    for (int64_t j = 0; gate.norm_weight && j < count; ++j) {
      if (gate.inverse_std) {
        const double average = centers[j] / double(gate.sentences);
        center[j] = float(average);
        scale[j] = gate.norm_weight[first + j] * gate.inverse_std[first + j];
        mean[j] = float(sum[j] / double(gate.sentences));
        mean_product[j] = float((products[j] - average * sum[j]) / double(gate.sentences));
      } else {
        scale[j] = gate.norm_weight[first + j] * (1.0f / std::sqrt(gate.running_var[first + j] + gate.eps));
      }
      a.norm_weight[first + j] = float(products[j]);
      a.norm_bias[first + j] = float(sum[j]);
    }
  }
};

}  // namespace

// Items of kGateFeatures columns of [B, N D]: dz, and all of their sums. Scratch: kGateFeatures B + H floats.
S2SENT_CLONES void up_gradients(const GateGradients& a, int64_t begin, int64_t end, float* scratch) {
  const Gate& gate = a.gate;
  const int64_t all = gate.num_blocks * gate.size, B = gate.sentences;
  float* turned = scratch;  // dz [kGateFeatures, B]
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kGateFeatures, count = std::min(kGateFeatures, all - first);
    const Columns of(a, first, count);
    double sum[kGateFeatures] = {};
    for (int64_t b = 0; b < B; ++b) {
      const int64_t place = b * all + first;
      for (int64_t j = 0; j < count; ++j) {
        float dz = gate.grad_normed[place + j];
        if (gate.inverse_std) dz = (dz - of.mean[j]) - (gate.normed[place + j] - of.center[j]) * of.mean_product[j];
        dz *= of.scale[j];
        gate.grad_normed[place + j] = dz;
        turned[j * B + b] = dz;
        sum[j] += double(dz);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      a.up_bias[first + j] = float(sum[j]);
      float* to = a.up_weight + (first + j) * gate.width;
      sum_sentences(turned + j * B, gate.bottleneck, B, gate.width, to, scratch + kGateFeatures * B);
    }
  }
}

// Items h, then n, then one: a row of dW1 and its db1; dc_n; dtau. Scratch: B + D floats.
S2SENT_CLONES void down_gradients(const GateGradients& a, int64_t begin, int64_t end, float* scratch) {
  const Gate& gate = a.gate;
  const int64_t B = gate.sentences, D = gate.size;
  for (int64_t item = begin; item < end; ++item) {
    double sum = 0.0;
    if (item >= gate.width) {
      const int64_t n = item - gate.width;
      float* const to = n < gate.num_blocks ? a.block_prior : a.gate_scale;
      if (to == nullptr) continue;
      const float* const sums = n < gate.num_blocks ? a.prior_sums + n * D : a.scale_sums;
      for (int64_t d = 0; d < D; ++d) sum += double(sums[d]);
      to[n % gate.num_blocks] = float(sum);
      continue;
    }
    for (int64_t b = 0; b < B; ++b) {
      scratch[b] = a.grad_down[b * gate.width + item];
      sum += double(scratch[b]);
    }
    a.down_bias[item] = float(sum);
    sum_sentences(scratch, gate.squeezed, B, D, a.down_weight + item * D, scratch + B);
  }
}

}  // namespace s2sent::cpu
