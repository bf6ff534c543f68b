// torch.ops.s2sent_native.*: private ops over the kernels, through LibTorch's stable ABI. They write into tensors that the
// caller allocated. What is checked (bindings.h) is what a kernel's memory safety rests on; everything else was checked before.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

#include "bindings.h"
#ifdef S2SENT_CUDA
#include "cuda/launch.h"
#endif

// Importing s2sent_kernels._C registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

// Goes up with every change of a schema below; s2sent_kernels/backend.py knows the number it was written for.
constexpr int64_t kInterface = 4;

int64_t interface_version() { return kInterface; }

#ifdef S2SENT_CUDA
std::vector<int64_t> cuda_architectures() { return s2sent::cuda::architectures(); }

std::string cuda_error(int64_t device) { return s2sent::cuda::refusal(int(device)); }
#else
std::vector<int64_t> cuda_architectures() { return {}; }

std::string cuda_error(int64_t) { return "it was built without its CUDA part"; }
#endif

}  // namespace

STABLE_TORCH_LIBRARY(s2sent_native, m) {
  m.def("interface_version() -> int");
  m.def("cuda_architectures() -> int[]");  // the CUDA part's, as 90 for sm_90; empty where it was not built
  m.def("cuda_error(int device) -> str");  // why its kernels cannot run there, or nothing
  m.def(
      "squeeze(Tensor[] hidden_states, int first_block, int num_blocks, Tensor? mask, Tensor? cu_seqlens, Tensor alpha, "
      "int[] y, Tensor? beta, int pooling, Tensor(a!) squeezed, Tensor(b!)? pooled) -> ()");
  m.def(
      "squeeze_backward(Tensor? grad_squeezed, Tensor? grad_pooled, Tensor? grad_fused, Tensor? gates, int[] shape, "
      "Tensor? mask, Tensor? cu_seqlens, Tensor alpha, int[] y, Tensor? beta, int pooling, Tensor(a!)[] grads) -> ()");
  m.def(
      "gate(Tensor squeezed, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? running_mean, Tensor? running_var, Tensor? block_prior, int num_blocks, bool relu, "
      "float eps, Tensor(a!) bottleneck, Tensor(b!)? gates, Tensor? pooled, Tensor(c!)? output, Tensor? grad_gates, "
      "Tensor? grad_output, Tensor(d!)? grad_pooled, Tensor(e!)? grad_logits, Tensor(f!)? grad_normed, "
      "Tensor(g!)? normed) -> ()");
  m.def("multiply(Tensor x, Tensor weight, Tensor(a!) result) -> ()");
  m.def("fuse(Tensor[] hidden_states, Tensor gates, Tensor? mask, Tensor? cu_seqlens, Tensor(a!) fused) -> ()");
  m.def(
      "fuse_backward(Tensor grad_fused, Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, Tensor(a!) grad_gates) "
      "-> ()");
  // CUDA alone: v, f and g from one read of the hidden states. False, and nothing written, where the kernel does not take the
  // batch, or, unless ``always``, where the others are as fast.
  m.def(
      "select(Tensor[] hidden_states, Tensor? mask, Tensor? cu_seqlens, Tensor alpha, int[] y, Tensor down_weight, "
      "Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, "
      "Tensor? running_var, Tensor? block_prior, bool relu, float eps, bool always, Tensor(a!) squeezed, "
      "Tensor(b!) gates, Tensor(c!) fused) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CompositeExplicitAutograd, m) {
  m.impl("interface_version", TORCH_BOX(&interface_version));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_error", TORCH_BOX(&cuda_error));
}

STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CPU, m) {
  m.impl("squeeze", TORCH_BOX(&s2sent::ops::cpu::squeeze));
  m.impl("squeeze_backward", TORCH_BOX(&s2sent::ops::cpu::squeeze_backward));
  m.impl("gate", TORCH_BOX(&s2sent::ops::cpu::gate));
  m.impl("multiply", TORCH_BOX(&s2sent::ops::cpu::multiply));
  m.impl("fuse", TORCH_BOX(&s2sent::ops::cpu::fuse));
  m.impl("fuse_backward", TORCH_BOX(&s2sent::ops::cpu::fuse_backward));
}

#ifdef S2SENT_CUDA
STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CUDA, m) {
  m.impl("squeeze", TORCH_BOX(&s2sent::ops::cuda::squeeze));
  m.impl("squeeze_backward", TORCH_BOX(&s2sent::ops::cuda::squeeze_backward));
  m.impl("gate", TORCH_BOX(&s2sent::ops::cuda::gate));
  m.impl("multiply", TORCH_BOX(&s2sent::ops::cuda::multiply));
  m.impl("fuse", TORCH_BOX(&s2sent::ops::cuda::fuse));
  m.impl("fuse_backward", TORCH_BOX(&s2sent::ops::cuda::fuse_backward));
  m.impl("select", TORCH_BOX(&s2sent::ops::cuda::select));
}
#endif
