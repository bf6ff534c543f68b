"""A folder whose file lacks a weight is one line and exit code 2 for every command, and nothing is written."""

import shutil

import pytest
from model_folders import save_kinds

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
from safetensors.torch import load_file, save_file

from s2sent_kernels.cli import main

COMMANDS = {
    "encode": ["encode", "texts.txt", "--output", "out.npy"],
    "evaluate": ["evaluate", "--sts", "sts.tsv", "--output-dir", "out"],
    "export": ["export", "--output", "out.onnx"],
    "inspect": ["inspect", "--text", "a cat", "--output-dir", "out"],
    "predict": ["predict", "texts.txt", "--output", "out.tsv"],
}
SELECTING = [name for name in COMMANDS if name != "predict"]
BLOCK = "encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    save_kinds(root)
    return root


@pytest.fixture
def fails(saved, tmp_path, monkeypatch, capsys):
    """Run a command with folders of which one has lost a tensor, expect its error, and return the line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a cat\na dog\n")
    (tmp_path / "sts.tsv").write_text("split\tscore\tsentence1\tsentence2\ntest\t1\ta cat\ta\ntest\t2\ta dog\ta\n")

    def run(command, folder, file, lost, *options):
        shutil.copytree(saved / folder, folder)
        tensors = load_file(f"{folder}/{file}")
        del tensors[lost]
        save_file(tensors, f"{folder}/{file}", metadata={"format": "pt"})
        before = sorted(tmp_path.rglob("*"))
        assert main([*COMMANDS[command], *map(str, options), "--device", "cpu"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("s2sent: error: ") and f"{folder}/{file}" in line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize("lost", ["selector.up.weight", f"encoder.{BLOCK}"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_of_transformers(fails, command, lost):
    folder, lost = ("classifier", f"model.{lost}") if command == "predict" else ("model", lost)
    assert f"{folder} cannot be loaded: " in (
        line := fails(command, folder, "model.safetensors", lost, "--model", f"./{folder}")
    )
    assert repr(lost) in line


@pytest.mark.parametrize(
    "file, lost", [("1_S2SentPooling/model.safetensors", "selector.up.weight"), ("model.safetensors", BLOCK)]
)
@pytest.mark.parametrize("command", SELECTING)
def test_a_sentence_transformer(fails, command, file, lost):
    assert repr(lost) in fails(command, "whole", file, lost, "--model", "./whole")


@pytest.mark.parametrize("command", SELECTING)
def test_a_selector(fails, saved, command):
    line = fails(
        command, "selector", "model.safetensors", "up.weight", "--model", saved / "encoder", "--selector", "./selector"
    )
    assert "'up.weight'" in line


@pytest.mark.parametrize("command", SELECTING)
def test_an_encoder(fails, saved, command):
    line = fails(
        command, "encoder", "model.safetensors", BLOCK, "--model", "./encoder", "--selector", saved / "selector"
    )
    assert repr(BLOCK) in line
