// squeeze, gate and fuse in one read of the hidden states (sm_90 and newer).
//
// A cluster of blocks holds one sentence: each block the N x l x slice_of(D) numbers of its slice of features, in a ring of
// stages of kStageTokens tokens. squeeze adds the stages as they come; fuse adds them again under the gates, and each stage that
// it has left is filled with the next sentence's tokens, which so arrive while this one is gated and summed. The slice's
// weights stay in registers. Between the blocks travel W1 f, of which each has its slice's share, and s: every block ends the
// sums of a few rows of W1 and tells all. A sentence longer than the ring is read twice. Clusters take sentences in turn.
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
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxStages = 48;
constexpr int kMaxStageParts = 4;  // parts of the frequencies that a slice may touch
constexpr int kMaxCluster = 16;
constexpr int kMaxWidth = 88;  // H: what D = 1024 has by default; four threads a row of W1

// Where things stand in a block's shared memory, in bytes.
struct Layout {
  int stage, stages;  // size of one; the ring begins at 0: in a stage [N, kStageTokens, slice] of a hidden state's dtype,
  int factors;        // then from here float [parts][kStageTokens]
  int sums, gates;    // float [N, slice]
  int f;              // float [slice]
  int parts;          // int [slice / kPiece]: which of the slice's parts of frequencies a piece is in; then the first of them
  int alpha;          // float [kMaxStageParts, N]
  int shares;         // float [2][cluster][rows]: W1 f of this block's rows, from every block
  int s;              // float [2][2][kMaxWidth / 2]: even and odd h
  int barriers;       // full[stages], empty[stages], shares[2], s[2]
  int bytes;
  int rows;           // of W1 that a block ends
  int cluster;
};

#if __CUDA_ARCH__ >= 900

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
  __device__ uint32_t full(const Layout& at, int stage) const { return address(at.barriers + stage * 8); }
  __device__ uint32_t empty(const Layout& at, int stage) const { return full(at, kMaxStages + stage); }
  __device__ uint32_t shares(const Layout& at, int half) const { return full(at, 2 * kMaxStages + half); }
  __device__ uint32_t s(const Layout& at, int half) const { return full(at, 2 * kMaxStages + 2 + half); }
};

__device__ inline int chunks_of(int length) { return (length + kStageTokens - 1) / kStageTokens; }

// ---------------------------------------------------------------- load

// Fills the stages in the order in which they are used. LONG: there may be sentences that are longer than the ring.
template <class T, int SLICE, bool LONG>
struct Loader {
  static constexpr int kAcross = SLICE * int(sizeof(T)) / 16;  // copies of 16 bytes that are a row
  static constexpr int kFillers = kStageTokens * kAcross;      // threads that fill a stage, for all of the N
  static constexpr int kTogether = kThreads / kFillers;        // stages at once
  Ring ring;
  int b, length, r0;    // what comes next: the tokens of sentence b from r0 on
  int64_t base;         // where it begins, in elements
  bool again;           // a long sentence's second read

  __device__ Loader(const Select& a, const Blocks& blocks, const Block<SLICE>& block) : b(block.cluster()) {
    find(a, blocks, block);
  }

  // The first sentence from b on that has tokens.
  __device__ void find(const Select& a, const Blocks& blocks, const Block<SLICE>& block) {
    r0 = 0, again = false;
    for (; b < int(a.batch.sentences); b += block.clusters()) {
      length = int(length_of(a.batch, b));
      if (length == 0) continue;
      base = a.batch.packed ? a.batch.starts[b] * blocks.rows[0].stride_l : b * blocks.rows[0].stride_b;
      return;
    }
  }

  // The next ``count`` stages, as far as there are sentences; each once all warps have left it.
  __device__ void run(const Select& a, const Blocks& blocks, const Layout& at, const Block<SLICE>& block, int count) {
#pragma unroll 1
    while (count > 0 && b < int(a.batch.sentences)) {
      const int mine = block.thread() / kFillers;  // of the stages that are filled together
      const int together = min(min(count, kTogether), chunks_of(length - r0));
      if (mine < together) {
        Ring here = ring;
        if (mine) here.advance(at.stages);
        if (here.round) wait(block.empty(at, here.stage), (here.round - 1) & 1);
        fill(a, blocks, at, block, here.stage, r0 + mine * kStageTokens);
        arrive_after_copies(block.full(at, here.stage));
      }
      ring.advance(at.stages);
      if (together > 1) ring.advance(at.stages);
      count -= together;
      r0 += together * kStageTokens;
      if (r0 < length) continue;
      if (LONG && !again && chunks_of(length) > at.stages) {
        r0 = 0, again = true;
      } else {
        b += block.clusters();
        find(a, blocks, block);
      }
    }
  }

