// Sums of weighted rows, for products of matrices.
#pragma once

#include "batch.h"

namespace s2sent::cpu {

// sum[c] += sum_r x[r] rows[r, c] over ``count`` rows, for columns [from, to): eight rows at a time as a tree, ascending, the
// last few one by one.
S2SENT_INLINE void add_rows(
    const float* x, const float* rows, int64_t count, int64_t columns, int64_t from, int64_t to, float* __restrict sum) {
  int64_t r = 0;
  for (; r + 8 <= count; r += 8) {
    const float *w0 = rows + r * columns, *w1 = w0 + columns, *w2 = w1 + columns, *w3 = w2 + columns;
    const float *w4 = w3 + columns, *w5 = w4 + columns, *w6 = w5 + columns, *w7 = w6 + columns;
    const float x0 = x[r], x1 = x[r + 1], x2 = x[r + 2], x3 = x[r + 3];
    const float x4 = x[r + 4], x5 = x[r + 5], x6 = x[r + 6], x7 = x[r + 7];
#pragma GCC ivdep
    for (int64_t c = from; c < to; ++c) {
      sum[c] += ((x0 * w0[c] + x1 * w1[c]) + (x2 * w2[c] + x3 * w3[c])) +
          ((x4 * w4[c] + x5 * w5[c]) + (x6 * w6[c] + x7 * w7[c]));
    }
  }
  for (; r < count; ++r) {
    const float* w = rows + r * columns;
#pragma GCC ivdep
    for (int64_t c = from; c < to; ++c) sum[c] += x[r] * w[c];
  }
}

}  // namespace s2sent::cpu
