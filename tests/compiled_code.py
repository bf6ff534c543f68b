"""Hashes of the code that the CUDA and Triton kernels compile to, to prove that a change only moved or renamed code. No GPU.

    python tests/compiled_code.py write before.json --cuda --triton     # in the tree before the change; one of them suffices
    python tests/compiled_code.py write after.json --cuda --triton      # in the tree after it, with the same compilers
    python tests/compiled_code.py compare before.json after.json        # exits with 1 where a kernel's code differs

Run it in a tree's root; the script itself may lie elsewhere. CUDA takes a minute of processor time, Triton four (``--cases 0``
compiles the first case alone; ``compare`` then looks at what both files have).

CUDA: csrc/**/*.cu with setup.py's NVCC_FLAGS to SASS, one entry for each kernel instance. Needs nvcc (on the PATH or below
CUDA_HOME) and cuobjdump (the toolkit's, or the one in Triton). Triton: the kernels that the ops launch over CASES and VARIANTS,
compiled as by ``compile_kernels.py``, to TTGIR and PTX.

Before hashing, addresses, encodings, locations, comments and all names are removed (symbols and values are numbered by first
use). Kernels are matched by name and case first, then by their code alone, so that renames, moves between files and a new
order of arguments do not count as differences; the output tells them apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path.cwd()
sys.path[:0] = [str(ROOT), *(str(path.parent) for path in (ROOT / "tests").rglob("compile_kernels.py"))]

CUDA_ARCHITECTURE = "90a"
BATCH, TOKENS, MANY_SENTENCES = 2, 64, 300  # the gate's tile depends on how many sentences there are


class Case(NamedTuple):
    size: int
    frequencies: int
    num_blocks: int
    bottleneck: int = 64
    dtype: str = "bfloat16"
    norm: bool = True
    prior: bool = True
    every_variant: bool = False  # of masks, poolings, profiles and activations; else one of each that differs most


CASES = [
    Case(384, 2, 3, every_variant=True),
    Case(768, 4, 12),
    Case(1024, 8, 24, prior=False),
    Case(384, 1, 6, dtype="float32"),
    Case(60, 4, 5, bottleneck=10, dtype="float16", norm=False),  # narrow loads, a padded bottleneck and padded blocks
    Case(384, 4, 6, bottleneck=300),  # wider than the fused gate
]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Numbered(dict[str, str]):
    """Names by the order of their first use; a substitution for ``re.sub``."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def __call__(self, found: re.Match[str]) -> str:
        return self.setdefault(found[0], f"{self.prefix}{len(self)}")


# ---------------------------------------------------------------- CUDA


def tool(name: str) -> str:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=f"{home}/bin")
    if found is None and name == "cuobjdump":
        import triton

        found = triton.knobs.nvidia.cuobjdump.path
    if found is None:
        raise SystemExit(f"{name} is neither on the PATH nor in {home}/bin (CUDA_HOME)")
    return found


def functions(dump: str) -> Iterator[tuple[str, str]]:
    """(mangled name, instructions) of each kernel in the output of ``cuobjdump -sass``."""
    for section in re.split(r"^\s*Function : ", dump, flags=re.M)[1:]:
        name, _, body = section.partition("\n")
        instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body, flags=re.M)
        assert instructions, name
        yield name.strip(), re.sub(r"[\w$]*_Z\w+", Numbered("symbol"), "\n".join(instructions))


