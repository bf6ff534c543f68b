// The ops on CPU tensors.

#include "on_cpu.h"

namespace s2sent::ops::cpu {

// ---------------------------------------------------------------- squeeze

void squeeze(
    const Tensors& hidden_states, int64_t first_block, int64_t num_blocks, const Optional& mask,
    const Optional& cu_seqlens, const Tensor& alpha, const Ints& y, const Optional& beta, int64_t pooling,
    const Tensor& squeezed, const Optional& pooled) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  Squeeze args = squeeze_arguments<Squeeze>(
      sentences, dtype_of(hidden_states[0]), hidden, first_block, num_blocks, alpha, beta.has_value(), pooling,
      squeezed, pooled);
  args.batch = real.batch;
  share_squeeze(sentences, args, factors_of(sentences, real.batch, num_blocks, args.parts, y, beta));
}

void squeeze_backward(
    const Optional& grad_squeezed, const Optional& grad_pooled, const Optional& grad_fused, const Optional& gates,
    const Ints& shape, const Optional& mask, const Optional& cu_seqlens, const Tensor& alpha, const Ints& y,
    const Optional& beta, int64_t pooling, const Tensors& grads) {
  STD_TORCH_CHECK(!grads.empty(), "s2sent_native: gradients do not fit");
  const Sentences sentences(grads[0], shape, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<void*> into = gradients_into(sentences.check, grads, shape);
  SqueezeBackward args = squeeze_backward_arguments<SqueezeBackward>(
      sentences, grads, into, alpha, beta.has_value(), pooling, grad_squeezed, grad_pooled, grad_fused, gates);
  const TokenFactors factors = factors_of(sentences, real.batch, args.num_blocks, args.parts, y, beta);
  args.batch = real.batch;
  args.factors = factors.view();
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num_blocks, grain, 3 * args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::squeeze_backward(args, begin, end, scratch);
  });
}

// ---------------------------------------------------------------- gate

void gate(
    const Tensor& squeezed, S2SENT_GATE_PARAMETERS int64_t num_blocks, int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& gates) {
  const Gate args =
      gate_arguments(squeezed, S2SENT_GATE_ARGUMENTS num_blocks, activation, eps, bottleneck, gates);
  share_bottleneck(args);
  share_excite(args);
}

void gate_pool(
    const Tensor& squeezed, const Tensor& pooled, S2SENT_GATE_PARAMETERS int64_t activation, double eps,
    const Tensor& bottleneck, const Tensor& output) {
  const Gate args =
      gate_pool_arguments(squeezed, pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, output);
  share_bottleneck(args);
  share_excite(args);
}

void gate_backward(
    const Optional& grad_gates, const Optional& grad_output, const Tensor& squeezed, const Optional& pooled,
    S2SENT_GATE_PARAMETERS int64_t activation, double eps, const Tensor& bottleneck, const Optional& grad_pooled,
    const Tensor& grad_logits, const Tensor& grad_normed, const Optional& normed) {
  const Gate args = gate_backward_arguments(
      grad_gates, grad_output, squeezed, pooled, S2SENT_GATE_ARGUMENTS activation, eps, bottleneck, grad_pooled,
      grad_logits, grad_normed, normed);
  share_bottleneck(args);
  share_gate(args, 2, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::excite_backward(args, begin, end, scratch);
  });
}

// x [B, rows] @ weight [rows, columns]
void multiply(const Tensor& x, const Tensor& weight, const Tensor& result) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "s2sent_native: expected two matrices");
  const int64_t count = x.size(0), columns = weight.size(1), chunks = product_chunks(weight);
  const std::unique_ptr<float[]> partial(new float[size_t(chunks * count * columns)]);
  const Product args = product_arguments(x, weight, partial.get(), result);
  const int64_t tiles = (columns + kProductColumns - 1) / kProductColumns;
  share(chunks * tiles, grain_of(count * columns * 64), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::multiply_rows(args, begin, end);
  });
  share(count, grain_of(chunks * columns), 0, [&](int64_t begin, int64_t end, float*) {
    s2sent::cpu::sum_products(args, begin, end);
  });
}

// ---------------------------------------------------------------- fuse

void fuse(
    const Tensors& hidden_states, const Tensor& gates, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& fused) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  Fuse args = fuse_arguments<Fuse>(sentences, hidden_states[0], hidden, gates, fused);
  args.batch = real.batch;
  share_fuse(sentences, args);
}

void fuse_backward(
    const Tensor& grad_fused, const Tensors& hidden_states, const Optional& mask, const Optional& cu_seqlens,
    const Tensor& grad_gates) {
  const Sentences sentences = sentences_of(hidden_states, mask, cu_seqlens);
  const RealBatch real(sentences);
  const std::vector<Rows> hidden = sentences.rows(hidden_states);
  FuseBackward args = fuse_backward_arguments<FuseBackward>(
      sentences, hidden_states[0], hidden, grad_fused, grad_gates);
  args.batch = real.batch;
  const int64_t grain = grain_of(typical_length(sentences) * args.size);
  share(sentences.count * args.num_blocks, grain, args.size, [&](int64_t begin, int64_t end, float* scratch) {
    s2sent::cpu::fuse_backward(args, begin, end, scratch);
  });
}

}  // namespace s2sent::ops::cpu
