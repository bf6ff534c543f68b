// fuse: v, and the gradient of the gates.
//
// Order of summation: v adds kBlocks Transformer blocks at a time as a tree, ascending, and the last few one by one. dg adds
// kTokens real tokens at a time as a tree and the last few of a run of kRun tokens one by one; then the runs as cascade.h says.

#include "cascade.h"
#include "launch.h"

#include <algorithm>

namespace s2sent::cpu {
namespace {

constexpr int64_t kBlocks = 4;
constexpr int64_t kTokens = 4;
constexpr int64_t kRun = 16 * kTokens;

template <class T>
S2SENT_INLINE void fuse_row(const Fuse& a, int64_t b, int64_t r, T* to, float* __restrict sum) {
  const int64_t size = a.size;
  const float* gates = a.gates + b * a.num_blocks * size;
  std::fill(sum, sum + size, 0.0f);
  const auto row = [&](int64_t n) { return static_cast<const T*>(a.hidden[n].data) + real_row(a.hidden[n], a.batch, b, r); };
  int64_t n = 0;
  for (; n + kBlocks <= a.num_blocks; n += kBlocks) {
    const T *u0 = row(n), *u1 = row(n + 1), *u2 = row(n + 2), *u3 = row(n + 3);
    const float *g0 = gates + n * size, *g1 = g0 + size, *g2 = g1 + size, *g3 = g2 + size;
#pragma GCC ivdep
    for (int64_t d = 0; d < size; ++d) {
      sum[d] += (g0[d] * load(u0[d]) + g1[d] * load(u1[d])) + (g2[d] * load(u2[d]) + g3[d] * load(u3[d]));
    }
  }
  for (; n < a.num_blocks; ++n) {
    const T* u = row(n);
    const float* g = gates + n * size;
#pragma GCC ivdep
    for (int64_t d = 0; d < size; ++d) sum[d] += g[d] * load(u[d]);
  }
#pragma GCC ivdep
  for (int64_t d = 0; d < size; ++d) store(sum[d], to + d);
}

template <class T>
S2SENT_INLINE void fuse_items(const Fuse& a, int64_t begin, int64_t end, float* scratch) {
  const Batch& batch = a.batch;
  int64_t b = 0;
  if (batch.packed) b = std::upper_bound(batch.starts, batch.starts + batch.sentences + 1, begin) - batch.starts - 1;
  for (int64_t item = begin; item < end; ++item) {
    int64_t r;  // rank among the real tokens
    bool real = true;
    if (batch.packed) {
      while (item >= batch.starts[b + 1]) ++b;
      r = item - batch.starts[b];
    } else {
      b = item / batch.size;
      r = item % batch.size;
      if (batch.places) {
        const int64_t *first = batch.places + batch.starts[b], *last = batch.places + batch.starts[b + 1];
        const int64_t* found = std::lower_bound(first, last, r);
        real = found != last && *found == r;
        r = found - first;
      }
    }
    T* to = static_cast<T*>(a.fused) + item * a.size;
    if (real) {
      fuse_row<T>(a, b, r, to, scratch);
    } else {
      std::memset(to, 0, size_t(a.size) * sizeof(T));
    }
  }
}

template <class T>
S2SENT_INLINE void fuse_backward_items(const FuseBackward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = a.size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.num_blocks, n = item % a.num_blocks, length = a.batch.length(b);
    const Rows& hidden = a.hidden[n];
    const auto u = [&](int64_t r) { return static_cast<const T*>(hidden.data) + real_row(hidden, a.batch, b, r); };
    const auto v = [&](int64_t r) {
      return static_cast<const T*>(a.grad_fused.data) + real_row(a.grad_fused, a.batch, b, r);
    };
    const auto sum_run = [&](int64_t from, int64_t stop, SumRows into) __attribute__((always_inline)) {
      float* __restrict sum = into.sums;
      std::fill(sum, sum + size, 0.0f);
      int64_t r = from;
      for (; r + kTokens <= stop; r += kTokens) {
        const T *u0 = u(r), *u1 = u(r + 1), *u2 = u(r + 2), *u3 = u(r + 3);
        const T *v0 = v(r), *v1 = v(r + 1), *v2 = v(r + 2), *v3 = v(r + 3);
#pragma GCC ivdep
        for (int64_t d = 0; d < size; ++d) {
          sum[d] += (load(v0[d]) * load(u0[d]) + load(v1[d]) * load(u1[d])) +
              (load(v2[d]) * load(u2[d]) + load(v3[d]) * load(u3[d]));
        }
      }
      for (; r < stop; ++r) {
        const T *u0 = u(r), *v0 = v(r);
#pragma GCC ivdep
        for (int64_t d = 0; d < size; ++d) sum[d] += load(v0[d]) * load(u0[d]);
      }
    };
    cascade(length, kRun, {a.grad_gates + item * size, nullptr}, size, scratch, sum_run);
  }
}

}  // namespace

// Items are rows of v: b L + l, or t if packed. Scratch: D floats.
S2SENT_KERNEL(fuse, Fuse)

// Items (b, n): dg_n. Scratch: kCascadeScratch D floats.
S2SENT_KERNEL(fuse_backward, FuseBackward)

}  // namespace s2sent::cpu
