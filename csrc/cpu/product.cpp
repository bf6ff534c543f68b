// x @ weight in an order that does not depend on the number of sentences.
//
// Order of summation: sum chunks of kProductRows rows; a chunk as in rows.h; then the chunks ascending.

#include <algorithm>

#include "launch.h"
#include "rows.h"

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
      add_rows(x + start, a.weight + start * a.columns, stop - start, a.columns, from, to, sum);
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
    if (a.bottleneck == nullptr) continue;
    for (int64_t c = 0; c < a.columns; ++c) sum[c] *= slope(a.activation, a.bottleneck[b * a.columns + c]);
  }
}

}  // namespace s2sent::cpu
