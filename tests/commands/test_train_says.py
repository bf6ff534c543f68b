"""What `s2sent train` says at its end, and the history that it leaves, of every way to train."""

import json
import re
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
from builders import pairs, save_encoder, sentences, write_examples

from s2sent_kernels.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from s2sent_kernels import S2SentSelector
from s2sent_kernels.commands import train_pairs
from s2sent_kernels.sentence_transformers import S2SentPooling
from s2sent_kernels.tools import evaluation, history, resuming, training, verdict
from s2sent_kernels.tools.scores import correlations

FROZEN = [[], ["--freeze-encoder"]]
LOST = re.compile(r": do not use it, or train (longer, or )?with a smaller learning rate$", re.M)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path / "data.tsv", pairs(24))
    rows = [(str(i % 5), a, b) for i, (a, b) in enumerate(zip(sentences(12), sentences(12, seed=1), strict=True))]
    write_examples(tmp_path / "dev.tsv", rows, ("score", "sentence1", "sentence2"))
    labels = [("yes" if "moon" in text else "no", text) for text in sentences(60)]
    write_examples(tmp_path / "labels.tsv", labels, ("label", "text"))


def run(encoder, *options, data="data.tsv", output="out"):
    arguments = ["train", "--model", encoder, "--data", data, "--output", output, "--device", "cpu", "--bottleneck", 4]
    return main([str(option) for option in [*arguments, "--epochs", 2, "--batch-size", 8, *options]])


def table(out):
    """Names and scores of the table."""
    lines = out[out.index("on dev (") :].splitlines()
    found = (line.strip().rsplit(maxsplit=1) for line in lines[1:] if line.startswith("  "))
    return {name.strip(): float(score) for name, score in found}


