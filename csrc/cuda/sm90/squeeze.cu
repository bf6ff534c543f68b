// squeeze's sums over tokens where a batch keeps all multiprocessors busy and its sentences differ in length: one persistent CTA on
// each, so that the memory never waits for a CTA to begin or to end.
//
// A CTA takes every gridDim.x-th pair of a sentence and a Transformer block. One warp copies its real tokens into a ring of stages
// of 32 tokens, one group for each accumulator of order.h, as soon as the other warps have released a stage. A stage of contiguous
// tokens is four bulk copies, one a group; else each token is one. A warp is an accumulator of a tile of features.

#include <map>
#include <mutex>
#include <utility>

#include "../squeeze.cuh"
#include "ptx.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kStageTokens = kGroupTokens * kAccumulators;
constexpr int kTileThreads = kAccumulators * kWarp;  // of a tile of kWarp pieces of features

// Tiles at most, from the registers of a thread: 544 threads may have 120 each, 800 may have 80.
template <class T>
constexpr int kMaxTiles = sizeof(T) == 2 ? 4 : 6;

// Where the ring gains (bench/NOTES.md): sentences of so many tokens, and so many items for each CTA, as some wait at the end.
constexpr int64_t kLongEnough = 32, kItems = 4;

// A ring in shared memory: the stages [kStageTokens, D], then what each tile's accumulators share, then two barriers a stage.
struct Ring {
  int stages, stage_bytes, shares, barriers, bytes;  // shares and barriers: offsets
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9

// The next stage of the ring, for the warp that fills it and for those that read it.
struct Turn {
  int stage = 0, round = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, ++round;
  }
};

// Fills the ring, in the order in which the stages are read. All lanes of the warp call this.
template <class T>
__device__ void fill_ring(const Squeeze& a, const Blocks& blocks, const Ring& ring, uint32_t memory) {
  const int lane = threadIdx.x % kWarp, row = int(a.size) * int(sizeof(T));  // bytes
  const unsigned num = unsigned(a.num), items = unsigned(a.batch.sentences) * num;
  Turn turn;
  for (unsigned item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t b = item / num;
    const Rows rows = blocks.rows[item % num];
    const int length = int(length_of(a.batch, b));
    const Sentence sentence(a.batch, rows, b);
    const int first = a.batch.firsts ? a.batch.firsts[b] : 0;  // -1: the tokens are not contiguous
    const bool whole = first >= 0 && rows.stride_l == a.size;
    for (int r0 = 0; r0 < length; r0 += kStageTokens, turn.advance(ring.stages)) {
      const int count = min(kStageTokens, length - r0);
      const uint32_t to = memory + turn.stage * ring.stage_bytes, full = memory + ring.barriers + turn.stage * 16;
      if (lane == 0) {
        if (turn.round) wait(full + 8, (turn.round - 1) & 1);
        arrive_expecting(full, uint32_t(count * row));
      }
      __syncwarp();
      const int step = whole ? kGroupTokens : 1, j = lane * step;
      if (j < count) {
        const int64_t from = whole ? sentence.base + (first + r0 + j) * rows.stride_l : sentence.real(r0 + j);
        copy_row(to + j * row, static_cast<const T*>(rows.data) + from, uint32_t(min(step, count - j) * row), full);
      }
    }
  }
}

