"""How far a command is: a bar where somebody watches standard error, else plain lines, since a bar returns the carriage and would
be one endless line of a log."""

import io
import subprocess
import sys

import pytest
from builders import TEXTS, make_encoder_and_tokenizer, pairs, save_encoder, write_examples

from s2sent_kernels.tools import encoders

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def encode(monkeypatch, stderr, every):
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(encoders, "PROGRESS_EVERY", every)
    encoder, tokenizer = make_encoder_and_tokenizer()
    rows = encoders.in_batches(range(len(TEXTS)), 2)
    batches = encoders.token_batches(encoder, tokenizer, TEXTS, rows, max_length=32, skip=1, progress=True)
    assert len(list(batches)) == len(rows) - 1
    return "" if stderr is None else stderr.getvalue()


def test_lines_in_a_log(monkeypatch):
    said = encode(monkeypatch, io.StringIO(), every=0.0)
    total = -(-len(TEXTS) // 2)
    assert said.splitlines() == [f"encode: {number} of {total} batches" for number in range(1, total)]
    assert encode(monkeypatch, io.StringIO(), every=30.0) == ""  # it was done before the first was due
    assert encode(monkeypatch, None, every=0.0) == ""


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    said = encode(monkeypatch, Terminal(), every=0.0)
    assert "\r" in said and "encode: 100%" in said


@pytest.mark.parametrize("frozen", [False, True])
def test_training_in_a_log(frozen, tmp_path):
    pytest.importorskip("datasets")
    save_encoder(tmp_path / "encoder")
    command = ["train", "--data", write_examples(tmp_path / "data.tsv", pairs(16)), "--model", tmp_path / "encoder"]
    command += ["--output", tmp_path / "out", "--device", "cpu", "--batch-size", 8, "--epochs", 1]
    command += ["--freeze-encoder", "--cache", tmp_path / "cache"] if frozen else []
    run = [sys.executable, "-m", "s2sent_kernels.cli", *map(str, command)]
    done = subprocess.run(run, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    # sentence-transformers shows one bar itself, of the examples in the model's card, and has no option for it. Lines say what a
    # slow machine waits for, and how large the cache will be.
    known = (b"Computing widget", b"cache: ")
    lines = [line for line in done.stderr.split(b"\n") if not line.endswith(b" ...")]
    theirs = [line for line in b"\n".join(lines).split(b"\r") if line.strip() and not line.startswith(known)]
    assert not theirs and b"\r" not in done.stdout
