"""Encode a text file of sentences, fuse the encoder's blocks, print each query's nearest sentences, compare the
backends that are usable here with the plain PyTorch formula, and draw the gates and the DCT bases."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import families, model_kinds, sources
from ..capture import BlockCapture
from ..engines.choice import BACKENDS, backends, choose
from ..engines.triton.limits import triton_interprets
from ..files import TO_UTF8, data_folder, installs, require
from ..formula.call import Call
from ..selector import S2SentSelector
from ..tools import pictures
from . import common
from .common import BUNDLED, UserError, positive

SEED = 0
FREQUENCIES = 4
REPEATS, WARM_UP = 20, 3
INTERPRETED = 2  # texts in the comparison of backends if one of them is interpreted
PARITY = 1e-4  # of the largest embedding value: if a backend differs by more, its time is not compared


class Texts(NamedTuple):
    sentences: list[str]
    queries: list[str]


class Timing(NamedTuple):
    """Milliseconds: median, and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float


def add(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="fuse an encoder's blocks on real sentences",
        description=__doc__,
        epilog=f"It needs the extra demo: {installs('demo')}.",
    )
    command.add_argument(
        "--model",
        help="path or hub id of an encoder, in front of an untrained selector; or a shipped name, in front of its own "
        "(default: all-MiniLM-L6-v2, bundled)",
    )
    command.add_argument(
        "--file", type=common.path, help="text file, one sentence a line, queries begin with '? ' (default: bundled)"
    )
    command.add_argument(
        "--output-dir", type=common.path, default="demo_output", help="where the pictures go (default: ./demo_output)"
    )
    command.add_argument("--top", type=positive, default=3, help="sentences to print for each query (default: 3)")
    command.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="default: auto")
    common.add_device(command)
    command.add_argument(
        "--blocks", type=common.blocks, metavar=common.BLOCKS, help="blocks to fuse, 0 the lowest (default: all)"
    )


# ---------------------------------------------------------------- input


