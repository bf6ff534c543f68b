"""`s2sent train --task classification` and `--task sts`, frozen and not, and `s2sent predict`."""

import json

import pytest
import torch
from builders import pairs, save_encoder, sentences, write_examples

from s2sent_kernels import S2SentSelector
from s2sent_kernels.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

import tokenizers
import transformers

from s2sent_kernels.sentence_transformers import load
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

CLASSIFICATION = ["train", "--task", "classification", "--device", "cpu", "--bottleneck", 4]
STS = ["train", "--task", "sts", "--device", "cpu", "--bottleneck", 4, "--batch-size", 16]
FROZEN = [[], ["--freeze-encoder"]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of 2 blocks, whose tokenizer marks the sentences of a pair."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def labelled(path, count=80, seed=0):
    """Whether a text has the word moon."""
    rows = [("yes" if "moon" in text else "no", text) for text in sentences(count, seed)]
    return write_examples(path, rows, ("label", "text"))


def scored(path, count=40):
    rows = [
        (str(len(set(a.split()) & set(b.split()))), a, b)
        for a, b in zip(sentences(count), sentences(count, 1), strict=True)
    ]
    return write_examples(path, rows, ("score", "sentence1", "sentence2"))


@pytest.mark.parametrize(
    "kind, columns, asked, told",
    [
        ("contrastive", ("score", "sentence1", "sentence2"), "anchor and positive", "sts"),
        ("contrastive", ("label", "text"), "anchor and positive", "classification"),
        ("contrastive", ("label", "sentence1", "sentence2"), "anchor and positive", "classification"),
        ("sts", ("anchor", "positive", "negative"), "score, sentence1 and sentence2", "contrastive"),
        ("classification", ("score", "sentence1", "sentence2"), "label and either ", "sts"),
        ("sts", ("label", "sentence1", "sentence2"), "score, sentence1 and sentence2", "classification"),
    ],
)
@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_the_columns_of_another_task_name_it(tmp_path, monkeypatch, capsys, kind, columns, asked, told, suffix):
    monkeypatch.chdir(tmp_path)
    data = write_examples(tmp_path / f"data{suffix}", [("1", "a", "b")[: len(columns)]] * 2, columns)
    assert run("train", "--task", kind, "--data", data, "--output", "out") == 2
    error = capsys.readouterr().err
    assert f"{data}: expected columns {asked}" in error and error.endswith(f", as --task {told} reads them\n")
    assert "--columns" not in error


# ---------------------------------------------------------------- a classifier


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_a_classifier_that_a_pipeline_loads(tmp_path, encoder, capsys, frozen):
    data, dev = labelled(tmp_path / "data.tsv"), labelled(tmp_path / "dev.jsonl", 20, seed=9)
    options = ["--model", encoder, "--data", data, "--dev", dev, "--output", "model", "--epochs", 2, *frozen]
    assert run(*CLASSIFICATION, *options) == 0
    out = capsys.readouterr().out
    assert out.count("dev accuracy") == (7 if frozen else 1)  # six trials and the one that was kept
    model = S2SentForSequenceClassification.from_pretrained("model")
    assert model.config.label2id == {"no": 0, "yes": 1} and model.model.selector.gate_scale is not None
    limit = transformers.AutoTokenizer.from_pretrained("model").model_max_length
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["truncation"]["max_length"] == limit > 9
    assert torch.equal(S2SentModel.from_pretrained("model").selector.up.weight, model.model.selector.up.weight)
    assert run(*CLASSIFICATION, "--model", "model", "--data", data, "--output", "again", *frozen) == 2
    assert (
        "model model: expected an encoder alone, got a classifier, encoder and selector included"
        in capsys.readouterr().err
    )
    texts = sentences(5, seed=3)
    pipeline = transformers.pipeline("text-classification", model="model", device="cpu")
    found = pipeline(texts, top_k=None)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    assert run("predict", path, "--model", "model", "--output", "out.jsonl", "--device", "cpu") == 0
    for line, wanted in zip((tmp_path / "out.jsonl").read_text().splitlines(), found, strict=True):
        row = json.loads(line)
        assert row["label"] == wanted[0]["label"]
        assert row["probabilities"] == pytest.approx({one["label"]: one["score"] for one in wanted}, abs=2e-6)


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_what_is_saved_has_the_score_that_was_printed(tmp_path, encoder, capsys, frozen):
    """The head, the blocks and the pooling that were trained are those that are saved, in the epoch that was best."""
    data, dev = labelled(tmp_path / "data.tsv", 200), labelled(tmp_path / "dev.tsv", 60, seed=9)
    options = ["--blocks", "last:1", "--pooling", "cls", "--learning-rate", 0.05, "--dropout", 0, "--batch-size", 16]
    options += ["--model", encoder, "--data", data, "--dev", dev, "--output", "model", *frozen]
    options += [] if frozen else ["--learning-rate", 1e-3, "--selector-learning-rate", 0.05, "--epochs", 6]
    assert run(*CLASSIFICATION, *options) == 0
    score = float(capsys.readouterr().out.split("dev accuracy ")[-1].replace(",", " ").split()[0])
    assert run("predict", dev, "--model", "model", "--output", "out.tsv", "--device", "cpu") == 0
    head, *rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert head == ["label", "p(no)", "p(yes)"]
    wanted = [line.split("\t")[0] for line in dev.read_text().splitlines()[1:]]
    right = sum(row[0] == label for row, label in zip(rows, wanted, strict=True))
    assert 100 * right / len(wanted) == pytest.approx(score, abs=0.01) and score > 60


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_pairs_are_read_as_transformers_reads_them(tmp_path, encoder, frozen):
    texts = list(zip(sentences(40), sentences(40, 1), strict=True))
    rows = [(str(int(len(a) > len(b))), a, b) for a, b in texts]
    data = write_examples(tmp_path / "pairs.csv", rows, ("label", "sentence1", "sentence2"))
    options = ["--model", encoder, "--data", data, "--output", "model", "--epochs", 1, *frozen]
    assert run(*CLASSIFICATION, *options) == 0
    assert run("predict", data, "--model", "model", "--output", "out.jsonl", "--device", "cpu") == 0
    pipeline = transformers.pipeline("text-classification", model="model", device="cpu")
    for (one, other), line in list(zip(texts, (tmp_path / "out.jsonl").read_text().splitlines(), strict=True))[:4]:
        found = {one["label"]: one["score"] for one in pipeline({"text": one, "text_pair": other}, top_k=None)}
        assert json.loads(line)["probabilities"] == pytest.approx(found, abs=2e-6)


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_other_problem_types(tmp_path, encoder, capsys, kind, frozen):
    def label(text):
        if kind == "regression":
            return str(50 + text.count("moon"))
        return ",".join(word for word in ("cat", "moon") if word in text)

    rows = [(label(text), text) for text in sentences(60)]
    data = write_examples(tmp_path / "data.tsv", rows, ("label", "text"))
    options = ["--model", encoder, "--data", data, "--problem-type", kind, "--output", "model", "--epochs", 2, *frozen]
    assert run(*CLASSIFICATION, *options) == 0
    assert S2SentForSequenceClassification.from_pretrained("model").config.problem_type == kind
    assert run("predict", data, "--model", "model", "--output", "out.jsonl", "--device", "cpu") == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    if kind == "regression":
        assert all(abs(row["label"] - 50) < 10 for row in found)
    else:
        assert all(row["label"] == [n for n, p in row["probabilities"].items() if p > 0.5] for row in found)


def test_the_split_column_and_the_option(tmp_path, encoder, capsys):
    texts = [(split, "yes" if "moon" in text else "no", text) for split in ("train", "dev") for text in sentences(24)]
    data = write_examples(tmp_path / "data.tsv", texts, ("split", "label", "text"))
    options = ["--model", encoder, "--data", data, "--freeze-encoder", "--epochs", 1, "--learning-rate", 1e-3]
    assert run(*CLASSIFICATION, *options, "--dev", data, "--output", "one") == 0
    assert run(*CLASSIFICATION, *options, "--split", "none", "--output", "two") == 2
    assert "expected rows of split 'none', got splits dev, train" in capsys.readouterr().err


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_a_regression_does_not_depend_on_the_unit(tmp_path, encoder, capsys, frozen):
    told, heads = [], []
    for unit in (1, 1024):
        rows = [(str(unit * (3 + ("moon" in text))), text) for text in sentences(40)]
        data = write_examples(tmp_path / f"{unit}.tsv", rows, ("label", "text"))
        options = ["--problem-type", "regression", "--model", encoder, "--data", data, "--dev", data, "--epochs", 2]
        options += ["--batch-size", 16, "--learning-rate", 1e-3, "--dropout", 0]
        assert run(*CLASSIFICATION, *options, *frozen, "--output", f"of {unit}") == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if "R2" in line])
        heads.append(S2SentForSequenceClassification.from_pretrained(f"of {unit}").classifier)
    assert told[0] == told[1] and told[0]
    torch.testing.assert_close(heads[1].weight, 1024 * heads[0].weight)


