"""Fine-tuning of encoder and selector: what it reads, that it learns, goes on and keeps the best, and its errors."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import WORDS, save_encoder, sentences

from s2sent_kernels.cli import main
from s2sent_kernels.examples import Examples, read_examples

pa = pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from pyarrow import parquet  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels import frozen, training  # noqa: E402
from s2sent_kernels.commands import train  # noqa: E402
from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402

ROWS = [("a b", 'b, "c"', "d"), ("é", "f", "")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of 2 blocks with a tokenizer of a few words, in a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


def write(path, rows=ROWS, columns=("anchor", "positive", "negative")):
    if path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        quoted = [",".join('"' + text.replace('"', '""') + '"' for text in row) for row in (columns, *rows)]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows), encoding="utf-8")
    else:
        parquet.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    return path


def pairs(count):
    """Sentences, and the same in other words."""
    other = dict(zip(WORDS, WORDS[8:] + WORDS[:8], strict=True))
    return [(text, " ".join(other[word] for word in text.split())) for text in sentences(count)]


def make_model(encoder):
    transformer = Transformer(str(encoder))
    torch.manual_seed(0)
    pooling = S2SentPooling.behind(transformer, blocks=None, bottleneck=4, frequencies=4, block_prior=True)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    examples = read_examples(write(tmp_path / f"data{suffix}"))
    assert examples == Examples(("anchor", "positive", "negative"), ROWS, supervised=True)


def test_several_negatives_and_other_columns(tmp_path):
    columns = ("id", "negative_2", "positive", "anchor", "negative_1", "negatives")
    examples = read_examples(write(tmp_path / "data.jsonl", [("1", "n2", "p", "a", "n1", "x")], columns))
    assert examples == Examples(("anchor", "positive", "negative_2", "negative_1"), [("a", "p", "n2", "n1")], True)


def test_any_row_may_be_the_first_with_a_negative(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d", "negative": "e"}\n')
    assert read_examples(path).rows == [("a", "b", ""), ("c", "d", "e")]


def test_sentences_are_their_own_positives(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("One.\n\n Two.\n", encoding="utf-8")
    assert read_examples(path) == Examples(("anchor", "positive"), [("One.", "One."), ("Two.", "Two.")], False)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.doc", b"a", "expected a file of .tsv, .csv, .jsonl, .parquet, .txt, got suffix '.doc'"),
        ("data.txt", b"\n \n", "expected sentences, got an empty file"),
        ("data.txt", b"ok\n\xff\n", "line 2 is not UTF-8"),
        ("data.tsv", b"", "got an empty file"),
        ("data.tsv", b"anchor\tother\na\tb\n", "expected a tab-separated column positive"),
        ("data.csv", b"", "expected rows with columns anchor and positive, got none"),
        ("data.csv", b"anchor,other\na,b\n", "expected a column positive, got anchor, other"),
        ("data.csv", b"anchor,positive\na\n", "line 2: expected 2 comma-separated fields"),
        ("data.csv", b"anchor,positive\na,b,c\n", "line 2: expected 2 comma-separated fields"),
        ("data.csv", b'anchor,positive\n"a"x,b\n', "line 2 is broken"),
        ("data.csv", b"anchor,positive\na,b\n\xff,b\n", "line 3 is not UTF-8"),
        ("data.jsonl", b'{"anchor": "a", "positive": "b"}\n{\n', "line 2 is not JSON"),
        ("data.jsonl", b"[1]\n", "line 1: expected an object"),
        ("data.jsonl", b"[" * 200_000, "line 1 cannot be read"),
        ("data.jsonl", b'{"anchor": "a", "positive": "b", "n": ' + b"9" * 5000 + b"}", "line 1 cannot be read"),
        ("data.jsonl", b'{"anchor": "a", "positive": "\\ud83d"}', "line 1: positive: expected a text, got half a character"),
        ("data.tsv", b"anchor\tpositive\tanchor\na\tb\tc\n", "expected each column once, got anchor twice"),
        ("data.csv", b"anchor,positive,anchor\na,b,c\n", "expected each column once, got anchor twice"),
        ("data.jsonl", b'{"anchor": "a"}\n', "expected a column positive"),
        ("data.jsonl", b'{"anchor": "a", "positive": 3}\n', "line 1: positive: expected a text, got 3"),
        ("data.jsonl", b'{"anchor": "a", "positive": "b", "negative": 0}\n', "line 1: negative: expected a text, got 0"),
        ("data.jsonl", b'{"anchor": "a", "positive": " "}\n', "line 1: expected an anchor and a positive"),
        ("data.parquet", b"PAR1 no", "cannot be read"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert main(["train", "--data", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- training


def test_it_learns_and_what_is_saved_is_what_was_trained(tmp_path, encoder):
    model = make_model(encoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examples = Examples(("anchor", "positive"), pairs(64), True)
    recipe = training.Recipe(epochs=15, batch_size=16, learning_rate=3e-3)
    assert training.fine_tune(model, examples, tmp_path / "out", recipe) is None
    after = model.state_dict()
    assert not (tmp_path / "out" / training.CHECKPOINTS).exists()
    for part in ("0.", "1.selector."):
        assert any(name.startswith(part) and not torch.equal(before[name], after[name]) for name in after), part
    texts, partners = (list(side) for side in zip(*pairs(64), strict=True))

    def accuracy(some):
        similarity = some.similarity(some.encode(texts), some.encode(partners))
        return (similarity.argmax(1) == torch.arange(64)).float().mean().item()

    assert accuracy(model) > accuracy(make_model(encoder)) + 0.3
    loaded = load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, encoder, monkeypatch):
    examples = Examples(
        ("anchor", "positive", "negative"),
        [(*pair, other) for pair, other in zip(pairs(24), sentences(24, 1), strict=True)],
        True,
    )
    recipe = training.Recipe(epochs=3, batch_size=8, learning_rate=1e-3)
    whole = make_model(encoder)
    training.fine_tune(whole, examples, tmp_path / "whole", recipe)

    class Stop(Exception):
        pass

    class Interrupt(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch > 1.5:
                raise Stop

    model, plain = make_model(encoder), training._Trainer
    monkeypatch.setattr(
        training, "_Trainer", lambda callbacks, **options: plain(callbacks=[*callbacks, Interrupt()], **options)
    )
    with pytest.raises(Stop):
        training.fine_tune(model, examples, tmp_path / "parts", recipe)
    monkeypatch.setattr(training, "_Trainer", plain)
    resumed = make_model(encoder)
    training.fine_tune(resumed, examples, tmp_path / "parts", recipe, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoints_are_of_one_training(tmp_path, encoder, monkeypatch):
    """Another one does not go on from them, and none begins beside one that runs."""
    examples, recipe = Examples(("anchor", "positive"), pairs(16), True), training.Recipe(epochs=2, batch_size=8)
    caught = []

    class Interrupt(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="another process is writing there") as error:
                training.fine_tune(make_model(encoder), examples, tmp_path, recipe, resume=bool(state.global_step))
            caught.append(error)
            if state.global_step:
                raise KeyboardInterrupt

    plain = training._Trainer
    monkeypatch.setattr(
        training, "_Trainer", lambda callbacks, **options: plain(callbacks=[*callbacks, Interrupt()], **options)
    )
    with pytest.raises(KeyboardInterrupt):
        training.fine_tune(make_model(encoder), examples, tmp_path, recipe)
    assert len(caught) == 2
    monkeypatch.setattr(training, "_Trainer", plain)
    wider = Transformer(str(encoder))
    wider = SentenceTransformer(modules=[wider, S2SentPooling.behind(wider, blocks=None, bottleneck=5)], device="cpu")
    for model, some, other, word in (
        (make_model(encoder), examples, recipe._replace(epochs=3), "epochs"),
        (make_model(encoder), examples._replace(rows=examples.rows[1:]), recipe, "examples"),
        (wider, examples, recipe, "selector_arguments, parameters"),
    ):
        with pytest.raises(ValueError, match=f"resume: expected the settings that .* got other {word}"):
            training.fine_tune(model, some, tmp_path, other, resume=True)
    training.fine_tune(make_model(encoder), examples, tmp_path, recipe, resume=True)
    assert not (tmp_path / training.CHECKPOINTS).exists() and load(tmp_path, device="cpu")


def test_the_best_epoch_is_kept_and_patience_stops(tmp_path, encoder, monkeypatch):
    scores = iter([0.3, 0.7, 0.5, 0.4, 0.9])
    seen = []

    class Evaluator(training.EmbeddingSimilarityEvaluator):
        def __call__(self, model, *args, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"dev_spearman_cosine": next(scores)}

    monkeypatch.setattr(training, "EmbeddingSimilarityEvaluator", Evaluator)
    model = make_model(encoder)
    recipe = training.Recipe(epochs=5, batch_size=16, learning_rate=1e-3, patience=2)
    dev = (["a cat", "a dog"], ["the cat", "the moon"], [1.0, 0.0])
    score = training.fine_tune(
        model, Examples(("anchor", "positive"), pairs(32), True), tmp_path / "out", recipe, dev=dev
    )
    assert score == pytest.approx(70) and len(seen) == 4
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())


def test_every_hard_negative_counts(tmp_path, encoder):
    columns = ("anchor", "positive", "negative_1", "negative_2")
    rows = [(*pair, one, two) for pair, one, two in zip(pairs(8), sentences(8, 1), sentences(8, 2), strict=True)]
    found = []
    for width in (2, 3, 4):
        model = make_model(encoder)
        examples = Examples(columns[:width], [row[:width] for row in rows], True)
        training.fine_tune(model, examples, tmp_path / str(width), training.Recipe(epochs=2, batch_size=8))
        found.append(model[1].selector.up.weight.detach().clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_the_selector_has_its_own_learning_rate(tmp_path, encoder):
    model = make_model(encoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = {"learning_rate": 0.0, "selector_learning_rate": 1e-12, "prior_learning_rate": 1e-2}
    recipe = training.Recipe(epochs=1, batch_size=8, **rates)
    training.fine_tune(model, Examples(("anchor", "positive"), pairs(16), True), tmp_path, recipe)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "1.selector.block_prior" in changed and all(name.startswith("1.selector.") for name in changed)
    assert (model.state_dict()["1.selector.block_prior"] - before["1.selector.block_prior"]).abs().max() > 1e-4
    down = "1.selector.down.weight"
    assert (model.state_dict()[down] - before[down]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": [("a", "b", "c")]}, "expected two or more"),
        ({"rows": [("a", "b", "c"), ("d", "e", "c")]}, "expected 64 at once without a text that repeats"),
        ({"rows": [("a", "b", "c"), ("d", "e", "")]}, "expected every row to have all negatives"),
        ({"recipe": training.Recipe(patience=2)}, "patience: expected dev"),
        ({"resume": True}, "resume: expected a checkpoint in"),
        ({"recipe": training.Recipe(precision="int4")}, "precision: expected one of"),
        ({"recipe": training.Recipe(epochs=0)}, "epochs: expected a positive"),
        ({"dev": (["a", "b"], ["c", "d"], [1.0, 1.0])}, "dev: expected pairs with different scores"),
        ({"recipe": training.Recipe(temperature=float("nan"))}, "temperature: expected a positive number"),
        ({"recipe": training.Recipe(learning_rate=float("inf"))}, "learning_rate: expected 0 or more"),
        ({"recipe": training.Recipe(learning_rate=1e38)}, "training diverged, .* is not finite any more"),
    ],
)
def test_what_it_refuses(tmp_path, encoder, change, message):
    rows = change.pop("rows", [("a", "b", "c"), ("d", "e", "f")])
    examples = Examples(("anchor", "positive", "negative"), rows, True)
    with pytest.raises(ValueError, match=message):
        training.fine_tune(make_model(encoder), examples, tmp_path / "deep" / "out", **change)
    left = {path.name for path in (tmp_path / "deep" / "out").glob("*")}
    assert left == {training.CHECKPOINTS} if "diverged" in message else not (tmp_path / "deep").exists()


def test_sentences_alone_need_dropout(tmp_path, encoder):
    model = make_model(encoder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    examples = Examples(("anchor", "positive"), [(text, text) for text in sentences(8)], False)
    with pytest.raises(ValueError, match="since the encoder's dropout is 0"):
        training.fine_tune(model, examples, tmp_path / "out")


# ---------------------------------------------------------------- the command


def test_precision_is_autocast(tmp_path, encoder, monkeypatch):
    """Products in bfloat16, weights in float32."""
    seen, pool = [], S2SentPooling.forward

    def forward(self, features, **options):
        if torch.is_grad_enabled():
            seen.append(torch.is_autocast_enabled("cpu"))
        return pool(self, features, **options)

    monkeypatch.setattr(S2SentPooling, "forward", forward)
    path = write(tmp_path / "data.tsv", pairs(16), ("anchor", "positive"))
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
        "train", "--data", path, "--model", encoder, "--output", tmp_path / "out", "--blocks", "last:1", "--dev", sts,
        "--epochs", 1, "--batch-size", 8, "--bottleneck", 4, "--device", "cpu", "--accumulation", 2,
    ]  # fmt: skip
    (tmp_path / "out" / training.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)  # interrupted before it was whole
    assert main(list(map(str, arguments))) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    model = load(tmp_path / "out", device="cpu")
    assert model[1].blocks == [1] and model[1].selector.block_prior is not None
    assert main(list(map(str, arguments))) == 2
    assert "it is not empty" in capsys.readouterr().err


def test_the_command_stops_when_the_sts_file_says_no_more(tmp_path, encoder, capsys):
    """Nothing moves, so no epoch is better than the first."""
    path, sts = write(tmp_path / "data.tsv", pairs(16), ("anchor", "positive")), tmp_path / "sts.tsv"
    rows = [f"dev\t{i % 5}\t{a}\t{b}" for i, (a, b) in enumerate(zip(sentences(8), sentences(8, seed=1), strict=True))]
    sts.write_text("split\tscore\tsentence1\tsentence2\n" + "\n".join(rows) + "\n", encoding="utf-8")
    arguments = [
        "train", "--data", path, "--model", encoder, "--output", tmp_path / "out", "--dev", sts, "--device", "cpu",
        "--batch-size", 8, "--bottleneck", 4, "--no-norm", "--learning-rate", 0, "--selector-learning-rate", 1e-30,
        "--prior-learning-rate", 1e-30, "--epochs", 6, "--patience", 2,
    ]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out.count("'eval_dev_spearman_cosine'") == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--freeze-encoder", "--patience", "2"], "--patience: not with --freeze-encoder"),
        (["--freeze-encoder", "--precision", "bfloat16"], "--precision: not with --freeze-encoder"),
        (["--freeze-encoder", "--resume"], "--resume: not with --freeze-encoder"),
        (["--cache", "x"], "--cache: only with --freeze-encoder"),
        (["--temperature", "0"], "temperature: expected a positive number"),
        (["--learning-rate", "-1"], "learning_rate: expected 0 or more"),
        (["--temperature", "nan"], "temperature: expected a positive number"),
        (["--freeze-encoder", "--temperature", "nan"], "temperature: expected a positive number"),
        (["--seed", "-1"], "argument --seed: invalid seed value: '-1'"),
        (["--seed", "4294967296"], "argument --seed: invalid seed value: '4294967296'"),
        (["--resume"], "resume: expected a checkpoint"),
        (["--patience", "2"], "patience: expected dev"),
        (["--model", "/nowhere/model"], "there is no such directory"),
        (["--dev", "/nowhere/sts.tsv"], "cannot be read"),
        (["--blocks", "last:9"], "'last:N' with N from 1 to 2"),
    ],
)
def test_the_command_refuses(tmp_path, encoder, capsys, options, message):
    path = write(tmp_path / "data.tsv", pairs(4), ("anchor", "positive"))
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
    path = write(tmp_path / "data.tsv", pairs(4), ("anchor", "positive"))
    assert (
        main(["train", "--data", str(path), "--model", "./encoder", "--output", "encoder", "--device", "cpu", *options])
        == 2
    )
    assert "output folder encoder: it is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("encoder").iterdir()} == before
    assert sorted(os.listdir()) == ["data.tsv", "encoder"]


def test_frozen_training_needs_pairs(tmp_path, encoder, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ["train", "--freeze-encoder", "--data", path, "--model", encoder, "--output", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 2
    assert "--freeze-encoder needs pairs" in capsys.readouterr().err


def test_defaults_are_the_recipes():
    recipe = training.Recipe()._asdict()
    assert {name: recipe[name] for name in train._TUNED} == train._TUNED
    assert set(train._FROZEN_ONLY) - {"cache"} <= set(frozen.Recipe._fields)


def test_frozen_training_takes_several_negatives(tmp_path, encoder):
    from s2sent_kernels import S2SentSelector

    columns = ("anchor", "positive", "negative_1", "negative_2")
    rows = [(*pair, one, two) for pair, one, two in zip(pairs(8), sentences(8, 1), sentences(8, 2), strict=True)]
    arguments = ["train", "--freeze-encoder", "--model", encoder, "--device", "cpu", "--cache", tmp_path / "cache"]
    arguments += ["--bottleneck", 4, "--epochs", 1, "--batch-size", 8]
    for name, some in (("both", rows), ("one", [(*row[:3], "") for row in rows])):
        data = write(tmp_path / f"{name}.csv", some, columns)
        assert main(list(map(str, [*arguments, "--data", data, "--output", tmp_path / name]))) == 0
    both, one = (S2SentSelector.from_pretrained(tmp_path / name) for name in ("both", "one"))
    assert not torch.equal(both.up.weight, one.up.weight)


def test_sentences_that_repeat_are_not_their_own_negatives(tmp_path, encoder):
    """Two texts, many times: only batches of two are without a repetition."""
    examples = Examples(("anchor", "positive"), [(text, text) for text in sentences(2) * 4], False)
    training.fine_tune(make_model(encoder), examples, tmp_path / "two", training.Recipe(epochs=1, batch_size=2))
    with pytest.raises(ValueError, match="expected 4 at once without a text that repeats"):
        training.fine_tune(make_model(encoder), examples, tmp_path / "four", training.Recipe(epochs=1, batch_size=4))


def test_a_missing_extra_is_named(tmp_path, encoder, capsys, monkeypatch):
    path = write(tmp_path / "data.tsv", pairs(4), ("anchor", "positive"))
    monkeypatch.delitem(sys.modules, "s2sent_kernels.training")
    monkeypatch.delattr("s2sent_kernels.training")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train", "--data", str(path), "--model", str(encoder), "--output", str(tmp_path / "out")]) == 2
    assert "pip install 's2sent_kernels[train]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes(tmp_path, encoder):
    path = write(tmp_path / "data.tsv", pairs(8), ("anchor", "positive"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--data", path, "--model", encoder, "--output", tmp_path / "out", "--device", "cpu", "--batch-size", 4]
    command = [*launch, "-m", "s2sent_kernels.cli", "train", *arguments, "--epochs", 1, "--bottleneck", 4]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert load(tmp_path / "out", device="cpu").encode("a cat").shape == (16,)
