// The producer warpgroup of the one-pass kernel (kernel.cuh): hidden states and factors into the ring.
#pragma once

#include "layout.cuh"

namespace s2sent::cuda {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Starts copying a slot: this warp's share of the rows of sentence b's real tokens from r0 on; the first warp also copies beta.
template <class T, int SLICE>
__device__ void fill_slot(
    const Select& a, const Hidden& hidden, const Layout& at, const Cta<SLICE>& cta, int slot, int64_t b, int r0,
    const Span& span) {
  constexpr int kRow = SLICE * int(sizeof(T)), kBoxes = kSlotTokens / kBoxTokens;
  const int lane = cta.thread() % kWarp, warp = (cta.thread() - kThreads) / kWarp;
  const int count = min(kSlotTokens, span.length - r0), blocks = int(a.num_blocks);
  const uint32_t rows = cta.address(slot * at.slot_bytes), full = cta.full(at, slot);
  const int32_t* places = span.contiguous() ? nullptr : a.batch.places + b * a.batch.size + r0;
  const int first = places ? places[0] : span.first + r0;
  const bool contiguous = !places || places[count - 1] - first == count - 1;
  const int boxes = (count + kBoxTokens - 1) / kBoxTokens, bytes = cta.features(a) * int(sizeof(T));
  if (warp == 0) {
    if (lane == 0) arrive_expecting(full, uint32_t(blocks * (contiguous ? boxes * kBoxTokens * kRow : count * bytes)));
    const int* parts = cta.ints(at.parts);
    const float* from = a.factors.beta + (a.batch.packed ? span.first : b * a.factors.stride_b) + r0 + lane;
    for (int part = 0; lane < count && part <= parts[SLICE / kPiece - 1]; ++part) {
      const uint32_t to = rows + at.factors + (part * kSlotTokens + lane) * int(sizeof(float));
      copy_4(to, from + (parts[SLICE / kPiece] + part) * a.factors.stride_m);
    }
    arrive_after_copies(full);
  }
  if (contiguous) {
    const int n = lane / kBoxes * kLoaders + warp, token = lane % kBoxes * kBoxTokens;
    if (n >= blocks || token >= count) return;
    const int z = a.batch.packed ? 0 : int(b);
    copy_box(rows + (n * kSlotTokens + token) * kRow, &hidden.maps[n], cta.d0(), first + token, z, full);
  } else {
    for (int n = warp; lane < count && n < blocks; n += kLoaders) {
      const Rows& u = hidden.rows[n];
      const T* from = static_cast<const T*>(u.data) + b * u.stride_b + places[lane] * u.stride_l + cta.d0();
      copy_row(rows + (n * kSlotTokens + lane) * kRow, from, uint32_t(bytes), full);
    }
  }
}

// The producer warpgroup: fills the slots in the order of their use, each as soon as the compute warps have released it.
// LONG: sentences may be longer than the ring and are then loaded twice.
template <class T, int SLICE, bool LONG>
__device__ void load_sentences(const Select& a, const Hidden& hidden, const Layout& at, const Cta<SLICE>& cta) {
  wait_for_previous();
  Ring ring;
  const int last = int(a.batch.sentences) - 1;
  const auto number = [&](const int32_t* from) { return from ? *from : 0; };
  int x = number(Span::begin(a.batch, cta.cluster())), y = number(Span::end(a.batch, cta.cluster()));
#pragma unroll 1
  for (int b = cta.cluster(); b <= last; b += cta.clusters()) {
    const Span span(a.batch, x, y);
    const int next = min(b + cta.clusters(), last);
    x = number(Span::begin(a.batch, next)), y = number(Span::end(a.batch, next));
    const int slots = slots_of(span.length), fills = LONG && slots > at.slots ? 2 * slots : slots;
#pragma unroll 1
    for (int c = 0; c < fills; ++c) {
      if (ring.round) wait(cta.empty(at, ring.slot), (ring.round - 1) & 1);
      fill_slot<T>(a, hidden, at, cta, ring.slot, b, (c < slots ? c : c - slots) * kSlotTokens, span);
      ring.advance(at.slots);
    }
  }
}

#endif

}  // namespace
}  // namespace s2sent::cuda
