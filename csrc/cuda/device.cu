// The architectures that this library was compiled for, and whether a device can run its kernels.

#include "launch.h"

namespace s2sent::cuda {
namespace {

__global__ void probe() {}

}  // namespace

std::vector<int64_t> architectures() {
  std::vector<int64_t> found;
  for (const int arch : {__CUDA_ARCH_LIST__}) found.push_back(arch / 10);  // 900 is sm_90
  return found;
}

std::string refusal(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    const cudaError_t back = cudaSetDevice(before);
    if (error == cudaSuccess) error = back;
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clear the error, it is handled
  return cudaGetErrorString(error);
}

}  // namespace s2sent::cuda
