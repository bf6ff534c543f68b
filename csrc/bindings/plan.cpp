#include "plan.h"

#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <unordered_map>

namespace s2sent::ops {
namespace {

std::mutex mutex;

std::unordered_map<int64_t, std::shared_ptr<const Plan>>& plans() {
  static auto* all = new std::unordered_map<int64_t, std::shared_ptr<const Plan>>;  // outlives Python's last objects
  return *all;
}

bool is_shaped(const Tensor& tensor, const Ints& shape) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != shape.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (sizes[i] != shape[i]) return false;
  }
  return true;
}

bool is_dense(const Checks& check, const Tensor& tensor, const Ints& shape, ScalarType dtype) {
  return check.here(tensor) && tensor.scalar_type() == dtype && is_shaped(tensor, shape) && tensor.is_contiguous();
}

bool has_floats(const Checks& check, const Tensor& tensor, const Ints& shape) {
  return is_dense(check, tensor, shape, ScalarType::Float);
}

bool has_floats(const Checks& check, const Optional& tensor, const Ints& shape) {
  return !tensor || has_floats(check, *tensor, shape);
}

bool is_known(ScalarType type) {
#define S2SENT_KNOWN(name, scalar, ...) \
  if (type == ScalarType::scalar) return true;
  S2SENT_FOR_EACH_DTYPE(S2SENT_KNOWN)
#undef S2SENT_KNOWN
  return false;
}

// Whether the first sentence begins at 0, none ends before it begins, and the last ends at T. On CUDA that is not looked at.
bool spans(const Checks& check, const Tensor& cu_seqlens, int64_t tokens) {
  if (check.cuda) return true;
  const auto* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.numel() - 1;
  for (int64_t b = 1; b <= last; ++b) {
    if (ends[b] < ends[b - 1]) return false;
  }
  return ends[0] == 0 && ends[last] == tokens;
}

bool is_ordinary(
    const Checks& check, ScalarType dtype, const Ints& shape, const Optional& mask, const Optional& cu_seqlens) {
  if (shape.size() != (cu_seqlens ? 2 : 3) || shape.back() == 0 || !is_known(dtype)) return false;
  if (!are_sizes({shape[0], cu_seqlens ? 1 : shape[1], shape.back()})) return false;
  if (mask) return !cu_seqlens && known_mask_type(*mask) && is_dense(check, *mask, {shape[0], shape[1]}, mask->scalar_type());
  if (!cu_seqlens) return true;
  return cu_seqlens->dim() == 1 && cu_seqlens->numel() > 0 &&
         is_dense(check, *cu_seqlens, {cu_seqlens->numel()}, ScalarType::Int) && spans(check, *cu_seqlens, shape[0]);
}

// Whether ``tensor`` is like a hidden state and dense in D.
bool is_like(const Checks& check, const Tensor& tensor, const Ints& shape, ScalarType dtype) {
  if (!check.here(tensor) || tensor.scalar_type() != dtype || !is_shaped(tensor, shape)) return false;
  return tensor.stride(int64_t(shape.size()) - 1) == 1 || shape.back() == 1;
}

void forget(int64_t number) {
  std::shared_ptr<const Plan> gone;  // lets its tensors go after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans().find(number);
  if (found == plans().end()) return;
  gone = std::move(found->second);
  plans().erase(found);
}

}  // namespace

std::tuple<int64_t, Tensor> keep(std::shared_ptr<const Plan> plan) {
  static int64_t last = 0;
  int64_t number;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    number = ++last;
    plans().emplace(number, std::move(plan));
  }
  const auto let_go = [](void* data) {
    const std::unique_ptr<int64_t> held(static_cast<int64_t*>(data));
    forget(*held);
  };
  const Ints one{1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return {number, torch::stable::from_blob(new int64_t(number), one, one, cpu, ScalarType::Long, let_go)};
}

std::shared_ptr<const Plan> plan_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans().find(number);
  return found == plans().end() ? nullptr : found->second;
}

