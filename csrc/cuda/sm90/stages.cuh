// squeeze, gate and fuse of one sentence in the one-pass kernel (kernel.cuh), for the compute warps.
#pragma once

#include <type_traits>

#include "layout.cuh"

namespace s2sent::cuda {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---------------------------------------------------------------- squeeze

// Adds a group to ``sums``. ``rows`` and ``factors`` point to its first token; ``own`` tokens are left, the group is full if they
// are kGroupTokens or more.
template <class T, int SLICE>
__device__ void squeeze_group(const char* rows, const float* factors, int own, float (&sums)[kPiece]) {
  const auto load = [&](int j, float (&x)[kPiece]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(rows + j * SLICE * int(sizeof(T)));
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack(pairs[i], T());
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  };
  if (own >= kGroupTokens) {
    float half[2][kPiece];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float beta[kGroupHalf];
      load_floats(factors + k * kGroupHalf, beta);
#pragma unroll
      for (int j = 0; j < kGroupHalf; ++j) {
        float x[kPiece];
        load(k * kGroupHalf + j, x);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) half[k][i] = j == 0 ? beta[j] * x[i] : fmaf(beta[j], x[i], half[k][i]);
      }
      asm volatile("" ::: "memory");  // registers suffice for the loads of half a group
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sums[i] += half[0][i] + half[1][i];
  } else {  // the last few tokens of a sentence
#pragma unroll 1
    for (int j = 0; j < own; ++j) {
      float x[kPiece];
      load(j, x);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sums[i] = fmaf(factors[j], x[i], sums[i]);
    }
  }
}

// S_n of a sentence into shared memory. A warp handles one Transformer block, kAccumulatorLanes lanes an accumulator. ``acquire``
// waits for a slot; ``release`` advances to the next one.
template <class T, int SLICE, class Acquire, class Release>
__device__ void squeeze_sentence(
    const Select& a, const Layout& at, const Cta<SLICE>& cta, int length, const Ring& ring, const Acquire& acquire,
    const Release& release) {
  const int lane = cta.thread() % kWarp, n = cta.thread() / kWarp;
  const int accumulator = lane / kAccumulatorLanes, piece = lane % kPiece;
  const bool squeezes = n < int(a.num_blocks) && piece * kPiece < cta.features(a);
  const int group = ((n * kSlotTokens + accumulator * kGroupTokens) * SLICE + piece * kPiece) * int(sizeof(T));
  const int part = squeezes ? cta.ints(at.parts)[piece] : 0;
  const int factors = at.factors + (part * kSlotTokens + accumulator * kGroupTokens) * int(sizeof(float));
  float sums[kPiece] = {};
  volatile float outer[kPiece];  // rarely used, so in local memory
#pragma unroll 1
  for (int c = 0; c < slots_of(length); ++c) {
    if (c && c % kChunkGroups == 0) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) outer[i] = (c == kChunkGroups ? 0.0f : outer[i]) + sums[i], sums[i] = 0.0f;
    }
    acquire(ring);
    const char* slot = cta.slot(at, ring);
    const int own = length - c * kSlotTokens - accumulator * kGroupTokens;
    if (squeezes) squeeze_group<T, SLICE>(slot + group, reinterpret_cast<const float*>(slot + factors), own, sums);
    release();
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    sums[i] = (slots_of(length) > kChunkGroups ? outer[i] : 0.0f) + sums[i];
    sums[i] += __shfl_xor_sync(~0u, sums[i], kAccumulatorLanes);  // the accumulators as a tree
    sums[i] += __shfl_xor_sync(~0u, sums[i], 2 * kAccumulatorLanes);
  }
  if (squeezes && accumulator == 0) store_floats(sums, cta.floats(at.sums) + n * SLICE + piece * kPiece);
}

// ---------------------------------------------------------------- gate

// Row thread / kQuarters of W1, in quarter thread % kQuarters of this CTA's slice.
template <int SLICE>
struct Down {
  float weight[SLICE / kQuarters];

  __device__ Down(const Select& a, const Cta<SLICE>& cta) {
    const int thread = cta.thread(), row = thread / kQuarters;
#pragma unroll
    for (int k = 0; k < SLICE / kQuarters; k += 4) {
      const int d = thread % kQuarters * (SLICE / kQuarters) + k;
      const float* from = a.gate.down_weight + row * a.size + cta.d0() + d;
      const bool inside = row < int(a.gate.width) && d < cta.features(a);
      const float4 four = inside ? __ldg(reinterpret_cast<const float4*>(from)) : float4();
      weight[k] = four.x, weight[k + 1] = four.y, weight[k + 2] = four.z, weight[k + 3] = four.w;
    }
  }
};

