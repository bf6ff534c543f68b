// The storage types of hidden states, in one table that every dispatch expands.
#pragma once

namespace s2sent {

// X(enumerator of DType, torch's ScalarType, type on the CPU, type on CUDA, CUtensorMapDataType, ...). The types are defined by
// cpu/batch.h and CUDA's headers; further arguments are passed on to X.
#define S2SENT_FOR_EACH_DTYPE(X, ...) \
  X(kFloat32, Float, float, float, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, __VA_ARGS__) \
  X(kBFloat16, BFloat16, BFloat16, __nv_bfloat16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, __VA_ARGS__) \
  X(kFloat16, Half, Float16, __half, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, __VA_ARGS__)

#define S2SENT_ENUMERATOR(name, ...) name,
enum class DType : int { S2SENT_FOR_EACH_DTYPE(S2SENT_ENUMERATOR) };
#undef S2SENT_ENUMERATOR

}  // namespace s2sent
