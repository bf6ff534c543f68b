// x @ weight in an order that does not depend on the number of sentences.
//
// Order of summation: sum chunks of kProductRows rows; within a chunk eight rows at a time as a tree, ascending, the last few one
// by one; then the chunks ascending.

#include <algorithm>

#include "launch.h"

namespace s2sent::cpu {

S2SENT_CLONES void multiply_rows(const Product& a, int64_t begin, int64_t end) {
  const int64_t tiles = (a.columns + kProductColumns - 1) / kProductColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / tiles, start = chunk * kProductRows, stop = std::min(a.rows, start + kProductRows);
    const int64_t from = item % tiles * kProductColumns, to = std::min(a.columns, from + kProductColumns);
    for (int64_t b = 0; b < a.sentences; ++b) {
      float* __restrict sum = a.partial + (chunk * a.sentences + b) * a.columns;
      const float* x = a.x + b * a.rows;
      std::fill(sum + from, sum + to, 0.0f);
      int64_t r = start;
      for (; r + 8 <= stop; r += 8) {
        const float *w0 = a.weight + r * a.columns, *w1 = w0 + a.columns, *w2 = w1 + a.columns, *w3 = w2 + a.columns;
        const float *w4 = w3 + a.columns, *w5 = w4 + a.columns, *w6 = w5 + a.columns, *w7 = w6 + a.columns;
        const float x0 = x[r], x1 = x[r + 1], x2 = x[r + 2], x3 = x[r + 3];
        const float x4 = x[r + 4], x5 = x[r + 5], x6 = x[r + 6], x7 = x[r + 7];
#pragma GCC ivdep
        for (int64_t c = from; c < to; ++c) {
          sum[c] += ((x0 * w0[c] + x1 * w1[c]) + (x2 * w2[c] + x3 * w3[c])) +
              ((x4 * w4[c] + x5 * w5[c]) + (x6 * w6[c] + x7 * w7[c]));
        }
      }
      for (; r < stop; ++r) {
        const float* w = a.weight + r * a.columns;
#pragma GCC ivdep
        for (int64_t c = from; c < to; ++c) sum[c] += x[r] * w[c];
      }
    }
  }
}

S2SENT_CLONES void sum_products(const Product& a, int64_t begin, int64_t end) {
  const int64_t chunks = (a.rows + kProductRows - 1) / kProductRows;
  for (int64_t b = begin; b < end; ++b) {
    float* __restrict sum = a.result + b * a.columns;
    std::fill(sum, sum + a.columns, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* partial = a.partial + (chunk * a.sentences + b) * a.columns;
      for (int64_t c = 0; c < a.columns; ++c) sum[c] += partial[c];
    }
  }
}

}  // namespace s2sent::cpu
