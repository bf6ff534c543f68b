"""One module called by several Python threads at once, forward and backward, for tests/sanitize_threads.sh.

Every call's result is also compared, bit by bit, with that of a call alone. Prints how many calls it made.
"""

import itertools
import sys
import threading

import torch

from s2sent_kernels import S2SentSelector

THREADS, N, B, L, D = 4, 5, 3, 37, 48


def calls(selector):
    """Functions without arguments, each over tensors of its own; all call one selector."""
    generator = torch.Generator().manual_seed(0)
    layouts = ("none", "mask", "packed")
    for dtype, layout, pooling, training in itertools.product(
        (torch.float32, torch.bfloat16), layouts, ("mean", "last", None), (False, True)
    ):
        shape = (B * L, D) if layout == "packed" else (B, L, D)
        hidden = [torch.randn(shape, generator=generator).to(dtype).requires_grad_(training) for _ in range(N)]
        where = {}
        if layout == "mask":
            where["attention_mask"] = torch.rand(B, L, generator=generator) < 0.6
        elif layout == "packed":
            where["cu_seqlens"] = torch.tensor([0, 3, 2 * L, B * L], dtype=torch.int32)

        def call(hidden=hidden, where=where, pooling=pooling, training=training):
            with torch.set_grad_enabled(training):
                out = selector(hidden, **where) if pooling is None else selector.pool(hidden, pooling=pooling, **where)
            grads = torch.autograd.grad(out.float().sum(), hidden) if training else ()
            return [out.detach(), *grads]

        yield call


def main(rounds):
    torch.manual_seed(0)
    selector = S2SentSelector(D, N, 16, 4, block_prior=True, gate_scale=4.0, backend="native").eval()
    made = list(calls(selector))
    alone = [call() for call in made]
    wrong, start = [], threading.Barrier(THREADS)

    def work(first):
        start.wait()
        for i in range(rounds * len(made)):
            place = (first + i) % len(made)
            if not all(map(torch.equal, made[place](), alone[place])):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{THREADS} threads, {THREADS * rounds * len(made)} calls, {len(wrong)} of them wrong", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2))
