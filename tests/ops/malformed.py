"""Wrong calls of the native backend's private ops: python tests/ops/malformed.py CALLS [SEED]

A call is a right one, of which some arguments were changed. It may raise, or give anything; it may not crash, nor access memory
outside of its tensors, which `make sanitize` notices. The last call that was printed is the one that crashed.
"""

from __future__ import annotations

import faulthandler
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

import s2sent_kernels
from s2sent_kernels.engines.native import limits

B, L, N, D, M, H = 3, 5, 4, 8, 2, 3
OPS = (
    "squeeze",
    "squeeze_backward",
    "gate",
    "gate_pool",
    "gate_in_training",
    "gate_backward",
    "fuse",
    "fuse_backward",
    "planned_pool",
    "planned_pool_in_training",
    "planned_pool_backward",
    "planned_select",
    "planned_select_backward",
)
NUMBERS = (-1, 0, 1, 2, 7, 129, 2**31, 2**62, 2**63 - 1, -(2**63))
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)


class Call:
    """One random right call: named arguments in the order of the op's schema."""

    def __init__(self, name: str, rng: random.Random, packed: bool | None = None) -> None:
        self.rng, self.packed = rng, rng.random() < 0.4 if packed is None else packed
        self.owner: torch.Tensor | None = None  # of the plan
        schema = getattr(torch.ops.s2sent_native, name).default._schema
        self.arguments = {each.name: self.right(each.name) for each in schema.arguments}

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape)

    def right(self, name: str) -> Any:
        shape = (B * L, D) if self.packed else (B, L, D)
        if name == "plan":
            return self.planned()
        made: dict[str, Callable[[], Any]] = {
            "hidden_states": lambda: [self.floats(*shape) for _ in range(N)],
            "grads": lambda: [self.floats(*shape) for _ in range(N)],
            "first_block": lambda: 0,
            "num_blocks": lambda: N,
            "mask": lambda: None if self.packed or self.rng.random() < 0.5 else (torch.rand(B, L) < 0.7),
            "cu_seqlens": lambda: torch.tensor([0, L, 2 * L - 2, B * L], dtype=torch.int32) if self.packed else None,
            "alpha": lambda: self.floats(M, N),
            "y": lambda: [0, 1],
            "beta": lambda: None,
            "pooling": lambda: self.rng.choice([0, 1, 2, 3]),
            "squeezed": lambda: self.floats(B, D),
            "pooled": lambda: self.floats(B, N, D),
            "grad_squeezed": lambda: self.floats(B, D),
            "grad_pooled": lambda: self.floats(B, N, D),
            "grad_fused": lambda: self.floats(*shape),
            "grad_output": lambda: self.floats(B, D),
            "grad_gates": lambda: self.floats(B, N, D),
            "gates": lambda: self.floats(B, N, D),
            "fused": lambda: self.floats(*shape),
            "shape": lambda: list(shape),
            "needed": lambda: [1] * N,
            "keep": lambda: self.rng.random() < 0.5,
            "activation": lambda: 0,
            "eps": lambda: 1e-5,
            "momentum": lambda: 0.1,
            "bottleneck": lambda: self.floats(B, H),
            "output": lambda: self.floats(B, D),
            "result": lambda: self.floats(B, N, D),
            "mean": lambda: self.floats(N * D),
            "inverse_std": lambda: self.floats(N * D),
            "down_weight": lambda: self.floats(H, D),
            "down_bias": lambda: self.floats(H),
            "up_weight": lambda: self.floats(N * D, H),
            "up_bias": lambda: self.floats(N * D),
            "norm_weight": lambda: self.floats(N * D),
            "norm_bias": lambda: self.floats(N * D),
            "running_mean": lambda: self.floats(N * D),
            "running_var": lambda: self.floats(N * D),
            "block_prior": lambda: self.floats(N),
            "gate_scale": lambda: self.floats(1)[0],
        }
        return made[name]()

    def planned(self) -> int:
        schema = torch.ops.s2sent_native.plan.default._schema
        arguments = [self.right(each.name) for each in schema.arguments]
        if self.rng.random() < 0.3:
            place = self.rng.randrange(len(arguments))
            arguments[place] = self.wrong(arguments[place])
        number, self.owner = torch.ops.s2sent_native.plan(*arguments)
        return number

    def mutate(self) -> None:
        for name in self.rng.sample(sorted(self.arguments), self.rng.choice([1, 1, 1, 2, 3])):
            self.arguments[name] = self.wrong(self.arguments[name])

    def wrong(self, value: Any) -> Any:
        rng = self.rng
        if isinstance(value, torch.Tensor):
            return rng.choice([self.reshaped, self.retyped, self.viewed, self.revalued])(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return rng.choice(NUMBERS)
        if isinstance(value, float):
            return rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e300])
        if isinstance(value, list):
            some = list(value)
            kind = rng.randrange(4)
            if kind == 0 or not some:
                return some[: rng.randrange(len(some) + 1)]
            if kind == 1:
                return some + some
            place = rng.randrange(len(some))
            some[place] = self.wrong(some[place])
            return some
        return rng.choice([None, self.floats(B, L), torch.tensor([0, 3, 15], dtype=torch.int32), torch.empty(0)])

    def reshaped(self, value: torch.Tensor) -> torch.Tensor:
        shape = list(value.shape)
        kind = self.rng.randrange(4)
        if kind == 0 and shape:
            shape[self.rng.randrange(len(shape))] = self.rng.choice([0, 1, 2, 3, 9])
        elif kind == 1:
            shape = shape[1:]
        elif kind == 2:
            shape = [*shape, self.rng.choice([0, 1, 2])]
        else:
            shape = [0]
        return torch.zeros(shape, dtype=value.dtype)

    def retyped(self, value: torch.Tensor) -> torch.Tensor:
        kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64]
        return value.to(self.rng.choice(kinds))

    def viewed(self, value: torch.Tensor) -> torch.Tensor:
        kind = self.rng.randrange(3)
        if kind == 0 and value.dim():
            return value[:1].expand(value.shape) if len(value) else value
        if kind == 1 and value.dim() > 1:
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.stack([value, value], dim=-1)[..., 0]

    def revalued(self, value: torch.Tensor) -> torch.Tensor:
        if value.dtype == torch.int32:  # cu_seqlens
            return torch.tensor(
                self.rng.choice(
                    [[0, 99, 3, 15], [5, 4, 3, 2], [-7, 0, 1, 15], [0, 15], [0, 0, 0, 15], [2**31 - 1] * 4]
                ),
                dtype=torch.int32,
            )
        return torch.full_like(
            value, self.rng.choice([float("nan"), float("inf"), -1e30, 0.0]) if value.is_floating_point() else 1
        )


def main(calls: int, seed: int) -> None:
    faulthandler.enable()
    assert limits.status().usable, limits.status().reason
    done = {"gave": 0, "refused": 0}
    for number in range(calls):
        rng = random.Random(seed * 1_000_003 + number)
        name = rng.choice(OPS)
        print(number, name, end="\r", flush=True)
        try:
            call = Call(name, rng)
            call.mutate()
            getattr(torch.ops.s2sent_native, name)(*call.arguments.values())
            done["gave"] += 1
        except REFUSED:
            done["refused"] += 1
    print(f"{calls} calls of {s2sent_kernels.__name__}: {done['gave']} gave a result, {done['refused']} were refused")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