Planned::Planned(
    int64_t number, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
    int64_t maximum_blocks)
    : plan(plan_of(number)) {
  if (!plan) return;
  const int64_t N = plan->num_blocks();
  if (int64_t(hidden_states.size()) != N) return;
  const Tensor& first = hidden_states[0];
  const Checks check(first);
  const Ints shape = shape_of(first);
  if (!is_ordinary(check, first.scalar_type(), shape, mask, cu_seqlens)) return;
  for (const Tensor& u : hidden_states) {
    if (!is_like(check, u, shape, first.scalar_type())) return;
  }
  if (!fits(check, shape.back(), maximum_blocks)) return;
  hidden.reserve(size_t(N));
  for (const Tensor& u : hidden_states) {
    hidden.push_back({u.const_data_ptr(), cu_seqlens ? 0 : u.stride(0), u.stride(cu_seqlens ? 0 : 1)});
  }
  fill(first, shape, mask, cu_seqlens);
}

Planned::Planned(
    int64_t number, const Tensor& like, const Ints& shape, const Optional& mask, const Optional& cu_seqlens,
    int64_t maximum_blocks)
    : plan(plan_of(number)) {
  if (!plan) return;
  const Checks check(like);
  if (!is_ordinary(check, like.scalar_type(), shape, mask, cu_seqlens)) return;
  if (fits(check, shape.back(), maximum_blocks)) fill(like, shape, mask, cu_seqlens);
}

bool Planned::fits(const Checks& check, int64_t size, int64_t maximum_blocks) const {
  const int64_t N = plan->num_blocks(), D = size;
  if (N > maximum_blocks || plan->down_weight.dim() != 2) return false;
  const int64_t H = plan->down_weight.size(0);
#define S2SENT_FITS(type, name, ...) \
  if (!has_floats(check, plan->name, {__VA_ARGS__})) return false;
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_FITS)
#undef S2SENT_FITS
  return D % plan->parts() == 0 && has_floats(check, plan->alpha, {plan->parts(), N});
}

void Planned::fill(const Tensor& like, const Ints& shape, const Optional& mask, const Optional& cu_seqlens) {
  sentences.emplace(like, shape, mask, cu_seqlens);
  dtype = dtype_of(like);
  gate.sentences = sentences->count;
  gate.num_blocks = plan->num_blocks();
  gate.size = shape.back();
  gate.width = plan->down_weight.size(0);
  gate.activation = plan->activation;
  gate.eps = float(plan->eps);
#define S2SENT_SET(type, name, ...) gate.name = data_of(plan->name);
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_SET)
#undef S2SENT_SET
}

bool Planned::takes(const Tensor& grad_fused) const {
  const ScalarType type = grad_fused.scalar_type();
  if (!sentences || !is_known(type) || dtype_of(grad_fused) != dtype) return false;
  return is_like(sentences->check, grad_fused, sentences->shape, type);
}

BatchStatistics Planned::statistics(double momentum) const {
  BatchStatistics args = {};
  args.gate = gate;
  args.momentum = momentum;
  args.running_mean = static_cast<float*>(plan->running_mean->mutable_data_ptr());
  args.running_var = static_cast<float*>(plan->running_var->mutable_data_ptr());
  return args;
}

void Planned::read_gradients(const Tensor& squeezed, const Optional& pooled, const Optional& grad_output) {
  const Checks& check = sentences->check;
  gate.squeezed = check.floats(squeezed, {gate.sentences, gate.size}, "squeezed");
  if (!pooled) return;
  gate.pooled = check.floats(*pooled, {gate.sentences, gate.num_blocks, gate.size}, "pooled");
  check.dense(*grad_output, {gate.sentences, gate.size}, grad_output->scalar_type(), "grad_output");
  gate.grad_output = grad_output->const_data_ptr();
  gate.dtype = dtype;
}

}  // namespace s2sent::ops
