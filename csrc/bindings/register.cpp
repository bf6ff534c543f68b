// torch.ops.s2sent_native.*: private ops over the kernels, through LibTorch's stable ABI. They check only what memory safety needs
// (checks.h); the caller validates everything else. They write into tensors that the caller has allocated, except that the gate's
// backward and a plan's ops return theirs.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

#include "../stages.h"
#include "plan.h"
#ifdef S2SENT_CUDA
#include "../cuda/launch.h"
#endif

#ifndef S2SENT_INTERFACE
#error "setup.py defines S2SENT_INTERFACE from INTERFACE in s2sent_kernels/engines/native/engine.py"
#endif

// Importing s2sent_kernels._C registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

using s2sent::ops::Ints, s2sent::ops::Optional, s2sent::ops::Tensor, s2sent::ops::require;

int64_t interface_version() { return S2SENT_INTERFACE; }

// The number of a new plan, which holds the gate's tensors, and its owner.
std::tuple<int64_t, Tensor> plan(S2SENT_GATE_PARAMETERS const Tensor& alpha, const Ints& y, int64_t activation, double eps) {
  require(
      alpha.dim() == 2 && alpha.size(0) == int64_t(y.size()) && alpha.size(0) > 0 && alpha.size(0) <= s2sent::kMaxParts &&
          alpha.size(1) > 0 &&
          norm_weight.has_value() == (norm_bias && running_mean && running_var),
      "the plan's tensors do not fit");
  s2sent::ops::check_frequencies(y, alpha.size(0));
  return s2sent::ops::keep(std::make_shared<s2sent::ops::Plan>(s2sent::ops::Plan{
      S2SENT_GATE_ARGUMENTS alpha, y, s2sent::ops::activation_of(activation), eps}));
}

std::vector<std::string> poolings() { return {std::begin(s2sent::kPoolings), std::end(s2sent::kPoolings)}; }

std::vector<std::string> activations() { return {std::begin(s2sent::kActivations), std::end(s2sent::kActivations)}; }

int64_t cuda_maximum_blocks() { return s2sent::kMaxBlocks; }

#ifdef S2SENT_CUDA
std::vector<int64_t> cuda_architectures() { return s2sent::cuda::architectures(); }

std::string cuda_error(int64_t device) { return s2sent::cuda::refusal(int(device)); }
#else
std::vector<int64_t> cuda_architectures() { return {}; }

std::string cuda_error(int64_t) { return "it was built without its CUDA part"; }
#endif

}  // namespace

#define S2SENT_DEFINE(name, result, schema, parameters) m.def(#name schema);
#define S2SENT_IMPLEMENT_CPU(name, ...) m.impl(#name, TORCH_BOX(&s2sent::ops::cpu::name));
#define S2SENT_IMPLEMENT_CUDA(name, ...) m.impl(#name, TORCH_BOX(&s2sent::ops::cuda::name));

STABLE_TORCH_LIBRARY(s2sent_native, m) {
  m.def("interface_version() -> int");     // INTERFACE of the package that this was built from
  m.def("poolings() -> str[]");            // the words of pooling's numbers 1, 2, ...; 0 is none
  m.def("activations() -> str[]");         // the words of activation's numbers 0, 1, ...
  m.def("cuda_maximum_blocks() -> int");   // the largest N of the CUDA part, built or not
  m.def("cuda_architectures() -> int[]");  // the CUDA part's, as 90 for sm_90; empty if it was not built
  m.def("cuda_error(int device) -> str");  // why its kernels cannot run on a device, or ""
  m.def("plan(" S2SENT_GATE_SCHEMA "Tensor alpha, int[] y, int activation, float eps) -> (int, Tensor)");
  S2SENT_FOR_EACH_OP(S2SENT_DEFINE)
  S2SENT_FOR_EACH_PLANNED_OP(S2SENT_DEFINE)
  S2SENT_FOR_EACH_CUDA_OP(S2SENT_DEFINE)
}

STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CompositeExplicitAutograd, m) {
  m.impl("interface_version", TORCH_BOX(&interface_version));
  m.impl("poolings", TORCH_BOX(&poolings));
  m.impl("activations", TORCH_BOX(&activations));
  m.impl("cuda_maximum_blocks", TORCH_BOX(&cuda_maximum_blocks));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_error", TORCH_BOX(&cuda_error));
  m.impl("plan", TORCH_BOX(&plan));
}

STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CPU, m) {
  S2SENT_FOR_EACH_OP(S2SENT_IMPLEMENT_CPU)
  S2SENT_FOR_EACH_PLANNED_OP(S2SENT_IMPLEMENT_CPU)
}

#ifdef S2SENT_CUDA
STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CUDA, m) {
  S2SENT_FOR_EACH_OP(S2SENT_IMPLEMENT_CUDA)
  S2SENT_FOR_EACH_PLANNED_OP(S2SENT_IMPLEMENT_CUDA)
  S2SENT_FOR_EACH_CUDA_OP(S2SENT_IMPLEMENT_CUDA)
}
#endif
