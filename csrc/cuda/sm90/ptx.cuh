// The PTX of Hopper's kernels: asynchronous copies into shared memory, its barriers, stores to another CTA of the cluster and, of
// sm_90a alone, registers that move between warpgroups.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace s2sent::cuda {

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

enum SpecialRegister { kThread, kRank, kCluster, kClusters };

// volatile, so that the compiler rereads it instead of keeping a copy in a register.
template <SpecialRegister WHICH>
__device__ inline uint32_t special_register() {
  uint32_t value;
  if constexpr (WHICH == kThread) asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  if constexpr (WHICH == kRank) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  if constexpr (WHICH == kCluster) asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(value));
  if constexpr (WHICH == kClusters) asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(value));
  return value;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Changes the registers per thread of this warpgroup: up, to what other warpgroups released, or down.
template <int COUNT>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
#endif

__device__ inline void cluster_wait_for_all() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address, in the CTA of that rank, that corresponds to ``address`` in this one.
__device__ inline uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Waits for the other threads of some warps. Number 0 is __syncthreads's.
__device__ inline void wait_for_warps(int number, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at another CTA's barrier. Only reads of this CTA's shared memory precede it, and their results have been used, so that
// relaxed order suffices; a release would wait for all stores in flight to device memory.
__device__ inline void arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once the copies that this thread has started are complete.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the barrier's phase of that parity; its copies and stores are then visible. (An acquire with cluster scope
// would invalidate the L1 cache each time, although the data is in shared memory.)
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@done bra over;\n\tbra again;\n"
      "over:\n\t}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// Stores four floats at ``address`` of another CTA and counts their bytes at ``barrier`` of that CTA.
__device__ inline void store_remote(uint32_t address, const float (&values)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])), "r"(__float_as_uint(values[2])),
      "r"(__float_as_uint(values[3])), "r"(barrier)
      : "memory");
}

__device__ inline void copy_4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Waits for the copies that this thread has started.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// TMA copy of a tensor's box from (x, y, z) on, 0 outside the tensor. Counts its bytes at ``barrier``.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* from, int x, int y, int z, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
               ::"r"(to), "l"(from), "r"(x), "r"(y), "r"(z), "r"(barrier)
               : "memory");
}

// Bulk copy of ``bytes`` contiguous bytes. Counts them at ``barrier``.
__device__ inline void copy_row(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

#endif

}  // namespace s2sent::cuda
