// Shared memory of the one-pass kernel (kernel.cuh), and the accessors that its stages share.
#pragma once

#include "../gate.cuh"
#include "../order.h"
#include "ptx.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kSlotTokens = 32;  // tokens of a ring slot: a group for every accumulator of order.h
constexpr int kPiece = 8;        // features that a thread squeezes
constexpr int kAccumulatorLanes = kWarp / kAccumulators;
constexpr int kWarps = 12;  // compute warps; each squeezes one Transformer block
constexpr int kThreads = kWarps * kWarp;
constexpr int kLoaders = 4;  // warps of the producer warpgroup, which gives registers to the compute warps
constexpr int kAllThreads = kThreads + kLoaders * kWarp;
constexpr int kRegisters = 160, kLoaderRegisters = 32;  // of a thread; 128 threads (3 * 160 + 32) fill the register file
constexpr int kBoxTokens = 16;  // tokens of a TMA copy, if they are contiguous
constexpr int kMaxCluster = 16;
constexpr int kMaxWidth = 88;  // H, the default for D = 1024; four threads handle a row of W1

static_assert(kSlotTokens == kGroupTokens * kAccumulators, "a slot holds one group of every accumulator");
static_assert(kPiece == kAccumulatorLanes, "lane % kPiece is the piece of an accumulator's lane");
static_assert(kLongSlice <= kPiece * kAccumulatorLanes, "an accumulator's lanes cover a slice");
static_assert(kMaxWidth * kQuarters <= kThreads, "every row of W1 has its threads");
static_assert(kRunningSums == 4, "send_shares spells the tree out");

// Offsets into a CTA's shared memory, in bytes.
struct Layout {
  int slot_bytes, slots;  // the ring is at 0. A slot holds [N, kSlotTokens, slice] of the hidden states' dtype,
  int factors;            // and at this offset float [slot_parts, kSlotTokens]: beta
  int sums, weights;      // float [N, slice]
  int f;                  // float [slice]
  int parts;              // int [slice / kPiece + 1]: each piece's part m minus the slice's first part; then that first part
  int alpha;              // float [slot_parts, N]
  int prior;              // float [kWarps + 1] c, the first N in use; then tau
  int spans;              // int [2, 2]: the two numbers of a Span, for this sentence and the next
  int shares;             // float [kMaxCluster, width]: each CTA's partial sums of W1 f
  int s;                  // float [2, kMaxWidth / 2]: even h, then odd h
  int barriers;           // shares, taken, full[slots], empty[slots]
  int bytes;              // of all of it

  int slot_parts;  // the most parts that a slice overlaps
  int cluster;     // CTAs of a cluster
  int width;       // H rounded up to a multiple of 4
};

// The hidden states, also as TMA descriptors of boxes [kBoxTokens, slice].
struct Hidden {
  CUtensorMap maps[kWarps];
  Rows rows[kWarps];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A position in the ring, and the number of completed rounds.
struct Ring {
  int slot = 0;
  uint32_t round = 0;

  __device__ void advance(int slots) {
    if (++slot == slots) slot = 0, ++round;
  }
  __device__ void go_back(int count, int slots) {  // at most one round
    slot -= count;
    if (slot < 0) slot += slots, --round;
  }
};

template <class T>
__device__ inline uint32_t pack(float x, float y) {
  T pair[2];
  narrow(x, &pair[0]), narrow(y, &pair[1]);
  return *reinterpret_cast<const uint32_t*>(pair);
}

// Accessors for this CTA. Recomputed at each use, because weights fill the register file.
template <int SLICE>
struct Cta {
  char* memory;

  __device__ int thread() const { return int(special_register<kThread>()); }
  __device__ int rank() const { return int(special_register<kRank>()); }
  __device__ int cluster() const { return int(special_register<kCluster>()); }
  __device__ int clusters() const { return int(special_register<kClusters>()); }
  __device__ int d0() const { return rank() * SLICE; }  // first feature of the slice
  __device__ int features(const Select& a) const { return min(SLICE, int(a.size) - d0()); }  // fewer in the last CTA
  __device__ uint32_t address(int offset) const { return shared_address(memory) + offset; }
  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ int* ints(int offset) const { return reinterpret_cast<int*>(memory + offset); }
  __device__ const char* slot(const Layout& at, const Ring& ring) const { return memory + ring.slot * at.slot_bytes; }
  __device__ uint32_t shares(const Layout& at) const { return address(at.barriers); }     // all shares have arrived
  __device__ uint32_t taken(const Layout& at) const { return address(at.barriers + 8); }  // all CTAs have read theirs
  __device__ uint32_t full(const Layout& at, int slot) const { return address(at.barriers + 16 + slot * 8); }
  __device__ uint32_t empty(const Layout& at, int slot) const { return full(at, at.slots + slot); }
};

__device__ inline int slots_of(int length) { return (length + kSlotTokens - 1) / kSlotTokens; }

// A sentence's real tokens: contiguous from ``first`` on, counted within the packed batch or within the sentence; or listed in
// batch.places if first is -1. Built from two numbers of the batch, which are prefetched one sentence ahead.
struct Span {
  int first, length;

  // Addresses of a sentence's two numbers; null if all tokens are real.
  static __device__ const int32_t* begin(const Batch& batch, int64_t b) {
    return batch.packed ? batch.starts + b : batch.firsts ? batch.firsts + b : nullptr;
  }
  static __device__ const int32_t* end(const Batch& batch, int64_t b) {
    return batch.packed ? batch.starts + b + 1 : batch.lengths ? batch.lengths + b : nullptr;
  }
  __device__ Span(const Batch& batch, int x, int y)
      : first(batch.firsts || batch.packed ? x : 0),
        length(batch.packed ? y - x : batch.lengths ? y : int(batch.size)) {}

  __device__ bool contiguous() const { return first >= 0; }
};

// Synchronises the compute warps.
__device__ inline void wait_for_all() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

#endif

}  // namespace
}  // namespace s2sent::cuda
