// squeeze, gate and fuse in one read of the hidden states (sm_90a).
//
// A cluster of blocks holds one sentence: each block the N x l x slice_of(D) numbers of its slice of features, in a ring of
// stages of kStageTokens tokens. squeeze adds the stages as they come; fuse adds them again under the gates. Each stage that it
// has left is filled with the next sentence's tokens by the copy engine, which a warpgroup of its own asks. W2's slice stays in
// the others' registers. Between the blocks travels W1 f alone: each sends its slice's share to all, and all end the sums. A
// sentence longer than the ring is read twice. Clusters take sentences in turn.
//
// Orders of summation are those of squeeze.cu, gate.cu and fuse.cu, and so are the bits.

#pragma once

#include "cluster.cuh"
#include "gate.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kStageTokens = 32;  // a group of 8 for each of squeeze.cu's four warps, here its slots
constexpr int kGroup = 8;
constexpr int kPiece = 8;   // features that a thread squeezes
constexpr int kChunk = 64;  // groups of a slot after which squeeze.cu closes a running sum
constexpr int kWarps = 12;  // of which each squeezes one of the N blocks
constexpr int kThreads = kWarps * kWarp;  // that compute
constexpr int kLoaders = 4;               // warps that load: a warpgroup, whose registers the others take
constexpr int kAllThreads = kThreads + kLoaders * kWarp;
constexpr int kRegisters = 160, kLoaderRegisters = 32;  // 3 x 160 + 32 is 512, a quarter of what 128 threads have
constexpr int kBoxTokens = 16;            // that are copied at once where they stand together
constexpr int kMaxCluster = 16;
constexpr int kMaxWidth = 88;  // H: what D = 1024 has by default; four threads a row of W1

// Where things stand in a block's shared memory, in bytes.
struct Layout {
  int stage, stages;  // size of one; the ring begins at 0: in a stage [N, kStageTokens, slice] of a hidden state's dtype,
  int factors;        // then from here float [parts][kStageTokens]
  int sums, weights;  // float [N, slice]
  int f;              // float [slice]
  int parts;          // int [slice / kPiece]: which of the slice's parts of frequencies a piece is in; then the first of them
  int alpha;          // float [parts, N]
  int prior;          // float [kWarps + 1], N of them used
  int spans;          // int [2, 2]: what Span is made of, of this sentence and of the next
  int shares;         // float [kMaxCluster, width]: W1 f, of every block's features
  int s;              // float [2, kMaxWidth / 2]: even and odd h
  int barriers;       // shares, taken, full[stages], empty[stages]
  int bytes;
  int stage_parts;    // of the frequencies, that a slice touches at most
  int cluster;
  int width;          // H, and up to three zeros more
};

// Where the hidden states stand, and the same as the copy engine takes it: boxes of [kBoxTokens, slice].
struct Hidden {
  CUtensorMap maps[kWarps];
  Rows rows[kWarps];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A place in the ring, and how often it went round.
struct Ring {
  int stage = 0;
  uint32_t round = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, ++round;
  }
  __device__ void go_back(int count, int stages) {  // not more than a round
    stage -= count;
    if (stage < 0) stage += stages, --round;
  }
};

__device__ inline float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ inline float2 unpack(uint32_t pair, __half) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

template <class T>
__device__ inline uint32_t pack(float x, float y) {
  T pair[2];
  narrow(x, &pair[0]), narrow(y, &pair[1]);
  return *reinterpret_cast<const uint32_t*>(pair);
}

// What there is to know of this block. Read where it is needed: registers are full of weights.
template <int SLICE>
struct Block {
  char* memory;

