// torch.ops.s2sent_native.*: private ops over the kernels, through LibTorch's stable ABI. They write into tensors that the
// caller allocated. What is checked here is what a kernel's memory safety rests on; everything else was checked before.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/fuse.h"
#include "cpu/gate.h"
#include "cpu/squeeze.h"

// Importing s2sent_kernels._C registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// Goes up with every change of a schema below; s2sent_kernels/native.py knows the number it was written for.
constexpr int64_t kInterface = 1;

int64_t interface_version() { return kInterface; }

// ---------------------------------------------------------------- checks

void check_shape(const Tensor& tensor, const Ints& shape, const char* name) {
  bool same = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(int64_t(i)) == shape[i];
  STD_TORCH_CHECK(same, "s2sent_native: ", name, " has another shape than its kernel expects");
}

void check_dense(const Tensor& tensor, const Ints& shape, ScalarType dtype, const char* name) {
  check_shape(tensor, shape, name);
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype, "s2sent_native: ", name,
      " must be a contiguous CPU tensor of its kernel's dtype");
}

const float* floats(const Tensor& tensor, const Ints& shape, const char* name) {
  check_dense(tensor, shape, ScalarType::Float, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

const float* floats(const std::optional<Tensor>& tensor, const Ints& shape, const char* name) {
  return tensor ? floats(*tensor, shape, name) : nullptr;
}

float* written(const Tensor& tensor, const Ints& shape, const char* name) {
  check_dense(tensor, shape, ScalarType::Float, name);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

s2sent::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return s2sent::DType::kFloat32;
    case ScalarType::BFloat16: return s2sent::DType::kBFloat16;
    case ScalarType::Half: return s2sent::DType::kFloat16;
    default: STD_TORCH_CHECK(false, "s2sent_native: expected float32, bfloat16 or float16");
  }
}

// ---------------------------------------------------------------- batches

// A batch's description and the memory behind it.
struct Sentences {
  s2sent::Batch batch;
  Ints shape;  // of a hidden state
  Ints starts;
  Ints places;

  Sentences(const Ints& shape, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens)
      : shape(shape) {
    const bool packed = cu_seqlens.has_value();
    STD_TORCH_CHECK(shape.size() == (packed ? 2 : 3), "s2sent_native: hidden states have a wrong rank");
    const int64_t count = packed ? cu_seqlens->numel() - 1 : shape[0], size = packed ? 0 : shape[1];
    starts.resize(size_t(count) + 1, 0);
    if (packed) {
      check_dense(*cu_seqlens, {count + 1}, ScalarType::Int, "cu_seqlens");
      const int32_t* ends = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
      for (int64_t b = 0; b <= count; ++b) {
        STD_TORCH_CHECK(ends[b] >= (b ? ends[b - 1] : 0), "s2sent_native: cu_seqlens decreases");
        starts[b] = ends[b];
      }
      STD_TORCH_CHECK(starts[0] == 0 && starts[count] == shape[0], "s2sent_native: cu_seqlens does not span the tokens");
    } else if (mask) {
      check_dense(*mask, {count, size}, ScalarType::Bool, "attention_mask");
      const bool* real = static_cast<const bool*>(mask->const_data_ptr());
      places.reserve(size_t(count * size));
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t l = 0; l < size; ++l) {
          if (real[b * size + l]) places.push_back(l);
        }
        starts[b + 1] = int64_t(places.size());
      }
    } else {
      for (int64_t b = 0; b < count; ++b) starts[b + 1] = starts[b] + size;
    }
    const bool listed = !packed && mask.has_value();
    places.reserve(1);  // so that an empty list is a list
    batch = {count, size, packed, starts.data(), listed ? places.data() : nullptr};
  }

  Sentences(const Sentences&) = delete;

  int64_t size() const { return shape.back(); }

  // ``tensor``, which has the shape of a hidden state and is dense in D.
  s2sent::Rows rows(const Tensor& tensor, ScalarType dtype) const {
    check_shape(tensor, shape, "a hidden state or its gradient");
    const bool dense = size() == 1 || tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1;
    STD_TORCH_CHECK(
        tensor.is_cpu() && tensor.scalar_type() == dtype && dense,
        "s2sent_native: hidden states must be CPU tensors of one dtype, dense in their features");
    if (batch.packed) return {tensor.const_data_ptr(), 0, tensor.stride(0)};
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  }

  std::vector<s2sent::Rows> rows(const Tensors& tensors) const {
    std::vector<s2sent::Rows> all;
    for (const Tensor& tensor : tensors) all.push_back(rows(tensor, tensors[0].scalar_type()));
    return all;
  }
};

