// What both devices check before a kernel runs: shapes, dtypes, strides and devices of tensors, on which memory safety rests, and
// the numbers of options. Python has validated everything else.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "../stages.h"
#include "error.h"
#include "ops.h"

namespace s2sent::ops {

using torch::headeronly::ScalarType;

// No array of a call has more numbers, so that products of checked sizes fit int64.
constexpr int64_t kLargest = int64_t(1) << 56;

// Sizes come from callers that may be wrong. Those that are not 0 have a product of at most ``kLargest``.
inline bool are_sizes(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes) {
    if (size < 0 || (size > 0 && size > kLargest / all)) return false;
    all *= size > 0 ? size : 1;
  }
  return true;
}

// Checks tensors against the device of an op's first tensor.
struct Checks {
  bool cuda;
  int32_t index;

  explicit Checks(const Tensor& first) : cuda(first.is_cuda()), index(cuda ? first.get_device_index() : 0) {
    require(cuda || first.is_cpu(), "expected CPU or CUDA tensors");
  }

  bool here(const Tensor& tensor) const {
    return cuda ? tensor.is_cuda() && tensor.get_device_index() == index : tensor.is_cpu();
  }

  static void shape(const Tensor& tensor, const Ints& shape, const char* name) {
    bool same = tensor.dim() == int64_t(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(int64_t(i)) == shape[i];
    require(same, name, " has another shape than its kernel expects");
  }

  void dense(const Tensor& tensor, const Ints& expected, ScalarType dtype, const char* name) const {
    shape(tensor, expected, name);
    require(
        here(tensor) && tensor.is_contiguous() && tensor.scalar_type() == dtype, name,
        " must be a contiguous tensor of its kernel's dtype, on the device of the others");
  }

  const float* floats(const Tensor& tensor, const Ints& expected, const char* name) const {
    dense(tensor, expected, ScalarType::Float, name);
    return static_cast<const float*>(tensor.const_data_ptr());
  }

  const float* floats(const Optional& tensor, const Ints& expected, const char* name) const {
    return tensor ? floats(*tensor, expected, name) : nullptr;
  }

  float* written(const Tensor& tensor, const Ints& expected, const char* name) const {
    dense(tensor, expected, ScalarType::Float, name);
    return static_cast<float*>(tensor.mutable_data_ptr());
  }

  float* written(const Optional& tensor, const Ints& expected, const char* name) const {
    return tensor ? written(*tensor, expected, name) : nullptr;
  }

  // ``tensor`` has the shape of a hidden state and is dense in D.
  void rows(const Tensor& tensor, const Ints& expected, ScalarType dtype) const {
    shape(tensor, expected, "a hidden state or its gradient");
    const bool adjacent = expected.back() == 1 || tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1;
    require(
        here(tensor) && tensor.scalar_type() == dtype && adjacent,
        "hidden states must be tensors of one dtype on one device, dense in their features");
  }
};

inline Ints shape_of(const Tensor& tensor) {
  Ints shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

inline DType dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
#define S2SENT_FOUND(name, scalar, ...) \
  if (type == ScalarType::scalar) return DType::name;
  S2SENT_FOR_EACH_DTYPE(S2SENT_FOUND)
#undef S2SENT_FOUND
  fail("the kernels do not read this dtype");
}

inline std::optional<MaskType> known_mask_type(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return MaskType::kByte;
    case ScalarType::Int: return MaskType::kInt32;
    case ScalarType::Long: return MaskType::kInt64;
    case ScalarType::Float: return MaskType::kFloat32;
    default: return std::nullopt;
  }
}

inline MaskType mask_type_of(const Tensor& mask) {
  const std::optional<MaskType> type = known_mask_type(mask);
  require(type.has_value(), "the kernels do not read a mask of this dtype");
  return *type;
}

inline Pooling pooling_of(int64_t number) {
  require(
      number >= 0 && number <= kNumPoolings, "pooling: expected a number from 0 (none) to ",
      kNumPoolings, ", got ", number);
  return Pooling(number);
}

inline Activation activation_of(int64_t number) {
  require(
      number >= 0 && number < kNumActivations, "activation: expected a number from 0 to ",
      kNumActivations - 1, ", got ", number);
  return Activation(number);
}

// ``count`` hidden states from ``first_block`` on, out of N, whose features form ``parts`` parts.
inline void check_blocks(int64_t first_block, int64_t count, int64_t num_blocks, int64_t parts, int64_t size) {
  require(
      first_block >= 0 && count > 0 && count <= num_blocks && first_block <= num_blocks - count && parts > 0 &&
          size % parts == 0,
      "blocks or parts do not fit");
}

// The token frequency of each part.
inline void check_frequencies(const Ints& y, int64_t parts) {
  require(int64_t(y.size()) == parts, "expected a frequency for every part");
  for (const int64_t each : y) require(each >= 0, "expected frequencies from 0 on, got ", each);
}

}  // namespace s2sent::ops