@pytest.fixture
def classifier(encoder):
    """A random classifier of texts, saved without the commands: it names neither its problem type nor what it reads."""
    model = S2SentForSequenceClassification.from_encoder(encoder, None, num_labels=3, bottleneck=4)
    model.eval().save_pretrained("classifier")
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained("classifier")
    return "classifier"


def test_a_classifier_that_names_no_problem_type(tmp_path, classifier):
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    assert run("predict", "a.txt", "--model", classifier, "--device", "cpu", "--output", "a.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(row["label"] in row["probabilities"] for row in rows) and len(rows[0]["probabilities"]) == 3


def test_predict_loses_no_row_and_no_input(tmp_path, classifier, capsys):
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "null.jsonl").write_text('{"text": "a cat"}\n{"text": null}\n')
    (tmp_path / "own.tsv").write_text(text := "text\na cat\n")
    command = ["predict", "--model", classifier, "--device", "cpu", "--output"]
    assert run(*command, "a.tsv", "null.jsonl") == 2
    assert "null.jsonl: line 2: text: expected a text, got null" in capsys.readouterr().err
    assert run(*command, "rows.tsv", "a.txt") == 0
    assert (tmp_path / "rows.tsv").read_text().count("\n") == 4  # a header, and a row for each line
    assert run(*command, "own.tsv", "own.tsv", "--force") == 2
    assert "output own.tsv: expected another file than own.tsv" in capsys.readouterr().err
    assert (tmp_path / "own.tsv").read_text() == text and not (tmp_path / "a.tsv").exists()


