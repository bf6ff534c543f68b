"""Values that are wrong whatever else is passed, by the kind of argument."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

N = 3  # hidden states of the calls that are made wrong
NAN, INF = float("nan"), float("inf")

NO_NUMBER = (None, "1", b"1", [1.0], 1j, torch.ones(2), {})
WRONG: dict[str, tuple[Any, ...]] = {
    "word": (3, 1.5, True, b"mean", ["mean"], "", "Mean", "no such", "\0", {}, torch.zeros(1)),
    "count": (None, "4", b"4", 2.0, NAN, True, [2], 1j, 0, -1, -(2**63), torch.ones(2)),
    "frequencies": (None, "4", 2.0, NAN, True, [2], 0, -1, 5, 10**6, 2**31, 2**63 - 1, 2**63, 2**70, torch.ones(2)),
    "positive": (*NO_NUMBER, True, NAN, INF, -INF, -1.0, -1, 2**1024),
    "share": (*NO_NUMBER[1:], True, NAN, INF, -INF, -0.5, 1.5, 2**1024),
    "finite": (*NO_NUMBER[1:], True, NAN, INF, -INF, 2**1024),
    "flag": (None, "no", "", 0, 1, 2.0, NAN, [], torch.tensor(True)),
    "blocks": (
        "first",
        "last",
        "last:0",
        "last:-1",
        "last:99",
        "last:1.5",
        3,
        1.5,
        True,
        [],
        [0, 0],
        [99],
        [-99],
        [1.0],
    )
    + ([True], [None], ["0"], [2**70], {}, b"last:1"),
    "block_norm": (3, True, "none", "Final", "", b"final", ["final"], torch.ones(1)),
    "encoder": (None, "bert", 3, nn.Linear(2, 2), nn.Sequential(), {}, torch.ones(2)),
    "device": ("nowhere", 1.5, [], {}, "cpu:x", ("cpu",)),
    "dtype": ("float32", 3, torch.int64, torch.complex64, torch.bool, float, [torch.float32]),
    "index": (None, "0", 1.5, [0], -1, N, 2**63, 2**70, True, NAN),
}


def wrong_tensors(like: Tensor) -> Iterator[Any]:
    """What cannot stand where ``like`` does."""
    yield from (None, "tensor", 1.0, 3, True, like.tolist(), {}, like.detach().float().numpy())
    yield like[None]
    yield like.new_zeros([size + 1 for size in like.shape] or [1])
    yield like.new_zeros(())[None, None, None, None]
    yield like.to("meta")
    yield like.to(torch.complex64)
    if like.is_floating_point():
        yield like.to(torch.int64)
        yield like.to(torch.float8_e5m2)
        yield torch.quantize_per_tensor(like.detach().float(), 0.1, 0, torch.qint8)
    if like.dim():
        yield like.detach().to_sparse()
    if like.dim() == 2:
        yield like.detach().to_sparse_csr()
    if like.dim() > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prototype, says torch
            yield torch.nested.nested_tensor([row.detach() for row in like])
            yield torch.nested.nested_tensor([row.detach() for row in like], layout=torch.jagged)


def wrong(kind: str, value: Any, rng: random.Random) -> Any:
    if kind == "tensor":
        return rng.choice(list(wrong_tensors(value)))
    if kind in ("mask", "cu_seqlens"):
        values = [v for v in wrong_tensors(value) if v is not None]
        if kind == "cu_seqlens":
            values += [value.long(), value.flip(0) + 1, value + 1, value - 1, value * 2, value[:0]]
            values += [torch.full_like(value, 2**31 - 1), torch.full_like(value, -(2**31))]
        else:  # any real dtype is a mask
            values = [
                v
                for v in values
                if not (isinstance(v, Tensor) and v.dtype in (torch.int64, torch.float8_e5m2)) or v.dim() > 2
            ]
        return rng.choice(values)
    if kind == "optional":  # a tensor of the gate's that may be left out
        return rng.choice([v for v in wrong_tensors(value) if v is not None])
    if kind == "states":
        return wrong_states(value, rng)
    return rng.choice(WRONG[kind])


def wrong_states(value: list[Tensor], rng: random.Random) -> Any:
    others = (
        None,
        "states",
        3,
        {},
        {"a": value[0]},
        torch.stack(value),
        iter(value),
        (u for u in value),
        [],
        set(value),
    )
    if rng.random() < 0.4:
        return rng.choice(others)
    changed = list(value)
    place = rng.randrange(len(value))
    changed[place] = rng.choice(list(wrong_tensors(value[place])))
    return changed