// f of sentence b, the ``turn``-th of this cluster, from S_n; then sends this slice's partial sums of W1 f to every CTA.
template <int SLICE>
__device__ void send_shares(
    const Select& a, const Layout& at, const Cta<SLICE>& cta, const Down<SLICE>& down, int64_t b, int turn) {
  constexpr int kQuarter = SLICE / kQuarters;
  const int thread = cta.thread(), width = int(a.gate.width);
  float* f = cta.floats(at.f);
  if (thread == 0) arrive_expecting(cta.shares(at), uint32_t(at.cluster * at.width) * sizeof(float));
  if (thread < SLICE) {
    const int features = cta.features(a);
    const float* alpha = cta.floats(at.alpha) + cta.ints(at.parts)[thread / kPiece] * int(a.num_blocks);
    const float* sums = cta.floats(at.sums) + thread;
    float sum = 0.0f;
#pragma unroll 12
    for (int n = 0; n < int(a.num_blocks); ++n) sum = fmaf(alpha[n], sums[n * SLICE], sum);
    f[thread] = thread < features ? sum : 0.0f;
    if (thread < features) a.squeezed[b * a.size + cta.d0() + thread] = sum;
  }
  wait_for_all();
  float four[kRunningSums] = {};
#pragma unroll
  for (int k = 0; k < kQuarter; ++k) {
    float& running = four[k % kRunningSums];
    running = fmaf(down.weight[k], f[thread % kQuarters * kQuarter + k], running);
  }
  float sum = (four[0] + four[1]) + (four[2] + four[3]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  // Sixteen threads hold four rows; each sends all four to one of up to 16 CTAs.
  float rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(~0u, sum, thread % kWarp / 16 * 16 + 4 * i);
  const int to = thread % kMaxCluster, first = thread / 16 * 4;
  if (first >= width || to >= at.cluster) return;
  if (turn) wait(cta.taken(at), (turn - 1) & 1);
  const uint32_t place = cta.address(at.shares + (cta.rank() * at.width + first) * int(sizeof(float)));
  store_remote(address_in(place, to), rows, address_in(cta.shares(at), to));
}

// s, from the shares of all CTAs; every CTA computes all of it.
template <int SLICE>
__device__ void bottleneck(const Select& a, const Layout& at, const Cta<SLICE>& cta, int turn) {
  const int h = cta.thread(), width = int(a.gate.width);
  if (h < width) {
    const float bias = a.gate.down_bias[h];
    wait(cta.shares(at), turn & 1);
    const float* shares = cta.floats(at.shares) + h;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxCluster; ++k) total += shares[k * at.width];
    cta.floats(at.s)[h % 2 * (kMaxWidth / 2) + h / 2] = activate(a.gate.activation, total + bias);
  }
  wait_for_all();
  if (h < at.cluster) arrive_remote(address_in(cta.taken(at), h));
}

// Half (even or odd h, by thread % 2) of rows thread / 2 + kThreads / 2 * i of W2's slice [N, slice].
template <int SLICE, int ROWS, int WIDTH>
struct Up {
  float weight[ROWS][WIDTH / 2];

  __device__ Up(const Select& a, int d0, int features) {
    const int thread = int(threadIdx.x), half = thread % 2, width = int(a.gate.width);
    const bool wide = width % 4 == 0 && reinterpret_cast<uintptr_t>(a.gate.up_weight) % 16 == 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = thread / 2 + kThreads / 2 * i, n = row / SLICE, d = row % SLICE;
      const int count = n < int(a.num_blocks) && d < features ? width : 0;
      const float* from = a.gate.up_weight + (n * a.size + d0 + d) * width;
      asm volatile("" : "+l"(from));  // otherwise the compiler keeps an address per weight in registers
      if (wide) {  // a thread pair loads four columns in turn and exchanges even and odd ones
#pragma unroll
        for (int h = 0; h < WIDTH; h += 8) {
          const int own = h + 4 * half;
          const float4 four = own < count ? __ldg(reinterpret_cast<const float4*>(from + own)) : float4();
          const float x = __shfl_xor_sync(~0u, half ? four.x : four.y, 1), y = __shfl_xor_sync(~0u, half ? four.z : four.w, 1);
          weight[i][h / 2] = half ? x : four.x, weight[i][h / 2 + 1] = half ? y : four.z;
          weight[i][h / 2 + 2] = half ? four.y : x, weight[i][h / 2 + 3] = half ? four.w : y;
        }
      } else {
#pragma unroll
        for (int k = 0; k < WIDTH / 2; ++k) weight[i][k] = 2 * k + half < count ? __ldg(from + 2 * k + half) : 0.0f;
      }
    }
  }
};

