"""The contestants: this package and what it is compared with, each as a function of a set of inputs.

Results and reports use these names. Competitors run on the same inputs, in the same interleaved loop.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from cases import BOTTLENECK, FREQUENCIES, MAIN, STAGES, Case, Inputs
from formula import Formula, masked_mean
from torch import Tensor, nn

from s2sent_kernels import S2SentSelector, fuse, gate, squeeze
from s2sent_kernels.engines.choice import choose
from s2sent_kernels.engines.native import engine as native
from s2sent_kernels.formula.call import Batch, Call, Reading

OURS, MEAN_OF_LAST = "s2sent_kernels", "mean of last block"
SCALED = f"{OURS}, gate scale"  # beside OURS, whose gate has none
NATIVE = f"{OURS}, native"  # on a GPU where "auto" selects another backend
ONE_PASS = f"{NATIVE}, one pass"  # forced, even where two passes are faster
SUM = "torch.sum of every state"  # a read of the hidden states and nothing else
PROFILES = {"official": "published formula", "paper": "paper formula"}
COMPILERS = {
    "torch.compile": None,
    # Its own CUDA graphs cannot be captured within ours, which measure device time. Its search for matrix products is left
    # out: they are small here, and each takes a minute to search.
    "torch.compile max-autotune": {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "max_autotune_gemm_backends": "ATEN",
    },
}
WEIGHTED, ATTENTION = "WeightedLayerPooling + mean", "fla attention over layers"
REFERENCE = "official reference, torch.compile"  # the package's own; the formulas above hold their bases as buffers
# Forward and backward of each path are compiled separately, for tens of seconds each.
MAIN_COMPILED = ("A", "A-small")
COMPILED_WITH_GRADIENTS = (("A", "pooled"), ("A-small", "pooled"), ("A-small", "token"))
CHOICES = ("none", "eager", "all")


@dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[[Inputs], Tensor | tuple[Tensor, ...]]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    judged: bool = True  # it computes the selector, so its result is compared with the reference
    compiled: bool = False
    modes: tuple[str, ...] = ("forward", "backward", "both")
    note: str = ""
    training: bool = False  # with the batch's statistics
    scale: float | None = None  # the gate's

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        result = self.call(inputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True)
class Missing:
    """A competitor that cannot be measured here; its row gives the reason."""

    name: str
    why: str


def make_selector(
    case: Case, device: str, profile: str = "paper", backend: str = "auto", scale: float | None = None
) -> S2SentSelector:
    """In eval mode, with parameters and statistics away from 0 and 1."""
    torch.manual_seed(0)
    options = {"profile": profile, "block_prior": profile == "paper", "gate_scale": scale, "backend": backend}
    selector = S2SentSelector(case.size, case.blocks, BOTTLENECK, FREQUENCIES, **options)
    with torch.no_grad():
        for tensor in (selector.norm.weight, selector.norm.bias, selector.norm.running_mean):
            tensor.add_(0.1 * torch.randn_like(tensor))
        selector.norm.running_var.mul_(torch.rand_like(selector.norm.running_var) + 0.5)
    return selector.to(device).eval()


def selector_call(selector: S2SentSelector, what: str) -> Callable[[Inputs], Tensor | tuple[Tensor, ...]]:
    """A stage or path through the package's public functions, on the selector's backend."""
    backend, blocks = selector.backend, selector.num_blocks
    if what == "pooled":
        return lambda i: selector.pool(i.blocks, i.mask, cu_seqlens=i.cu_seqlens)
    if what == "token":
        return lambda i: selector(i.blocks, i.mask, cu_seqlens=i.cu_seqlens)
    if what == "squeeze":
        return lambda i: squeeze(
            i.blocks, i.mask, cu_seqlens=i.cu_seqlens, frequencies=FREQUENCIES, pooling="mean", backend=backend
        )
    if what == "fuse":
        return lambda i: fuse(i.blocks, i.gates, i.mask, cu_seqlens=i.cu_seqlens, backend=backend)
    parameters = selector.gate_parameters()
    assert parameters is not None  # profile "paper", in eval mode
    return lambda i: gate(i.squeezed, parameters, num_blocks=blocks, backend=backend)


def differentiated(selector: S2SentSelector, what: str) -> dict[str, Tensor]:
    """The parameters that a stage or path has gradients for, by name."""
    return {} if what in ("squeeze", "fuse") else dict(selector.named_parameters())


def ours(
    case: Case,
    what: str,
    device: str,
    backend: str | None = None,
    name: str = OURS,
    *,
    training: bool = False,
    scale: float | None = None,
) -> Contestant:
    """On a GPU one backend for all paths, so that rows can be compared: what "auto" selects for most N and D."""
    if backend is None:
        backend = choose("auto", Call(torch.device(device), case.dtype)) if device == "cuda" else "auto"
    selector = make_selector(case, device, backend=backend, scale=scale).train(training)
    modes = ("training",) if training else ("forward", "backward", "both")
    call, parameters = selector_call(selector, what), differentiated(selector, what)
    return Contestant(name, call, parameters, modes=modes, training=training, scale=scale)


def with_batch_statistics(contestant: Contestant, case: Case, what: str, device: str) -> Contestant | None:
    """The contestant in training mode, where it is this package's and the case has the two sentences that statistics need."""
    if case.batch < 2 or what != "pooled" or contestant.name not in (OURS, NATIVE):
        return None
    backend = "native" if contestant.name == NATIVE else None
    return ours(case, what, device, backend, contestant.name, training=True)