  // A stage's rows and factors.
  __device__ void fill(
      const Select& a, const Blocks& blocks, const Layout& at, const Block<SLICE>& block, int where, int first) const {
    const int thread = block.thread() % kFillers, token = thread / kAcross, r = first + token;
    const int d = block.d0() + thread % kAcross * (16 / int(sizeof(T)));
    const uint32_t stage = block.address(where * at.stage);
    if (r < length && d < int(a.size)) {
      const int l = a.batch.places ? a.batch.places[b * a.batch.size + r] : r;
      const int64_t place = base + l * blocks.rows[0].stride_l + d;  // all of the N have these strides
#pragma unroll
      for (int n = 0; n < kWarps; ++n) {
        if (n >= int(a.num_blocks)) break;
        copy_16(stage + thread * 16 + n * (kFillers * 16), static_cast<const T*>(blocks.rows[n].data) + place);
      }
    }
    const int* parts = block.ints(at.parts);
    const int part = thread / kStageTokens, q = first + thread % kStageTokens;
    if (part < kMaxStageParts && part <= parts[SLICE / kPiece - 1] && q < length) {
      const float* from = factors_of(a.factors, a.batch, b, parts[SLICE / kPiece] + part) + q;
      copy_4(stage + at.factors + thread * int(sizeof(float)), from);
    }
  }
};

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

// ---------------------------------------------------------------- gate

// s of sentence b, the ``turn``-th of this cluster, into every block of it, from squeeze's sums.
template <int SLICE>
__device__ void bottleneck(const Select& a, const Layout& at, const Block<SLICE>& block, int64_t b, int turn) {
  constexpr int kQuarter = SLICE / 4;  // of the slice's features, a thread's in a row of W1
  const int thread = block.thread(), half = turn & 1, width = int(a.gate.width), rank = block.rank(), row = thread / 4;
  float* f = block.floats(at.f);
  float weight[kQuarter];
#pragma unroll
  for (int k = 0; k < kQuarter; k += 4) {
    const int d = thread % 4 * kQuarter + k;
    const float* from = a.gate.down_weight + row * a.size + block.d0() + d;
    const float4 four = row < width && d < block.features(a) ? __ldg(reinterpret_cast<const float4*>(from)) : float4();
    weight[k] = four.x, weight[k + 1] = four.y, weight[k + 2] = four.z, weight[k + 3] = four.w;
  }
  if (thread == 0) {
    const int rows = max(0, min(at.rows, width - rank * at.rows));
    arrive_expecting(block.shares(at, half), uint32_t(at.cluster * rows) * sizeof(float));
    arrive_expecting(block.s(at, half), uint32_t(width) * sizeof(float));
  }
  if (thread < SLICE) {
    const int features = block.features(a);
    const float* alpha = block.floats(at.alpha) + block.ints(at.parts)[thread / kPiece] * int(a.num_blocks);
    const float* sums = block.floats(at.sums) + thread;
    float sum = 0.0f;
#pragma unroll 6
    for (int n = 0; n < int(a.num_blocks); ++n) sum = fmaf(alpha[n], sums[n * SLICE], sum);
    f[thread] = thread < features ? sum : 0.0f;
    if (thread < features) a.squeezed[b * a.size + block.d0() + thread] = sum;
  }
  __syncthreads();
  float four[4] = {};
#pragma unroll
  for (int k = 0; k < kQuarter; ++k) four[k % 4] = fmaf(weight[k], f[thread % 4 * kQuarter + k], four[k % 4]);
  float sum = (four[0] + four[1]) + (four[2] + four[3]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (row < width && thread % 4 == 0) {
    const int there = row / at.rows;
    const int place = at.shares + ((half * at.cluster + rank) * at.rows + row % at.rows) * int(sizeof(float));
    store_there(address_in(block.address(place), there), sum, address_in(block.shares(at, half), there));
  }
  if (thread < at.rows * at.cluster) {
    const int own = thread % at.rows, h = rank * at.rows + own, there = thread / at.rows;
    if (h < width) {
      wait(block.shares(at, half), turn >> 1 & 1);
      const float* shares = block.floats(at.shares) + half * at.cluster * at.rows + own;
      float total = 0.0f;
#pragma unroll 8
      for (int k = 0; k < at.cluster; ++k) total += shares[k * at.rows];
      const int place = at.s + (half * kMaxWidth + h % 2 * (kMaxWidth / 2) + h / 2) * int(sizeof(float));
      store_there(address_in(block.address(place), there), activate(a.gate, h, total), address_in(block.s(at, half), there));
    }
  }
}

// Rows of W2 that this thread has a half of (even h or odd h): row group + kThreads / 2 * i of [N, slice].
template <int SLICE, int ROWS, int WIDTH>
struct Up {
  float weight[ROWS][WIDTH / 2];

  __device__ Up(const Select& a, int d0, int features) {
    const int thread = int(threadIdx.x), half = thread % 2;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = thread / 2 + kThreads / 2 * i, n = row / SLICE, d = row % SLICE;
      const int count = n < int(a.num_blocks) && d < features ? (int(a.gate.width) + 1 - half) / 2 : 0;
      const float* from = a.gate.up_weight + (n * a.size + d0 + d) * a.gate.width + half;
      asm volatile("" : "+l"(from));  // or an address for each of the weights is computed first, in registers
#pragma unroll
      for (int k = 0; k < WIDTH / 2; ++k) weight[i][k] = k < count ? __ldg(from + 2 * k) : 0.0f;
    }
  }
};