  __device__ int thread() const { return int(special_register<kThread>()); }
  __device__ int rank() const { return int(special_register<kRank>()); }
  __device__ int cluster() const { return int(special_register<kCluster>()); }
  __device__ int clusters() const { return int(special_register<kClusters>()); }
  __device__ int d0() const { return rank() * SLICE; }
  __device__ int features(const Select& a) const { return min(SLICE, int(a.size) - d0()); }  // fewer in the last
  __device__ uint32_t address(int offset) const { return shared_address(memory) + offset; }
  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ int* ints(int offset) const { return reinterpret_cast<int*>(memory + offset); }
  __device__ const char* stage(const Layout& at, const Ring& ring) const { return memory + ring.stage * at.stage; }
  __device__ uint32_t shares(const Layout& at) const { return address(at.barriers); }     // are here
  __device__ uint32_t taken(const Layout& at) const { return address(at.barriers + 8); }  // from all blocks' memory
  __device__ uint32_t full(const Layout& at, int stage) const { return address(at.barriers + 16 + stage * 8); }
  __device__ uint32_t empty(const Layout& at, int stage) const { return full(at, at.stages + stage); }
};

__device__ inline int stages_of(int length) { return (length + kStageTokens - 1) / kStageTokens; }

// Where a sentence's real tokens stand: side by side from ``first`` on, of a packed batch's tokens or of the sentence's own,
// or, where that is -1, where batch.places says. Made of two numbers of the batch, which are asked for a sentence ahead.
struct Span {
  int first, length;

  // The numbers of a sentence; null where all tokens are real.
  static __device__ const int32_t* begin(const Batch& batch, int64_t b) {
    return batch.packed ? batch.starts + b : batch.firsts ? batch.firsts + b : nullptr;
  }
  static __device__ const int32_t* end(const Batch& batch, int64_t b) {
    return batch.packed ? batch.starts + b + 1 : batch.lengths ? batch.lengths + b : nullptr;
  }
  __device__ Span(const Batch& batch, int x, int y)
      : first(batch.firsts || batch.packed ? x : 0),
        length(batch.packed ? y - x : batch.lengths ? y : int(batch.size)) {}

  __device__ bool together() const { return first >= 0; }
};

// Waits for all threads that compute.
__device__ inline void wait_for_all() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// ---------------------------------------------------------------- load

// This warp's share of a stage's rows, the real tokens of sentence b from r0 on, and the first warp's factors.
template <class T, int SLICE>
__device__ void fill_stage(
    const Select& a, const Hidden& hidden, const Layout& at, const Block<SLICE>& block, int where, int64_t b, int r0,
    const Span& span) {
  constexpr int kRow = SLICE * int(sizeof(T)), kBoxes = kStageTokens / kBoxTokens;
  const int lane = block.thread() % kWarp, warp = (block.thread() - kThreads) / kWarp;
  const int count = min(kStageTokens, span.length - r0), blocks = int(a.num_blocks);
  const uint32_t stage = block.address(where * at.stage), full = block.full(at, where);
  const int32_t* places = span.together() ? nullptr : a.batch.places + b * a.batch.size + r0;
  const int first = places ? places[0] : span.first + r0;
  const bool together = !places || places[count - 1] - first == count - 1;
  const int boxes = (count + kBoxTokens - 1) / kBoxTokens, bytes = block.features(a) * int(sizeof(T));
  if (warp == 0) {
    if (lane == 0) arrive_expecting(full, uint32_t(blocks * (together ? boxes * kBoxTokens * kRow : count * bytes)));
    const int* parts = block.ints(at.parts);
    const float* from = a.factors.beta + (a.batch.packed ? span.first : b * a.factors.stride_b) + r0 + lane;
    for (int part = 0; lane < count && part <= parts[SLICE / kPiece - 1]; ++part) {
      const uint32_t to = stage + at.factors + (part * kStageTokens + lane) * int(sizeof(float));
      copy_4(to, from + (parts[SLICE / kPiece] + part) * a.factors.stride_m);
    }
    arrive_after_copies(full);
  }
  if (together) {
    const int n = lane / kBoxes * kLoaders + warp, token = lane % kBoxes * kBoxTokens;
    if (n >= blocks || token >= count) return;
    const int z = a.batch.packed ? 0 : int(b);
    copy_box(stage + (n * kStageTokens + token) * kRow, &hidden.maps[n], block.d0(), first + token, z, full);
  } else {
    for (int n = warp; lane < count && n < blocks; n += kLoaders) {
      const Rows& rows = hidden.rows[n];
      const T* from = static_cast<const T*>(rows.data) + b * rows.stride_b + places[lane] * rows.stride_l + block.d0();
      copy_row(stage + (n * kStageTokens + lane) * kRow, from, uint32_t(bytes), full);
    }
  }
}

