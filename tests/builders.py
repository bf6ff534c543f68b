"""Builders that several test files share: batches, gate parameters, selectors, output gradients, tiny encoders.

Numbers are drawn on the CPU in float64 and then rounded, so that they are the same on every device and, up to rounding, in
every dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from s2sent_kernels import GateParameters, S2SentSelector, functional, ops

MASKS = ("none", "right", "left", "holes", "mixed")
LAYOUTS = ("contiguous", "column", "cut", "expanded")  # those that PyTorch treats differently; lay_out has others
GRADIENTS = ("random", "strided", "expanded")
NAN = float("nan")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def table(names: str, rows: Sequence[tuple]) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` whose ids label every value: "N3-D40-holes-no_norm-tanh-float16"."""
    columns = names.split(", ")

    def label(name: str, value: object) -> str:
        if value is None or value is False:
            return f"no_{name}"
        if isinstance(value, str | torch.dtype):
            return str(value).removeprefix("torch.")
        if value is True:
            return name
        return f"{name}{value}".replace(" ", "")

    ids = ["-".join(map(label, columns, row)) for row in rows]
    return pytest.mark.parametrize(names, rows, ids=ids)


# ---------------------------------------------------------------- batches


class Batch(NamedTuple):
    hidden_states: list[Tensor]  # N x [B, L, D]
    attention_mask: Tensor | None  # [B, L] bool

    @property
    def where(self) -> dict[str, Tensor]:
        """The keyword arguments that tell which tokens are real."""
        return {} if self.attention_mask is None else {"attention_mask": self.attention_mask}

    @property
    def real(self) -> Tensor:
        """[B, L] bool"""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(self.hidden_states[0].shape[:2], dtype=torch.bool, device=self.hidden_states[0].device)

    @property
    def num_sentences(self) -> int:
        return self.hidden_states[0].shape[0]