// A thread pair computes each row in two halves; thread t finalises the rows of parity t % 2. Holds the parameters of those rows.
template <int SLICE, int ROWS>
struct Units {
  static constexpr int kCount = (ROWS + 1) / 2;

  // Index in [N, slice]; at least kWarps * slice if the thread has no such row.
  static __device__ int row(const Cta<SLICE>& cta, int i) {
    return 2 * i + cta.thread() % 2 < ROWS ? cta.thread() / 2 + kThreads / 2 * (2 * i + cta.thread() % 2)
                                             : kWarps * SLICE;
  }
  // Index in [N, D]; some valid one if the thread has no such row.
  static __device__ int place(const Select& a, const Cta<SLICE>& cta, int i) {
    const int n = min(row(cta, i) / SLICE, int(a.num_blocks) - 1), d = min(row(cta, i) % SLICE, cta.features(a) - 1);
    return n * int(a.size) + cta.d0() + d;
  }

  Unit units[kCount];

  __device__ Units(const Select& a, const Cta<SLICE>& cta) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) units[i] = Unit(a.gate, place(a, cta, i));
  }
};

// tau of all sentences.
template <int SLICE>
__device__ Scale scale_of(const Layout& at, const Cta<SLICE>& cta) {
  Scale scale;
  scale.tau = cta.floats(at.prior)[kWarps + 1];
  scale.large = fabsf(scale.tau) > kPlainScale;
  return scale;
}

