// How fast a ring of slots in shared memory fills from twelve hidden states [256, 128, 768] of two bytes, by each kind of copy
// that the one-pass kernel could use, and the latency of a 16-byte load from shared memory meanwhile: a table of bench/NOTES.md.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90,code=sm_90 -o fill bench/probes/fill.cu && ./fill

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(x) \
  if (const cudaError_t error = (x)) printf("%s: %s\n", #x, cudaGetErrorString(error)), exit(1)

constexpr int N = 12, B = 256, L = 128, D = 768, kTokens = 32;  // tokens of a slot
enum Way { kRows, kRowsOfFour, kBoxes, kTallBoxes, kCopies, kCopiesOfFour };  // by one warp, or by four

struct Maps {
  CUtensorMap map[N];
};
struct Pointers {
  const char* at[N];
};

__device__ uint32_t address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@done bra over;\n\tbra again;\n"
      "over:\n\t}" ::"r"(barrier), "r"(parity)
      : "memory");
}
__device__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void copy_row(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// CTA ``rank`` of a cluster of ``parts`` copies its slice of features of every sentence of the cluster. Warps 12 to 15 fill slots,
// warp 0 releases each slot at once, and the others load from shared memory ``loads`` times.
template <int WAY, int SLICE>
__global__ void __launch_bounds__(512, 1) fill(
    const __grid_constant__ Maps maps, const __grid_constant__ Pointers hidden, int parts, int clusters, int loads,
    long long* clocks) {
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t full[8], empty[8];
  constexpr int kRow = SLICE * 2, kSlotBytes = N * kTokens * kRow, kSlots = SLICE == 48 ? 6 : 4;
  constexpr bool kFour = WAY == kRowsOfFour || WAY == kCopiesOfFour;
  const int rank = blockIdx.x % parts, cluster = blockIdx.x / parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      init(address(full + i), WAY == kCopiesOfFour ? 128 : WAY == kCopies ? 32 : WAY == kRowsOfFour ? 4 : 1);
      init(address(empty + i), 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (kFour ? warp >= 12 : warp == 12) {
    int slot = 0, round = 0;
    for (int b = cluster; b < B; b += clusters) {
      for (int c = 0; c < L / kTokens; ++c) {
        if (round) wait(address(empty + slot), (round - 1) & 1);
        const uint32_t to = address(memory) + slot * kSlotBytes, barrier = address(full + slot);
        const int first = b * L + c * kTokens;
        if (WAY == kRows || WAY == kRowsOfFour) {
          if (lane == 0) arrive_expecting(barrier, kFour ? kSlotBytes / 4 : kSlotBytes);
          __syncwarp();
          const size_t place = (size_t(first + lane) * D + rank * SLICE) * 2;
          for (int n = kFour ? warp - 12 : 0; n < N; n += kFour ? 4 : 1) {
            copy_row(to + (n * kTokens + lane) * kRow, hidden.at[n] + place, kRow, barrier);
          }
        } else if (WAY == kBoxes || WAY == kTallBoxes) {
          if (lane == 0) {
            arrive_expecting(barrier, kSlotBytes);
            if (WAY == kBoxes) {
              for (int n = 0; n < N; ++n) copy_box(to + n * kTokens * kRow, &maps.map[n], rank * SLICE, first, barrier);
            } else {  // all tokens of a quarter of the N
              for (int n = 0; n < 3; ++n) copy_box(to + n * L * kRow, &maps.map[c * 3 + n], rank * SLICE, b * L, barrier);
            }
          }
        } else {
          constexpr int kThreads = kFour ? 128 : 32, kAcross = kRow / 16;
          for (int i = kFour ? threadIdx.x - 384 : lane; i < kTokens * kAcross; i += kThreads) {
            const size_t place = (size_t(first + i / kAcross) * D + rank * SLICE) * 2 + i % kAcross * 16;
#pragma unroll
            for (int n = 0; n < N; ++n) {
              asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + n * kTokens * kRow + i * 16),
                           "l"(hidden.at[n] + place)
                           : "memory");
            }
          }
          asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
        }
        if (++slot == kSlots) slot = 0, ++round;
      }
    }
  } else if (warp == 0) {
    int slot = 0, round = 0;
    for (int b = cluster; b < B; b += clusters) {
      for (int c = 0; c < L / kTokens; ++c) {
        wait(address(full + slot), round & 1);
        __syncwarp();
        if (lane == 0) arrive(address(empty + slot));
        if (++slot == kSlots) slot = 0, ++round;
      }
    }
  } else if (warp < 12) {
    uint32_t from = address(memory) + lane * 16;
    float sum = 0.0f;
    const long long begin = clock64();
    for (int i = 0; i < loads; ++i) {  // each depends on the previous one
      float4 x;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                   : "r"(from)
                   : "memory");
      sum += x.x;
      from += __float_as_uint(x.y) == 12345 ? 16 : 0;
    }
    if (lane == 0 && blockIdx.x == 0 && warp == 1 && loads) clocks[0] = (clock64() - begin) / loads;
    if (sum == 1.2345f) clocks[1] = 1;  // so that the compiler keeps the loads
  }
}

