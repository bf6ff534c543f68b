// The PTX behind select.cu (sm_90 and newer): asynchronous copies into shared memory, barriers in it, and stores into that of
// another block of the cluster.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace s2sent::cuda {

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

enum SpecialRegister { kThread, kRank, kCluster, kClusters };

// Read anew each time: a copy is not kept in a register of its own.
template <SpecialRegister WHICH>
__device__ inline uint32_t special_register() {
  uint32_t value;
  if constexpr (WHICH == kThread) asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  if constexpr (WHICH == kRank) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  if constexpr (WHICH == kCluster) asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(value));
  if constexpr (WHICH == kClusters) asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(value));
  return value;
}

// A warpgroup's registers a thread from here on: what others have left, or fewer.
template <int COUNT>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ inline void cluster_wait_for_all() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where ``address`` of this block lies in the block of that rank.
__device__ inline uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At another block's barrier, after reads of this block's memory alone whose results have been used: a release would first wait
// for all stores on their way to device memory.
__device__ inline void arrive_there(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once this thread's copies so far are there.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the barrier's phase of that parity; what was copied or stored with it is there. (An acquire of the whole
// cluster's scope would throw the L1 cache away each time, for what only lies in shared memory.)
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@done bra over;\n\tbra again;\n"
      "over:\n\t}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// Stores four floats at ``address`` of another block and counts their bytes at that block's ``barrier``.
__device__ inline void store_there(uint32_t address, const float (&values)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])), "r"(__float_as_uint(values[2])),
      "r"(__float_as_uint(values[3])), "r"(barrier)
      : "memory");
}

__device__ inline void copy_4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Waits for this thread's copies so far.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A box of a tensor from (x, y, z) on, by the copy engine, which counts its bytes at ``barrier``; 0 beyond the tensor's ends.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* from, int x, int y, int z, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
               ::"r"(to), "l"(from), "r"(x), "r"(y), "r"(z), "r"(barrier)
               : "memory");
}

__device__ inline void copy_row(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

#endif

}  // namespace s2sent::cuda