// exp(tau e + c) of this sentence, or if tau is large the logits.
template <int SLICE, int ROWS, int WIDTH>
__device__ void excite(
    const Select& a, const Layout& at, const Cta<SLICE>& cta, const Up<SLICE, ROWS, WIDTH>& up,
    const Units<SLICE, ROWS>& units) {
  const int thread = cta.thread(), rows = int(a.num_blocks) * SLICE;
  float z[ROWS + 1] = {}, inverse[units.kCount];
#pragma unroll
  for (int i = 0; i < units.kCount; ++i) inverse[i] = units.units[i].inverse(a.gate);
  const float* own = cta.floats(at.s) + thread % 2 * (kMaxWidth / 2);
#pragma unroll
  for (int k = 0; k < WIDTH / 2; k += 4) {
    float four[4];
    load_floats(own + k, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) z[i] = fmaf(up.weight[i][k + j], four[j], z[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) z[i] += __shfl_xor_sync(~0u, z[i], 1);
#pragma unroll
  for (int i = 0; i < units.kCount; ++i) {
    const int row = units.row(cta, i);
    const float sum = units.units[i].normed(thread % 2 ? z[2 * i + 1] : z[2 * i], inverse[i]);
    const float weight = scale_of(at, cta).weight(units.units[i].open(sum), cta.floats(at.prior)[row / SLICE]);
    if (row < rows) cta.floats(at.weights)[row] = weight;
  }
}

// ---------------------------------------------------------------- fuse

// g and v of sentence b. A thread handles two features and keeps their gates of all Transformer blocks in registers.
template <class T, int SLICE, class Acquire, class Release>
__device__ void fuse_sentence(
    const Select& a, const Layout& at, const Cta<SLICE>& cta, int64_t b, const Span& span, const Ring& ring,
    const Acquire& acquire, const Release& release) {
  constexpr int kPairs = SLICE / 2, kRows = kThreads / kPairs, kItems = (kSlotTokens + kRows - 1) / kRows;
  constexpr int kAtOnce = 6;  // Transformer blocks whose loads are issued together
  const int blocks = int(a.num_blocks);
  const int thread = cta.thread(), pair = thread % kPairs, first = thread / kPairs;
  const int32_t* places = span.contiguous() ? nullptr : a.batch.places + b * a.batch.size;
  const int64_t begin = ((a.batch.packed ? 0 : b * a.batch.size) + (places ? 0 : span.first)) * a.size + cta.d0();
  char* const to = static_cast<char*>(a.fused) + begin * int64_t(sizeof(T));
  const uint32_t bytes = uint32_t(a.size) * uint32_t(sizeof(T));  // of a token; a sentence has less than 2^32
  const bool inside = 2 * pair < cta.features(a);
  const float2* weights = reinterpret_cast<const float2*>(cta.floats(at.weights)) + pair;
  float2 gates[kWarps], total = {};
#pragma unroll
  for (int n = 0; n < kWarps; ++n) {
    gates[n] = n < blocks ? weights[n * kPairs] : float2();
    total.x += gates[n].x, total.y += gates[n].y;
  }
  const float2 inverse = make_float2(1.0f / total.x, 1.0f / total.y);
  const auto divided = [&](float2 weight) {
    return make_float2(divide(weight.x, total.x, inverse.x), divide(weight.y, total.y, inverse.y));
  };
  static_assert(kRows >= kWarps, "each thread of a feature pair writes the gates of at most one block");
#pragma unroll
  for (int n = 0; n < kWarps; ++n) gates[n] = divided(gates[n]);
#pragma unroll 1
  for (int c = 0; c < span.length; c += kSlotTokens) {
    // Tokens first, first + kRows, ... of the slot.
    const auto real = [&](int i) { return inside && first + kRows * i < min(kSlotTokens, span.length - c); };
    int place[kItems];
    if (places) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) place[i] = real(i) ? places[c + first + kRows * i] : 0;
    }
    acquire(ring);
    const char* from = cta.slot(at, ring) + (first * SLICE + 2 * pair) * int(sizeof(T));
    float2 sum[kItems] = {};
    const auto add = [&](int n, auto count) {  // ``count`` blocks from n on
      constexpr int kCount = decltype(count)::value;
      uint32_t x[kCount][kItems];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int after = kSlotTokens % kRows ? min(first + kRows * i, kSlotTokens - 1) - first : kRows * i;
          const int offset = ((n + k) * kSlotTokens + after) * SLICE * int(sizeof(T));
          x[k][i] = *reinterpret_cast<const uint32_t*>(from + offset);
        }
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const float2 two = unpack(x[k][i], T());
          sum[i].x = fmaf(gates[n + k].x, two.x, sum[i].x), sum[i].y = fmaf(gates[n + k].y, two.y, sum[i].y);
        }
      }
    };
#pragma unroll
    for (int n = 0; n < kWarps; n += kAtOnce) {
      if (n + kAtOnce <= blocks) {
        add(n, std::integral_constant<int, kAtOnce>());
        continue;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce - 1; ++k) {
        if (n + k < blocks) add(n + k, std::integral_constant<int, 1>());
      }
    }
    release();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t l = uint32_t(places ? place[i] : c + first + kRows * i);
      if (!real(i)) continue;
      *reinterpret_cast<uint32_t*>(to + (l * bytes + pair * uint32_t(2 * sizeof(T)))) = pack<T>(sum[i].x, sum[i].y);
    }
  }
  if (first < blocks && inside) {
    float* to = a.gate.gates + (b * blocks + first) * a.size + cta.d0();
    reinterpret_cast<float2*>(to)[pair] = divided(weights[first * kPairs]);
  }
}

// v = 0 at padding.
template <class T, int SLICE>
__device__ void clear_padding(const Select& a, const Cta<SLICE>& cta, int b, const Span& span) {
  constexpr int kPieces = SLICE * int(sizeof(T)) / 16;
  const int thread = int(threadIdx.x), d = thread % kPieces * (16 / int(sizeof(T)));
  if (d >= cta.features(a)) return;
#pragma unroll 1
  for (int64_t l = thread / kPieces; l < a.batch.size; l += kThreads / kPieces) {
    const int64_t row = b * a.batch.size + l;
    if (span.contiguous() ? l >= span.first && l < span.first + span.length : a.batch.mask[row]) continue;
    *reinterpret_cast<uint4*>(static_cast<T*>(a.fused) + row * a.size + cta.d0() + d) = make_uint4(0, 0, 0, 0);
  }
}

#endif

}  // namespace
}  // namespace s2sent::cuda