def untouched(encoder, blocks):
    model = transformers.AutoModel.from_pretrained(encoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    rows = [line.split("\t") for line in Path("dev.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    dev = [(a, b, float(score)) for score, a, b in rows]
    states = [
        model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[1:]
        for first, second, _ in dev
        for text in (first, second)
    ]

    def score(of):
        vectors = [of([state[0].mean(dim=0) for state in some]).detach() for some in states]
        similarity = [float(a @ b / a.norm() / b.norm()) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return correlations(similarity, [gold for _, _, gold in dev]).spearman

    return score(lambda means: means[-1]), score(lambda means: sum(means[block] for block in blocks) / len(blocks))


def untrained(encoder, pooling):
    """By the model that the training begins with, as sentence-transformers scores it."""
    transformer = Transformer(str(encoder))
    torch.manual_seed(0)
    module = S2SentPooling.behind(
        transformer,
        None,
        pooling=pooling,
        bottleneck=4,
        frequencies=4,
        gate_norm="batch",
        block_prior=True,
        gate_scale=4.0,
    )
    model = SentenceTransformer(modules=[transformer, module], device="cpu")
    dev = [line.split("\t") for line in Path("dev.tsv").read_text().splitlines()[1:]]
    scores, ones, others = zip(*dev, strict=True)
    evaluator = EmbeddingSimilarityEvaluator(ones, others, list(map(float, scores)), write_csv=False)
    return 100 * evaluator(model)["spearman_cosine"]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_the_encoder_before_and_the_result_after(encoder, capsys, frozen, pooling):
    assert run(encoder, "--dev", "dev.tsv", "--pooling", pooling, *frozen) == 0
    found = table(capsys.readouterr().out)
    mean, average = untouched(encoder, range(2))
    assert found["mean of last, before"] == pytest.approx(mean, abs=0.006)
    if not frozen and pooling == "mean":
        assert found["scalar mix, equal weights, before"] == pytest.approx(average, abs=0.006)
    lines = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]
    best = max((line for line in lines if "dev" in line and line["step"]), key=lambda line: line["dev"])
    name = f"trained {'selector' if frozen else 'model'} (epoch {best['epoch']:g})"
    assert found[name] == pytest.approx(best["dev"], abs=0.006) and len(found) == 4
    if frozen:  # which scores it before the first epoch, too
        assert found["untrained selector"] == pytest.approx(lines[0]["dev"], abs=0.006) and lines[0]["step"] == 0
    else:
        assert found["untrained selector"] == pytest.approx(untrained(encoder, pooling), abs=0.006)
    assert Path("out/history.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1]["step"] == 6 and all(line["loss"] > 0 for line in lines if line["step"])


def test_what_is_refused_is_refused_before_the_dev_part_is_encoded(encoder, capsys, monkeypatch):
    def encoded(*given):
        raise AssertionError

    monkeypatch.setattr(verdict, "untouched", encoded)
    assert run(encoder, "--dev", "dev.tsv", "--learning-rate", -1) == 2
    assert "--learning-rate: expected a finite number, 0 or more, got -1.0" in capsys.readouterr().err
    (Path("out") / resuming.CHECKPOINTS).mkdir(parents=True)
    (Path("out") / resuming.CHECKPOINTS / "settings.json").write_text('{"epochs": 9}')
    assert run(encoder, "--dev", "dev.tsv", "--resume") == 2
    assert (
        "--resume: expected the settings that out/checkpoints was begun with: epochs = 9, got 2"
        in capsys.readouterr().err
    )


def test_the_scalar_mix_is_kept_for_evaluate(encoder):
    assert run(encoder, "--dev", "dev.tsv", "--freeze-encoder") == 0
    weights = json.loads(Path("out/config.json").read_text())["scalar_mix"]
    assert len(weights) == 2 and sum(weights) == pytest.approx(1) and weights[0] != weights[1]


def test_the_mean_of_the_last_block_is_that_of_the_encoder(encoder, capsys, monkeypatch):
    """Also where that block is not fused, and not in the cache."""
    monkeypatch.setattr(train_pairs.families, "indices", lambda *_: (0,))
    assert run(encoder, "--dev", "dev.tsv", "--freeze-encoder") == 0
    assert table(capsys.readouterr().out)["mean of last, before"] == pytest.approx(
        untouched(encoder, [0])[0], abs=0.006
    )


@pytest.mark.parametrize("task", ["contrastive", "sts", "classification"])
@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_a_training_that_lost_says_so(encoder, capsys, monkeypatch, frozen, task):
    """And is kept: whoever wants it can have it."""
    plain = verdict.report
    monkeypatch.setattr(
        verdict, "report", lambda what, rows, *rest: plain(what, [row._replace(score=1e9) for row in rows], *rest)
    )
    data = {"contrastive": "data.tsv", "sts": "dev.tsv", "classification": "labels.tsv"}[task]
    dev = data if task == "classification" else "dev.tsv"
    assert run(encoder, "--task", task, "--dev", dev, *frozen, data=data) == 0
    out = capsys.readouterr().out
    what = "selector" if frozen else "classifier" if task == "classification" else "model"
    assert f"the trained {what} scores less than" in out and len(LOST.findall(out)) == 1
    assert out.endswith("wrote out\n")


@pytest.mark.parametrize("rate", [1e-12, 10.0])
def test_a_training_that_brought_nothing_says_so(encoder, capsys, rate):
    assert run(encoder, "--dev", "dev.tsv", "--freeze-encoder", "--learning-rate", rate) == 0
    before, *after = [json.loads(line)["dev"] for line in Path("out/history.jsonl").read_text().splitlines()]
    said = f"no epoch scored more than the selector before its training, {before:.2f}: "
    assert (said in capsys.readouterr().out) == (max(after) <= before)
    assert rate == 10.0 or max(after) == before


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_a_classifier_beside_what_it_has_to_beat(encoder, capsys, frozen):
    assert run(encoder, "--task", "classification", *frozen, data="labels.tsv") == 0
    found = table(capsys.readouterr().out)
    if frozen:
        assert [name.split(",")[0] for name in found][:2] == ["mean of last", "scalar mix"]
    else:
        assert 50 <= found["always the most frequent label"] <= 100
    lines = history.read(Path("out"))
    assert any(line.loss is not None for line in lines) and any(line.dev is not None for line in lines)


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_a_loss_that_says_nothing(encoder, capsys, monkeypatch, frozen):
    assert run(encoder, *frozen) == 0
    assert "under 0.001" not in capsys.readouterr().out
    monkeypatch.setattr(verdict, "SAYS_NOTHING", 1e9)
    assert run(encoder, *frozen, output="other") == 0
    out = capsys.readouterr().out
    assert "nothing left to learn from; harder negatives" in out and "on dev" not in out


def test_the_baselines_change_no_bit_of_the_result(encoder):
    for output, options in (("with", ["--dev", "dev.tsv", "--patience", 9]), ("without", [])):
        assert run(encoder, "--epochs", 1, "--freeze-encoder", *options, output=output) == 0
    found = [S2SentSelector.from_pretrained(name).state_dict() for name in ("with", "without")]
    assert all((a == b).all() for a, b in zip(*(state.values() for state in found), strict=True))


def test_epochs_are_printed_as_they_end(encoder, capsys, monkeypatch):
    """Before the second epoch begins, the first has been told."""
    printed, plain = [], train_pairs.frozen.Dev.__call__

    def scored(self, module):
        printed.append(capsys.readouterr().out)
        return plain(self, module)

    monkeypatch.setattr(train_pairs.frozen.Dev, "__call__", scored)
    assert run(encoder, "--dev", "dev.tsv", "--freeze-encoder") == 0
    assert printed[:2] == ["", ""] and printed[2].startswith("epoch 1: loss ")


# ---------------------------------------------------------------- other libraries


class Reporter(transformers.TrainerCallback):
    told: ClassVar[list[dict]] = []

    def on_train_begin(self, args, state, control, **others):
        folder = Path(args.output_dir) / resuming.RUNS / "now"
        folder.mkdir(parents=True)
        (folder / "events").write_text("x")

    def on_log(self, args, state, control, logs=None, **others):
        self.told.append(dict(logs))


@pytest.fixture
def reporter(monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setattr(Reporter, "told", [])
    return Reporter


@pytest.mark.parametrize("task", ["contrastive", "classification"])
def test_tensorboard_is_told_and_its_files_stay(tmp_path, encoder, reporter, task):
    data = "labels.tsv" if task == "classification" else "data.tsv"
    assert run(encoder, "--task", task, "--report-to", "tensorboard", data=data) == 0
    assert any("loss" in logs for logs in reporter.told)
    assert (tmp_path / "out" / "runs" / "now" / "events").exists()
    assert not (tmp_path / "out" / resuming.CHECKPOINTS).exists()


def test_who_is_told_is_no_other_training(tmp_path, encoder, monkeypatch, capsys, reporter):
    """A training goes on with another --report-to."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(encoder) == 130
    assert run(encoder, "--resume", "--report-to", "tensorboard") == 0


def test_a_library_that_is_not_there_is_one_line(tmp_path, encoder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(encoder, "--report-to", "wandb") == 2
    error = capsys.readouterr().err
    assert "--report-to: wandb cannot be imported" in error and "pip install wandb" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_scores_are_those_of_evaluate(encoder, capsys):
    """One word for one thing: the names are those of `s2sent evaluate`."""
    assert verdict.MEAN_OF_LAST is evaluation.MEAN_OF_LAST and verdict.SCALAR_MIX is evaluation.SCALAR_MIX