// The work of the last warps: fill the stages in the order in which they are used, each once all others have left it. LONG:
// there may be sentences that are longer than the ring.
template <class T, int SLICE, bool LONG>
__device__ void load_sentences(const Select& a, const Hidden& hidden, const Layout& at, const Block<SLICE>& block) {
  wait_for_previous();
  Ring ring;
  const int last = int(a.batch.sentences) - 1;
  const auto ask = [&](const int32_t* from) { return from ? *from : 0; };
  int x = ask(Span::begin(a.batch, block.cluster())), y = ask(Span::end(a.batch, block.cluster()));
#pragma unroll 1
  for (int b = block.cluster(); b <= last; b += block.clusters()) {
    const Span span(a.batch, x, y);
    const int next = min(b + block.clusters(), last);
    x = ask(Span::begin(a.batch, next)), y = ask(Span::end(a.batch, next));
    const int stages = stages_of(span.length), fills = LONG && stages > at.stages ? 2 * stages : stages;
#pragma unroll 1
    for (int c = 0; c < fills; ++c) {
      if (ring.round) wait(block.empty(at, ring.stage), (ring.round - 1) & 1);
      fill_stage<T>(a, hidden, at, block, ring.stage, b, (c < stages ? c : c - stages) * kStageTokens, span);
      ring.advance(at.stages);
    }
  }
}

// ---------------------------------------------------------------- squeeze

// ``stage`` at the group's first token, ``factors`` likewise; own: how many tokens there are, 8 or more or fewer.
template <class T, int SLICE>
__device__ void squeeze_stage(const char* stage, const float* factors, int own, float (&sums)[kPiece]) {
  const auto load = [&](int j, float (&x)[kPiece]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(stage + j * SLICE * int(sizeof(T)));
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack(pairs[i], T());
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  };
  if (own >= kGroup) {
    float half[2][kPiece];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float beta[kGroup / 2];
      load_floats(factors + k * kGroup / 2, beta);
#pragma unroll
      for (int j = 0; j < kGroup / 2; ++j) {
        float x[kPiece];
        load(k * kGroup / 2 + j, x);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) half[k][i] = j == 0 ? beta[j] * x[i] : fmaf(beta[j], x[i], half[k][i]);
      }
      asm volatile("" ::: "memory");  // there are registers for half a group's loads
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sums[i] += half[0][i] + half[1][i];
  } else {  // a sentence's last few tokens
#pragma unroll 1
    for (int j = 0; j < own; ++j) {
      float x[kPiece];
      load(j, x);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sums[i] = fmaf(factors[j], x[i], sums[i]);
    }
  }
}

// S_n of a sentence, of each of the N, into shared memory: a warp a block, eight lanes a slot. ``come`` waits for a stage,
// ``leave`` goes on to the next.
template <class T, int SLICE, class Come, class Leave>
__device__ void squeeze_sentence(
    const Select& a, const Layout& at, const Block<SLICE>& block, int length, const Ring& ring, const Come& come,
    const Leave& leave) {
  const int lane = block.thread() % kWarp, n = block.thread() / kWarp, slot = lane / kPiece, piece = lane % kPiece;
  const bool squeezes = n < int(a.num_blocks) && piece * kPiece < block.features(a);
  const int group = ((n * kStageTokens + slot * kGroup) * SLICE + piece * kPiece) * int(sizeof(T));
  const int part = squeezes ? block.ints(at.parts)[piece] : 0;
  const int factors = at.factors + (part * kStageTokens + slot * kGroup) * int(sizeof(float));
  float sums[kPiece] = {};
  volatile float closed[kPiece];  // rarely used: in local memory
#pragma unroll 1
  for (int c = 0; c < stages_of(length); ++c) {
    if (c && c % kChunk == 0) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) closed[i] = (c == kChunk ? 0.0f : closed[i]) + sums[i], sums[i] = 0.0f;
    }
    come(ring);
    const char* stage = block.stage(at, ring);
    const int own = length - c * kStageTokens - slot * kGroup;
    if (squeezes) squeeze_stage<T, SLICE>(stage + group, reinterpret_cast<const float*>(stage + factors), own, sums);
    leave();
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    sums[i] = (stages_of(length) > kChunk ? closed[i] : 0.0f) + sums[i];
    sums[i] += __shfl_xor_sync(~0u, sums[i], 8);  // the slots as a tree
    sums[i] += __shfl_xor_sync(~0u, sums[i], 16);
  }
  if (squeezes && slot == 0) store_floats(sums, block.floats(at.sums) + n * SLICE + piece * kPiece);
}