Ints shape_of(const Tensor& tensor) {
  Ints shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

// beta [M, l] of profile ``paper``, in float64 and rounded once: 6 / sqrt(N l) c(y_m, r, l). One table a length.
struct TokenFactors {
  std::map<int64_t, std::vector<float>> tables;
  std::vector<const float*> beta;
  Ints strides;

  TokenFactors(
      const s2sent::Batch& batch, int64_t num_blocks, const Ints& y, const std::optional<Tensor>& official, int64_t parts) {
    const float* given = floats(official, {parts, batch.size}, "beta");
    STD_TORCH_CHECK(given || int64_t(y.size()) == parts, "s2sent_native: expected a frequency for every part");
    for (int64_t b = 0; b < batch.sentences; ++b) {
      const int64_t length = batch.length(b);
      if (!given && !tables.count(length)) tables[length] = table(length, num_blocks, y);
      beta.push_back(given ? given : tables[length].data());
      strides.push_back(given ? batch.size : length);
    }
  }

  static std::vector<float> table(int64_t length, int64_t num_blocks, const Ints& y) {
    const double pi = 3.14159265358979323846, period = double(length);
    std::vector<float> values(y.size() * size_t(length), 0.0f);
    for (size_t m = 0; m < y.size(); ++m) {
      if (y[m] >= length) continue;
      float* to = values.data() + m * size_t(length);
      size_t same = 0;
      while (y[same] != y[m]) ++same;
      if (same < m) {
        std::copy_n(values.data() + same * size_t(length), length, to);
        continue;
      }
      const double norm = 1.0 + (std::sqrt(2.0) - 1.0) * (y[m] > 0), scale = 6.0 / std::sqrt(double(num_blocks) * period);
      for (int64_t r = 0; r < length; ++r) {
        const int64_t half_steps = y[m] * (2 * r + 1) % (4 * length);
        to[r] = float(scale * (std::cos(double(half_steps) * (pi / 2) / period) * norm / std::sqrt(period)));
      }
    }
    return values;
  }
};

// Calls work(begin, end, scratch) on the threads of torch's pool, with ``scratch_size`` floats each.
template <class Work>
void share(int64_t items, int64_t grain, int64_t scratch_size, const Work& work) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[size_t(scratch_size)]);
    work(begin, end, scratch.get());
  });
}

// Items a thread takes at least, where each reads ``elements``: fewer are not worth waking a thread.
int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const Tensor& alpha, const Ints& y, const std::optional<Tensor>& beta,
    int64_t pooling, const Tensor& squeezed, const std::optional<Tensor>& pooled) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(shape_of(hidden_states[0]), mask, cu_seqlens);
  const s2sent::Batch& batch = sentences.batch;
  const int64_t num = int64_t(hidden_states.size()), size = sentences.size(), parts = alpha.size(0);
  STD_TORCH_CHECK(
      first_block >= 0 && first_block + num <= num_blocks && parts > 0 && size % parts == 0 && pooling >= 0 && pooling <= 3,
      "s2sent_native: blocks, parts or pooling do not fit");
  const std::vector<s2sent::Rows> hidden = sentences.rows(hidden_states);
  const TokenFactors factors(batch, num_blocks, y, beta, parts);
  const std::unique_ptr<float[]> sums(new float[size_t(batch.sentences * num * size)]);
  s2sent::Squeeze args = {
      batch,
      dtype_of(hidden_states[0]),
      num,
      first_block,
      num_blocks,
      size,
      parts,
      pooled ? s2sent::Pooling(pooling) : s2sent::Pooling::kNone,
      hidden.data(),
      floats(alpha, {parts, num_blocks}, "alpha"),
      factors.beta.data(),
      factors.strides.data(),
      beta.has_value(),
      sums.get(),
      pooled ? written(*pooled, {batch.sentences, num_blocks, size}, "pooled") : nullptr,
      written(squeezed, {batch.sentences, size}, "squeezed"),
  };
  const int64_t tokens = batch.packed ? sentences.shape[0] / std::max<int64_t>(1, batch.sentences) : batch.size;
  share(batch.sentences * num, grain_of(tokens * size), 2 * size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::sum_tokens(args, begin, end, scratch);
  });
  share(batch.sentences, grain_of(num * size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::sum_blocks(args, begin, end);
  });
}

