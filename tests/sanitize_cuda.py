"""Every CUDA kernel of the native backend, or every Triton kernel, forward and backward, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck|racecheck|initcheck|synccheck --error-exitcode 1 \\
        python tests/sanitize_cuda.py [--narrow] [--share K/N] | --one-pass | --triton [NUMBER]

Without PyTorch's cache every tensor is an allocation of its own, so that a read beyond its end or of what was never written is
seen. PyTorch's own kernels run under the tool too; --kernel-name kernel_substring=s2sent leaves them out. Triton's kernels have
no such prefix: with --triton all are checked. Prints how many cases it ran.

--narrow: the cases of few features. With more, squeeze's backward writes by bulk copies, of which initcheck sees the first bytes.
--share K/N: every N-th case from the K-th on, K from 1: the tools are slow, and N processes take the shares side by side.
--one-pass: a few batches through csrc/cuda/sm90/ alone, for a tool that is slow with CTAs that wait for each other.
--triton: the batches of TRITON, or the one of that number. A first run without the tool fills Triton's cache; its compiler's
processes would run under the tool else.
"""

import itertools
import sys

import torch

from s2sent_kernels import GateParameters, functional
from s2sent_kernels.engines.native import engine as native
from s2sent_kernels.formula.call import Batch, BatchStatistics, Gating, Reading

KINDS = ("none", "mask", "packed")
SIZES = (12, 192)
# blocks, sentences, tokens, features, bottleneck, frequencies, dtype, kind, pooling, training. Few, because each is compiled:
# vector loads and none, every dtype, layout and path, batch statistics, and sentences of several sum chunks.
TRITON = (
    (3, 3, 37, 64, 16, 4, torch.float32, "mask", "mean", False),
    (12, 2, 70, 192, 33, 4, torch.bfloat16, "packed", "last", True),
    (6, 2, 20, 21, 5, 3, torch.float16, "mask", None, False),
    (5, 3, 33, 64, 16, 4, torch.float32, "none", None, True),
    (1, 1, 2060, 32, 5, 1, torch.float32, "none", "mean", False),
)


def make_parameters(num_blocks, size, width):
    def random(*shape):
        return torch.randn(shape, device="cuda", requires_grad=True)

    both = num_blocks * size
    statistics = torch.randn(both, device="cuda"), torch.rand(both, device="cuda") + 1
    return GateParameters(
        random(width, size),
        random(width),
        random(both, width),
        random(both),
        random(both),
        random(both),
        *statistics,
        random(num_blocks),
        random(),
    )


def where_tokens_are(kind, batch, length):
    if kind == "mask":
        return {"attention_mask": torch.rand(batch, length, device="cuda") < 0.6}
    if kind == "packed":
        inner = sorted(torch.randint(0, batch * length + 1, (batch - 1,)).tolist())
        return {"cu_seqlens": torch.tensor([0, *inner, batch * length], dtype=torch.int32, device="cuda")}
    return {}


def one_pass():
    cases = ((12, 9, 70, 768, 64, "none"), (6, 20, 40, 384, 32, "mask"), (2, 20, 64, 96, 8, "packed"))
    for num_blocks, batch, length, size, width, kind in cases:
        shape = (batch * length, size) if kind == "packed" else (batch, length, size)
        hidden = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_blocks)]
        where = where_tokens_are(kind, batch, length)
        mask, cu_seqlens = where.get("attention_mask"), where.get("cu_seqlens")
        parameters = make_parameters(num_blocks, size, width).each(torch.Tensor.detach)
        done = native.select_once(
            Batch(hidden, mask, cu_seqlens), Reading(2), parameters, Gating("tanh", 1e-5), always=True
        )
        assert done is not None, "the kernel does not support this batch"
        torch.cuda.synchronize()
        print(f"{num_blocks} blocks, {kind}", flush=True)
    print(f"{len(cases)} cases")