def cuda() -> dict[str, Any]:
    import setup

    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    sources = sorted((ROOT / "csrc").rglob("*.cu"))

    def dump(source: Path) -> str:
        with tempfile.TemporaryDirectory() as folder:
            cubin = f"{folder}/a.cubin"
            target = f"-gencode=arch=compute_{CUDA_ARCHITECTURE},code=sm_{CUDA_ARCHITECTURE}"
            subprocess.run([nvcc, *setup.NVCC_FLAGS, target, "-cubin", str(source), "-o", cubin], check=True)
            return subprocess.run([cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [kernel for text in pool.map(dump, sources) for kernel in functions(text)]
    names = [name for name, _ in found]
    if shutil.which("c++filt"):
        plain = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
        names = plain.stdout.splitlines()
    release = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    entries = Counter((name, digest(body)) for name, (_, body) in zip(names, found, strict=True))
    return {
        "made_with": f"{release.splitlines()[-1]}, sm_{CUDA_ARCHITECTURE}",
        "kernels": [[name, {"sass": code}] for (name, code), count in sorted(entries.items()) for _ in range(count)],
    }


# ---------------------------------------------------------------- Triton


def without_locations(ttgir: str) -> str:
    """TTGIR without ``loc(...)``, whose brackets nest, and the aliases of locations."""
    lines = []
    for line in ttgir.splitlines():
        if line.startswith("#loc"):
            continue
        while (start := line.find("loc(")) >= 0:
            end, depth = start + 4, 1
            while depth:
                depth += {"(": 1, ")": -1}.get(line[end], 0)
                end += 1
            line = line[:start] + line[end:]
        lines.append(line.rstrip())
    return "\n".join(line for line in lines if line)


def normal_ttgir(ttgir: str, kernel: str) -> tuple[str, str]:
    """The text with its values numbered by first use, and the same with the kernel's parameters in no order."""
    text = re.sub(rf"@{re.escape(kernel)}\b", "@kernel", without_locations(ttgir))
    head = re.search(r"tt\.func public @kernel\((.*)\) attributes", text)
    assert head, text[:2000]
    parameters = sorted(p.split(": ", 1)[1] for p in re.split(r", (?=%)", head[1]) if p)
    value = r"%[\w.$-]+"
    loose = re.sub(value, Numbered("%"), text[: head.start(1)] + text[head.end(1) :])
    return re.sub(value, Numbered("%"), text), "\n".join([*parameters, loose])


def normal_ptx(ptx: str, kernel: str) -> tuple[str, str]:
    ptx = re.sub(r"//.*", "", ptx.split(".section", 1)[0]).replace(kernel, "kernel")
    lines = [line.strip() for line in ptx.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\.(loc|file)\b|\$L__(tmp|func)\w*:", line)]
    parameters = sorted(re.sub(r"\bkernel_param_\d+,?", "", line) for line in lines if line.startswith(".param"))
    body = [line for line in lines if not re.match(r"\.param|ld\.param", line)]
    register = r"%[a-z]+\d+\b"
    loose = re.sub(register, Numbered("%"), "\n".join(body))
    return re.sub(register, Numbered("%"), "\n".join(lines)), "\n".join([*parameters, loose])


def calls(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, call of an op) for the variants of a case that differ in what is compiled."""
    import torch

    from s2sent_kernels import S2SentSelector

    size, frequencies, num_blocks, bottleneck, dtype_name, norm, prior, every = case
    dtype, ops = getattr(torch, dtype_name), torch.ops.s2sent
    gate_norm = "batch" if norm else None
    selector = S2SentSelector(
        size, num_blocks, bottleneck, frequencies, gate_norm=gate_norm, block_prior=prior, backend="triton"
    ).eval()
    n = selector.norm
    norms = (None,) * 4 if n is None else (n.weight, n.bias, n.running_mean, n.running_var)
    linear = (selector.down.weight, selector.down.bias, selector.up.weight, selector.up.bias)
    parameters = [None if t is None else t.detach() for t in (*linear, *norms, selector.block_prior)]
    f, p, many_f = torch.zeros(BATCH, size), torch.zeros(BATCH, num_blocks, size), torch.zeros(MANY_SENTENCES, size)
    device, needed = torch.device("cpu"), [True] * num_blocks
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, TOKENS, BATCH * TOKENS], dtype=torch.int32)
    padded, packed = (BATCH, TOKENS, size), (BATCH * TOKENS, size)
    batches = {"packed": (packed, None, cu_seqlens), "masked": (padded, mask, None)}
    if every:
        batches["unmasked"] = (padded, None, None)

    def block_by_block(blocks, batch, pooling):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            blockwise = selector.blockwise(batch[0], cu_seqlens=batch[1], pooling=pooling)
            for block, hidden_state in enumerate(blocks):
                blockwise.add(block, hidden_state)
            blockwise.result()

    for layout, (shape, *batch) in batches.items():
        blocks = [torch.zeros(shape, dtype=dtype) for _ in range(num_blocks)]
        read = (blocks, *batch, frequencies)
        to = (shape, dtype, device, needed, *batch, frequencies)
        gated, tail = (blocks, *batch, *parameters, frequencies), (1e-6, "triton")
        for pooling in ("mean", "cls", "last") if every else ("mean",):
            yield f"select_pool {layout} {pooling}", partial(ops.select_pool, *gated, pooling, "tanh", *tail)
            yield f"squeeze {layout} {pooling}", partial(ops.squeeze, *read, "paper", pooling, "triton")
            yield (
                f"squeeze_backward {layout} {pooling}",
                partial(ops.squeeze_backward, f, p, None, None, *to, "paper", pooling, "triton"),
            )
            yield f"block by block {layout} {pooling}", partial(block_by_block, blocks, batch, pooling)
        profiles = ("paper", "official") if every and layout != "packed" else ("paper",)
        for profile in profiles:
            yield f"squeeze {layout} {profile}", partial(ops.squeeze, *read, profile, None, "triton")
            yield (
                f"squeeze_backward of tokens {layout} {profile}",
                partial(ops.squeeze_backward, f, None, blocks[0], p, *to, profile, None, "triton"),
            )
        yield f"select {layout}", partial(ops.select, *gated, "tanh", *tail)
        yield f"fuse {layout}", partial(ops.fuse, blocks, *batch, p, "triton")
        yield f"fuse_backward {layout}", partial(ops.fuse_backward, blocks[0], blocks, *batch, "triton")
    for activation in ("tanh", "relu") if every else ("tanh",):
        tail = (*parameters, activation, 1e-6, "triton")
        options = (*parameters, num_blocks, activation, 1e-6, "triton")
        yield f"gate {activation}", partial(ops.gate, f, *options)
        yield f"gate of many {activation}", partial(ops.gate, many_f, *options)
        yield f"gate_backward {activation}", partial(ops.gate_backward, p, f, *tail)
        yield f"gate_pool_backward {activation}", partial(ops.gate_pool_backward, f.to(dtype), f, p, *tail)


def name_of(case: Case) -> str:
    return ",".join(map(str, case))


def accept_cpu_tensors() -> None:
    """The Triton engine without a GPU: it is used for the CPU tensors of ``calls``, and launches compile only."""
    if (ROOT / "s2sent_kernels" / "engines").is_dir():
        from s2sent_kernels.engines.triton import limits

        limits.refuses = lambda call: None
    else:  # trees before the engines had a folder
        from s2sent_kernels import backend

        backend._refusal = lambda *call: None


def triton(capability: int, cases: list[Case]) -> dict[str, Any]:
    folder = tempfile.TemporaryDirectory()  # kernels without their machine code must not stay in the user's cache
    os.environ.update(TRITON_CACHE_DIR=folder.name, TRITON_DISABLE_LINE_INFO="1")
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from compile_kernels import StandInDriver
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(StandInDriver(capability))
    accept_cpu_tensors()
    CUDABackend.make_cubin = lambda self, *_: b""  # ptxas is deterministic, and most of the time
    entries: list[list[Any]] = []
    known: dict[int, dict[str, str]] = {}
    kept, current = [], [""]

    def codes(kernel: Any, name: str) -> dict[str, str]:
        kept.append(kernel)  # so that no other gets its id
        ttgir, ptx = normal_ttgir(kernel.asm["ttgir"], name), normal_ptx(kernel.asm["ptx"], name)
        launch = f"{kernel.metadata.num_warps} warps, {kernel.metadata.shared} bytes, {kernel.metadata.launch_pdl}"
        texts = {"ttgir": ttgir[0], "ptx": ptx[0], "ttgir_any_order": ttgir[1], "ptx_any_order": ptx[1]}
        return {**{key: digest(text) for key, text in texts.items()}, "launch": launch}

    def compile_instead_of_launching(self: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel, name = self.run(*args, grid=grid, warmup=True, **kwargs), self.fn.__name__
            if id(kernel) not in known:
                known[id(kernel)] = codes(kernel, name)
            entries.append([f"{name}: {current[0]}", known[id(kernel)]])

        return launch

    JITFunction.__getitem__ = compile_instead_of_launching
    for case in cases:
        for label, call in calls(case):
            current[0] = f"{label} at {name_of(case)}"
            call()
        print(f"{case}: {len(known)} kernels so far, {len(entries)} launches", file=sys.stderr, flush=True)
    folder.cleanup()
    unique = {json.dumps(entry): entry for entry in entries}  # a kernel that an op launches once for each block
    return {
        "made_with": f"Triton {triton.__version__}, sm_{capability}",
        "cases": [name_of(case) for case in cases],
        "kernels": list(unique.values()),
    }


# ---------------------------------------------------------------- comparing


def matches(left: list[Any], right: list[Any], key: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """Pairs of equal keys, removed from both lists."""
    waiting: dict[Any, list[Any]] = {}
    for entry in right:
        waiting.setdefault(key(entry), []).append(entry)
    pairs = []
    for entry in list(left):
        if waiting.get(key(entry)):
            other = waiting[key(entry)].pop(0)
            pairs.append((entry, other))
            left.remove(entry)
            right.remove(other)
    return pairs


def kernels_of_common_cases(part: dict[str, Any], other: dict[str, Any]) -> list[Any]:
    if "cases" not in part:
        return list(part["kernels"])
    common = set(part["cases"]) & set(other["cases"])
    return [entry for entry in part["kernels"] if entry[0].rpartition(" at ")[2] in common]


def exact(code: dict[str, str]) -> tuple[str, ...]:
    return tuple(value for key, value in sorted(code.items()) if not key.endswith("any_order"))


def any_order(code: dict[str, str]) -> tuple[str, ...]:
    return tuple(value for key, value in sorted(code.items()) if key not in ("ttgir", "ptx"))


def compare(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether all code is the same; prints what is the same, moved, and different."""
    same = True
    for part in sorted(before.keys() & after.keys()):
        if before[part]["made_with"] != after[part]["made_with"]:
            raise SystemExit(f"{part}: made with {before[part]['made_with']}, and with {after[part]['made_with']}")
        left, right = (
            kernels_of_common_cases(before[part], after[part]),
            kernels_of_common_cases(after[part], before[part]),
        )
        print(f"{part} ({before[part]['made_with']}): {len(left)} before, {len(right)} after")
        print(f"  equal under the same name: {len(matches(left, right, lambda e: (e[0], exact(e[1]))))}")
        reordered = matches(left, right, lambda e: (e[0], any_order(e[1])))
        print(f"  equal but for the order of parameters: {len(reordered)}")
        renamed = matches(left, right, lambda e: exact(e[1])) + matches(left, right, lambda e: any_order(e[1]))
        print(f"  equal under another name: {len(renamed)}")
        for (old, _), (new, _) in renamed:
            print(f"    {old} -> {new}")
        for title, rest, others in (("before", left, right), ("after", right, left)):
            print(f"  only {title}: {len(rest)}")
            for name, code in rest:
                other = next((c for n, c in others if n == name), None)
                differing = (
                    "" if other is None else " differs in " + ", ".join(k for k in code if code[k] != other.get(k))
                )
                print(f"    {name}{differing}")
        same = same and not left and not right
    for part in sorted(before.keys() ^ after.keys()):
        print(f"{part}: only in one of the files, not compared")
    return same


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("file", type=Path)
    write.add_argument("--cuda", action="store_true")
    write.add_argument("--triton", action="store_true")
    write.add_argument("--capability", type=int, default=90, help="of the Triton kernels: 80, 90 or 100")
    write.add_argument("--cases", help="indices into CASES, separated by commas; all where left out")
    comparison = commands.add_parser("compare")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        files = (json.loads(path.read_text()) for path in (options.before, options.after))
        return 0 if compare(*files) else 1
    if not options.cuda and not options.triton:
        parser.error("write: expected --cuda, --triton or both")
    found = {}
    if options.cuda:
        found["cuda"] = cuda()
    if options.triton:
        cases = [CASES[int(index)] for index in options.cases.split(",")] if options.cases else CASES
        found["triton"] = triton(options.capability, cases)
    options.file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