constexpr int kUnits = 2;  // of [N, slice] that a thread ends, at most

// What this thread's units need; asked for early, since it comes from far.
template <int SLICE>
struct Units {
  Unit unit[kUnits];

  __device__ Units(const Select& a, const Block<SLICE>& block) {
    const int thread = block.thread();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int row = thread + kThreads * i, n = row / SLICE, d = min(row % SLICE, block.features(a) - 1);
      if (n < int(a.num_blocks)) unit[i] = Unit(a.gate, n * int(a.size) + block.d0() + d);
    }
  }
};

// The gates of sentence b, the ``turn``-th of this cluster.
template <int SLICE, int ROWS, int WIDTH>
__device__ void excite(
    const Select& a, const Layout& at, const Block<SLICE>& block, const Up<SLICE, ROWS, WIDTH>& up,
    const Units<SLICE>& of, int b, int turn) {
  const int units = int(a.num_blocks) * SLICE, thread = block.thread();
  float* sums = block.floats(at.sums);  // squeeze's are taken when s is there
  wait(block.s(at, turn & 1), turn >> 1 & 1);
  float z[ROWS] = {};
  const float* own = block.floats(at.s) + (turn & 1) * kMaxWidth + thread % 2 * (kMaxWidth / 2);
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
  for (int i = 0; i < ROWS; ++i) {
    z[i] += __shfl_xor_sync(~0u, z[i], 1);
    const int row = thread / 2 + kThreads / 2 * i;
    if (thread % 2 == i % 2 && row < units) sums[row] = z[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int row = thread + kThreads * i;
    if (row >= units) break;
    const float e = of.unit[i].open(of.unit[i].normed(sums[row], of.unit[i].inverse(a.gate)));
    sums[row] = expf(e + (a.gate.prior ? a.gate.prior[row / SLICE] : 0.0f));
  }
  __syncthreads();
  static_assert(kThreads % SLICE == 0, "a thread's units are of one feature");
  const int d = thread % SLICE;
  float total = 0.0f;
#pragma unroll 4
  for (int n = 0; n < int(a.num_blocks); ++n) total += sums[n * SLICE + d];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int row = thread + kThreads * i;
    if (row >= units) break;
    const float g = sums[row] / total;
    block.floats(at.gates)[row] = g;
    if (d < block.features(a)) a.gate.gates[(int64_t(b) * a.num_blocks + row / SLICE) * a.size + block.d0() + d] = g;
  }
}

// ---------------------------------------------------------------- fuse

