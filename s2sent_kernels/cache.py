"""A cache of the inputs of a selector behind a frozen encoder, so that one encoding pass serves the training of many selectors.

The squeeze is separable: a DCT of each block along the tokens, then a weighted sum over the blocks. The cache therefore stores
the lowest Y token frequencies of each block. f and p of any selector follow, for the last N of the cached blocks and for any M
whose components have y < Y:

    C[n,y,d] = sum_l c(y, rank of l, length) u_n[l,d]           stored, [N, Y, D]
    f[d]     = 6 / sqrt(N length) sum_n alpha[m(d),n] C[n, y_m(d), d]
    p[n,d]   = C[n,0,d] / sqrt(length)                          for pooling "mean"; stored separately for "cls" and "last"

The arrays are numpy files, mapped into memory. A cache's folder is named by a digest of the encoder's weights, the tokenizer, the
blocks, the texts and the settings. It is written under a temporary name and renamed once complete. An interrupted pass resumes at
its last record of progress. Several processes can share the work (``shard``). Checksums are compared when a pass resumes, and of
a complete cache on request (``verify``). A file that is damaged is a DamagedCache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic as clock
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import families, validate, waiting
from .cache_files import ABOUT, Unfinished, announce, check_rows, done_by_all, opened, rank_and_world, sweep
from .cache_files import DamagedCache as DamagedCache  # public under this name
from .capture import BLOCK_NORMS, BlockCapture
from .files import locked, made_folder
from .formula import dct
from .formula.call import POOLINGS, Batch
from .formula.tokens import Tokens
from .tools import encoders

FORMAT = 1
# Between two records of progress there are so many batches or seconds, whichever is less: what an interruption may cost.
RECORD_EVERY, RECORD_SECONDS = 32, 3.0
ROWS_AT_ONCE = 4096  # read from the files and turned into f and p


class Settings(NamedTuple):
    """What a cache depends on, besides encoder, tokenizer and texts. The digest that names the folder includes the field names:
    renaming one makes existing caches unreachable."""

    blocks: Sequence[int] | str | None = None  # as BlockCapture's
    block_norm: str | None = "final"
    token_frequencies: int = 2  # Y; 2 are enough for M <= 4, 7 for every M
    pooling: str = "mean"
    max_length: int = 512  # tokens; less if the tokenizer or the encoder supports fewer
    batch_size: int = 128


DEFAULT = Settings()


class BlockCache:
    """A finished cache. ``row`` and ``rows`` map texts to rows; ``squeezed`` and ``pooled`` read rows.

    Attributes:
        blocks: the encoder's cached blocks, ascending.
        hidden_size, token_frequencies, pooling: D, Y, and what p is.

    Raises:
        DamagedCache: a file is missing, or is not what was written, as far as its size and type tell. ``verify`` tells more.
    """

    def __init__(self, folder: Path, texts: Sequence[encoders.Text]) -> None:
        about = _read_about(folder)
        self.folder, self.blocks, self.pooling = folder, tuple(about["blocks"]), about["pooling"]
        names = ("frequencies", "lengths", *(() if self.pooling == "mean" else ("pooled",)))
        self._about = about.get("arrays")  # caches of earlier releases do not say
        try:
            known = {name: None if self._about is None else self._about[name] for name in names}
            arrays = {name: opened(folder / f"{name}.npy", known[name]) for name in names}
        except (KeyError, TypeError) as error:
            raise DamagedCache(folder / ABOUT, f"says nothing of the array {error}") from error
        self._kept, self._ends = arrays["frequencies"], arrays.get("pooled")
        wanted = (len(texts), len(self.blocks), about["token_frequencies"])
        if self._kept.ndim != 4 or self._kept.shape[:3] != wanted or len(arrays["lengths"]) != len(texts):
            raise DamagedCache(folder / "frequencies.npy", f"expected {list(wanted)}, got {list(self._kept.shape)}")
        self._lengths = torch.from_numpy(arrays["lengths"].copy())
        _, _, self.token_frequencies, self.hidden_size = self._kept.shape
        self._row = {text: row for row, text in enumerate(texts)}

    def verify(self) -> None:
        """Compare every number with its checksum, which reads all files.

        Raises:
            DamagedCache: some are not what was written.
            ValueError: an earlier release made the cache, without checksums.
        """
        if self._about is None:
            raise ValueError(
                f"{self.folder}: an earlier release made it, without checksums: remove it to have it made again"
            )
        for name, known in self._about.items():
            check_rows(self.folder / f"{name}.npy", known)

    def __len__(self) -> int:
        return len(self._lengths)

    def row(self, text: encoders.Text) -> int:
        """A text's row. KeyError if the cache was made without that text."""
        return self._row[text]

    def rows(self, texts: Sequence[encoders.Text]) -> Tensor:
        return torch.tensor([self._row[text] for text in texts], dtype=torch.long)

    def _last(self, num_blocks: int) -> list[int]:
        """The positions of the last ``num_blocks`` cached blocks."""
        validate.positive_int("num_blocks", num_blocks)
        if num_blocks > len(self.blocks):
            raise ValueError(f"num_blocks: expected at most {len(self.blocks)}, as many as cached, got {num_blocks}")
        return list(range(len(self.blocks) - num_blocks, len(self.blocks)))

    def squeezed(self, num_blocks: int, frequencies: int, rows: Tensor | None = None) -> Tensor:
        """f [S, D] of the last ``num_blocks`` cached blocks, for a selector of ``frequencies`` components.

        Raises:
            ValueError: fewer blocks are cached, N blocks have no M components, or a component needs a y that is not stored.
        """
        blocks = self._last(num_blocks)
        validate.components(num_blocks, self.hidden_size, frequencies, "paper")
        y = torch.tensor([pair[1] for pair in dct.frequency_pairs(num_blocks, frequencies)])
        if int(y.max()) >= self.token_frequencies:
            raise ValueError(
                f"frequencies: M = {frequencies} on N = {num_blocks} blocks needs {int(y.max()) + 1} token frequencies, "
                f"got a cache of {self.token_frequencies}"
            )
        part = torch.arange(self.hidden_size) // (self.hidden_size // frequencies)  # m(d)
        alpha = dct.block_basis(num_blocks, frequencies)[part].T.float()  # [N, D]
        wanted = y[part][None, None].expand(num_blocks, 1, -1)  # [N, 1, D]

        def of_rows(kept: Tensor, length: Tensor) -> Tensor:
            of_each = kept[:, blocks].gather(2, wanted.expand(len(kept), -1, -1, -1))[:, :, 0]
            return (alpha * of_each).sum(dim=1) * (dct.GRID / (num_blocks * length.clamp(min=1)).sqrt())[:, None]

        return self._each(rows, of_rows, (self.hidden_size,))

    def pooled(self, num_blocks: int, rows: Tensor | None = None) -> Tensor:
        """p [S, N, D] of the last ``num_blocks`` cached blocks."""
        blocks = self._last(num_blocks)
        if self._ends is not None:
            index = torch.arange(len(self)) if rows is None else rows
            return torch.from_numpy(self._ends[index.numpy()])[:, blocks]

        def of_rows(kept: Tensor, length: Tensor) -> Tensor:
            return kept[:, blocks, 0] / length.clamp(min=1).sqrt()[:, None, None]

        return self._each(rows, of_rows, (num_blocks, self.hidden_size))

    def mean_of_last(self) -> Tensor:
        """The mean of the highest cached block [S, D] of every text, whatever ``pooling`` is."""

        def of_rows(kept: Tensor, length: Tensor) -> Tensor:
            return kept[:, -1, 0] / length.clamp(min=1).sqrt()[:, None]

        return self._each(None, of_rows, (self.hidden_size,))

    def _each(self, rows: Tensor | None, of_rows: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
        """``of_rows`` of C [S, N, Y, D] and the lengths [S], a slice of the rows at a time."""
        index = torch.arange(len(self)) if rows is None else rows
        result = torch.empty(len(index), *shape)
        for start in range(0, len(index), ROWS_AT_ONCE):
            some = index[start : start + ROWS_AT_ONCE]
            kept = torch.from_numpy(self._kept[some.numpy()])
            result[start : start + ROWS_AT_ONCE] = of_rows(kept, self._lengths[some].float())
        return result


def _read_about(folder: Path) -> dict[str, Any]:
    """about.json, whose content names the folder.

    Raises:
        DamagedCache: it cannot be read, or holds something else.
    """
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        name = _name({key: value for key, value in about.items() if key != "arrays"})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedCache(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if name != folder.name:
        raise DamagedCache(path, f"holds what a folder {name} would")
    return about


def _name(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]


# ---------------------------------------------------------------- making one


def unique(texts: Sequence[encoders.Text]) -> list[encoders.Text]:
    """Each text once, in order of first appearance: the rows of a cache."""
    return list(dict.fromkeys(texts))


def fingerprint(encoder: torch.nn.Module, tokenizer: Any) -> str:
    """A digest of all weights and of the tokenizer's rules."""
    digest = hashlib.sha256(type(encoder).__name__.encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is None:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:  # padding and truncation are the state of its last call
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()


@overload
def make(
    encoder: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[encoders.Text],
    folder: str | Path,
    settings: Settings = ...,
    *,
    shard: None = None,
    progress: bool = ...,
    verify: bool = ...,
) -> BlockCache: ...


@overload
def make(
    encoder: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[encoders.Text],
    folder: str | Path,
    settings: Settings = ...,
    *,
    shard: tuple[int, int],
    progress: bool = ...,
    verify: bool = ...,
) -> BlockCache | None: ...


def make(
    encoder: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[encoders.Text],
    folder: str | Path,
    settings: Settings = DEFAULT,
    *,
    shard: tuple[int, int] | None = None,
    progress: bool = False,
    verify: bool = False,
) -> BlockCache | None:
    """The cache of ``texts``, or of pairs of texts, in a folder below ``folder``: opened if complete, resumed if a pass was
    interrupted, else made. A text that appears twice is stored once. The encoder runs in eval mode, on its own device.

    Args:
        shard: (rank, world): ``world`` processes share the work, at once or one after the other, on machines that see the same
            ``folder``. Each computes its share of the batches of one process, into the same files: on equal processors the bits
            are one process's. The rank that ends last completes the cache. Ranks that end before get None, and open the cache
            by a later call.
        verify: compare a cache that is complete already with its checksums.

    Raises:
        DamagedCache: a file is not what was written; the message names it, and what to remove.
        ValueError, TypeError: a setting or the shard is wrong, or the texts are. Another process is at work on this shard.
            Without ``shard``: ranks have begun, and not all of them are done; names those.
    """
    texts = unique(encoders.checked(texts))
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    validate.positive_int("token_frequencies", settings.token_frequencies)
    validate.positive_int("max_length", settings.max_length)
    validate.positive_int("batch_size", settings.batch_size)
    validate.option("pooling", settings.pooling, POOLINGS)
    validate.option("block_norm", settings.block_norm, BLOCK_NORMS)
    rank, world = (0, None) if shard is None else rank_and_world(shard)
    batches = encoders.in_batches(encoders.longest_first(texts), settings.batch_size)
    capture = BlockCapture(encoder, settings.blocks, block_norm=settings.block_norm)
    try:
        with waiting.told("computing the digest of the encoder's weights", progress):
            model = fingerprint(encoder, tokenizer)
        about = {
            "format": FORMAT,
            "model": model,
            "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            **settings._asdict(),
            "blocks": list(capture.blocks),
        }
        name = _name(about)
        parent = made_folder("folder", folder)
        target, lock, unfinished = parent / name, parent / f".{name}.lock", Unfinished(parent, name, world)

        def fill() -> None:
            with encoders.in_eval_mode(encoder):
                _fill(unfinished, rank, batches, capture, tokenizer, texts, settings, progress)

        found = target.exists()
        if progress and rank == 0:
            shape = (len(texts), len(capture.blocks), settings.token_frequencies, families.hidden_size(encoder))
            announce(target, shape, settings.pooling != "mean", found)
        if world is None:
            with ExitStack() as stack:  # a second process finds the cache complete when it has the lock
                with waiting.told(f"waiting for another process that fills {target}", progress):
                    stack.enter_context(locked(lock, wait=True))
                if target.exists():
                    sweep(target)
                else:
                    if by_ranks := Unfinished.begun_by_ranks(parent, name):
                        unfinished = done_by_all(by_ranks, batches)
                    else:
                        fill()
                    unfinished.finish(about, target, progress)
        elif not target.exists():
            with unfinished.taken_by(rank):
                fill()
            with locked(lock, wait=True):
                if not target.exists() and not unfinished.missing(batches):
                    unfinished.finish(about, target, progress)
    finally:
        capture.remove()
    if not target.exists():
        return None
    made = BlockCache(target, texts)
    if verify and found:
        made.verify()
    return made


def _fill(
    unfinished: Unfinished,
    rank: int,
    batches: Sequence[list[int]],
    capture: BlockCapture,
    tokenizer: Any,
    texts: Sequence[encoders.Text],
    settings: Settings,
    progress: bool,
) -> None:
    """Compute and write the rank's share of the batches, from its last record of progress on."""
    mine, known = unfinished.share(batches, rank), unfinished.done(batches, rank)
    done, total = known.batches, sum(map(len, mine))

    def recorded_texts() -> int:
        return sum(map(len, mine[: known.batches]))

    if progress and done:
        waiting.say(f"cache: going on after {recorded_texts():,} of {total:,} texts")
    todo = encoders.state_batches(
        capture, tokenizer, texts, mine, max_length=settings.max_length, skip=done, progress=progress
    )
    if unfinished.world is None and not done:
        unfinished.remove()  # nothing of it is known to be what was written
    try:
        with unfinished.arrays(len(texts)) as arrays:
            recorded = clock()
            for rows, states, mask in todo:
                with torch.no_grad():
                    result = _summaries(states, mask, settings)
                arrays.write(rows, {key: tensor.cpu().numpy() for key, tensor in result.items()})
                done += 1
                due = clock() - recorded >= RECORD_SECONDS
                if due or done % RECORD_EVERY == 0 or done == len(mine):
                    arrays.flush()
                    after = known.after(done, arrays)
                    unfinished.note(rank, after)
                    known, recorded = after, clock()
    except BaseException as error:
        if progress and not isinstance(error, Exception):
            waiting.say_last(
                f"cache: {recorded_texts():,} of {total:,} texts are encoded and kept in {unfinished.folder.parent}"
            )
        if unfinished.world is None and not known.batches:  # no progress to resume from
            unfinished.remove()
        raise


def _summaries(hidden_states: Sequence[Tensor], mask: Tensor, settings: Settings) -> dict[str, Tensor]:
    """A batch's rows: "frequencies" C [B, N, Y, D], "lengths" [B], and "pooled" p [B, N, D] unless it follows from C."""
    first = hidden_states[0]
    tokens = Tokens.of(Batch([first], mask))
    y = torch.arange(settings.token_frequencies, device=first.device)
    wave = dct.cosine(y, tokens.rank[..., None], tokens.length.clamp(min=1)[..., None])
    beta = torch.where(tokens.real[..., None] & (y < tokens.length[..., None]), wave, 0.0).float()  # [B, L, Y]
    real = [tokens.keep_real(u.float()) for u in hidden_states]
    result = {
        "frequencies": torch.stack([beta.mT @ u for u in real], dim=1),
        "lengths": tokens.real.sum(dim=1),
    }
    if settings.pooling != "mean":
        weights = tokens.pooling_weights(settings.pooling).float()[:, None]  # [B, 1, L]
        result["pooled"] = torch.stack([(weights @ u)[:, 0] for u in real], dim=1)
    return result
