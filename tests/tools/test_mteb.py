"""mteb's tasks on poolings: with a task made in memory, where mteb is installed."""

import json

import pytest
import torch
from builders import save_encoder, sentences

from s2sent_kernels import S2SentSelector
from s2sent_kernels.cli import main
from s2sent_kernels.tools import mteb_tasks

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")


def _metadata(name, kind, splits, score):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        dataset={"path": "none/none", "revision": "1"},
        description="Made in memory.",
        type=kind,
        category="t2t" if kind == "STS" else "t2c",
        eval_splits=splits,
        eval_langs=["eng-Latn"],
        main_score=score,
        reference=None,
        date=("2020-01-01", "2020-01-02"),
        domains=["Written"],
        task_subtypes=[],
        license="not specified",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
        modalities=["text"],
    )


def _task(ones=tuple(f"a{i}" for i in range(6)), others=tuple(f"b{i}" for i in range(6))):
    from mteb.abstasks.sts import AbsTaskSTS

    class Tiny(AbsTaskSTS):
        min_score, max_score = 0, 5
        metadata = _metadata("TinySTS", "STS", ["test"], "cosine_spearman")

        def load_data(self, *_, **__):
            rows = {"sentence1": list(ones), "sentence2": list(others), "score": [float(i) for i in range(len(ones))]}
            self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
            self.data_loaded = True

    return Tiny()


def _classification(texts, labels):
    from mteb.abstasks.classification import AbsTaskClassification

    class Tiny(AbsTaskClassification):
        metadata = _metadata("TinyClassification", "Classification", ["test"], "accuracy")

        def load_data(self, *_, **__):
            rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
            self.dataset = datasets.DatasetDict({"train": rows, "test": rows})
            self.data_loaded = True

    return Tiny()


def test_each_pooling_has_its_score():
    angle = torch.linspace(1.5, 0, 6)
    right = {f"a{i}": torch.tensor([1.0, 0.0]) for i in range(6)}
    right |= {f"b{i}": torch.stack([angle[i].cos(), angle[i].sin()]) for i in range(6)}

    def embed(texts):
        known = torch.stack([right[text] for text in texts])
        wrong = torch.stack([right[text] if text[0] == "a" else right[f"b{5 - int(text[1])}"] for text in texts])
        return {"right": known, "wrong": wrong}

    found = mteb_tasks.score([_task()], embed, ["right", "wrong"])
    assert found["TinySTS"]["right"]["main_score"] == pytest.approx(100)
    assert found["TinySTS"]["wrong"]["main_score"] == pytest.approx(-100)


def test_a_task_that_does_not_exist():
    with pytest.raises(ValueError, match="mteb: "):
        mteb_tasks.run(["NoSuchTask"], lambda texts: {"any": torch.ones(len(texts), 2)})


def test_the_command_takes_tasks_of_several_kinds(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    save_encoder(tmp_path / "encoder")
    S2SentSelector(16, 2, 4, 4, block_prior=True).save_pretrained(tmp_path / "selector")
    labels = [i % 2 for i in range(32)]
    texts = [f"{'moon' if label else 'dog'} {text}" for label, text in zip(labels, sentences(32), strict=True)]
    known = {"TinySTS": _task(sentences(6), sentences(6, 1)), "TinyClassification": _classification(texts, labels)}
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [known[name] for name in tasks])
    arguments = ["evaluate", "--model", tmp_path / "encoder", "--selector", tmp_path / "selector", "--device", "cpu"]
    arguments += ["--mteb", *known, "--output-dir", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())["mteb"]
    assert list(content) == list(known) and all("s2sent" in scores for scores in content.values())
    assert content["TinyClassification"]["s2sent"]["main_score"] > 80  # the first word decides the label
    assert f"{content['TinySTS']['s2sent']['main_score']:.2f}" in capsys.readouterr().out