void squeeze_backward(
    const std::optional<Tensor>& grad_squeezed, const std::optional<Tensor>& grad_pooled,
    const std::optional<Tensor>& grad_fused, const std::optional<Tensor>& gates, const Ints& shape,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens, const Tensor& alpha, const Ints& y,
    const std::optional<Tensor>& beta, int64_t pooling, const Tensors& grads) {
  STD_TORCH_CHECK(
      !grads.empty() && grad_fused.has_value() == gates.has_value(), "s2sent_native: gradients do not fit");
  const Sentences sentences(shape, mask, cu_seqlens);
  const s2sent::Batch& batch = sentences.batch;
  const int64_t num_blocks = int64_t(grads.size()), size = sentences.size(), parts = alpha.size(0);
  STD_TORCH_CHECK(
      parts > 0 && size % parts == 0 && pooling >= 0 && pooling <= 3, "s2sent_native: parts or pooling do not fit");
  const TokenFactors factors(batch, num_blocks, y, beta, parts);
  const ScalarType dtype = grads[0].scalar_type();
  std::vector<void*> into;
  for (const Tensor& grad : grads) {
    const bool wanted = grad.numel() != 0;
    if (wanted) check_dense(grad, shape, dtype, "a hidden state's gradient");
    into.push_back(wanted ? grad.mutable_data_ptr() : nullptr);
  }
  std::optional<s2sent::Rows> fused;
  if (grad_fused) fused = sentences.rows(*grad_fused, dtype);
  const s2sent::SqueezeBackward args = {
      batch,
      dtype_of(grads[0]),
      num_blocks,
      size,
      parts,
      s2sent::Pooling(pooling),
      floats(alpha, {parts, num_blocks}, "alpha"),
      factors.beta.data(),
      factors.strides.data(),
      beta.has_value(),
      floats(grad_squeezed, {batch.sentences, size}, "grad_squeezed"),
      floats(grad_pooled, {batch.sentences, num_blocks, size}, "grad_pooled"),
      fused ? &*fused : nullptr,
      floats(gates, {batch.sentences, num_blocks, size}, "gates"),
      into.data(),
  };
  const int64_t tokens = batch.packed ? shape[0] / std::max<int64_t>(1, batch.sentences) : batch.size;
  share(batch.sentences * num_blocks, grain_of(tokens * size), 3 * size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::squeeze_backward(args, begin, end, scratch);
  });
}

// ---------------------------------------------------------------- gate

float* optional_written(const std::optional<Tensor>& tensor, const Ints& shape, const char* name) {
  return tensor ? written(*tensor, shape, name) : nullptr;
}

// Calls work for the items of gate.h, with ``copies`` of the item's gates in the scratch.
template <class Work>
void share_gate(const s2sent::Gate& args, int64_t copies, const Work& work) {
  const int64_t sentences = s2sent::kGateSentences, features = s2sent::kGateFeatures;
  const int64_t items = (args.sentences + sentences - 1) / sentences * ((args.size + features - 1) / features);
  const int64_t scratch_size = features * (args.width + copies * std::min(args.sentences, sentences) * args.num_blocks);
  share(items, grain_of(args.num_blocks * features * args.width), scratch_size, work);
}

void gate(
    const Tensor& squeezed, const Tensor& down_weight, const Tensor& down_bias, const Tensor& up_weight,
    const Tensor& up_bias, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& prior, int64_t num_blocks, bool relu, double eps, const Tensor& bottleneck,
    const std::optional<Tensor>& gates, const std::optional<Tensor>& pooled, const std::optional<Tensor>& output,
    const std::optional<Tensor>& grad_gates, const std::optional<Tensor>& grad_output,
    const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_logits,
    const std::optional<Tensor>& grad_normed, const std::optional<Tensor>& normed) {
  STD_TORCH_CHECK(
      squeezed.dim() == 2 && down_weight.dim() == 2 && num_blocks > 0 &&
          (pooled.has_value() == output.has_value() || grad_logits),
      "s2sent_native: the gate's arguments do not fit");
  STD_TORCH_CHECK(
      !norm_weight || (norm_bias && running_mean && running_var), "s2sent_native: expected all of the norm's tensors");
  const int64_t count = squeezed.size(0), size = squeezed.size(1), width = down_weight.size(0), both = num_blocks * size;
  if (output) check_dense(*output, {count, size}, output->scalar_type(), "output");
  const s2sent::Gate args = {
      count,
      num_blocks,
      size,
      width,
      relu,
      float(eps),
      floats(squeezed, {count, size}, "squeezed"),
      floats(down_weight, {width, size}, "down_weight"),
      floats(down_bias, {width}, "down_bias"),
      floats(up_weight, {both, width}, "up_weight"),
      floats(up_bias, {both}, "up_bias"),
      floats(norm_weight, {both}, "norm_weight"),
      floats(norm_bias, {both}, "norm_bias"),
      floats(running_mean, {both}, "running_mean"),
      floats(running_var, {both}, "running_var"),
      floats(prior, {num_blocks}, "block_prior"),
      written(bottleneck, {count, width}, "bottleneck"),
      optional_written(gates, {count, num_blocks, size}, "gates"),
      floats(pooled, {count, num_blocks, size}, "pooled"),
      output ? output->mutable_data_ptr() : nullptr,
      output ? dtype_of(*output) : s2sent::DType::kFloat32,
      floats(grad_gates, {count, num_blocks, size}, "grad_gates"),
      floats(grad_output, {count, size}, "grad_output"),
      optional_written(grad_pooled, {count, num_blocks, size}, "grad_pooled"),
      optional_written(grad_logits, {count, num_blocks, size}, "grad_logits"),
      optional_written(grad_normed, {count, num_blocks, size}, "grad_normed"),
      optional_written(normed, {count, num_blocks, size}, "normed"),
  };
  const bool backward = grad_logits.has_value();
  STD_TORCH_CHECK(
      !backward || (grad_normed && (!norm_weight || normed) && (pooled ? grad_output && grad_pooled : !!grad_gates)),
      "s2sent_native: the gate's gradients do not fit");
  share(width, grain_of(count * size), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::bottleneck(args, begin, end);
  });
  if (backward) {
    share_gate(args, 2, [&](int64_t begin, int64_t end, float* scratch) {
      s2sent::excite_backward(args, begin, end, scratch);
    });
  } else {
    share_gate(args, 1, [&](int64_t begin, int64_t end, float* scratch) { s2sent::excite(args, begin, end, scratch); });
  }
}