// v of the tokens from r0 on that stand in two stages, four features a thread.
template <class T, int SLICE>
__device__ void fuse_stages(
    const Select& a, const Layout& at, const Block<SLICE>& block, const char* stage, const char* next, int64_t b, int r0,
    int length) {
  constexpr int kFours = SLICE / 4, kRows = kThreads / kFours, kItems = (2 * kStageTokens + kRows - 1) / kRows;
  const int thread = block.thread(), four = thread % kFours, first = thread / kFours;  // tokens first, first + kRows, ...
  const char* from[kItems];
  int64_t to[kItems];
  const Sentence sentence(a.batch, {a.fused, a.batch.size * a.size, a.size}, b);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = min(first + kRows * i, 2 * kStageTokens - 1);
    from[i] = (token < kStageTokens ? stage : next) + (token % kStageTokens * SLICE + four * 4) * int(sizeof(T));
    to[i] = r0 + token < length ? sentence.real(r0 + token) : -1;
  }
  const float4* gates = reinterpret_cast<const float4*>(block.floats(at.gates)) + four;
  float4 sum[kItems] = {};
#pragma unroll(kItems == 2 ? 3 : 2)
  for (int n = 0; n < int(a.num_blocks); ++n) {
    const float4 g = gates[n * kFours];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint2 pairs = *reinterpret_cast<const uint2*>(from[i] + n * kStageTokens * SLICE * int(sizeof(T)));
      const float2 x = unpack(pairs.x, T()), y = unpack(pairs.y, T());
      sum[i].x = fmaf(g.x, x.x, sum[i].x), sum[i].y = fmaf(g.y, x.y, sum[i].y);
      sum[i].z = fmaf(g.z, y.x, sum[i].z), sum[i].w = fmaf(g.w, y.y, sum[i].w);
    }
  }
  const int d = block.d0() + 4 * four;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (to[i] < 0 || d >= int(a.size) || first + kRows * i >= 2 * kStageTokens) continue;
    const uint2 pairs = make_uint2(pack<T>(sum[i].x, sum[i].y), pack<T>(sum[i].z, sum[i].w));
    *reinterpret_cast<uint2*>(static_cast<T*>(a.fused) + to[i] + d) = pairs;
  }
}

// v of padding.
template <class T, int SLICE>
__device__ void clear_padding(const Select& a, const Block<SLICE>& block, int b) {
  constexpr int kPieces = SLICE * int(sizeof(T)) / 16;
  const int thread = int(threadIdx.x), d = thread % kPieces * (16 / int(sizeof(T)));
  if (d >= block.features(a)) return;
#pragma unroll 1
  for (int64_t l = thread / kPieces; l < a.batch.size; l += kThreads / kPieces) {
    const int64_t row = b * a.batch.size + l;
    if (a.batch.mask[row]) continue;
    *reinterpret_cast<uint4*>(static_cast<T*>(a.fused) + row * a.size + block.d0() + d) = make_uint4(0, 0, 0, 0);
  }
}

// ---------------------------------------------------------------- all of it