class Packed(NamedTuple):
    hidden_states: list[Tensor]  # N x [T, D]
    cu_seqlens: Tensor  # int32 [B + 1]

    @property
    def where(self) -> dict[str, Tensor]:
        return {"cu_seqlens": self.cu_seqlens}

    @property
    def real(self) -> Tensor:
        """[T] bool"""
        return torch.ones(self.hidden_states[0].shape[0], dtype=torch.bool, device=self.cu_seqlens.device)

    @property
    def num_sentences(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def make_mask(kind: str, B: int, L: int, generator: torch.Generator | None = None) -> Tensor | None:
    """[B, L] bool on the CPU, or None for "none". "right", "left" and "holes" leave every sentence a real token; "mixed"
    repeats right, holes, empty, left by rows. Lengths and holes are drawn from ``generator``; without one they depend on
    the row alone."""
    if kind == "none":
        return None
    place, row = torch.arange(L), torch.arange(B)[:, None]
    if generator is None:
        length = (L - row * 2).clamp(min=(L + 1) // 2)  # [B, 1]
        holes = ((place + row) % 3 != 1) & (place >= row)
    else:
        length = torch.randint(1, L + 1, (B, 1), generator=generator)
        holes = torch.rand(B, L, generator=generator) < 0.6
    holes[:, L // 2 : L // 2 + 1] = True
    kinds = {"right": place < length, "left": place >= L - length, "holes": holes}
    if kind != "mixed":
        return kinds[kind]
    row = row % 4
    return torch.where(row == 0, kinds["right"], torch.where(row == 1, holes, kinds["left"])) & (row != 2)


def lay_out(values: Tensor, layout: str, index: int = 0) -> Tensor:
    """The same values under other strides or at another address; the memory around them is NaN."""
    shape = values.shape
    if layout == "different":  # from one hidden state to the next
        layout = ("contiguous", "window", "column", "offset")[index % 4]
    if layout == "transposed":  # [L, B, D] in memory
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "column":  # features outermost in memory
        return values.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "offset":  # one element off every alignment
        result = values.new_full((values.numel() + 1,), NAN)[1:].view(shape)
        return result.copy_(values)
    if layout == "sliced":  # neither address nor row stride is aligned
        return values.new_full((*shape[:-1], shape[-1] + 3), NAN)[..., 1:-2].copy_(values)
    if layout == "cut":  # sliced in every dimension
        larger = values.new_full([size + 3 for size in shape], NAN)
        return larger[tuple(slice(1, 1 + size) for size in shape)].copy_(values)
    if layout == "window":  # cut from a larger buffer, but aligned: kernels read it without a copy
        buffer = values.new_full((*shape[:-2], shape[-2] + 2, shape[-1] + 32), NAN)
        return buffer[..., : shape[-2], 16:-16].copy_(values)
    if layout == "expanded":  # repeats the first sentence, or the first packed token
        return values[:1].expand(shape) if len(values) else values
    assert layout == "contiguous"
    return values.contiguous()


def make_batch(
    N: int = 3,
    B: int = 4,
    L: int = 6,
    D: int = 12,
    dtype: torch.dtype = torch.float64,
    mask: str = "mixed",
    layout: str = "contiguous",
    *,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
    drawn_lengths: bool = True,
) -> Batch | Packed:
    """N standard normal hidden states, leaves of ``dtype``: [B, L, D] and a mask of one of MASKS, or with "packed" an empty
    sentence, then B - 1 of L tokens and fewer."""
    cu_seqlens = attention_mask = None
    if mask == "packed":
        ends = torch.tensor([0] + [max(1, L - 2 * b) for b in range(B - 1)]).cumsum(0)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32).to(device)
        shape = (int(ends[-1]), D)
    else:
        attention_mask = make_mask(mask, B, L, torch.Generator().manual_seed(seed) if drawn_lengths else None)
        shape = (B, L, D)
    hidden_states = [
        lay_out(randn(*shape, seed=100 * seed + n, dtype=dtype, device=device), layout, n).detach() for n in range(N)
    ]
    hidden_states = [u.requires_grad_(requires_grad) for u in hidden_states]
    if cu_seqlens is not None:
        return Packed(hidden_states, cu_seqlens)
    return Batch(hidden_states, attention_mask if attention_mask is None else attention_mask.to(device))


def pack(hidden_states: list[Tensor], mask: Tensor | None) -> Packed:
    """The real tokens of N hidden states [B, L, D], sentence after sentence."""
    if mask is None:
        mask = torch.ones(hidden_states[0].shape[:2], dtype=torch.bool, device=hidden_states[0].device)
    ends = mask.sum(1).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return Packed([hidden_state[mask] for hidden_state in hidden_states], cu_seqlens)


# ---------------------------------------------------------------- the gate, selectors, output gradients


def make_parameters(
    N: int = 3,
    D: int = 12,
    H: int = 5,
    dtype: torch.dtype = torch.float64,
    *,
    norm: bool = True,
    prior: bool | Sequence[float] | None = None,
    scale: float | None = None,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> GateParameters:
    """The gate's tensors, none of them at a special value; the running statistics never require a gradient.
    prior: True draws one, numbers are repeated over the N blocks."""
    wide = torch.promote_types(dtype, torch.float32)

    tensors: dict[str, Tensor | None] = {
        name: randn(*shape, seed=seed, dtype=wide, device=device)
        for seed, (name, shape) in enumerate(GateParameters.shapes(N, D, H).items(), start=1)
    }
    tensors["down_weight"] *= D**-0.5
    tensors["up_weight"] *= H**-0.5 * 2
    tensors["norm_weight"] += 1
    tensors["running_var"] = tensors["running_var"].exp()
    tensors["block_prior"] *= 2
    tensors["gate_scale"] = None if scale is None else torch.tensor(scale, device=device)
    if not norm:
        tensors |= dict.fromkeys(("norm_weight", "norm_bias", "running_mean", "running_var"))
    if prior is not True:
        numbers = [prior[n % len(prior)] for n in range(N)] if prior else None
        tensors["block_prior"] = None if numbers is None else torch.tensor(numbers, device=device)
    for name, tensor in tensors.items():
        if tensor is not None:
            grad = requires_grad and not name.startswith("running")
            tensors[name] = tensor.to(dtype).requires_grad_(grad)
    return GateParameters(**tensors)


def kept(parameters: GateParameters):
    """The tensors that have gradients, all but the running statistics, and a function from them back to GateParameters. It
    copies the running statistics, because a call in training mode updates them."""
    names = [name for name, t in parameters._asdict().items() if t is not None and not name.startswith("running")]

    def rebuild(tensors) -> GateParameters:
        statistics = {
            name: t.clone() for name, t in parameters._asdict().items() if t is not None and name.startswith("running")
        }
        return parameters._replace(**statistics, **dict(zip(names, tensors, strict=True)))

    return [getattr(parameters, name) for name in names], rebuild


def make_selector(
    N: int = 3,
    D: int = 12,
    M: int = 4,
    *,
    H: int = 5,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **options,
) -> S2SentSelector:
    """A selector in eval mode none of whose parameters and running statistics is at its initial value."""
    selector = S2SentSelector(D, N, H, M, **options)
    selector.to(device, dtype)
    parameters = make_parameters(
        N, D, H, dtype, norm=selector.norm is not None, prior=(0.5, -1.0, 2.0), scale=3.5, device=device
    )
    with torch.no_grad():
        for name, tensor in selector.named_parameters():
            tensor.copy_(getattr(parameters, name.replace(".", "_")))
        if selector.norm is not None:
            selector.norm.running_mean.copy_(parameters.running_mean)
            selector.norm.running_var.copy_(parameters.running_var)
    return selector.eval()


def make_gradient(like: Tensor, kind: str = "random", seed: int = 0) -> Tensor:
    """An output gradient: "random", "strided" (features outermost in memory) or "expanded" (zero strides but in D)."""
    values = randn(*like.shape, seed=900 + seed, dtype=like.dtype, device=like.device)
    if kind == "strided":
        return lay_out(values, "column")
    if kind == "expanded" and values.numel():
        return values.flatten(0, -2)[0].expand(values.shape)
    return values


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-12, name: str = "tensor") -> None:
    """Shapes and dtypes are equal and the largest error is at most ``relative`` of the largest magnitude expected
    (of 1, where that is smaller: gradients that are zero up to rounding)."""
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max().item()
        bound = relative * max(1.0, expected.double().abs().max().item())
        assert error <= bound, f"{name}: error {error:.3g} over {bound:.3g}"


def through_ops(monkeypatch) -> str:
    """Make ``functional`` call torch.ops.s2sent.*, and with it the written-out backward, where it would use plain
    PyTorch. Returns the ``backend`` to pass; inside the op S2SENT_BACKEND makes it the reference."""
    choose = functional.choose

    def choose_ops(*args, **options):
        choose(*args, **options)  # for its errors
        return "auto"

    monkeypatch.setattr(functional, "choose", choose_ops)
    for op in (ops.select, ops.select_pool, functional):  # which would otherwise go around the dispatcher
        monkeypatch.setattr(op, "is_ordinary", lambda tensors: False)
    monkeypatch.setenv("S2SENT_BACKEND", "reference")
    return "auto"


# ---------------------------------------------------------------- tiny encoders and texts

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "moon",
    "is",
    "bright",
    "who",
    "old",
    "new",
    "red",
]


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
        vocab_size=len(vocabulary),
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * size,
        max_position_embeddings=positions,
    )
    transformers.BertModel(config).save_pretrained(folder)


def sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` texts of five of WORDS each."""
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=generator)) for _ in range(count)]


TEXTS = [
    "the cat sat on the mat .",
    "a dog ran .",
    "the moon is bright .",
    "moon",
    "a cat is under the moon .",
    "the dog sat .",
    "a mat is bright .",
    "the cat ran under the bright moon and sat on a mat .",
]


def make_encoder_and_tokenizer():
    """A random BERT of four blocks and 16 features in eval mode, and a tokenizer of the words of TEXTS."""
    import tokenizers
    import transformers

    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "moon", "is", "bright", "."]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words) + 4, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    return transformers.BertModel(config).eval(), fast


def pairs(count: int) -> list[tuple[str, str]]:
    """Sentences, each paired with the same sentence in other words."""
    other = dict(zip(WORDS, WORDS[8:] + WORDS[:8], strict=True))
    return [(text, " ".join(other[word] for word in text.split())) for text in sentences(count)]


def write_examples(path, rows, columns=("anchor", "positive")):
    """Rows of texts as a file of the path's suffix. Returns the path."""
    if path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        quoted = [",".join('"' + text.replace('"', '""') + '"' for text in row) for row in (columns, *rows)]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows), encoding="utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    return path


def save_model(root):
    """An encoder of 2 blocks and 16 features, a selector for it, and both as one SentenceTransformer, in folders of ``root``."""
    from s2sent_kernels import S2SentSelector

    save_encoder(root / "encoder")
    torch.manual_seed(1)
    S2SentSelector(16, 2, 4, 4, block_prior=True).save_pretrained(root / "selector", about={"blocks": [0, 1]})
    make_sentence_transformer(root / "encoder", root / "selector").save(str(root / "whole"))


def make_sentence_transformer(encoder, selector):
    """A SentenceTransformer on the CPU of an encoder's and a selector's folder."""
    from s2sent_kernels import parts
    from s2sent_kernels.sentence_transformers import S2SentPooling, SentenceTransformer

    transformer, trained = parts.load_transformer(str(encoder)), parts.read_selector(str(selector))
    blocks = trained.blocks(transformer.auto_model)
    pooling = S2SentPooling.behind(transformer, blocks, pooling=trained.pooling, **trained.config["selector"])
    pooling.selector.load_state_dict(trained.selector.state_dict())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()
