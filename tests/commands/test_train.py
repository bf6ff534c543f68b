"""`s2sent train`, with the encoder fine-tuned and with it frozen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import TEXTS, pairs, save_encoder, sentences, write_examples

from s2sent_kernels import S2SentSelector, files
from s2sent_kernels.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

from s2sent_kernels.commands import train
from s2sent_kernels.sentence_transformers import S2SentPooling, load
from s2sent_kernels.tools import resuming


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of 2 blocks with a tokenizer of a few words, in a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


def test_precision_is_autocast(tmp_path, encoder, monkeypatch):
    """Products in bfloat16, weights in float32."""
    seen, pool = [], S2SentPooling.forward

    def forward(self, features, **options):
        if torch.is_grad_enabled():
            seen.append(torch.is_autocast_enabled("cpu"))
        return pool(self, features, **options)

    monkeypatch.setattr(S2SentPooling, "forward", forward)
    path = write_examples(tmp_path / "data.tsv", pairs(16))
    arguments = ["train", "--data", path, "--model", encoder, "--device", "cpu", "--batch-size", 8, "--epochs", 2]
    found = []
    for precision in ("float32", "bfloat16"):
        output = tmp_path / precision
        assert main(list(map(str, [*arguments, "--precision", precision, "--output", output]))) == 0
        assert set(seen) == {precision == "bfloat16"}
        seen.clear()
        found.append(load(output, device="cpu").state_dict())
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in found[1].values())
    assert not all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_the_command(tmp_path, encoder, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(sentences(24)), encoding="utf-8")
    sts = tmp_path / "sts.tsv"
    rows = [f"dev\t{i % 5}\t{a}\t{b}" for i, (a, b) in enumerate(zip(sentences(8), sentences(8, seed=1), strict=True))]
    sts.write_text("split\tscore\tsentence1\tsentence2\n" + "\n".join(rows) + "\n", encoding="utf-8")
    arguments = [
        "train",
        "--data",
        path,
        "--model",
        encoder,
        "--output",
        tmp_path / "out",
        "--blocks",
        "last:1",
        "--dev",
        sts,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--bottleneck",
        4,
        "--device",
        "cpu",
        "--accumulation",
        2,
    ]
    (tmp_path / "out" / resuming.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)  # interrupted while it was written
    assert main(list(map(str, arguments))) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    model = load(tmp_path / "out", device="cpu")
    assert model[1].blocks == [1] and model[1].selector.block_prior is not None
    assert main(list(map(str, arguments))) == 2
    assert "it is there already and not empty" in capsys.readouterr().err


def test_the_command_stops_when_the_sts_file_says_no_more(tmp_path, encoder, capsys):
    """No parameter changes, so no epoch is better than the first."""
    path, sts = write_examples(tmp_path / "data.tsv", pairs(16)), tmp_path / "sts.tsv"
    rows = [f"dev\t{i % 5}\t{a}\t{b}" for i, (a, b) in enumerate(zip(sentences(8), sentences(8, seed=1), strict=True))]
    sts.write_text("split\tscore\tsentence1\tsentence2\n" + "\n".join(rows) + "\n", encoding="utf-8")
    arguments = [
        "train",
        "--data",
        path,
        "--model",
        encoder,
        "--output",
        tmp_path / "out",
        "--dev",
        sts,
        "--device",
        "cpu",
        "--batch-size",
        8,
        "--bottleneck",
        4,
        "--no-norm",
        "--learning-rate",
        0,
        "--selector-learning-rate",
        1e-30,
        "--prior-learning-rate",
        1e-30,
        "--epochs",
        6,
        "--patience",
        2,
    ]
    assert main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out.count(": dev ") == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--freeze-encoder", "--patience", "2"], "--patience: expected --dev"),
        (["--freeze-encoder", "--learning-rate", "1e-3", "1e-2"], "--dev: expected a file that chooses among several"),
        (["--seed", "0", "1"], "--seed: several values only with --freeze-encoder"),
        (["--dropout", "0.1"], "--dropout: not with --task contrastive"),
        (["--loss", "cosine"], "--loss: not with --task contrastive"),
        (["--gate-scale", "inf"], "--gate-scale: expected a finite number"),
        (["--gate-scale", "4", "--no-gate-scale"], "not allowed with argument"),
        (["--freeze-encoder", "--precision", "bfloat16"], "--precision: not with --freeze-encoder"),
        (["--freeze-encoder", "--report-to", "wandb"], "--report-to: not with --freeze-encoder"),
        (["--symmetric"], "--symmetric: only with --freeze-encoder"),
        (["--widths", "4"], "--widths: only with --freeze-encoder"),
        (["--freeze-encoder", "--widths", "4", "16"], "widths: expected fewer than all 16 features, got 16"),
        (["--cache", "x"], "--cache: only with --freeze-encoder"),
        (["--mini-batch", "4"], "--mini-batch: expected --no-norm beside it"),
        (["--freeze-encoder", "--mini-batch", "4", "--no-norm"], "--mini-batch: not with --freeze-encoder"),
        (["--task", "sts", "--mini-batch", "4", "--no-norm"], "--mini-batch: not with --task sts"),
        (["--task", "classification", "--mini-batch", "4"], "--mini-batch: not with --task classification"),
        (["--temperature", "0"], "temperature: expected a positive number"),
        (["--learning-rate", "-1"], "--learning-rate: expected a finite number, 0 or more"),
        (["--temperature", "nan"], "temperature: expected a positive number"),
        (["--freeze-encoder", "--temperature", "nan"], "temperature: expected a positive number"),
        (["--learning-rate", "fast"], "--learning-rate: expected a number, got 'fast'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0, under 2^32, got '-1'"),
        (["--seed", "4294967296"], "--seed: expected a whole number from 0, under 2^32, got '4294967296'"),
        (["--patience", "2"], "--patience: expected --dev"),
        (["--model", "/nowhere/model"], "there is no such directory"),
        (["--dev", "/nowhere/sts.tsv"], "cannot be read"),
        (["--blocks", "last:9"], "'last:N' with N from 1 to 2"),
    ],
)
def test_the_command_refuses(tmp_path, encoder, capsys, options, message):
    path = write_examples(tmp_path / "data.tsv", pairs(4))
    model = [] if "--model" in options else ["--model", str(encoder)]
    arguments = ["train", "--data", str(path), "--output", str(tmp_path / "out"), "--device", "cpu", *model, *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--freeze-encoder", "--cache", "cache"]], ids=["tuned", "frozen"])
def test_the_encoder_is_not_written_over(tmp_path, encoder, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder, "encoder")
    before = {path.name: path.read_bytes() for path in Path("encoder").iterdir()}
    path = write_examples(tmp_path / "data.tsv", pairs(4))
    assert (
        main(["train", "--data", str(path), "--model", "./encoder", "--output", "encoder", "--device", "cpu", *options])
        == 2
    )
    assert "output encoder: it is there already and not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("encoder").iterdir()} == before
    assert sorted(os.listdir()) == ["data.tsv", "encoder"]


def test_frozen_training_needs_pairs(tmp_path, encoder, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ["train", "--freeze-encoder", "--data", path, "--model", encoder, "--output", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 2
    assert "--freeze-encoder needs pairs" in capsys.readouterr().err


def test_every_option_of_some_trainings_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in (*train._ONLY, *train._SEVERAL))


def test_frozen_training_takes_several_negatives(tmp_path, encoder):
    columns = ("anchor", "positive", "negative_1", "negative_2")
    rows = [(*pair, one, two) for pair, one, two in zip(pairs(8), sentences(8, 1), sentences(8, 2), strict=True)]
    arguments = ["train", "--freeze-encoder", "--model", encoder, "--device", "cpu", "--cache", tmp_path / "cache"]
    arguments += ["--bottleneck", 4, "--epochs", 1, "--batch-size", 8]
    fewer = [(*row[:3], "") for row in rows]
    for name, some, options in (
        ("both", rows, []),
        ("one", fewer, []),
        ("symmetric", rows, ["--symmetric"]),
        ("widths", rows, ["--widths", "4", "8"]),
    ):
        data = write_examples(tmp_path / f"{name}.csv", some, columns)
        assert main(list(map(str, [*arguments, "--data", data, "--output", tmp_path / name, *options]))) == 0
    both, *others = (S2SentSelector.from_pretrained(tmp_path / name) for name in ("both", "one", "symmetric", "widths"))
    assert not any(torch.equal(both.up.weight, other.up.weight) for other in others)


def test_a_missing_extra_is_named(tmp_path, encoder, capsys, monkeypatch):
    path = write_examples(tmp_path / "data.tsv", pairs(4))
    monkeypatch.delitem(sys.modules, "s2sent_kernels.tools.training")
    monkeypatch.delattr("s2sent_kernels.tools.training")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train", "--data", str(path), "--model", str(encoder), "--output", str(tmp_path / "out")]) == 2
    assert files.installs("train") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes(tmp_path, encoder):
    path = write_examples(tmp_path / "data.tsv", pairs(8))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--data", path, "--model", encoder, "--output", tmp_path / "out", "--device", "cpu", "--batch-size", 4]
    command = [*launch, "-m", "s2sent_kernels.cli", "train", *arguments, "--epochs", 1, "--bottleneck", 4]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert load(tmp_path / "out", device="cpu").encode("a cat").shape == (16,)


# ---------------------------------------------------------------- behind a frozen encoder


def test_train_with_a_frozen_encoder_writes_what_evaluate_reads(places, tmp_path, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    data = tmp_path / "triplets.tsv"
    rows = [f"{TEXTS[i]}\t{TEXTS[(i + 1) % 8]}\t{TEXTS[(i + 3) % 8] if i % 2 else ''}" for i in range(8)]
    data.write_text("\n".join(["anchor\tpositive\tnegative", *rows]) + "\n")
    arguments = ["train", "--freeze-encoder", "--model", places / "model", "--data", data, "--dev", places / "sts.tsv"]
    arguments += [
        "--dev-split",
        "test",
        "--blocks",
        "last:3",
        "--frequencies",
        "8",
        "--bottleneck",
        "4",
        "--epochs",
        "2",
    ]
    arguments += ["--batch-size", "4", "--cache", tmp_path / "cache", "--device", "cpu"]
    assert main([*map(str, arguments), "--output", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["epoch 1", "epoch 2"]
    assert main([*map(str, arguments), "--output", str(tmp_path / "two")]) == 0
    first, second = (S2SentSelector.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert (first.num_blocks, first.frequencies, first.bottleneck) == (3, 8, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert json.loads((tmp_path / "one" / "config.json").read_text())["blocks"] == [1, 2, 3]
    evaluate = ["evaluate", "--model", places / "model", "--selector", tmp_path / "one", "--sts", places / "sts.tsv"]
    assert main([*map(str, evaluate), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("anchor\tpositive\na\tb\nc\td\n", ["--freeze-encoder", "--blocks", "last:9"], "'last:N' with N from 1 to 4"),
        ("anchor\tpositive\na\tb\nc\td\n", ["--freeze-encoder", "--frequencies", "5"], "divisible by M"),
        ("anchor\tpositive\na\tb\n", ["--freeze-encoder"], "expected two or more examples, since the others"),
        ("anchor\tpositive\na\t\n", ["--freeze-encoder"], "line 2: positive: expected a text, got an empty one"),
        (
            "anchor\tother\na\tb\n",
            ["--freeze-encoder"],
            "expected columns anchor and positive, got anchor, other, ",
        ),
    ],
)
def test_training_that_cannot_be(content, options, message, places, tmp_path, capsys):
    data = tmp_path / "data.tsv"
    data.write_text(content)
    arguments = ["train", "--model", places / "model", "--data", data, "--output", tmp_path / "out", "--device", "cpu"]
    assert main([*map(str, arguments), "--cache", str(tmp_path / "cache"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
