// The launch of select.cuh's kernel: which of its variants a batch takes, if any, and how many clusters run at once.

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "select.cuh"

namespace s2sent::cuda {
namespace {

Layout layout_of(const Select& a, int most) {
  Layout to = {};
  const int slice = int(slice_of(a.size)), blocks = int(a.num_blocks);
  to.cluster = int(pieces(a.size, slice));
  to.rows = int(pieces(a.gate.width, to.cluster));
  to.factors = blocks * kStageTokens * slice * 2;
  to.stage = to.factors + kMaxStageParts * kStageTokens * int(sizeof(float));
  int place = 0;
  const auto take = [&](int words) {
    const int begin = place;
    place += (words * 4 + 15) / 16 * 16;
    return begin;
  };
  to.sums = take(blocks * slice);
  to.gates = take(blocks * slice);
  to.f = take(slice);
  to.parts = take(slice / kPiece + 1);
  to.alpha = take(kMaxStageParts * blocks);
  to.shares = take(2 * to.cluster * to.rows);
  to.s = take(2 * kMaxWidth);
  to.barriers = take(2 * (2 * kMaxStages + 4));
  to.stages = int(std::min<int64_t>(kMaxStages, (most - place) / to.stage));
  for (int* offset : {&to.sums, &to.gates, &to.f, &to.parts, &to.alpha, &to.shares, &to.s, &to.barriers}) {
    *offset += to.stages * to.stage;
  }
  to.bytes = to.stages * to.stage + place;
  return to;
}

using Kernel = void (*)(Select, Blocks, Layout);

// The kernel for a batch, or null: what fits registers is how many rows of W2 a thread has a half of, and how long they are.
template <class T, int SLICE>
Kernel kernel_for(const Select& a) {
  constexpr int kWidth = SLICE == 48 ? 64 : 48;
  const int64_t rows = pieces(a.num_blocks * SLICE, kThreads / 2);
  const bool longer = a.batch.packed;  // sentences than the ring: who knows
  if (rows <= 3 && a.gate.width <= kWidth) {
    return longer ? select_kernel<T, SLICE, 3, kWidth, true> : select_kernel<T, SLICE, 3, kWidth, false>;
  }
  if (rows <= 2 && a.gate.width <= kMaxWidth) {
    return longer ? select_kernel<T, SLICE, 2, kMaxWidth, true> : select_kernel<T, SLICE, 2, kMaxWidth, false>;
  }
  return nullptr;
}

template <class T>
Kernel kernel_for(const Select& a) {
  const bool alike = std::all_of(a.hidden, a.hidden + a.num_blocks, [&](const Rows& rows) {
    return rows.stride_b == a.hidden[0].stride_b && rows.stride_l == a.hidden[0].stride_l;
  });
  const int64_t part = a.size / a.parts, slice = slice_of(a.size);
  if (!alike || a.num_blocks > kWarps || pieces(a.size, slice) > kMaxCluster) return nullptr;
  if (part < 2 * kPiece || !wide<T>(part, a.hidden, a.num_blocks)) return nullptr;
  if (!aligned(a.fused) || !aligned(a.gate.down_weight)) return nullptr;
  return slice == 48 ? kernel_for<T, 48>(a) : kernel_for<T, 64>(a);
}

struct Plan {
  Kernel kernel;  // or null
  Layout at;
  int clusters;  // that run at once
};

cudaLaunchConfig_t config_of(const Plan& plan, int64_t clusters, cudaLaunchAttribute& cluster, cudaStream_t stream) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(plan.at.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(plan.at.cluster * clusters));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(plan.at.bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// How many clusters run at once on the current device, asked for once; none where it cannot hold one.
int clusters_at_once(const Plan& plan, int device, int most) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(plan.kernel, device, plan.at.cluster, plan.at.bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const void* kernel = reinterpret_cast<const void*>(plan.kernel);
  cudaLaunchAttribute cluster = {};
  const cudaLaunchConfig_t config = config_of(plan, 1, cluster, nullptr);
  int clusters = 0;
  // The most there is: other batches of this kernel take other sizes.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) {
    cudaGetLastError();  // asked and answered
    clusters = 0;
  }
  return known[key] = clusters;
}

cudaError_t plan_for(const Select& a, Plan& plan) {
  plan = {};
  if (a.dtype == DType::kFloat32 || a.batch.tokens == 0 || a.batch.sentences == 0 || a.batch.sentences > INT32_MAX) {
    return cudaSuccess;
  }
  int device = 0, major = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess || major < 9) return error;
  plan.at = layout_of(a, most);
  const int64_t length = a.batch.packed ? 1 : a.batch.size;
  if (plan.at.stages < 2 || pieces(length, kStageTokens) > plan.at.stages) return cudaSuccess;
  plan.kernel = a.dtype == DType::kBFloat16 ? kernel_for<__nv_bfloat16>(a) : kernel_for<__half>(a);
  if (plan.kernel) plan.clusters = clusters_at_once(plan, device, most);
  if (plan.clusters == 0) plan.kernel = nullptr;
  return cudaSuccess;
}

}  // namespace

cudaError_t takes(const Select& a, bool always, bool& taken) {
  Plan plan;
  const cudaError_t error = plan_for(a, plan);
  // Of more rounds of sentences than 2 N / 3 the two-pass kernels make as much or more (bench/NOTES.md): they use all of the
  // GPU, and here most warps wait while there are fewer than 12 blocks to squeeze.
  const bool few = 3 * a.batch.sentences <= 2 * a.num_blocks * plan.clusters;
  const bool fit = a.batch.tokens <= a.batch.sentences * plan.at.stages * kStageTokens;  // where packed, on average
  taken = plan.kernel && (always || (few && fit));
  return error;
}

cudaError_t select(const Select& a, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = plan_for(a, plan);
  if (error != cudaSuccess || !plan.kernel) return error == cudaSuccess ? cudaErrorInvalidValue : error;
  cudaLaunchAttribute cluster = {};
  const int64_t clusters = std::min<int64_t>(plan.clusters, a.batch.sentences);
  const cudaLaunchConfig_t config = config_of(plan, clusters, cluster, stream);
  return cudaLaunchKernelEx(&config, plan.kernel, a, Blocks(a.hidden, a.num_blocks), plan.at);
}

}  // namespace s2sent::cuda