template <class T, int SLICE, int ROWS, int WIDTH, bool LONG>
__device__ void select_sentences(const Select& a, const Blocks& blocks, const Layout& at, const Block<SLICE>& block) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Loader<T, SLICE, LONG> loader(a, blocks, block);
  Ring ring;
  int free = at.stages;  // stages that wait to be filled
  const auto load = [&] {
    loader.run(a, blocks, at, block, free);
    free = 0;
  };
  const auto leave = [&] {
    __syncwarp();
    if (lane == 0) arrive(block.empty(at, ring.stage));
    ++free;
    ring.advance(at.stages);
  };
  const Up<SLICE, ROWS, WIDTH> up(a, block.d0(), block.features(a));
  // In squeeze: a warp a block of the N, eight lanes a slot.
  const int slot = lane / kPiece, piece = lane % kPiece;
  const bool squeezes = warp < int(a.num_blocks) && piece * kPiece < block.features(a);
  const int group = ((warp * kStageTokens + slot * kGroup) * SLICE + piece * kPiece) * int(sizeof(T));
  const int part = squeezes ? block.ints(at.parts)[piece] : 0;
  const int factors = at.factors + (part * kStageTokens + slot * kGroup) * int(sizeof(float));
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int b = block.cluster() + turn * block.clusters();
    if (b >= int(a.batch.sentences)) break;
    const int length = int(length_of(a.batch, b)), chunks = chunks_of(length);
    const bool stays = !LONG || chunks <= at.stages;
    load();
    {
      float sums[kPiece] = {};
      volatile float closed[kPiece];  // rarely used: in local memory
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        if (c && c % kChunk == 0) {
#pragma unroll
          for (int i = 0; i < kPiece; ++i) closed[i] = (c == kChunk ? 0.0f : closed[i]) + sums[i], sums[i] = 0.0f;
        }
        wait(block.full(at, ring.stage), ring.round & 1);
        const char* stage = block.stage(at, ring);
        const int own = length - c * kStageTokens - slot * kGroup;
        if (squeezes) squeeze_stage<T, SLICE>(stage + group, reinterpret_cast<const float*>(stage + factors), own, sums);
        if (stays) {
          ring.advance(at.stages);
        } else {
          load();  // where the stage before this one was, which by now all warps have left
          leave();
        }
      }
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        sums[i] = (chunks > kChunk ? closed[i] : 0.0f) + sums[i];
        sums[i] += __shfl_xor_sync(~0u, sums[i], 8);  // the slots as a tree
        sums[i] += __shfl_xor_sync(~0u, sums[i], 16);
      }
      if (squeezes && slot == 0) store_floats(sums, block.floats(at.sums) + warp * SLICE + piece * kPiece);
    }
    __syncthreads();
    const Units<SLICE> units(a, block);
    bottleneck(a, at, block, b, turn);
    excite(a, at, block, up, units, b, turn);
    __syncthreads();
    if (stays) ring.go_back(chunks, at.stages);
#pragma unroll 1
    for (int c = 0; c < chunks; c += 2) {
      Ring next = ring;
      next.advance(at.stages);
      const bool two = c + 1 < chunks;
      if (!stays) {
        wait(block.full(at, ring.stage), ring.round & 1);
        if (two) wait(block.full(at, next.stage), next.round & 1);
      }
      const char* stage = block.stage(at, ring);
      fuse_stages<T>(a, at, block, stage, two ? block.stage(at, next) : stage, b, c * kStageTokens, length);
      load();
      leave();
      if (two) leave();
    }
    if (a.batch.mask) clear_padding<T>(a, block, b);
  }
}

#endif

template <class T, int SLICE, int ROWS, int WIDTH, bool LONG>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(
    const __grid_constant__ Select a, const __grid_constant__ Blocks blocks, const __grid_constant__ Layout at) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  const Block<SLICE> block = {memory};
  if (threadIdx.x == 0) {
    for (int i = 0; i < at.stages; ++i) {
      init_barrier(block.full(at, i), Loader<T, SLICE, LONG>::kFillers);
      init_barrier(block.empty(at, i), kWarps);
    }
    for (int i = 0; i < 2; ++i) init_barrier(block.shares(at, i), 1), init_barrier(block.s(at, i), 1);
    publish_barriers();
  }
  const int first = block.d0() / int(a.size / a.parts);
  if (threadIdx.x <= SLICE / kPiece) {
    const int d = block.d0() + min(kPiece * int(threadIdx.x), block.features(a) - 1);
    block.ints(at.parts)[threadIdx.x] = threadIdx.x < SLICE / kPiece ? d / int(a.size / a.parts) - first : first;
  }
  for (int i = threadIdx.x; i < kMaxStageParts * int(a.num_blocks); i += kThreads) {
    const int64_t m = min(first + i / int(a.num_blocks), int(a.parts) - 1);
    block.floats(at.alpha)[i] = a.alpha[m * a.num_blocks + i % int(a.num_blocks)];
  }
  for (int i = threadIdx.x; i < 2 * kMaxWidth; i += kThreads) block.floats(at.s)[i] = 0.0f;  // beyond H
  __syncthreads();
  cluster_wait_for_all();  // before anything is sent to a barrier
  select_sentences<T, SLICE, ROWS, WIDTH, LONG>(a, blocks, at, block);
  cluster_wait_for_all();  // nobody leaves while something is on its way to him
#endif
}

}  // namespace
}  // namespace s2sent::cuda
