// The order in which sums over a sentence's tokens are added, on every path alike. Changing a number here changes bits.
//
// ``run`` tokens form a running sum, kRuns of these sums a chunk, and chunks are added ascending. So a running sum has few terms,
// and its rounding error grows with their number: PyTorch's sums have the same depth. A sentence of one run has no further sum.
#pragma once

#include <algorithm>

#include "batch.h"

namespace s2sent::cpu {

constexpr int64_t kRuns = 16;
constexpr int64_t kCascadeScratch = 2;  // rows of scratch for a row that is summed

// A kernel's results: one or two rows, or a null pointer.
struct SumRows {
  float* sums;
  float* pools;
};

S2SENT_INLINE void add_row(float* __restrict to, const float* __restrict from, int64_t size) {
  if (to == nullptr) return;
#pragma GCC ivdep
  for (int64_t d = 0; d < size; ++d) to[d] += from[d];
}

// Writes the sums over tokens [from, to) in spans of ``span`` tokens. sum_span(from, to, into) writes those of one span.
// Scratch: one row of ``size`` floats for each of ``into``.
template <class SumSpan>
S2SENT_INLINE void add_spans(
    int64_t from, int64_t to, int64_t span, SumRows into, int64_t size, float* scratch, const SumSpan& sum_span) {
  const SumRows next = {into.sums ? scratch : nullptr, into.pools ? scratch + (into.sums ? size : 0) : nullptr};
  int64_t start = from;
  do {  // of no token, too: the sum is zero then
    const int64_t stop = std::min(to, start + span);
    sum_span(start, stop, start == from ? into : next);
    if (start != from) {
      add_row(into.sums, next.sums, size);
      add_row(into.pools, next.pools, size);
    }
    start = stop;
  } while (start < to);
}

// The same over ``count`` tokens, by sum_run(from, to, into) for at most ``run`` of them. Scratch: kCascadeScratch rows of
// ``size`` floats for each of ``into``.
template <class SumRun>
S2SENT_INLINE void cascade(
    int64_t count, int64_t run, SumRows into, int64_t size, float* scratch, const SumRun& sum_run) {
  const int64_t rows = (into.sums != nullptr) + (into.pools != nullptr);
  const auto sum_chunk = [&](int64_t from, int64_t to, SumRows chunk) __attribute__((always_inline)) {
    add_spans(from, to, run, chunk, size, scratch + rows * size, sum_run);
  };
  add_spans(0, count, kRuns * run, into, size, scratch, sum_chunk);
}

}  // namespace s2sent::cpu
