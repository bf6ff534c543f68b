// Launches the one-pass kernel: whether it supports a batch, which variant, and how many clusters run at once.

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "kernel.cuh"

namespace s2sent::cuda {

struct SelectPlan {
  void (*kernel)(Select, Hidden, Layout);
  Layout at;
  Hidden hidden;
  int clusters;  // number that run at once
};

namespace {

using Kernel = decltype(SelectPlan::kernel);

Layout layout_of(const Select& a, int shared_bytes) {
  Layout to = {};
  const int slice = int(slice_of(a.size)), blocks = int(a.num_blocks);
  to.cluster = int(pieces(a.size, slice));
  const int part = int(a.size / a.parts);
  for (int d0 = 0; d0 < int(a.size); d0 += slice) {
    to.slot_parts = std::max(to.slot_parts, (std::min(d0 + slice, int(a.size)) - 1) / part - d0 / part + 1);
  }
  to.factors = blocks * kSlotTokens * slice * 2;
  to.slot_bytes = to.factors + to.slot_parts * kSlotTokens * int(sizeof(float));
  int place = 0;
  const auto reserve = [&](int words) {
    const int begin = place;
    place += (words * 4 + 15) / 16 * 16;
    return begin;
  };
  to.sums = reserve(blocks * slice);
  to.f = reserve(slice);
  to.weights = reserve(blocks * slice);
  to.parts = reserve(slice / kPiece + 1);
  to.alpha = reserve(to.slot_parts * blocks);
  to.prior = reserve(kWarps + 2);
  to.spans = reserve(4);
  to.width = (int(a.gate.width) + 3) / 4 * 4;
  to.shares = reserve(kMaxCluster * to.width);
  to.s = reserve(kMaxWidth);
  to.barriers = reserve(4);
  const int barriers = 2 * int(sizeof(uint64_t));  // bytes for each slot
  to.slots = (shared_bytes - place) / (to.slot_bytes + barriers);
  for (int* offset :
       {&to.sums, &to.weights, &to.f, &to.parts, &to.alpha, &to.prior, &to.spans, &to.shares, &to.s, &to.barriers}) {
    *offset += to.slots * to.slot_bytes;
  }
  to.bytes = to.slots * (to.slot_bytes + barriers) + place;
  return to;
}

// The variant for a batch, or null. Registers limit the rows of W2 that a thread holds a half of, and their length.
template <class T, int SLICE>
Kernel kernel_for(const Select& a) {
  constexpr int kWidth = SLICE == kShortSlice ? 64 : 48;
  const int64_t rows = pieces(a.num_blocks * SLICE, kThreads / 2);
  const bool longer = a.batch.packed;  // packed lengths are unknown on the host: assume a sentence may not fit the ring
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
  const int64_t part = a.size / a.parts, slice = slice_of(a.size);
  if (a.num_blocks > kWarps || pieces(a.size, slice) > kMaxCluster) return nullptr;
  if (part < 2 * kPiece || !wide<T>(part, a.hidden, a.num_blocks)) return nullptr;
  if (!aligned(a.fused) || !aligned(a.gate.down_weight)) return nullptr;
  return slice == kShortSlice ? kernel_for<T, kShortSlice>(a) : kernel_for<T, kLongSlice>(a);
}

#define S2SENT_CASE(name, scalar, cpu, T, ...) \
  case DType::name: \
    if constexpr (sizeof(T) == 2) return kernel_for<T>(a); \
    break;
// 16-bit dtypes only; the rest of this file assumes two bytes a number.
Kernel kernel_of(const Select& a) {
  switch (a.dtype) { S2SENT_FOR_EACH_DTYPE(S2SENT_CASE) }
  return nullptr;
}
#undef S2SENT_CASE

#define S2SENT_CASE(name, scalar, cpu, T, map, ...) \
  case DType::name: return map;
CUtensorMapDataType tma_dtype(DType dtype) {
  switch (dtype) { S2SENT_FOR_EACH_DTYPE(S2SENT_CASE) }
  __builtin_unreachable();
}
#undef S2SENT_CASE

// False if TMA does not support such tensors.
bool describe(const Select& a, Hidden& to) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    cudaGetLastError();  // clear the error, it is handled
    return result == cudaDriverEntryPointSuccess ? decltype(&cuTensorMapEncodeTiled)(found) : nullptr;
  }();
  if (!encode) return false;
  const bool packed = a.batch.packed;
  const cuuint64_t tokens = cuuint64_t(packed ? a.batch.tokens : a.batch.size);
  const cuuint64_t sizes[3] = {cuuint64_t(a.size), tokens, cuuint64_t(packed ? 1 : a.batch.sentences)};
  const cuuint32_t box[3] = {cuuint32_t(slice_of(a.size)), kBoxTokens, 1}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType dtype = tma_dtype(a.dtype);
  for (int n = 0; n < int(a.num_blocks); ++n) {
    const Rows& rows = to.rows[n] = a.hidden[n];
    const cuuint64_t row = cuuint64_t(rows.stride_l) * 2;  // bytes
    const cuuint64_t strides[2] = {row, packed ? tokens * row : cuuint64_t(rows.stride_b) * 2};
    const CUresult result = encode(
        &to.maps[n], dtype, 3, const_cast<void*>(rows.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return false;
  }
  return true;
}

cudaLaunchConfig_t config_of(
    const SelectPlan& plan, int64_t clusters, cudaLaunchAttribute (&attributes)[2], cudaStream_t stream) {
  cudaLaunchAttribute &cluster = attributes[0], &early = attributes[1];  // may start while the previous kernel finishes
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(plan.at.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(plan.at.cluster * clusters));
  config.blockDim = dim3(kAllThreads);
  config.dynamicSmemBytes = size_t(plan.at.bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// How many clusters run at once on the current device; the answer is cached. 0 if it cannot hold one, or if the kernel was
// compiled for another architecture than sm_90a and is empty, which its number of registers tells.
int clusters_at_once(const SelectPlan& plan, int device, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(plan.kernel, device, plan.at.cluster, plan.at.bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const void* kernel = reinterpret_cast<const void*>(plan.kernel);
  cudaLaunchAttribute launch[2] = {};
  const cudaLaunchConfig_t config = config_of(plan, 1, launch, nullptr);
  int clusters = 0;
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.numRegs < kLoaderRegisters) return known[key] = 0;
  // The maximum, because other batches of this kernel need other sizes.
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clear the error, it is handled
    clusters = 0;
  }
  return known[key] = clusters;
}

}  // namespace

cudaError_t plan(const Select& a, bool always, std::shared_ptr<const SelectPlan>& result) {
  result.reset();
  if (a.batch.tokens == 0 || a.batch.sentences == 0 || a.batch.sentences > INT32_MAX) return cudaSuccess;
  SelectPlan found = {};
  found.kernel = kernel_of(a);
  if (!found.kernel) return cudaSuccess;
  int device = 0, major = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess || major != 9) return error;
  found.at = layout_of(a, shared_bytes);
  if (a.batch.packed && a.batch.tokens * a.size > INT32_MAX) return cudaSuccess;  // offsets are 32 bits
  const int64_t length = a.batch.packed ? 1 : a.batch.size;
  if (found.at.slots < 2 || pieces(length, kSlotTokens) > found.at.slots) return cudaSuccess;
  found.clusters = clusters_at_once(found, device, shared_bytes);
  if (found.clusters == 0) return cudaSuccess;
  // Every sentence pays the latency of its gate, whatever its length. With many short sentences the two-pass kernels are as
  // fast or faster (bench/NOTES.md), because they keep the whole GPU busy; also with fewer than six Transformer blocks,
  // because each warp squeezes one and the others idle.
  const int64_t tokens = a.batch.tokens / a.batch.sentences;  // the average if packed
  const bool few = a.batch.sentences <= 2 * a.num_blocks * found.clusters;
  const bool much = a.num_blocks * tokens * slice_of(a.size) * 2 >= 96 << 10;
  const bool fit = tokens <= found.at.slots * kSlotTokens;
  const bool faster = a.num_blocks >= kWarps / 2 && (few || much) && fit;
  if ((always || faster) && describe(a, found.hidden)) result = std::make_shared<const SelectPlan>(found);
  return cudaSuccess;
}

cudaError_t select(const Select& a, const SelectPlan& plan, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  const int64_t clusters = std::min<int64_t>(plan.clusters, a.batch.sentences);
  const cudaLaunchConfig_t config = config_of(plan, clusters, attributes, stream);
  return cudaLaunchKernelEx(&config, plan.kernel, a, plan.hidden, plan.at);
}

}  // namespace s2sent::cuda