using Encode = decltype(&cuTensorMapEncodeTiled);

template <int WAY, int SLICE>
void measure(
    const char* name, Encode encode, const Pointers& hidden, int clusters, int loads = 0,
    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_NONE) {
  const int parts = D / SLICE, bytes = (SLICE == 48 ? 6 : 4) * N * kTokens * SLICE * 2;
  Maps maps;
  for (int n = 0; n < N; ++n) {
    const cuuint64_t sizes[2] = {D, B * L}, strides[1] = {D * 2};
    const cuuint32_t box[2] = {SLICE, cuuint32_t(WAY == kTallBoxes ? L : kTokens)}, steps[2] = {1, 1};
    if (encode(
            &maps.map[n], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<char*>(hidden.at[n]), sizes, strides, box, steps,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)) {
      printf("no tensor map\n"), exit(1);
    }
  }
  long long* clocks;
  CHECK(cudaMallocManaged(&clocks, 2 * sizeof(*clocks)));
  CHECK(cudaFuncSetAttribute(fill<WAY, SLICE>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 1e9f;
  for (int i = 0; i < 6; ++i) {
    CHECK(cudaEventRecord(begin));
    fill<WAY, SLICE><<<clusters * parts, 512, bytes>>>(maps, hidden, parts, clusters, loads, clocks);
    CHECK(cudaEventRecord(end));
    CHECK(cudaDeviceSynchronize());
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    best = std::min(best, ms);
  }
  const double gigabytes = double(N) * B * L * D * 2 / 1e9;
  printf("%-46s %3d CTAs: %7.1f us, %.2f TB/s", name, clusters * parts, best * 1e3, gigabytes / best);
  if (loads) printf(", %lld clocks a load", clocks[0]);
  printf("\n");
}

int main() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
  const Encode encode = Encode(found);
  Pointers hidden;
  for (const char*& at : hidden.at) {
    void* memory;
    CHECK(cudaMalloc(&memory, size_t(B) * L * D * 2));
    CHECK(cudaMemset(memory, 0, size_t(B) * L * D * 2));
    at = static_cast<const char*>(memory);
  }
  for (const int loads : {0, 2000}) {
    measure<kRows, 48>("rows of 96 bytes, one warp", encode, hidden, 7, loads);
    measure<kBoxes, 48>("boxes of 32 x 96 bytes", encode, hidden, 7, loads);
    measure<kCopies, 48>("cp.async, one warp", encode, hidden, 7, loads);
    measure<kCopiesOfFour, 48>("cp.async, four warps", encode, hidden, 7, loads);
  }
  measure<kRowsOfFour, 48>("rows of 96 bytes, four warps", encode, hidden, 7);
  measure<kTallBoxes, 48>("boxes of 128 x 96 bytes", encode, hidden, 7);
  measure<kBoxes, 48>("boxes of 32 x 96, L2 fetches 128", encode, hidden, 7, 0, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  for (const int clusters : {1, 2, 4}) measure<kBoxes, 48>("boxes of 32 x 96 bytes", encode, hidden, clusters);
  for (const int clusters : {4, 8, 11}) measure<kBoxes, 64>("boxes of 32 x 128 bytes", encode, hidden, clusters);
}
