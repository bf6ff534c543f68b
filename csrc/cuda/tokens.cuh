// Shared by the CUDA kernels: launches, storage types, loads and stores of pieces of rows, and a batch's real tokens.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace s2sent::cuda {

constexpr int kWarp = 32;

// Features W that a thread handles at once: 16 bytes if every address is aligned (see wide), else one.
template <class T>
constexpr int kWide = 16 / int(sizeof(T));

// The rows of all Transformer blocks, as a kernel argument.
struct Blocks {
  Rows rows[kMaxBlocks];

  Blocks(const Rows* from, int64_t count) : rows() {
    for (int64_t n = 0; n < count; ++n) rows[n] = from[n];
  }
};

inline int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// Whether every row begins at a multiple of 16 bytes and no 16-byte piece crosses a boundary between two parts.
template <class T>
bool wide(const Rows& rows) {
  const int64_t step = kWide<T>;
  return uintptr_t(rows.data) % 16 == 0 && rows.stride_b % step == 0 && rows.stride_l % step == 0;
}

template <class T>
bool wide(int64_t part, const Rows* rows, int64_t count) {
  bool all = part % 8 == 0;  // 8 also suffices for the float32 tensors of a kernel with 16-bit hidden states
  for (int64_t n = 0; n < count; ++n) all = all && wide<T>(rows[n]);
  return all;
}

// The number of multiprocessors of the current device.
inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Launches a kernel that calls wait_for_previous. From sm_90 on its CTAs may start while the previous kernel finishes
// (programmatic dependent launch).
template <class... Parameters, class... Arguments>
cudaError_t launch_early(
    void (*kernel)(Parameters...), unsigned grid, int threads, size_t bytes, cudaStream_t stream,
    const Arguments&... arguments) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Waits until the writes of the previous kernel are visible, then lets the next kernel start. Every thread must call this before
// it writes anything and before it reads anything that an earlier kernel wrote.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__host__ __device__ inline bool aligned(const void* pointer) { return uintptr_t(pointer) % 16 == 0; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// Two adjacent numbers of 16 bits.
__device__ inline float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ inline float2 unpack(uint32_t pair, __half) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

// W adjacent numbers.
template <class T, int W>
struct alignas(W * sizeof(T)) Piece {
  T values[W];
};

template <class T, int W>
__device__ inline Piece<T, W> load_piece(const T* from) {
  if constexpr (W * sizeof(T) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Piece<T, W>*>(&bits);
  } else {
    static_assert(W == 1, "a piece is 16 bytes or a number");
    return {*from};
  }
}

// Keeps the loads above it together. The compiler would otherwise sink each to its use, where their latencies add up.
__device__ inline void issue_loads() { __syncwarp(__activemask()); }

// W floats, W a multiple of 4 or 1.
template <int W>
__device__ inline void load_floats(const float* from, float (&to)[W]) {
  if constexpr (W == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  }
}

template <int W>
__device__ inline void store_floats(const float (&from)[W], float* to) {
  if constexpr (W == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }
}

template <class T, int W>
__device__ inline void store_piece(const float (&from)[W], T* to) {
  Piece<T, W> piece;
#pragma unroll
  for (int i = 0; i < W; ++i) narrow(from[i], &piece.values[i]);
  if constexpr (W * sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&piece);
  } else {
    *to = piece.values[0];
  }
}

// Number of real tokens of sentence b.
__device__ inline int64_t length_of(const Batch& batch, int64_t b) {
  if (batch.packed) return batch.starts[b + 1] - batch.starts[b];
  return batch.lengths ? batch.lengths[b] : batch.size;
}

// A sentence's rows of one tensor. real and any return the offset, in elements, of the r-th real token and of token l.
struct Sentence {
  int64_t base;
  int64_t stride;
  const int32_t* places;

  __device__ Sentence(const Batch& batch, const Rows& rows, int64_t b)
      : base(batch.packed ? batch.starts[b] * rows.stride_l : b * rows.stride_b),
        stride(rows.stride_l),
        places(batch.places ? batch.places + b * batch.size : nullptr) {}

  __device__ int64_t real(int64_t r) const { return base + (places ? places[r] : r) * stride; }
  __device__ int64_t any(int64_t l) const { return base + l * stride; }
};

// The sentence that packed token t belongs to.
__device__ inline int64_t sentence_of(const Batch& batch, int64_t t) {
  int64_t low = 0, high = batch.sentences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (batch.starts[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ inline const float* factors_of(const Factors& factors, const Batch& batch, int64_t b, int64_t m) {
  return factors.beta + (batch.packed ? int64_t(batch.starts[b]) : b * factors.stride_b) + m * factors.stride_m;
}

// Names a storage type as a function argument.
template <class Storage>
struct StorageType {
  using type = Storage;
};

#define S2SENT_CASE(name, scalar, cpu, T, ...) \
  case DType::name: return work(StorageType<T>());

// work(StorageType<T>()) for the storage type T of a dtype.
template <class Work>
cudaError_t with_storage(DType dtype, const Work& work) {
  switch (dtype) { S2SENT_FOR_EACH_DTYPE(S2SENT_CASE) }
  return cudaErrorInvalidValue;
}
#undef S2SENT_CASE

}  // namespace s2sent::cuda
