"""Scores, files and the commands `evaluate` and `inspect`: on a tiny random encoder."""

import itertools
import json
import shutil
import sys

import pytest
import torch
from tools.test_frozen import TEXTS, make_encoder

from s2sent_kernels import S2SentSelector, evaluation, frozen, mteb_tasks, pictures, squeeze, tables
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.cli import main
from s2sent_kernels.commands.common import load_pipeline
from s2sent_kernels.export import as_pipeline

stats = pytest.importorskip("scipy.stats")

PNG = b"\x89PNG\r\n\x1a\n"
POOLINGS = ["mean of last", "first-last average", "average of blocks", "cls", "s2sent", "scalar mix"]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("S2SENT_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a model, a selector, an STS file and transfer files."""
    folder = tmp_path_factory.mktemp("evaluate")
    encoder, tokenizer = make_encoder()
    encoder.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    selector = S2SentSelector(16, 3, 4, 4, block_prior=True)
    selector.save_pretrained(folder / "selector")
    path = folder / "selector" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scalar_mix": [0.2, 0.3, 0.5]}))
    rows = [f"test\t{i % 6}\t{TEXTS[i]}\t{TEXTS[(3 * i + 1) % 8]}\tall" for i in range(8)]
    rows.append(f"dev\t1\t{TEXTS[0]}\t{TEXTS[1]}\tall")
    (folder / "sts.tsv").write_text("\n".join(["split\tscore\tsentence1\tsentence2\tsubset", *rows]) + "\n")
    labelled = [f"{split}\t{int('moon' in text)}\t{text}" for split in ("train", "test") for text in TEXTS * 6]
    (folder / "words.tsv").write_text("\n".join(["split\tlabel\ttext", *labelled]) + "\n")
    return folder


# ---------------------------------------------------------------- scores


def test_every_pooling_is_what_its_name_says(places):
    encoder, tokenizer = make_encoder()
    selector = S2SentSelector(16, 3, 4, 4, block_prior=True, backend="reference").eval()
    mix = frozen.ScalarMix.of_weights([1.0, 2.0, 5.0])
    texts = [*TEXTS, TEXTS[2]]
    found = evaluation.side_by_side(encoder, tokenizer, texts, {"s2sent": selector, "scalar mix": mix}, batch_size=3)
    assert sorted(found) == sorted(POOLINGS)
    for row, text in enumerate(texts):
        batch = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            states = encoder(**batch, output_hidden_states=True).hidden_states[1:]
            means = torch.stack([state[0].mean(dim=0) for state in states])
            expected = {
                "mean of last": means[-1],
                "first-last average": (means[0] + means[-1]) / 2,
                "average of blocks": means.mean(dim=0),
                "cls": states[-1][0, 0],
                "s2sent": selector.pool(states[-3:], batch["attention_mask"])[0],
                "scalar mix": (torch.tensor([0.125, 0.25, 0.625])[:, None] * means[-3:]).sum(dim=0),
            }
        for name, values in expected.items():
            torch.testing.assert_close(found[name][row], values, rtol=1e-4, atol=1e-5, msg=f"{name}, {text}")
    with pytest.raises(TypeError, match="modules: expected selectors and scalar mixes, got Linear"):
        evaluation.side_by_side(encoder, tokenizer, texts, {"other": torch.nn.Linear(2, 2)})


def test_correlations_are_scipys_times_100():
    similarity, gold = [0.1, 0.4, 0.35, 0.9, 0.2], [1.0, 3.0, 3.0, 5.0, 0.0]
    found = evaluation.correlations(similarity, gold)
    assert found.spearman == pytest.approx(100 * stats.spearmanr(similarity, gold).statistic)
    assert found.pearson == pytest.approx(100 * stats.pearsonr(similarity, gold).statistic)
    with pytest.raises(ValueError, match="gold: expected 5 scores"):
        evaluation.correlations(similarity, gold[:-1])


def test_sts_finds_what_it_was_made_from():
    pairs = [evaluation.Pair(f"a{i}", f"b{i}", float(i), "") for i in range(6)]
    angle = torch.linspace(1.5, 0, 6)  # the greater the score, the smaller the angle
    vectors = {f"a{i}": torch.tensor([1.0, 0.0]) for i in range(6)}
    vectors |= {f"b{i}": torch.stack([angle[i].cos(), angle[i].sin()]) for i in range(6)}
    found = evaluation.sts(lambda texts: {"known": torch.stack([vectors[text] for text in texts])}, pairs)
    assert found["known"].spearman == pytest.approx(100)


@pytest.mark.parametrize("cross_validated", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_transfer_learns_what_is_there_and_nothing_else(cross_validated, pair):
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    vectors, items = {}, []
    for i in range(120):
        noise = torch.randn(4, generator=generator)
        vectors[f"x{i}"] = torch.cat([torch.tensor([3.0 if i % 3 else -3.0]), noise])
        vectors[f"y{i}"] = torch.cat([torch.tensor([1.0]), noise])
        items.append(evaluation.Labelled((f"x{i}", f"y{i}") if pair else (f"x{i}",), str(int(i % 3 > 0))))
    splits = {"all": items} if cross_validated else {"train": items[:90], "test": items[90:]}

    def embed(texts):
        told = torch.stack([vectors[text] for text in texts])
        return {"told": told, "silent": torch.zeros_like(told)}

    found = evaluation.transfer(embed, splits)
    assert found["told"] == (100, 100)
    expected = splits["all" if cross_validated else "test"]
    share = 100 * sum(item.label == "1" for item in expected) / len(expected)
    assert found["silent"].accuracy == pytest.approx(share)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "an empty file"),
        (b"split\tscore\tsentence1\n", "expected a tab-separated column sentence2, got split, score, sentence1"),
        (b"split\tscore\tsentence1\tsentence2\n", "expected rows below the header"),
        (b"split\tscore\tsentence1\tsentence2\ntest\t1\ta\n", "line 2: expected 4 tab-separated fields, got 3"),
        (b"split\tscore\tsentence1\tsentence2\n\ntest\tone\ta\tb\n", "line 3: expected a number as score, got 'one'"),
        (b"split\tscore\tsentence1\tsentence2\ntest\tnan\ta\tb\n", "line 2: expected a number as score, got 'nan'"),
        (b"split\tscore\tsentence1\tsentence2\ntest\tinf\ta\tb\n", "line 2: expected a number as score, got 'inf'"),
        (
            b"split\tscore\tsentence1\tsentence2\ntest\t2\ta\tb\ntest\t2.0\tc\td\n",
            "expected pairs with different scores, got 2 of score 2",
        ),
        (b"split\tscore\tsentence1\tsentence1\tsentence2\n", "expected each column once, got sentence1 twice"),
        (b"split\tscore\tsentence1\tsentence2\ntest\t1\ta\t\xff\n", r"line 2 is not UTF-8 \(byte 0xff\)"),
        (b"split\tscore\tsentence1\tsentence2\ntrain\t1\ta\tb\n", "expected pairs of split 'test', got splits train"),
    ],
)
def test_sts_files(content, message, tmp_path):
    path = tmp_path / "file.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        evaluation.read_sts(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("split\tlabel\nall\t1\n", r"expected a tab-separated column text or sentence1\+sentence2"),
        ("split\tlabel\ttext\ntrain\t1\ta\n", "expected splits train and test, or all, got train"),
        ("split\tlabel\ttext\nall\t1\ta\nall\t1\tb\n", "expected at least two labels, got 1"),
    ],
)
def test_transfer_files(content, message, tmp_path):
    path = tmp_path / "file.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluation.read_transfer(path)