def read_texts(path: str | None = None) -> Texts:
    """Sentences and queries of a UTF-8 file (by default the bundled one): one per line, queries begin with "? ", comments with
    "# ", empty lines are skipped.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8 (names the line), or has no sentences or no queries.
    """
    name = "the bundled file" if path is None else path
    try:
        if path is None:
            content = (data_folder() / "sentences.txt").read_bytes()
        else:
            content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise UserError(f"{name}: line {number} is not UTF-8 (byte 0x{byte:02x}): {TO_UTF8}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    texts = Texts([], [])
    for line in map(str.strip, text.split("\n")):
        if line.startswith("? "):
            texts.queries.append(line[2:].strip())
        elif line not in ("", "?", "#") and not line.startswith("# "):
            texts.sentences.append(line)
    if not texts.sentences:
        raise UserError(f"{name}: expected sentences, one a line, got none")
    if not texts.queries:
        raise UserError(f"{name}: expected queries, lines that begin with '? ', got none")
    return texts


# ---------------------------------------------------------------- work


def make_selector(hidden_size: int, num_blocks: int, backend: str = "auto") -> S2SentSelector:
    """An untrained selector, the same on every run, with a prior that favours the last block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return S2SentSelector(
            hidden_size,
            num_blocks,
            bottleneck=max(1, hidden_size // 12),
            frequencies=math.gcd(FREQUENCIES, hidden_size),
            gate_norm=None,
            block_prior=True,
            backend=backend,
        ).eval()


def _time(call: Callable[[], Tensor], device: torch.device, repeats: int, warm_up: int) -> Timing:
    """Wall time of a call, from an idle device to an idle device."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for repeat in range(warm_up + repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        if repeat >= warm_up:
            times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 5], times[(4 * len(times)) // 5])


def _print_comparison(selector: S2SentSelector, hidden_states: Sequence[Tensor], mask: Tensor) -> None:
    """The embeddings and time of each usable backend beside those of the plain PyTorch formula, on the same hidden states."""
    interprets = triton_interprets()
    if interprets:
        hidden_states, mask = [hidden_state[:INTERPRETED] for hidden_state in hidden_states], mask[:INTERPRETED]
    first = hidden_states[0]
    size, dtype, backend = len(hidden_states), str(first.dtype).removeprefix("torch."), selector.backend
    embeddings: dict[str, Tensor] = {}
    times: dict[str, Timing] = {}
    refusals: dict[str, str] = {}
    for name in BACKENDS:
        try:
            choose(name, Call(first.device, first.dtype))
        except ValueError as error:
            status = backends()[name]
            refusals[name] = str(error) if status.usable else f"not usable here: {status.reason}"
            continue
        selector.backend = name
        interpreted = interprets and name == "triton"
        repeats, warm_up = (1, 0) if interpreted else (REPEATS, WARM_UP)
        embeddings[name] = selector.pool(hidden_states, mask)
        times[name] = _time(lambda: selector.pool(hidden_states, mask), first.device, repeats, warm_up)
    selector.backend = backend

    shape = "{} texts x {} tokens x {} blocks x {} features".format(*first.shape[:2], size, first.shape[2])
    print(f"\nBackends: {shape} to embeddings,")
    print(f"{dtype} on {first.device}, wall time in ms: median [20 %, 80 %] of {REPEATS} calls")
    plain, scale = embeddings["reference"].double(), embeddings["reference"].abs().max().item()
    for name in BACKENDS:
        if name in refusals:
            print(f"  {name:<10}{refusals[name]}")
            continue
        timing = times[name]
        interpreted = interprets and name == "triton"
        line = f"  {name:<10}{timing.median:9.3f}"
        line += "" if interpreted else f" [{timing.low:.3f}, {timing.high:.3f}]"
        difference = (embeddings[name].double() - plain).abs().max().item()
        if name == "reference":
            line += "   the formula in plain PyTorch"
        elif not difference <= PARITY * scale:
            line += f"   differs from plain PyTorch by {difference:.2g}: no speed is compared"
        elif interpreted:
            line += "   one call, interpreted: says nothing about speed"
        else:
            line += f"   {times['reference'].median / timing.median:.2f} times as fast as plain PyTorch"
        print(line)
    if len(embeddings) == 1:
        print("Only the reference is usable here: there is no other backend to compare it with.")
    else:
        largest = max(
            (one.double() - other.double()).abs().max().item()
            for one in embeddings.values()
            for other in embeddings.values()
        )
        print(f"Largest difference between the embeddings of {' and '.join(embeddings)}: {largest:.2g}")


def _print_nearest(texts: Texts, embeddings: Tensor, top: int) -> None:
    """Each query's nearest sentences by cosine; ``embeddings`` [sentences + queries, D]."""
    unit = F.normalize(embeddings.float(), dim=1)
    sentences, queries = unit[: len(texts.sentences)], unit[len(texts.sentences) :]
    scores, places = (queries @ sentences.T).topk(min(top, len(sentences)), dim=1)
    for query, row, indices in zip(texts.queries, scores.tolist(), places.tolist(), strict=True):
        print(f"\n? {query}")
        for score, index in zip(row, indices, strict=True):
            print(f"  {score:6.3f}  {texts.sentences[index]}")


def run(arguments: argparse.Namespace) -> None:
    require("matplotlib.figure", "matplotlib", "demo")
    texts = read_texts(arguments.file)
    directory = Path(arguments.output_dir)
    common.check_writable(directory)
    device = common.device_of(arguments.device)
    try:
        chosen = choose(arguments.backend, Call(device, torch.float32))
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    model = arguments.model
    if model is not None and (kind := model_kinds.held(model)) not in (model_kinds.ENCODER, None):
        raise UserError(
            f"--model {model}: expected an encoder alone, got {kind}: `s2sent inspect --model {model}` shows it"
        )
    sizes = common.sizes(model)
    try:
        if sizes is not None:
            families.indices(arguments.blocks, sizes.depth)  # for its error, before weights are loaded
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    encoder, tokenizer, name = common.load_model(model, device)
    try:
        capture = BlockCapture(encoder, arguments.blocks)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    with capture, torch.no_grad():
        size, depth = encoder.config.hidden_size, encoder.config.num_hidden_layers
        trained = (model is None or sources.is_shipped(model)) and len(capture.blocks) == depth
        if trained:
            selector = S2SentSelector.from_pretrained(model or BUNDLED, backend=arguments.backend).to(device)
        else:
            selector = make_selector(size, len(capture.blocks), arguments.backend).to(device)
        source = "the bundled file" if arguments.file is None else arguments.file
        print(f"texts     sentences: {len(texts.sentences)}, queries: {len(texts.queries)}, from {source}")
        print(f"encoder   {name}: {type(encoder).__name__}, {depth} blocks, {size} features, float32 on {device}")
        _print_selector(selector, capture.blocks, trained)
        print(f"backend   {chosen}: {backends()[chosen].reason}", flush=True)

        batches = common.batches(encoder, tokenizer, texts.sentences + texts.queries, common.max_length(model))
        start = time.perf_counter()
        embeddings = torch.cat([capture.pool(selector, **batch) for batch in batches]).cpu()
        seconds = time.perf_counter() - start
        print(f"encoded   {len(embeddings)} texts in {seconds:.2f} s, encoder included, block by block")
        _print_nearest(texts, embeddings, arguments.top)

        mask, hidden_states = batches[0]["attention_mask"], capture.collect(**batches[0])
        _print_comparison(selector, hidden_states, mask)
        selector.backend = "reference"  # pictures need no speed, and the interpreter is slow
        gates = selector.gates(hidden_states, mask)
    tokens = max(1, int(mask.sum(dim=1).median()))
    title = f"encoder {name}; selector {(model or BUNDLED) if trained else f'untrained, seed {SEED}'}"
    blocks = capture.blocks
    with common.warnings_in_lines():
        content = {
            "gates.png": pictures.gates_picture(gates, blocks, title),
            "dct_bases.png": pictures.bases_picture(len(blocks), selector.frequencies, tokens, blocks, title),
        }
    common.write_files(directory, content)


def _print_selector(selector: S2SentSelector, blocks: Sequence[int], trained: bool) -> None:
    fused = ", ".join(map(str, blocks))
    print(f"selector  fuses blocks {fused}; bottleneck {selector.bottleneck}, {selector.frequencies} DCT components")
    if trained:
        print("          The selector is trained, and comes with the package; its scores: bench/QUALITY.md.")
    else:
        print(
            f"          The selector is untrained (seed {SEED}): random weights, a prior that favours the last block."
        )