// ---------------------------------------------------------------- gate

// A quarter of the slice's features in a row of W1, that of thread / 4.
template <int SLICE>
struct Down {
  float weight[SLICE / 4];

  __device__ Down(const Select& a, const Block<SLICE>& block) {
    const int thread = block.thread(), row = thread / 4;
#pragma unroll
    for (int k = 0; k < SLICE / 4; k += 4) {
      const int d = thread % 4 * (SLICE / 4) + k;
      const float* from = a.gate.down_weight + row * a.size + block.d0() + d;
      const bool inside = row < int(a.gate.width) && d < block.features(a);
      const float4 four = inside ? __ldg(reinterpret_cast<const float4*>(from)) : float4();
      weight[k] = four.x, weight[k + 1] = four.y, weight[k + 2] = four.z, weight[k + 3] = four.w;
    }
  }
};

// f of sentence b, the ``turn``-th of this cluster, from squeeze's sums, and W1 f of this slice's features to every block.
template <int SLICE>
__device__ void share(
    const Select& a, const Layout& at, const Block<SLICE>& block, const Down<SLICE>& down, int64_t b, int turn) {
  constexpr int kQuarter = SLICE / 4;
  const int thread = block.thread(), width = int(a.gate.width);
  float* f = block.floats(at.f);
  if (thread == 0) arrive_expecting(block.shares(at), uint32_t(at.cluster * at.width) * sizeof(float));
  if (thread < SLICE) {
    const int features = block.features(a);
    const float* alpha = block.floats(at.alpha) + block.ints(at.parts)[thread / kPiece] * int(a.num_blocks);
    const float* sums = block.floats(at.sums) + thread;
    float sum = 0.0f;
#pragma unroll 12
    for (int n = 0; n < int(a.num_blocks); ++n) sum = fmaf(alpha[n], sums[n * SLICE], sum);
    f[thread] = thread < features ? sum : 0.0f;
    if (thread < features) a.squeezed[b * a.size + block.d0() + thread] = sum;
  }
  wait_for_all();
  float four[4] = {};
#pragma unroll
  for (int k = 0; k < kQuarter; ++k) four[k % 4] = fmaf(down.weight[k], f[thread % 4 * kQuarter + k], four[k % 4]);
  float sum = (four[0] + four[1]) + (four[2] + four[3]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  // Of four rows, whose threads are sixteen, each thread tells all to one of up to sixteen blocks.
  float rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(~0u, sum, thread % kWarp / 16 * 16 + 4 * i);
  const int there = thread % kMaxCluster, first = thread / 16 * 4;
  if (first >= width || there >= at.cluster) return;
  if (turn) wait(block.taken(at), (turn - 1) & 1);
  const uint32_t place = block.address(at.shares + (block.rank() * at.width + first) * int(sizeof(float)));
  store_there(address_in(place, there), rows, address_in(block.shares(at), there));
}

// s, in every block alike, from the shares of all.
template <int SLICE>
__device__ void bottleneck(const Select& a, const Layout& at, const Block<SLICE>& block, int turn) {
  const int h = block.thread(), width = int(a.gate.width);
  if (h < width) {
    const float bias = a.gate.down_bias[h];
    wait(block.shares(at), turn & 1);
    const float* shares = block.floats(at.shares) + h;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxCluster; ++k) total += shares[k * at.width];
    block.floats(at.s)[h % 2 * (kMaxWidth / 2) + h / 2] = activate(a.gate, total + bias);
  }
  wait_for_all();
  if (h < at.cluster) arrive_there(address_in(block.taken(at), h));
}