def test_quotes_and_byte_order_marks_are_no_trouble(tmp_path):
    path = tmp_path / "file.tsv"
    path.write_bytes('\ufeffa\tb\r\n"x\ty"z\r\n'.encode())
    assert list(tables.read_table(path, ("a", "b"))) == [(2, {"a": '"x', "b": 'y"z'})]


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
        ("mean", places / "selector", []), ("cls", tmp_path / "cls", []), ("asked", tmp_path / "cls", ["--pooling", "mean"]),
    ):  # fmt: skip
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
    encoder, tokenizer = make_encoder()
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


@pytest.fixture(scope="module", params=["sentence-transformers", "transformers"])
def whole(request, places):
    """A folder that holds encoder and selector, and the embeddings of what was saved."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer

    from s2sent_kernels.sentence_transformers import S2SentPooling
    from s2sent_kernels.transformers import S2SentModel

    folder, options = places / request.param, {"blocks": [1, 3], "pooling": "cls", "bottleneck": 4}
    torch.manual_seed(1)
    if request.param == "transformers":
        model, tokenizer = S2SentModel.from_encoder(places / "model", **options), make_encoder()[1]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            return folder, model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).embedding
    transformer = Transformer(str(places / "model"))
    pooling = S2SentPooling.behind(transformer, **options)
    model = library.SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()
    model.save(str(folder))
    return folder, model.encode(TEXTS, convert_to_tensor=True)


def test_a_folder_of_encoder_and_selector_is_a_pipeline(whole, places):
    folder, wanted = whole
    model, encoder = load_pipeline(folder)
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), wanted)
    assert type(encoder).__name__ == "BertModel" and encoder in list(model.modules())
    assert model.get_embedding_dimension() == 16
    assert load_pipeline(places / "model") is None
    assert load_pipeline("some/encoder-of-the-hub") is None


def test_evaluate_scores_a_whole_model_beside_its_encoders_poolings(whole, places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = whole
    arguments = ["evaluate", "--model", folder, "--sts", places / "sts.tsv", "--device", "cpu"]
    arguments += ["--max-length", "5", "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sts"]["sts"]
    assert list(found) == ["mean of last", "first-last average", "average of blocks", "cls", "s2sent"]
    model, _ = load_pipeline(folder)
    model.max_seq_length = 5
    pairs = evaluation.read_sts(places / "sts.tsv")
    own = evaluation.sts(lambda texts: {"s2sent": model.encode(texts, convert_to_tensor=True)}, pairs)["s2sent"]
    assert found["s2sent"] == own._asdict()
    encoder, tokenizer = make_encoder()
    others = evaluation.sts(lambda texts: evaluation.side_by_side(encoder, tokenizer, texts, max_length=5), pairs)
    assert {name: scores._asdict() for name, scores in others.items()} == {
        name: scores for name, scores in found.items() if name != "s2sent"
    }
    for option, value in (("--selector", places / "selector"), ("--pooling", "mean")):
        assert main([*map(str, arguments), option, str(value)]) == 2
        assert f"{option}: expected none beside --model {folder}" in capsys.readouterr().err


def test_evaluate_takes_a_whole_model_in_bfloat16(places, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sentence_transformers")
    from s2sent_kernels.transformers import S2SentModel

    S2SentModel.from_encoder(places / "model", bottleneck=4).bfloat16().save_pretrained(tmp_path / "half")
    make_encoder()[1].save_pretrained(tmp_path / "half")
    arguments = ["evaluate", "--model", tmp_path / "half", "--transfer", places / "words.tsv", "--device", "cpu"]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["transfer"]["words"]
    assert found["s2sent"]["accuracy"] == 100  # the same texts in train and test


@pytest.mark.parametrize(
    ("missing", "message"),
    [("weights", "cannot be loaded: "), ("sentence_transformers", "s2sent_kernels[sentence-transformers]")],
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
    assert main(list(map(str, arguments))) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("s2sent: error: ")]
    assert len(error) == 1
    assert f"model {folder} cannot be loaded: " in error[0] and message in error[0]
    assert not (tmp_path / "out").exists()


def test_inspect_prints_gates_and_energies_and_writes_pictures(places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    arguments += ["--output-dir", tmp_path / "out", "--text", TEXTS[0], TEXTS[1]]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert "blocks 1, 2, 3, 4 components" in out
    gates = [float(value) for value in out.split(f" {TEXTS[0]}")[0].splitlines()[-1].split()[::2]]
    assert sum(gates) == pytest.approx(1, abs=2e-3)
    names = ["dct_bases.png", "energy.png", "gates.png", "gates_by_text.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("texts, pairs", [(1, 1), (16, 4), (3, 16)])
def test_everything_written_in_the_picture_of_energies_is_inside(texts, pairs, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    pictures.energy_picture(torch.rand(texts, pairs) + 0.1, [(0, i) for i in range(pairs)], ["w" * 47 + "…"] * texts)
    (figure,) = figures
    figure.draw_without_rendering()
    whole, (axes,) = figure.bbox, figure.axes
    for box in (axes.xaxis.label.get_window_extent(), figure.legends[0].get_window_extent()):
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert axes.bbox.height > whole.height / 3


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_everything_written_in_the_picture_of_scores_is_inside(tasks, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    scores = {f"/a/folder/with/a/name/task{i}.tsv": dict.fromkeys(POOLINGS, 70.0 + i) for i in range(tasks)}
    pictures.scores_picture(
        scores, "/home/somebody/projects/embeddings/models/an-encoder: Spearman or accuracy, times 100"
    )
    (figure,) = figures
    figure.draw_without_rendering()
    whole, (axes,) = figure.bbox, figure.axes
    (title,) = figure.texts
    boxes = [text.get_window_extent() for text in (title, *axes.get_xticklabels(), axes.get_legend())]
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    labels = boxes[1 : tasks + 1]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))
    assert axes.bbox.height > whole.height / 3


def test_what_inspect_draws(places, tmp_path, monkeypatch):
    """The numbers in the four pictures, from the encoder's hidden states."""
    pytest.importorskip("matplotlib")
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    texts = [TEXTS[0], TEXTS[0], TEXTS[7]]
    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path), "--text", *texts]) == 0
    mean, by_text, energy, bases = figures
    encoder, tokenizer = make_encoder()
    selector, batch = (
        S2SentSelector.from_pretrained(places / "selector"),
        tokenizer(texts, padding=True, return_tensors="pt"),
    )
    with BlockCapture(encoder, "last:3") as capture, torch.no_grad():
        states, mask = capture.collect(**batch), batch["attention_mask"]
        gates = selector.gates(states, mask).double()
        f, _ = squeeze(states, mask, frequencies=4, backend="reference")

    def images(figure):
        return [torch.tensor(image.get_array().data) for axes in figure.axes for image in axes.images]

    def same(found, wanted):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-4)

    above, below = images(mean)
    same(above, gates.mean(0))
    same(below, 100 * (gates.mean(0) / gates.mean((0, 2))[:, None] - 1))
    departures = images(by_text)
    assert len(departures) == 3 and departures[2].abs().max() > 1e-3
    for found, wanted in zip(departures, 100 * (gates / gates.mean(0) - 1), strict=True):
        same(found, wanted)
    heights = [[bar.get_height() for bar in bars] for bars in energy.axes[0].containers]  # a group for each text
    same(torch.tensor(heights), f.double().unflatten(1, (4, 4)).square().mean(2))
    tokens = int(mask.sum(1).median())
    n, place = torch.arange(3.0, dtype=torch.float64), torch.arange(tokens, dtype=torch.float64)
    planes = images(bases)
    assert len(planes) == 4
    for found, (x, y) in zip(planes, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        alpha, beta = (torch.cos(torch.pi * wave * (at + 0.5) / len(at)) for wave, at in ((x, n), (y, place)))
        same(found / found.abs().max(), alpha[:, None] * beta / (alpha[:, None] * beta).abs().max())


def test_inspect_shows_the_pictures_or_says_where_they_are(places, tmp_path, capsys, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu", "--show"]
    arguments += ["--output-dir", tmp_path / "out", "--text", TEXTS[0]]
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert f"there is no display to show pictures on; they stand in {tmp_path / 'out'}" in captured.err
    assert captured.err.count("\n") == 1 and len(list((tmp_path / "out").iterdir())) == 4
    shown = []
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "QtAgg")
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    assert main(list(map(str, arguments))) == 0
    assert [len(axes.images) for axes in shown[0].axes] == [1] * 4
    pyplot.close(shown[0])


def test_inspect_reads_the_blocks_that_the_selector_was_trained_for(places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shutil.copytree(places / "selector", tmp_path / "selector")
    path = tmp_path / "selector" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blocks": [0, 1, 3]}))
    arguments = ["inspect", "--model", places / "model", "--selector", tmp_path / "selector", "--device", "cpu"]
    assert main(list(map(str, [*arguments, "--output-dir", tmp_path / "out", "--text", TEXTS[0]]))) == 0
    assert "blocks 0, 1, 3, 4 components" in capsys.readouterr().out


def test_inspect_looks_into_a_folder_of_encoder_and_selector(whole, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = whole
    arguments = ["inspect", "--model", folder, "--device", "cpu", "--output-dir", tmp_path / "out", "--text", TEXTS[0]]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert f"model     {folder}: blocks 1, 3, 4 components" in out
    pipeline = as_pipeline(load_pipeline(folder)[0] if folder.name == "sentence-transformers" else read_model(folder))
    batch = make_encoder()[1]([TEXTS[0]], return_tensors="pt")
    with pipeline.capture, torch.no_grad():
        gates = pipeline.selector.gates(pipeline.capture.collect(**batch), batch["attention_mask"]).mean(dim=(0, 2))
    shown = [float(value) for value in out.split(f" {TEXTS[0]}")[0].splitlines()[-1].split()[::2]]
    assert shown == pytest.approx(gates.tolist(), abs=1e-3)
    assert main([*map(str, arguments), "--selector", "all-MiniLM-L6-v2"]) == 2
    assert f"--selector: expected none beside --model {folder}" in capsys.readouterr().err


def read_model(folder):
    from s2sent_kernels.transformers import S2SentModel

    return S2SentModel.from_pretrained(folder)


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
    assert capsys.readouterr().out.count(", kept") == 1
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
        ("anchor\tpositive\na\tb\n", ["--freeze-encoder"], "expected at least two"),
        ("anchor\tpositive\na\t\n", ["--freeze-encoder"], "line 2: expected an anchor and a positive"),
        ("anchor\tother\na\tb\n", ["--freeze-encoder"], "expected a tab-separated column positive"),
    ],
)
def test_training_that_cannot_be(content, options, message, places, tmp_path, capsys):
    data = tmp_path / "data.tsv"
    data.write_text(content)
    arguments = ["train", "--model", places / "model", "--data", data, "--output", tmp_path / "out", "--device", "cpu"]
    assert main([*map(str, arguments), "--cache", str(tmp_path / "cache"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_of_scores_and_energies():
    pytest.importorskip("matplotlib")
    assert pictures.scores_picture({"one": {"a": 70.0, "b": 80.0}, "two": {"a": 60.0}}, "title").startswith(PNG)
    assert pictures.energy_picture(torch.rand(2, 3), [(0, 0), (0, 1), (1, 0)], ["x", "y"]).startswith(PNG)
    with pytest.raises(ValueError, match="scores: expected at least one"):
        pictures.scores_picture({}, "title")
    with pytest.raises(ValueError, match="energy: expected"):
        pictures.energy_picture(torch.rand(2, 2), [(0, 0)], ["x", "y"])
    with pytest.raises(ValueError, match="gates: expected"):
        pictures.gates_by_text_picture(torch.rand(2, 3, 4), ["x"])
    formulas = ["$x$ costs $\\frac{1$", "$\\nope{$"]  # people's texts, no formulas
    assert pictures.energy_picture(torch.rand(2, 3), [(0, 0), (0, 1), (1, 0)], formulas).startswith(PNG)
    assert pictures.gates_by_text_picture(torch.rand(2, 3, 4), formulas).startswith(PNG)
    assert pictures.scores_picture({formulas[0]: {"a": 70.0}, formulas[1]: {"a": 60.0}}, formulas[1]).startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "expected files or tasks to score on"),
        (["evaluate", "--sts", "no/such.tsv"], "no/such.tsv: cannot be read: No such file"),
        (
            ["evaluate", "--sts", "{sts}", "--split", "nothing"],
            "expected pairs of split 'nothing', got splits dev, test",
        ),
        (["evaluate", "--sts", "{sts}", "--selector", "nowhere"], "expected a folder or one of the shipped names"),
        (["evaluate", "--sts", "{sts}", "--model", "./nowhere"], "there is no such directory"),
        (["evaluate", "--transfer", "{sts}"], "expected a tab-separated column label"),
        (["evaluate", "--model", "{model}", "--transfer", "{few}"], "few.tsv: "),
        (
            ["evaluate", "--sts", "{sts}", "--model", "{model}", "--selector", "all-MiniLM-L6-v2"],
            "expected an encoder with blocks [0, 1, 2, 3, 4, 5] of 384 features, got BertModel with 4 of 16",
        ),
        (["inspect", "--text", " "], "expected texts, got an empty one"),
        (["inspect", "--model", "{model}", "--text", "a"], "expected a folder or a shipped name beside --model"),
        (["inspect", "--model", "{model}", "--selector", "all-MiniLM-L6-v2"], "got BertModel with 4 of 16"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
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
    assert "pip install 's2sent_kernels[evaluate]'" in capsys.readouterr().err
