// The one-pass kernel: squeeze, gate and fuse in one read of the hidden states (sm_90a).
//
// A cluster of CTAs holds one sentence. Each CTA keeps the N x l x slice_of(D) numbers of its slice of features in a ring of
// slots of kSlotTokens tokens. squeeze adds the slots as they arrive; fuse adds them again under the gates. A producer
// warpgroup refills each released slot by TMA with the next sentence. W2's slice stays in the compute warps' registers. CTAs
// exchange only their partial sums of W1 f; every CTA adds them all. A sentence longer than the ring is read twice. Clusters
// take sentences in turn.
//
// Orders of summation are those of squeeze.cu, gate.cu and fuse.cu (order.h), and so are the bits.
#pragma once

#include "load.cuh"
#include "stages.cuh"

namespace s2sent::cuda {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Starts copying the numbers of this cluster's ``turn``-th sentence, if it exists, to shared memory.
template <int SLICE>
__device__ void prefetch_span(const Select& a, const Layout& at, const Cta<SLICE>& cta, int turn) {
  const int64_t b = cta.cluster() + int64_t(turn) * cta.clusters();
  if (b >= a.batch.sentences || !Span::end(a.batch, b)) return;
  const uint32_t to = cta.address(at.spans) + turn % 2 * 2 * int(sizeof(int32_t));
  copy_4(to, Span::begin(a.batch, b));
  copy_4(to + int(sizeof(int32_t)), Span::end(a.batch, b));
}

template <class T, int SLICE, int ROWS, int WIDTH, bool LONG>
__device__ void select_sentences(const Select& a, const Layout& at, const Cta<SLICE>& cta) {
  const Up<SLICE, ROWS, WIDTH> up(a, cta.d0(), cta.features(a));
  wait_for_previous();  // for find_tokens, which does not write W2
  if (cta.thread() == 0) {
    prefetch_span(a, at, cta, 0);
    wait_for_copies();
  }
  wait_for_all();
  Ring ring;
  const auto release = [&] {  // hands this slot to the producer
    __syncwarp();
    if (cta.thread() % kWarp == 0) arrive(cta.empty(at, ring.slot));
    ring.advance(at.slots);
  };
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int b = cta.cluster() + turn * cta.clusters();
    if (b >= int(a.batch.sentences)) break;
    const int* numbers = cta.ints(at.spans) + turn % 2 * 2;
    const auto span = [&] { return Span(a.batch, numbers[0], numbers[1]); };
    const int length = span().length, slots = slots_of(length);
    if (cta.thread() == 0) prefetch_span(a, at, cta, turn + 1);
    const bool fits = !LONG || slots <= at.slots;
    const Down<SLICE> down(a, cta);  // issued early to hide its latency
    const auto acquire = [&](const Ring& place) { wait(cta.full(at, place.slot), place.round & 1); };
    if (fits) {
      squeeze_sentence<T>(a, at, cta, length, ring, acquire, [&] { ring.advance(at.slots); });
      ring.go_back(slots, at.slots);
    } else {
      squeeze_sentence<T>(a, at, cta, length, ring, acquire, release);
    }
    if (cta.thread() == 0) wait_for_copies();  // the next sentence's numbers
    wait_for_all();
    send_shares(a, at, cta, down, b, turn);
    const Units<SLICE, ROWS> units(a, cta);  // loads overlap the exchange; fuse has no registers for them
    bottleneck(a, at, cta, turn);
    excite(a, at, cta, up, units);
    wait_for_all();
    if (scale_of(at, cta).large) {
      if (cta.thread() < SLICE) exponentiate(cta.floats(at.weights) + cta.thread(), a.num_blocks, SLICE);
      wait_for_all();
    }
    fuse_sentence<T>(a, at, cta, b, span(), ring, acquire, release);
    if (a.batch.mask && length < int(a.batch.size)) clear_padding<T>(a, cta, b, span());
  }
}

#endif

template <class T, int SLICE, int ROWS, int WIDTH, bool LONG>
__global__ void __launch_bounds__(kAllThreads, 1) select_kernel(
    const __grid_constant__ Select a, const __grid_constant__ Hidden hidden, const __grid_constant__ Layout at) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) char memory[];
  const Cta<SLICE> cta = {memory};
  if (threadIdx.x == 0) {
    for (int i = 0; i < at.slots; ++i) {
      init_barrier(cta.full(at, i), kWarp + 1);
      init_barrier(cta.empty(at, i), kWarps);
    }
    init_barrier(cta.shares(at), 1);
    init_barrier(cta.taken(at), at.cluster);
    publish_barriers();
  }
  const int first = cta.d0() / int(a.size / a.parts);
  if (threadIdx.x <= SLICE / kPiece) {
    const int d = cta.d0() + min(kPiece * int(threadIdx.x), cta.features(a) - 1);
    cta.ints(at.parts)[threadIdx.x] = threadIdx.x < SLICE / kPiece ? d / int(a.size / a.parts) - first : first;
  }
  for (int i = threadIdx.x; i < at.slot_parts * int(a.num_blocks); i += kAllThreads) {
    const int64_t m = min(first + i / int(a.num_blocks), int(a.parts) - 1);
    cta.floats(at.alpha)[i] = a.alpha[m * a.num_blocks + i % int(a.num_blocks)];
  }
  if (threadIdx.x < kWarp) {
    const float largest = largest_prior(a.gate);
    const Scale scale(a.gate);
    const int n = int(threadIdx.x);
    const float* prior = a.gate.block_prior;
    if (n <= kWarps) cta.floats(at.prior)[n] = (prior && n < int(a.num_blocks) ? prior[n] - largest : 0.0f) - scale.bound;
    if (n == 0) cta.floats(at.prior)[kWarps + 1] = scale.tau;
  }
  for (int i = threadIdx.x; i < kMaxWidth; i += kAllThreads) cta.floats(at.s)[i] = 0.0f;  // beyond H
  for (int i = threadIdx.x; i < kMaxCluster * at.width; i += kAllThreads) cta.floats(at.shares)[i] = 0.0f;
  __syncthreads();
  cluster_wait_for_all();  // no CTA may signal a barrier before its owner has initialised it
  if (threadIdx.x < kThreads) {
    raise_registers<kRegisters>();
    select_sentences<T, SLICE, ROWS, WIDTH, LONG>(a, at, cta);
  } else {
    lower_registers<kLoaderRegisters>();
    load_sentences<T, SLICE, LONG>(a, hidden, at, cta);
  }
  cluster_wait_for_all();  // no CTA may exit while a remote store to it is in flight
#endif
}

}  // namespace
}  // namespace s2sent::cuda
