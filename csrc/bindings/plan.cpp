#include "plan.h"

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
    const Checks& check, const Tensors& hidden_states, const Ints& shape, const Optional& mask,
    const Optional& cu_seqlens) {
  if (shape.size() != (cu_seqlens ? 2 : 3) || shape.back() == 0) return false;
  const ScalarType dtype = hidden_states[0].scalar_type();
  if (!is_known(dtype)) return false;
  for (const Tensor& u : hidden_states) {
    const bool same = check.here(u) && u.scalar_type() == dtype && is_shaped(u, shape);
    if (!same || (u.stride(int64_t(shape.size()) - 1) != 1 && shape.back() != 1)) return false;
  }
  if (mask) return !cu_seqlens && known_mask_type(*mask) && is_dense(check, *mask, {shape[0], shape[1]}, mask->scalar_type());
  if (!cu_seqlens) return true;
  return cu_seqlens->dim() == 1 && cu_seqlens->numel() > 0 &&
         is_dense(check, *cu_seqlens, {cu_seqlens->numel()}, ScalarType::Int) && spans(check, *cu_seqlens, shape[0]);
}

}  // namespace

int64_t keep(std::shared_ptr<const Plan> plan) {
  static int64_t last = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  plans().emplace(++last, std::move(plan));
  return last;
}

void forget(int64_t number) {
  std::shared_ptr<const Plan> gone;  // lets its tensors go after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans().find(number);
  if (found == plans().end()) return;
  gone = std::move(found->second);
  plans().erase(found);
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
  STD_TORCH_CHECK(plan, "s2sent_native: there is no plan of this number");
  const int64_t N = plan->num_blocks();
  if (int64_t(hidden_states.size()) != N || N > maximum_blocks || plan->down_weight.dim() != 2) return;
  const Checks check(hidden_states[0]);
  const Ints shape = shape_of(hidden_states[0]);
  const int64_t H = plan->down_weight.size(0);
  if (!is_ordinary(check, hidden_states, shape, mask, cu_seqlens)) return;
  const int64_t D = shape.back();
#define S2SENT_FITS(type, name, ...) \
  if (!has_floats(check, plan->name, {__VA_ARGS__})) return;
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_FITS)
#undef S2SENT_FITS
  if (D % plan->parts() || !has_floats(check, plan->alpha, {plan->parts(), N})) return;
  sentences.emplace(hidden_states[0], shape, mask, cu_seqlens);
  hidden.reserve(size_t(N));
  for (const Tensor& u : hidden_states) {
    hidden.push_back({u.const_data_ptr(), cu_seqlens ? 0 : u.stride(0), u.stride(cu_seqlens ? 0 : 1)});
  }
  dtype = dtype_of(hidden_states[0]);
  gate.sentences = sentences->count;
  gate.num_blocks = N;
  gate.size = D;
  gate.width = H;
  gate.activation = plan->activation;
  gate.eps = float(plan->eps);
#define S2SENT_SET(type, name, ...) gate.name = data_of(plan->name);
  S2SENT_FOR_EACH_GATE_TENSOR(S2SENT_SET)
#undef S2SENT_SET
}

}  // namespace s2sent::ops