// Rows of W2 that this thread has a half of (even h or odd h): row group + kThreads / 2 * i of [N, slice].
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
      asm volatile("" : "+l"(from));  // or an address for each of the weights is computed first, in registers
      if (wide) {  // both threads ask for four in turn, and give each other what is theirs
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

// Of the rows that a thread has a half of, it ends every other one, from thread % 2 on: their places in [N, slice], N slice or
// more where there is none, and what turns W2 s into their gates.
template <int SLICE, int ROWS>
struct Units {
  static constexpr int kCount = (ROWS + 1) / 2;

  static __device__ int row(const Block<SLICE>& block, int i) {
    return 2 * i + block.thread() % 2 < ROWS ? block.thread() / 2 + kThreads / 2 * (2 * i + block.thread() % 2)
                                             : kWarps * SLICE;
  }
  // Of [N, D]; some row where there is none.
  static __device__ int place(const Select& a, const Block<SLICE>& block, int i) {
    const int n = min(row(block, i) / SLICE, int(a.num_blocks) - 1), d = min(row(block, i) % SLICE, block.features(a) - 1);
    return n * int(a.size) + block.d0() + d;
  }

  Unit units[kCount];

  __device__ Units(const Select& a, const Block<SLICE>& block) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) units[i] = Unit(a.gate, place(a, block, i));
  }
};

// exp(e + c) of this sentence.
template <int SLICE, int ROWS, int WIDTH>
__device__ void excite(
    const Select& a, const Layout& at, const Block<SLICE>& block, const Up<SLICE, ROWS, WIDTH>& up,
    const Units<SLICE, ROWS>& units) {
  const int thread = block.thread(), rows = int(a.num_blocks) * SLICE;
  float z[ROWS + 1] = {}, inverse[units.kCount];
#pragma unroll
  for (int i = 0; i < units.kCount; ++i) inverse[i] = units.units[i].inverse(a.gate);
  const float* own = block.floats(at.s) + thread % 2 * (kMaxWidth / 2);
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
    const int row = units.row(block, i);
    const float sum = units.units[i].normed(thread % 2 ? z[2 * i + 1] : z[2 * i], inverse[i]);
    const float weight = expf(units.units[i].open(sum) + block.floats(at.prior)[row / SLICE]);
    if (row < rows) block.floats(at.weights)[row] = weight;
  }
}

// ---------------------------------------------------------------- fuse

