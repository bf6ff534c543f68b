"""`s2sent inspect` on a tiny random encoder."""

import json
import shutil

import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, squeeze
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.cli import main
from s2sent_kernels.commands.common import load_whole
from s2sent_kernels.export import as_pipeline
from s2sent_kernels.tools import fonts, pictures


def gates_of(out, text):
    """The mean gates in the table's row of ``text``."""
    row = next(line for line in out.splitlines() if text in line and "%" in line)
    return [float(value) for value in row.partition(text)[2].split()[::2]]


stats = pytest.importorskip("scipy.stats")
PNG = b"\x89PNG\r\n\x1a\n"


def test_inspect_prints_gates_and_energies_and_writes_pictures(places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    arguments += ["--output-dir", tmp_path / "out", "--text", TEXTS[0], TEXTS[1]]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert "blocks 1, 2, 3, 4 components" in out
    gates = gates_of(out, TEXTS[0])
    assert sum(gates) == pytest.approx(1, abs=2e-3)
    names = ["dct_bases.png", "energy.png", "gates.png", "gates_by_text.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "out").iterdir())


def test_every_row_of_the_tables_is_labelled(places, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    texts = [TEXTS[0], "\u8239\u306f", f"{TEXTS[1]} " * 5]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path), "--text", *texts]) == 0
    captured = capsys.readouterr()
    _, *tables, _ = captured.out.split("\n\n")
    assert len(tables) == 3
    for table in tables:
        _, head, *rows = table.splitlines()
        assert [row.split()[0] for row in rows] == ["1", "2", "3"]
        for row, text in zip(rows, texts, strict=True):
            assert text[:39] in row
        # A Chinese character takes two columns on a terminal, so that row has two characters less.
        assert len(rows[0]) == len(rows[1]) + 2 == len(rows[2]) == len(head)
    assert captured.err.count("s2sent: warning: no installed font has") <= 1 and "UserWarning" not in captured.err


def test_one_warning_of_a_whole_command(places, tmp_path, capsys, monkeypatch):
    """Three pictures have the texts; what no font has is said once."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fonts, "_families", dict)
    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path), "--text", "\u8239\u306f", "a"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "font" in line]
    assert len(lines) == 1 and lines[0].startswith("s2sent: warning: no installed font has \u306f \u8239")


def test_what_inspect_draws(places, tmp_path, monkeypatch):
    """The numbers in the four pictures, from the encoder's hidden states."""
    pytest.importorskip("matplotlib")
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    texts = [TEXTS[0], TEXTS[0], TEXTS[7]]
    arguments = ["inspect", "--model", places / "model", "--selector", places / "selector", "--device", "cpu"]
    assert main([*map(str, arguments), "--output-dir", str(tmp_path), "--text", *texts]) == 0
    mean, by_text, energy, bases = figures
    encoder, tokenizer = make_encoder_and_tokenizer()
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
    assert main(list(map(str, [*arguments, "--force"]))) == 0
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
    pipeline = as_pipeline(load_whole(folder)[0] if folder.name == "sentence-transformers" else read_model(folder))
    batch = make_encoder_and_tokenizer()[1]([TEXTS[0]], return_tensors="pt")
    with pipeline.capture, torch.no_grad():
        gates = pipeline.selector.gates(pipeline.capture.collect(**batch), batch["attention_mask"]).mean(dim=(0, 2))
    assert gates_of(out, TEXTS[0]) == pytest.approx(gates.tolist(), abs=1e-3)
    assert main([*map(str, arguments), "--selector", "all-MiniLM-L6-v2", "--force"]) == 2
    assert f"--selector: expected none beside --model {folder}" in capsys.readouterr().err


def read_model(folder):
    from s2sent_kernels.transformers import S2SentModel

    return S2SentModel.from_pretrained(folder)