// x [B, rows] @ weight [rows, columns], each sentence's sum in one order.
void multiply(const Tensor& x, const Tensor& weight, const Tensor& result) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "s2sent_native: expected two matrices");
  const int64_t count = x.size(0), rows = weight.size(0), columns = weight.size(1);
  const int64_t chunks = (rows + s2sent::kProductRows - 1) / s2sent::kProductRows;
  const std::unique_ptr<float[]> partial(new float[size_t(chunks * count * columns)]);
  const s2sent::Product args = {
      count,
      rows,
      columns,
      floats(x, {count, rows}, "x"),
      floats(weight, {rows, columns}, "weight"),
      partial.get(),
      written(result, {count, columns}, "result"),
  };
  const int64_t tiles = (columns + s2sent::kProductColumns - 1) / s2sent::kProductColumns;
  share(chunks * tiles, grain_of(count * columns * 64), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::multiply_rows(args, begin, end);
  });
  share(count, grain_of(chunks * columns), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::sum_products(args, begin, end);
  });
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const Tensor& fused) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(shape_of(hidden_states[0]), mask, cu_seqlens);
  const s2sent::Batch& batch = sentences.batch;
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size();
  const std::vector<s2sent::Rows> hidden = sentences.rows(hidden_states);
  check_dense(fused, sentences.shape, hidden_states[0].scalar_type(), "fused");
  const s2sent::Fuse args = {
      batch,
      dtype_of(hidden_states[0]),
      num_blocks,
      size,
      hidden.data(),
      floats(gates, {batch.sentences, num_blocks, size}, "gates"),
      fused.mutable_data_ptr(),
  };
  const int64_t rows = batch.packed ? sentences.shape[0] : batch.sentences * batch.size;
  share(rows, grain_of(num_blocks * size), size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::fuse(args, begin, end, scratch);
  });
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, const Tensor& grad_gates) {
  STD_TORCH_CHECK(!hidden_states.empty(), "s2sent_native: expected a hidden state");
  const Sentences sentences(shape_of(hidden_states[0]), mask, cu_seqlens);
  const s2sent::Batch& batch = sentences.batch;
  const int64_t num_blocks = int64_t(hidden_states.size()), size = sentences.size();
  const std::vector<s2sent::Rows> hidden = sentences.rows(hidden_states);
  const s2sent::FuseBackward args = {
      batch,
      dtype_of(hidden_states[0]),
      num_blocks,
      size,
      hidden.data(),
      sentences.rows(grad_fused, hidden_states[0].scalar_type()),
      written(grad_gates, {batch.sentences, num_blocks, size}, "grad_gates"),
  };
  const int64_t tokens = batch.packed ? sentences.shape[0] / std::max<int64_t>(1, batch.sentences) : batch.size;
  share(batch.sentences * num_blocks, grain_of(tokens * size), size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::fuse_backward(args, begin, end, scratch);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(s2sent_native, m) {
  m.def("interface_version() -> int");
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
}

STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CompositeExplicitAutograd, m) {
  m.impl("interface_version", TORCH_BOX(&interface_version));
}

STABLE_TORCH_LIBRARY_IMPL(s2sent_native, CPU, m) {
  m.impl("squeeze", TORCH_BOX(&squeeze));
  m.impl("squeeze_backward", TORCH_BOX(&squeeze_backward));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("multiply", TORCH_BOX(&multiply));
  m.impl("fuse", TORCH_BOX(&fuse));
  m.impl("fuse_backward", TORCH_BOX(&fuse_backward));
}