// g and v of sentence b, two features a thread, whose gates of all blocks are in registers.
template <class T, int SLICE, class Come, class Leave>
__device__ void fuse_sentence(
    const Select& a, const Layout& at, const Block<SLICE>& block, int64_t b, const Span& span, const Ring& ring,
    const Come& come, const Leave& leave) {
  constexpr int kPairs = SLICE / 2, kRows = kThreads / kPairs, kItems = (kStageTokens + kRows - 1) / kRows;
  constexpr int kBatch = 6;  // blocks that are asked for together
  const int blocks = int(a.num_blocks);
  const int thread = block.thread(), pair = thread % kPairs, first = thread / kPairs;
  const int32_t* places = span.together() ? nullptr : a.batch.places + b * a.batch.size;
  const int64_t begin = ((a.batch.packed ? 0 : b * a.batch.size) + (places ? 0 : span.first)) * a.size + block.d0();
  char* const to = static_cast<char*>(a.fused) + begin * int64_t(sizeof(T));
  const uint32_t bytes = uint32_t(a.size) * uint32_t(sizeof(T));  // of a token; a sentence has fewer than 2^32
  const bool inside = 2 * pair < block.features(a);
  const float2* weights = reinterpret_cast<const float2*>(block.floats(at.weights)) + pair;
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
  static_assert(kRows >= kWarps, "of the threads that have these gates, each keeps one block's at most");
#pragma unroll
  for (int n = 0; n < kWarps; ++n) gates[n] = divided(gates[n]);
#pragma unroll 1
  for (int c = 0; c < span.length; c += kStageTokens) {
    // Tokens first, first + kRows, ... of the stage.
    const auto real = [&](int i) { return inside && first + kRows * i < min(kStageTokens, span.length - c); };
    int place[kItems];
    if (places) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) place[i] = real(i) ? places[c + first + kRows * i] : 0;
    }
    come(ring);
    const char* from = block.stage(at, ring) + (first * SLICE + 2 * pair) * int(sizeof(T));
    float2 sum[kItems] = {};
    const auto add = [&](int n, auto count) {  // so many blocks, asked for together
      constexpr int kCount = decltype(count)::value;
      uint32_t x[kCount][kItems];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int after = kStageTokens % kRows ? min(first + kRows * i, kStageTokens - 1) - first : kRows * i;
          const int offset = ((n + k) * kStageTokens + after) * SLICE * int(sizeof(T));
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
    for (int n = 0; n < kWarps; n += kBatch) {
      if (n + kBatch <= blocks) {
        add(n, std::integral_constant<int, kBatch>());
        continue;
      }
#pragma unroll
      for (int k = 0; k < kBatch - 1; ++k) {
        if (n + k < blocks) add(n + k, std::integral_constant<int, 1>());
      }
    }
    leave();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t l = uint32_t(places ? place[i] : c + first + kRows * i);
      if (!real(i)) continue;
      *reinterpret_cast<uint32_t*>(to + (l * bytes + pair * uint32_t(2 * sizeof(T)))) = pack<T>(sum[i].x, sum[i].y);
    }
  }
  if (first < blocks && inside) {
    float* to = a.gate.gates + (b * blocks + first) * a.size + block.d0();
    reinterpret_cast<float2*>(to)[pair] = divided(weights[first * kPairs]);
  }
}

// v of padding.
template <class T, int SLICE>
__device__ void clear_padding(const Select& a, const Block<SLICE>& block, int b, const Span& span) {
  constexpr int kPieces = SLICE * int(sizeof(T)) / 16;
  const int thread = int(threadIdx.x), d = thread % kPieces * (16 / int(sizeof(T)));
  if (d >= block.features(a)) return;
#pragma unroll 1
  for (int64_t l = thread / kPieces; l < a.batch.size; l += kThreads / kPieces) {
    const int64_t row = b * a.batch.size + l;
    if (span.together() ? l >= span.first && l < span.first + span.length : a.batch.mask[row]) continue;
    *reinterpret_cast<uint4*>(static_cast<T*>(a.fused) + row * a.size + block.d0() + d) = make_uint4(0, 0, 0, 0);
  }
}

// ---------------------------------------------------------------- all of it

// The numbers of this cluster's sentence of that turn, if there is one; to be waited for.
template <int SLICE>
__device__ void ask_for_span(const Select& a, const Layout& at, const Block<SLICE>& block, int turn) {
  const int64_t b = block.cluster() + int64_t(turn) * block.clusters();
  if (b >= a.batch.sentences || !Span::end(a.batch, b)) return;
  const uint32_t to = block.address(at.spans) + turn % 2 * 2 * int(sizeof(int32_t));
  copy_4(to, Span::begin(a.batch, b));
  copy_4(to + int(sizeof(int32_t)), Span::end(a.batch, b));
}

