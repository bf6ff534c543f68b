// Memory that an op allocates, through torch's allocator: its results, and scratch memory for one call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include "checks.h"

namespace s2sent::ops {

// A dense tensor. (torch::stable::empty goes through the dispatcher, which takes several times as long.)
inline Tensor empty(const Checks& check, const Ints& sizes, ScalarType dtype) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t device = check.cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  require(
      aoti_torch_empty_strided(
          int64_t(sizes.size()), sizes.data(), strides.data(), type, device, check.index, &handle) == 0,
      "out of memory");
  return Tensor(handle);
}

// Arrays of 4-byte numbers in one allocation: first all that are wanted, then ``allocate``. Each begins at a multiple of 256
// bytes, so that kernels may load 16 at a time.
class Scratch {
 public:
  template <class T>
  void want(T*& array, int64_t count) {
    static_assert(sizeof(T) == 4);
    wanted_.emplace_back(reinterpret_cast<void**>(&array), words_);
    words_ += (count + 63) / 64 * 64;
  }

  void allocate(const Checks& check) {
    memory_ = empty(check, {words_}, ScalarType::Int);
    auto* begin = static_cast<int32_t*>(memory_->mutable_data_ptr());
    for (const auto& [array, place] : wanted_) *array = begin + place;
  }

 private:
  std::vector<std::pair<void**, int64_t>> wanted_;
  int64_t words_ = 0;
  Optional memory_;
};

}  // namespace s2sent::ops