def test_predict_takes_what_the_classifier_was_trained_on(tmp_path, encoder, capsys):
    data = labelled(tmp_path / "data.tsv")
    options = ["--model", encoder, "--freeze-encoder", "--epochs", 1, "--learning-rate", 1e-3, "--dropout", 0]
    assert run(*CLASSIFICATION, *options, "--data", data, "--output", "model") == 0
    pairs = scored(tmp_path / "pairs.tsv")
    assert run("predict", pairs, "--model", "model", "--device", "cpu", "--output", "out.tsv") == 2
    assert "pairs.tsv: expected texts, of which model is a classifier" in capsys.readouterr().err
    rows = [f"{one}\tother {one}\tanother" for one in sentences(6)]
    (tmp_path / "both.tsv").write_text("\n".join(["text\tsentence1\tsentence2", *rows]) + "\n")
    (tmp_path / "texts.tsv").write_text("\n".join(["text", *sentences(6)]) + "\n")
    for name in ("both", "texts"):
        command = ["predict", f"{name}.tsv", "--model", "model", "--device", "cpu", "--output", f"of_{name}.tsv"]
        assert run(*command) == 0
    assert (tmp_path / "of_both.tsv").read_text() == (tmp_path / "of_texts.tsv").read_text()


def test_the_output_may_be_an_empty_folder_but_not_the_caches(tmp_path, encoder, monkeypatch, capsys):
    data = labelled(tmp_path / "data.tsv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    options = [
        *CLASSIFICATION,
        "--model",
        encoder,
        "--data",
        data,
        "--epochs",
        1,
        "--freeze-encoder",
        "--learning-rate",
        1e-3,
    ]
    assert run(*options, "--output", "cache/one", "--cache", "cache") == 2
    assert "expected one apart from the cache's, cache" in capsys.readouterr().err
    assert run(*options, "--output", "link", "--cache", "cache") == 0
    assert S2SentForSequenceClassification.from_pretrained("link").config.pairs is False
    assert [path.name for path in (tmp_path / "empty").iterdir() if path.name.startswith(".")] == []