def _native(case: Case, what: str, device: str) -> Contestant | Missing:
    try:
        choose("native", Call(torch.device(device), case.dtype))
    except ValueError as error:
        return Missing(NATIVE, str(error))
    return ours(case, what, device, "native", NATIVE)


def _one_pass(case: Case, device: str) -> Contestant:
    selector = make_selector(case, device, backend="native")
    parameters, gating = selector.gate_parameters(), selector.gating()
    assert parameters is not None

    def call(inputs: Inputs) -> Tensor:
        batch = Batch(inputs.blocks, inputs.mask, inputs.cu_seqlens)
        return native.select(batch, Reading(FREQUENCIES), parameters, gating, one_pass=True)[0]

    return Contestant(ONE_PASS, call, differentiated(selector, "token"), modes=("forward",))


def sum_of_states(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(u.sum() for u in inputs.blocks)


def mean_of_last(inputs: Inputs) -> Tensor:
    return masked_mean(inputs.blocks[-1], inputs.mask)


def contestants(case: Case, what: str, device: str, choice: str) -> Iterator[Contestant | Missing]:
    """This package first, on a GPU on native too, then the competitors of ``choice``: none, eager (no compiler) or all."""
    yield ours(case, what, device)
    if what not in ("squeeze", "fuse") and case.name in MAIN:
        yield ours(case, what, device, name=SCALED, scale=4.0)
    if device == "cuda" and choose("auto", Call(torch.device(device), case.dtype)) != "native":
        native = _native(case, what, device)
        yield native
        if what == "token" and case.name in MAIN and isinstance(native, Contestant):
            yield _one_pass(case, device)
    if what in STAGES or case.layout == "packed":
        return
    if what == "pooled":
        yield Contestant(MEAN_OF_LAST, mean_of_last, judged=False)
        if device == "cpu":
            yield Contestant(SUM, sum_of_states, judged=False, modes=("forward",))
    if choice == "none" or case.layout != "full" or case.name not in (*MAIN, "A-small"):
        return
    for profile, name in PROFILES.items():
        yield _formula(case, what, device, profile, f"{name}, eager", None)
    yield weighted_layer_pooling(case, what, device)
    if what == "token":
        yield _attention_over_layers(case, device)
    if choice == "all" and (what == "pooled" or case.name in MAIN_COMPILED):
        for profile, name in PROFILES.items():
            for compiler in COMPILERS if device == "cuda" else ("torch.compile",):
                yield _formula(case, what, device, profile, f"{name}, {compiler}", compiler)
        if device == "cpu":
            yield _reference(case, what)


def _formula(case: Case, what: str, device: str, profile: str, name: str, compiler: str | None) -> Contestant:
    selector = make_selector(case, device, profile, backend="reference")
    formula = Formula(selector, case.tokens)
    function = getattr(formula, what)
    if compiler is None:
        return Contestant(name, lambda i: function(i.blocks, i.mask), dict(selector.named_parameters()))
    compiled = torch.compile(function, options=COMPILERS[compiler], dynamic=False)
    # Not the backward alone: that would be another compilation, of code that must not reuse the forward's buffers.
    modes = ("forward", "both") if (case.name, what) in COMPILED_WITH_GRADIENTS else ("forward",)
    note = "without its own CUDA graphs, products by cuBLAS" if "max-autotune" in name else ""
    return Contestant(
        name,
        lambda i: compiled(i.blocks, i.mask),
        dict(selector.named_parameters()),
        compiled=True,
        modes=modes,
        note=note,
    )


def _reference(case: Case, what: str) -> Contestant:
    selector = make_selector(case, "cpu", "official", backend="reference")
    compiled = torch.compile(selector_call(selector, what), dynamic=False)
    return Contestant(REFERENCE, compiled, dict(selector.named_parameters()), compiled=True, modes=("forward", "both"))


def weighted_layer_pooling(case: Case, what: str, device: str) -> Contestant | Missing:
    if importlib.util.find_spec("sentence_transformers") is None:
        return Missing(WEIGHTED, "not installed")
    try:
        # The import prints deprecation warnings, and its dependencies print progress.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling
    except ImportError:
        try:
            from sentence_transformers.models import WeightedLayerPooling
        except ImportError as error:
            return Missing(WEIGHTED, f"not importable: {type(error).__name__}")
    pooling: nn.Module = WeightedLayerPooling(case.size, num_hidden_layers=case.blocks - 1, layer_start=0).to(device)

    def token(inputs: Inputs) -> Tensor:
        features = {"all_layer_embeddings": inputs.blocks, "token_embeddings": inputs.blocks[-1]}
        return pooling(features)["token_embeddings"].to(inputs.case.dtype)

    def pooled(inputs: Inputs) -> Tensor:
        return masked_mean(token(inputs), inputs.mask)

    return Contestant(WEIGHTED, pooled if what == "pooled" else token, dict(pooling.named_parameters()), judged=False)


def _attention_over_layers(case: Case, device: str) -> Contestant | Missing:
    if device != "cuda" or importlib.util.find_spec("fla") is None:
        return Missing(ATTENTION, "not installed" if importlib.util.find_spec("fla") is None else "needs a GPU")
    try:
        from fla.ops.attnres import fused_attnres
    except Exception as error:
        return Missing(ATTENTION, f"not importable: {type(error).__name__}")
    torch.manual_seed(0)
    query = torch.randn(case.size).to(device, case.dtype).requires_grad_()
    weight = torch.ones(case.size, device=device, dtype=case.dtype, requires_grad=True)
    return Contestant(
        ATTENTION, lambda i: fused_attnres(query, i.blocks, weight), {"query": query, "weight": weight}, judged=False
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