template <class T, int SLICE, int ROWS, int WIDTH, bool LONG>
__device__ void select_sentences(const Select& a, const Layout& at, const Block<SLICE>& block) {
  const Up<SLICE, ROWS, WIDTH> up(a, block.d0(), block.features(a));
  wait_for_previous();  // find_tokens, which does not write W2
  if (block.thread() == 0) {
    ask_for_span(a, at, block, 0);
    wait_for_copies();
  }
  wait_for_all();
  Ring ring;
  const auto leave = [&] {  // this stage, for the next
    __syncwarp();
    if (block.thread() % kWarp == 0) arrive(block.empty(at, ring.stage));
    ring.advance(at.stages);
  };
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int b = block.cluster() + turn * block.clusters();
    if (b >= int(a.batch.sentences)) break;
    const int* numbers = block.ints(at.spans) + turn % 2 * 2;
    const auto span = [&] { return Span(a.batch, numbers[0], numbers[1]); };
    const int length = span().length, stages = stages_of(length);
    if (block.thread() == 0) ask_for_span(a, at, block, turn + 1);
    const bool stays = !LONG || stages <= at.stages;
    const Down<SLICE> down(a, block);  // early, since it comes from far
    const auto come = [&](const Ring& place) { wait(block.full(at, place.stage), place.round & 1); };
    if (stays) {
      squeeze_sentence<T>(a, at, block, length, ring, come, [&] { ring.advance(at.stages); });
      ring.go_back(stages, at.stages);
    } else {
      squeeze_sentence<T>(a, at, block, length, ring, come, leave);
    }
    if (block.thread() == 0) wait_for_copies();  // of the next sentence's numbers
    wait_for_all();
    share(a, at, block, down, b, turn);
    const Units<SLICE, ROWS> units(a, block);  // while the shares are on their way: there are no registers for it in fuse
    bottleneck(a, at, block, turn);
    excite(a, at, block, up, units);
    wait_for_all();
    fuse_sentence<T>(a, at, block, b, span(), ring, come, leave);
    if (a.batch.mask && length < int(a.batch.size)) clear_padding<T>(a, block, b, span());
  }
}

#endif

template <class T, int SLICE, int ROWS, int WIDTH, bool LONG>
__global__ void __launch_bounds__(kAllThreads, 1) select_kernel(
    const __grid_constant__ Select a, const __grid_constant__ Hidden hidden, const __grid_constant__ Layout at) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) char memory[];
  const Block<SLICE> block = {memory};
  if (threadIdx.x == 0) {
    for (int i = 0; i < at.stages; ++i) {
      init_barrier(block.full(at, i), kWarp + 1);
      init_barrier(block.empty(at, i), kWarps);
    }
    init_barrier(block.shares(at), 1);
    init_barrier(block.taken(at), at.cluster);
    publish_barriers();
  }
  const int first = block.d0() / int(a.size / a.parts);
  if (threadIdx.x <= SLICE / kPiece) {
    const int d = block.d0() + min(kPiece * int(threadIdx.x), block.features(a) - 1);
    block.ints(at.parts)[threadIdx.x] = threadIdx.x < SLICE / kPiece ? d / int(a.size / a.parts) - first : first;
  }
  for (int i = threadIdx.x; i < at.stage_parts * int(a.num_blocks); i += kAllThreads) {
    const int64_t m = min(first + i / int(a.num_blocks), int(a.parts) - 1);
    block.floats(at.alpha)[i] = a.alpha[m * a.num_blocks + i % int(a.num_blocks)];
  }
  if (threadIdx.x < kWarp) {
    const float largest = largest_prior(a.gate);
    const int n = int(threadIdx.x);
    if (n <= kWarps) block.floats(at.prior)[n] = a.gate.prior && n < int(a.num_blocks) ? a.gate.prior[n] - largest : 0.0f;
  }
  for (int i = threadIdx.x; i < kMaxWidth; i += kAllThreads) block.floats(at.s)[i] = 0.0f;  // beyond H
  for (int i = threadIdx.x; i < kMaxCluster * at.width; i += kAllThreads) block.floats(at.shares)[i] = 0.0f;
  __syncthreads();
  cluster_wait_for_all();  // before anything is sent to a barrier
  if (threadIdx.x < kThreads) {
    take_registers<kRegisters>();
    select_sentences<T, SLICE, ROWS, WIDTH, LONG>(a, at, block);
  } else {
    leave_registers<kLoaderRegisters>();
    load_sentences<T, SLICE, LONG>(a, hidden, at, block);
  }
  cluster_wait_for_all();  // nobody leaves while something is on its way to him
#endif
}

}  // namespace
}  // namespace s2sent::cuda