// Reads the ring and writes the sums of this warp's tile.
template <class T, bool MEAN>
__device__ void sum_ring(const Squeeze& a, const Blocks& blocks, const Ring& ring, unsigned char* memory) {
  constexpr int W = kWide<T>;
  using Shares = float[1 + MEAN][kAccumulators - 1][W][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tile = warp / kAccumulators;
  const int accumulator = warp % kAccumulators, d = (tile * kWarp + lane) * W;
  const bool inside = d < a.size;
  const unsigned part = inside ? unsigned(d) / (unsigned(a.size) / unsigned(a.parts)) : 0;
  const uint32_t barriers = shared_address(memory) + ring.barriers;
  Shares& shares = reinterpret_cast<Shares*>(memory + ring.shares)[tile];
  const unsigned num = unsigned(a.num), items = unsigned(a.batch.sentences) * num;
  Turn turn;
  for (unsigned item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t b = item / num, n = item % num;
    const int length = int(length_of(a.batch, b));
    const float* beta = factors_of(a.factors, a.batch, b, part);
    const bool quads = aligned(beta);
    Accumulator<T, W, true, MEAN> own;
    for (int r0 = 0; r0 < length; r0 += kStageTokens, turn.advance(ring.stages)) {
      const int r = r0 + accumulator * kGroupTokens;
      const T* from = reinterpret_cast<const T*>(memory + turn.stage * ring.stage_bytes) +
          accumulator * kGroupTokens * int(a.size) + d;
      const auto piece = [&](int j) { return *reinterpret_cast<const Piece<T, W>*>(from + j * int(a.size)); };
      const uint32_t full = barriers + turn.stage * 16;
      if (r + kGroupTokens <= length) {
        float factor[kGroupTokens];
        load_factors(beta + r, quads, factor);  // before the wait
        wait(full, turn.round & 1);
        if (inside) {
          Piece<T, W> u[kGroupTokens];
#pragma unroll
          for (int j = 0; j < kGroupTokens; ++j) u[j] = piece(j);
          own.add_group(u, factor);
        }
      } else {
        wait(full, turn.round & 1);
        for (int k = r; inside && k < length; ++k) own.add_token(piece(k - r), beta[k]);
      }
      __syncwarp();
      if (lane == 0) arrive(full + 8);
      if (r < length) own.end_group();
    }
    own.end();
    wait_for_warps(1 + tile, kTileThreads);  // until the last item's shares are read
    if (accumulator) {
      share_sums(own.sums.outer, shares[0], accumulator);
      if (MEAN) share_sums(own.pools.outer, shares[MEAN], accumulator);
    }
    wait_for_warps(1 + tile, kTileThreads);
    if (accumulator == 0) {
      add_accumulators(own.sums.outer, shares[0]);
      if (MEAN) add_accumulators(own.pools.outer, shares[MEAN]);
      if (inside) write_sums<T, W, MEAN>(a, blocks.rows[n], b, n, d, length, own.sums.outer, own.pools.outer);
    }
  }
}

#endif

template <class T, bool MEAN>
__global__ void __launch_bounds__(kMaxTiles<T> * kTileThreads + kWarp, 1) stream_kernel(
    const __grid_constant__ Squeeze a, const __grid_constant__ Blocks blocks, const __grid_constant__ Ring ring) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9
  extern __shared__ __align__(128) unsigned char memory[];
  const int readers = int(blockDim.x) / kWarp - 1;  // warps
  const uint32_t base = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < ring.stages; ++i) {
      init_barrier(base + ring.barriers + i * 16, 1);            // full
      init_barrier(base + ring.barriers + i * 16 + 8, readers);  // released
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_previous();
  if (int(threadIdx.x) / kWarp == readers) {
    fill_ring<T>(a, blocks, ring, base);
  } else {
    sum_ring<T, MEAN>(a, blocks, ring, memory);
  }
#endif
}

// The most shared memory that a CTA may have, and the number of multiprocessors, of the current device. No memory: it has no
// kernel, because it is no Hopper GPU or the kernel was compiled for an older one.
struct Limits {
  int shared_bytes = 0, processors = 0;
};

// The answer is cached.
cudaError_t find_limits(const void* kernel, Limits& limits) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Limits> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    limits = found->second;
    return cudaSuccess;
  }
  int major = 0, shared_bytes = 0;
  cudaFuncAttributes attributes = {};
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = multiprocessors(limits.processors);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && major == 9 && attributes.ptxVersion >= 90) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    limits.shared_bytes = shared_bytes;
  }
  if (error == cudaSuccess) known[{kernel, device}] = limits;
  return error;
}

template <class T, bool MEAN>
bool launch(const Squeeze& a, cudaStream_t stream, cudaError_t& error) {
  constexpr int W = kWide<T>, kShares = (1 + MEAN) * (kAccumulators - 1) * W * kWarp * int(sizeof(float));
  const auto kernel = stream_kernel<T, MEAN>;
  const int tiles = int(pieces(a.size, W * kWarp));
  if (tiles > kMaxTiles<T>) return false;
  Limits limits;
  error = find_limits(reinterpret_cast<const void*>(kernel), limits);
  const int64_t items = a.batch.sentences * a.num;
  if (error != cudaSuccess || items < kItems * limits.processors) return false;
  Ring ring = {};
  ring.stage_bytes = kStageTokens * int(a.size) * int(sizeof(T));
  ring.stages = (limits.shared_bytes - tiles * kShares) / (ring.stage_bytes + 16);
  if (ring.stages < 2) return false;
  ring.shares = ring.stages * ring.stage_bytes;
  ring.barriers = ring.shares + tiles * kShares;
  ring.bytes = ring.barriers + ring.stages * 16;
  const unsigned grid = unsigned(items < limits.processors ? items : limits.processors);
  const Blocks blocks(a.hidden, a.num);
  error = launch_early(kernel, grid, tiles * kTileThreads + kWarp, size_t(ring.bytes), stream, a, blocks, ring);
  return true;
}

}  // namespace

bool stream_sums(const Squeeze& a, cudaStream_t stream, cudaError_t& error) {
  const int64_t tokens = a.batch.tokens / a.batch.sentences;  // of a sentence; the average if packed
  const bool differ = a.batch.packed || a.batch.mask;         // in length. Of equal ones the other kernel reads as fast
  if (a.official || !differ || tokens < kLongEnough || a.batch.sentences * a.num > INT32_MAX) return false;
  bool launched = false;
  error = with_storage(a.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    cudaError_t result = cudaSuccess;
    const bool mean = a.pooled && a.pooling == Pooling::kMean;
    launched = mean ? launch<T, true>(a, stream, result) : launch<T, false>(a, stream, result);
    return result;
  });
  return launched;
}

}  // namespace s2sent::cuda