GOOD = "label\ttext\n" + "".join(f"{label}\ta {word}\n" for label in "xy" for word in ("cat", "dog", "mat") * 4)
SMALL = "label\ttext\nx\ta cat\ny\ta dog\n"


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
@pytest.mark.parametrize(
    ("data", "dev", "options", "message"),
    [
        (
            "name\ttext\nx\ta\ny\tb\n",
            SMALL,
            [],
            "data.tsv: expected columns label and either text or ",
        ),
        ("label\tother\nx\ta\ny\tb\n", SMALL, [], "text or sentence1 and sentence2, got label, other, without text"),
        ("label\ttext\nx\ta\nx\tb\n", SMALL, [], "data.tsv: expected at least two labels, got 'x'"),
        (
            GOOD,
            "label\ttext\nx\ta\nz\tb\n",
            [],
            "dev.tsv: line 3: expected a label of the training data (x, y), got 'z'",
        ),
        (
            GOOD,
            "label\tsentence1\tsentence2\nx\ta\tb\ny\ta\tb\n",
            [],
            "dev.tsv: expected texts, as in data.tsv, got pairs",
        ),
        ("label\ttext\nx\ta\tb\ny\tb\n", SMALL, [], "line 2: expected 2 tab-separated fields, got 3"),
        ("label\ttext\n\ta\ny\tb\n", SMALL, [], "line 2: label: expected a label, got an empty text"),
        ("label\ttext\nx\t\ny\tb\n", SMALL, [], "line 2: text: expected a text, got an empty one"),
        (
            "label\ttext\n1\ta\nnan\tb\n",
            SMALL,
            ["--problem-type", "regression"],
            "line 3: label: expected a finite number",
        ),
        (
            "label\ttext\n1\ta\n1\tb\n",
            SMALL,
            ["--problem-type", "regression"],
            "expected different numbers, got 2 times 1",
        ),
        (SMALL, None, [], "expected --dev, or 20 rows to hold a tenth out, got 2"),
        (
            "label\ttext\n" + "0\ta\n" * 2 + "3\tb\n" * 16 + "5\tc\n" * 2,
            None,
            ["--problem-type", "regression"],
            "data.tsv: expected --dev, since the tenth to hold out has equal numbers",
        ),
        (GOOD, SMALL, ["--no-prior", "--prior-learning-rate", "1"], "--prior-learning-rate: not with --no-prior"),
        (
            "label\ttext\nx\ta\n\tb\n",
            "label\ttext\n\ta\n\tb\n",
            ["--problem-type", "multi_label_classification"],
            "dev.tsv: expected labels, got none in 2 rows",
        ),
        (
            "label\ttext\n" + "\ta\n" * 20 + "x\tb\n",
            None,
            ["--problem-type", "multi_label_classification"],
            "data.tsv: expected --dev, since the tenth to hold out has no labels",
        ),
        (GOOD, SMALL, ["--batch-size", "1"], "--batch-size: expected 2 or more, since the gate's batch norm"),
        (GOOD, SMALL, ["--dropout", "1"], "dropout: expected a number from 0 to below 1"),
        (GOOD, SMALL, ["--temperature", "1"], "--temperature: not with --task classification"),
        (GOOD, SMALL, ["--loss", "cosine"], "--loss: not with --task classification"),
        (GOOD, SMALL, ["--learning-rate", "nan"], "--learning-rate: expected"),
        (GOOD, SMALL, ["--split", "train"], "data.tsv: expected a column split"),
        (GOOD, None, ["--dev-split", "train"], "--dev-split: expected --dev"),
    ],
)
def test_what_a_classifier_refuses(tmp_path, encoder, capsys, frozen, data, dev, options, message):
    (tmp_path / "data.tsv").write_text(data)
    files = ["--data", "data.tsv"]
    if dev is not None:
        (tmp_path / "dev.tsv").write_text(dev)
        files += ["--dev", "dev.tsv"]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(*CLASSIFICATION, "--model", encoder, *files, "--output", "model", *frozen, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "encoder", "--output", "out.tsv"], "expected the folder of a classifier"),
        (["--model", "nowhere", "--output", "out.tsv"], "expected the folder of a classifier"),
        (["--model", "encoder", "--output", "out.parquet"], "--output: expected a file of .tsv, .jsonl"),
        (["--model", "encoder", "--output", "there.tsv"], "it is there already"),
    ],
)
def test_what_predict_refuses(tmp_path, encoder, capsys, arguments, message):
    (tmp_path / "encoder").symlink_to(encoder)
    (tmp_path / "there.tsv").write_text("mine")
    (tmp_path / "texts.txt").write_text("a cat\n")
    assert run("predict", "texts.txt", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.tsv").exists() and (tmp_path / "there.tsv").read_text() == "mine"


# ---------------------------------------------------------------- scored pairs


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_scored_pairs_behind_a_frozen_encoder(tmp_path, encoder, capsys, loss):
    data = scored(tmp_path / "pairs.tsv")
    options = ["--model", encoder, "--data", data, "--dev", data, "--freeze-encoder", "--loss", loss, "--epochs", 15]
    options += ["--learning-rate", 1e-9, 0.3, "--prior-learning-rate", 0.3, "--seed", 0, 1, "--blocks", "last:2"]
    assert run(*STS, *options, "--output", "selector") == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split("dev ")[1].split()[0]) for line in lines if line.startswith("learning rate")]
    assert len(scores) == 4
    assert [line for line in lines if line.startswith("kept: ") and f"dev {max(scores):.2f} (epoch" in line]
    selector = S2SentSelector.from_pretrained("selector", backend="reference")
    assert selector.gate_scale is not None and selector.gate_scale.item() != 4


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_scored_pairs_with_the_encoder(tmp_path, encoder, capsys, loss):
    data = scored(tmp_path / "pairs.tsv")
    options = ["--model", encoder, "--data", data, "--dev", data, "--loss", loss, "--epochs", 3, "--no-gate-scale"]
    assert run(*STS, *options, "--learning-rate", 1e-3, "--output", "model") == 0
    assert "dev " in capsys.readouterr().out
    model = load("model", device="cpu")
    assert model.encode("a cat").shape == (16,) and model[1].selector.gate_scale is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("score\tsentence1\tsentence2\nnan\ta\tb\n1\ta\tc\n", [], "line 2: score: expected a finite number, got 'nan'"),
        ("score\tsentence1\tsentence2\n1\ta\tb\n1\ta\tc\n", [], "expected different numbers, got 2 times 1"),
        (
            "score\ttext\n1\ta\n2\tb\n",
            [],
            "score, sentence1 and sentence2, got score, text, without sentence1 and ",
        ),
        (
            "score\tsentence1\tsentence2\n1\ta\tb\n2\ta\tc\n",
            ["--loss", "cosine", "--temperature", "1"],
            "not with --loss",
        ),
    ],
)
@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_scored_pairs_that_cannot_be(tmp_path, encoder, capsys, frozen, content, options, message):
    (tmp_path / "data.tsv").write_text(content)
    assert run(*STS, "--model", encoder, "--data", "data.tsv", "--output", "out", *frozen, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.tsv"]


def test_patience_of_a_frozen_training(tmp_path, encoder, capsys):
    """Nothing moves, so no epoch is better than the first."""
    data = scored(tmp_path / "pairs.tsv")
    options = ["--model", encoder, "--data", data, "--dev", data, "--freeze-encoder", "--no-norm", "--patience", 2]
    options += ["--learning-rate", 1e-30, "--prior-learning-rate", 1e-30, "--epochs", 9, "--output", "selector"]
    assert run(*STS, *options) == 0
    assert sum(line.startswith("epoch ") for line in capsys.readouterr().out.splitlines()) == 3


# ---------------------------------------------------------------- the gate scale


@pytest.mark.parametrize(
    ("options", "scale"),
    [([], 4.0), (["--no-gate-scale"], None), (["--no-prior"], None), (["--no-prior", "--gate-scale", "2"], 2.0)],
)
def test_the_gate_scale_is_on_with_the_prior(tmp_path, encoder, options, scale):
    data = scored(tmp_path / "pairs.tsv", 8)
    arguments = ["--model", encoder, "--data", data, "--freeze-encoder", "--epochs", 1, "--output", "selector"]
    if options != ["--no-prior"]:  # then nothing has this rate, and it is refused
        arguments += ["--prior-learning-rate", 1e-9]
    assert run(*STS, *arguments, *options) == 0
    found = S2SentSelector.from_pretrained("selector", backend="reference").gate_scale
    assert found is None if scale is None else torch.isclose(found, torch.tensor(scale))


# ---------------------------------------------------------------- columns of other names


def renamed(path, names):
    """A table of tab-separated columns with other names, and a column of no use."""
    header, *lines = path.read_text().splitlines()
    header = "\t".join(names[name] for name in header.split("\t"))
    path.write_text("\n".join(["genre\t" + header, *(f"news\t{line}" for line in lines)]) + "\n")
    return path


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
@pytest.mark.parametrize("task", ["contrastive", "sts", "classification"])
def test_columns_of_other_names(tmp_path, encoder, capsys, task, frozen):
    """The result is that of a table with the expected ones."""
    tables = {
        "contrastive": lambda path: write_examples(path, pairs(8)),
        "sts": scored,
        "classification": labelled,
    }
    names = {"anchor": "query", "positive": "doc", "score": "gold", "sentence1": "a", "sentence2": "b"}
    names |= {"label": "class", "text": "review"}
    own, other = tables[task](tmp_path / "own.tsv"), renamed(tables[task](tmp_path / "other.tsv"), names)
    options = [
        "train",
        "--task",
        task,
        "--model",
        encoder,
        "--epochs",
        1,
        "--batch-size",
        4,
        "--device",
        "cpu",
        *frozen,
    ]
    dev = [] if task == "contrastive" else ["--dev", other]
    header = other.read_text().splitlines()[0].split("\t")
    asked = ["--columns", ",".join(f"{what}={name}" for what, name in names.items() if name in header)]
    assert run(*options, "--data", own, "--output", "one", *(["--dev", own] if dev else [])) == 0
    assert "not read" not in capsys.readouterr().err
    assert run(*options, "--data", other, "--output", "two", *dev, *asked) == 0
    assert f"{other}: not read: genre\n" in capsys.readouterr().err
    weights = [sorted((tmp_path / folder).rglob("model.safetensors")) for folder in ("one", "two")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    assert run(*options, "--data", other, "--output", "three", *dev) == 2
    assert "expected columns " in (error := capsys.readouterr().err) and error.count("\n") == 1
    if task == "classification" and frozen:
        for file, columns in ((own, []), (other, ["--columns", "text=review"])):
            assert run("predict", file, "--model", "two", "--device", "cpu", "--output", f"{file}.tsv", *columns) == 0
        assert (tmp_path / "own.tsv.tsv").read_text() == (tmp_path / "other.tsv.tsv").read_text()


@pytest.mark.parametrize("frozen", FROZEN, ids=["tuned", "frozen"])
def test_a_list_of_negatives_is_trained_on(tmp_path, encoder, frozen):
    rows = [(*pair, *others) for pair, *others in zip(pairs(8), sentences(8, 5), sentences(8, 6), strict=True)]
    one = write_examples(tmp_path / "one.jsonl", rows, ("anchor", "positive", "negative_1", "negative_2"))
    lists = [(a, b, [c, d]) for a, b, c, d in rows]
    two = write_examples(tmp_path / "two.jsonl", lists, ("anchor", "positive", "negatives"))
    without = write_examples(tmp_path / "none.jsonl", pairs(8))
    options = ["train", "--model", encoder, "--epochs", 1, "--batch-size", 4, "--device", "cpu", *frozen]
    found = []
    for data in (one, two, without):
        assert run(*options, "--data", data, "--output", data.stem) == 0
        found.append([path.read_bytes() for path in sorted((tmp_path / data.stem).rglob("model.safetensors"))])
    assert found[0] == found[1] != found[2]
