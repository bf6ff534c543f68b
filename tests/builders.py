"""Builders that several test files share: batches, packing, gate parameters, output gradients, the op path."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from s2sent_kernels import GateParameters, functional

torch.set_num_threads(1)  # the tensors are tiny, and with pytest -n the threads would fight over the cores

MASKS = ("none", "right", "left", "holes", "mixed")
LAYOUTS = ("contiguous", "strided", "sliced", "expanded")
GRADIENTS = ("random", "strided", "expanded")


class Batch(NamedTuple):
    hidden_states: list[Tensor]  # N x [B, L, D]
    attention_mask: Tensor | None  # [B, L] bool


def make_mask(kind: str, B: int, L: int, generator: torch.Generator) -> Tensor | None:
    """[B, L] bool. "right", "left" and "holes" leave at least one real token to a sentence; "mixed" takes one of the
    three for each row in turn, and every fourth row is empty."""
    if kind == "none":
        return None
    lengths = torch.randint(1, L + 1, (B, 1), generator=generator)
    place = torch.arange(L)
    right = place < lengths
    left = place >= L - lengths
    holes = torch.rand(B, L, generator=generator) < 0.6
    holes[:, L // 2] = True
    if kind == "mixed":
        row = torch.arange(B)[:, None] % 4
        return torch.where(row == 0, right, torch.where(row == 1, left, holes)) & (row != 3)
    return {"right": right, "left": left, "holes": holes}[kind]


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values under other strides ("expanded" repeats the first sentence, or the first packed token)."""
    if layout == "contiguous":
        return values
    if layout == "strided":  # innermost dimension outermost in memory
        return values.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":  # cut from a larger buffer, off any alignment; what lies around is NaN
        larger = values.new_full([size + 3 for size in values.shape], float("nan"))
        part = larger[tuple(slice(1, 1 + size) for size in values.shape)]
        part.copy_(values)
        return part
    assert layout == "expanded"
    return values[:1].expand_as(values) if len(values) else values


def make_batch(
    N: int = 3,
    B: int = 4,
    L: int = 6,
    D: int = 12,
    dtype: torch.dtype = torch.float64,
    mask: str = "mixed",
    layout: str = "contiguous",
    *,
    device: str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> Batch:
    """N standard normal hidden states [B, L, D], leaves of ``dtype``, and a mask of one of MASKS; the same values for
    every dtype (but for rounding) and layout (but for "expanded")."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = make_mask(mask, B, L, generator)
    hidden_states = []
    for _ in range(N):
        values = torch.randn(B, L, D, generator=generator, dtype=torch.float64).to(dtype).to(device)
        hidden_states.append(lay_out(values, layout).detach().requires_grad_(requires_grad))
    return Batch(hidden_states, attention_mask if attention_mask is None else attention_mask.to(device))


def pack(hidden_states: list[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The real tokens of N hidden states [B, L, D] one after another, [T, D] each, and int32 cu_seqlens [B + 1]."""
    if mask is None:
        mask = torch.ones(hidden_states[0].shape[:2], dtype=torch.bool, device=hidden_states[0].device)
    ends = mask.sum(1).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return [hidden_state[mask] for hidden_state in hidden_states], cu_seqlens


def make_parameters(
    N: int = 3,
    D: int = 12,
    H: int = 5,
    dtype: torch.dtype = torch.float64,
    *,
    norm: bool = True,
    prior: bool = False,
    device: str = "cpu",
    requires_grad: bool = False,
    seed: int = 1,
) -> GateParameters:
    """The gate's tensors, none of them at a special value; the running statistics never require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0, grad: bool = requires_grad) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        return values.to(dtype).to(device).requires_grad_(grad)

    linear = [normal(H, D, scale=D**-0.5), normal(H), normal(N * D, H, scale=H**-0.5), normal(N * D)]
    norms: list[Tensor | None] = [None] * 4
    if norm:
        variance = normal(N * D, grad=False).exp()
        norms = [normal(N * D, shift=1.0), normal(N * D), normal(N * D, scale=0.5, grad=False), variance]
    return GateParameters(*linear, *norms, normal(N, scale=2.0) if prior else None)


def make_gradient(like: Tensor, kind: str = "random", seed: int = 2) -> Tensor:
    """An output gradient of one of GRADIENTS: contiguous, under other strides, or of zero strides in all but D."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype).to(like.device)
    if kind == "strided":
        return lay_out(values, "strided")
    if kind == "expanded":
        return values.flatten(0, -2)[:1].view([1] * (like.dim() - 1) + [like.shape[-1]]).expand(like.shape)
    return values


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-12, name: str = "tensor") -> None:
    """Shapes and dtypes are equal and the largest error is at most ``relative`` of the largest magnitude expected
    (of 1, where that is smaller: gradients that are zero but for rounding)."""
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max().item()
        bound = relative * max(1.0, expected.double().abs().max().item())
        assert error <= bound, f"{name}: error {error:.3g} over {bound:.3g}"


def through_ops(monkeypatch) -> str:
    """Make ``functional`` call torch.ops.s2sent.*, and with it the written-out backward, where it would take plain
    PyTorch. Returns the ``backend`` to ask for; inside the op S2SENT_BACKEND makes it the reference."""
    choose = functional.choose

    def choose_ops(*args):
        choose(*args)  # for its errors
        return "auto"

    monkeypatch.setattr(functional, "choose", choose_ops)
    monkeypatch.setenv("S2SENT_BACKEND", "reference")
    return "auto"


WORDS = [
    "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "moon", "is", "bright", "who", "old", "new", "red",
]  # fmt: skip


def save_encoder(folder: str | os.PathLike[str], layers: int = 2, size: int = 16, positions: int = 512) -> None:
    """A random BERT with a tokenizer of WORDS."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=size, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * size, max_position_embeddings=positions,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Five of WORDS each."""
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=generator)) for _ in range(count)]
