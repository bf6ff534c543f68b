// A batch's real tokens and their factors. A CTA handles one sentence; if all tokens are real, one table serves every sentence.

#include "tokens.cuh"

namespace s2sent::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The distinct frequencies of the M parts, and which of them each part has.
struct Frequencies {
  int count;
  int32_t y[kMaxParts];
  int32_t of[kMaxParts];
};

__device__ float factor(int64_t y, int64_t r, int64_t length, int64_t num_blocks) {
  if (y >= length) return 0.0f;
  const double period = double(length), norm = y > 0 ? 1.4142135623730951 : 1.0;
  // y and r are less than the length. A 64-bit division is slow.
  const uint64_t turn = uint64_t(y) * uint64_t(2 * r + 1), whole = 4 * uint64_t(length);
  const uint64_t rest = length <= 1 << 15 ? uint32_t(turn) % uint32_t(whole) : turn % whole;
  const double wave = y > 0 ? cospi(double(rest) / (2.0 * period)) : 1.0;
  return float(6.0 / sqrt(double(num_blocks) * period) * (wave * norm / sqrt(period)));
}

__global__ void __launch_bounds__(kThreads) find_kernel(
    const __grid_constant__ TokenFinder a, const __grid_constant__ Frequencies frequencies) {
  wait_for_previous();  // returns at once, since this launch is an ordinary one, and lets the next kernel start
  const int64_t b = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  int64_t length = a.batch.packed ? a.batch.starts[b + 1] - a.batch.starts[b] : a.batch.size;
  if (a.lengths) {
    __shared__ int counts[kWarps], first, last;
    const int64_t row = b * a.batch.size;
    int64_t before = 0;
    for (int64_t start = 0; start < a.batch.size; start += kThreads) {
      const int64_t l = start + thread;
      const bool real = l < a.batch.size && a.batch.mask[row + l];
      const unsigned votes = __ballot_sync(~0u, real);
      if (lane == 0) counts[warp] = __popc(votes);
      __syncthreads();
      int64_t rank = before + __popc(votes & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) rank += counts[w];
        before += counts[w];
      }
      if (real) a.places[b * a.batch.size + rank] = int32_t(l);
      if (real && rank == 0) first = int(l);
      if (real && rank == before - 1) last = int(l);
      if (l < a.batch.size) a.ranks[b * a.batch.size + l] = real ? int32_t(rank) : -1;
      __syncthreads();
    }
    length = before;
    if (thread == 0) {
      a.lengths[b] = int32_t(length);
      a.firsts[b] = length > 0 && last - first == length - 1 ? first : -1;
    }
  }
  if (a.beta == nullptr) return;
  float* beta = a.beta + (a.batch.packed ? int64_t(a.batch.starts[b]) : b * a.stride_b);
  const int64_t columns = (length + kWarp - 1) / kWarp * kWarp;  // whole warps for each frequency
  for (int64_t i = blockIdx.y * kThreads + thread; i < frequencies.count * columns; i += gridDim.y * kThreads) {
    const int which = int(i / columns);
    const int64_t r = i % columns;
    if (r >= length) continue;
    const float value = factor(frequencies.y[which], r, length, a.num_blocks);
    for (int64_t m = 0; m < a.parts; ++m) {
      if (frequencies.of[m] == which) beta[m * a.stride_m + r] = value;
    }
  }
}

}  // namespace

cudaError_t find_tokens(const TokenFinder& args, cudaStream_t stream) {
  if (args.batch.sentences == 0 || args.batch.tokens == 0) {
    if (args.lengths && args.batch.sentences) {
      return cudaMemsetAsync(args.lengths, 0, size_t(args.batch.sentences) * sizeof(int32_t), stream);
    }
    return cudaSuccess;
  }
  if (args.parts > kMaxParts) return cudaErrorInvalidValue;
  Frequencies frequencies = {};
  for (int64_t m = 0; args.beta && m < args.parts; ++m) {
    int32_t& which = frequencies.of[m];
    while (which < frequencies.count && frequencies.y[which] != int32_t(args.y[m])) ++which;
    if (which == frequencies.count) frequencies.y[frequencies.count++] = int32_t(args.y[m]);
  }
  const bool shared = !args.batch.packed && !args.batch.mask;  // one table for all sentences
  // Several CTAs may share a table. A mask is scanned by one CTA per sentence.
  const unsigned ctas = unsigned(shared ? pieces(args.batch.size * args.parts, kThreads) : 1);
  const dim3 grid(unsigned(shared ? 1 : args.batch.sentences), ctas < 1024 ? ctas : 1024);
  find_kernel<<<grid, kThreads, 0, stream>>>(args, frequencies);
  return cudaGetLastError();
}

}  // namespace s2sent::cuda