def planned(batch, parameters, frequencies, pooling):
    """The plan's calls and backward passes, each in one op; with statistics of the batch where it has two sentences."""
    gate, gating = parameters.each(torch.Tensor.detach), Gating("tanh", 1e-5, momentum=0.1)
    reading, needed = Reading(frequencies, pooling=pooling), [n % 3 != 1 for n in range(batch.num_blocks)]
    prepared = native.prepare(gate, batch.num_blocks, reading, gating)
    if pooling is None:
        fused, squeezed, gates = prepared.select(*batch, keep=True)
        assert prepared.select_backward(fused, squeezed, gates, batch, needed)
        return
    output, squeezed, pooled = prepared.select_pool(*batch, pooling, keep=True)
    assert prepared.select_pool_backward(output, squeezed, pooled, None, batch.layout, pooling, needed)
    if batch.num_sentences < 2:
        return
    output, squeezed, pooled, *statistics = prepared.select_pool_in_training(*batch, pooling, 0.1)
    found = BatchStatistics(*statistics)
    assert prepared.select_pool_backward(output, squeezed, pooled, found, batch.layout, pooling, needed)


def call(hidden, parameters, pooling, training, options):
    """Forward and backward."""
    if pooling is None:
        output = functional.select(hidden, parameters, training=training, **options)
    else:
        output = functional.select_pool(hidden, parameters, pooling=pooling, training=training, **options)
    output.float().sum().backward()


def triton(number=None):
    chosen = TRITON if number is None else TRITON[number : number + 1]
    for num_blocks, batch, length, size, width, frequencies, dtype, kind, pooling, training in chosen:
        shape = (batch * length, size) if kind == "packed" else (batch, length, size)
        hidden = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(num_blocks)]
        where, parameters = where_tokens_are(kind, batch, length), make_parameters(num_blocks, size, width)
        options = {"frequencies": frequencies, "backend": "triton", **where}
        call(hidden, parameters, pooling, training, options)
        plain, detached = [u.detach() for u in hidden], parameters.each(torch.Tensor.detach)
        with torch.no_grad():
            functional.squeeze(plain, pooling=pooling, **options)
            gates = functional.gate(
                torch.randn(batch, size, device="cuda"), detached, num_blocks=num_blocks, backend="triton"
            )
            functional.fuse(plain, gates, backend="triton", **where)
        torch.cuda.synchronize()
        print(f"{num_blocks} blocks, {dtype}, {kind}, {pooling}", flush=True)
    print(f"{len(chosen)} cases")


def chosen_cases():
    """(shape, dtype, kind): a third of all, because the tools are slow."""
    shapes = itertools.product((1, 5, 20), (1, 3), (1, 37, 70), SIZES, (5, 33))
    dtypes = (torch.float32, torch.bfloat16)
    for (num_blocks, batch, length, size, width), dtype, kind in itertools.product(shapes, dtypes, KINDS):
        if (num_blocks + batch + length + size + width) % 3 == 0:
            yield (num_blocks, batch, length, size, width), dtype, kind


def main(share=1, shares=1, narrow=False):
    torch.manual_seed(0)
    count = 0
    cases = [case for case in chosen_cases() if not narrow or case[0][3] == min(SIZES)]
    for (num_blocks, batch, length, size, width), dtype, kind in cases[share - 1 :: shares]:
        shape = (batch * length, size) if kind == "packed" else (batch, length, size)
        hidden = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(num_blocks)]
        options = {"frequencies": 1 if num_blocks == 1 else 4, "backend": "native"}
        options |= where_tokens_are(kind, batch, length)
        parameters = make_parameters(num_blocks, size, width)
        where = options.get("attention_mask"), options.get("cu_seqlens")
        plain = Batch([u.detach() for u in hidden], *where)
        for pooling, training in itertools.product(("mean", "last", None), (False, True)):
            if training and batch < 2:
                continue
            call(hidden, parameters, pooling, training, options)
            planned(plain, parameters, options["frequencies"], pooling)
        count += 1
    torch.cuda.synchronize()
    print(f"{count} cases")


if __name__ == "__main__":
    if "--triton" in sys.argv:
        triton(*map(int, sys.argv[sys.argv.index("--triton") + 1 :]))
    elif "--one-pass" in sys.argv:
        one_pass()
    else:
        share = sys.argv[sys.argv.index("--share") + 1] if "--share" in sys.argv else "1/1"
        main(*map(int, share.split("/")), narrow="--narrow" in sys.argv)
