"""mteb's tasks on poolings: with a task made in memory, where mteb is installed."""

import pytest
import torch

from s2sent_kernels import mteb_tasks

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")


def _task():
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class Tiny(AbsTaskSTS):
        min_score, max_score = 0, 5
        metadata = TaskMetadata(
            name="TinySTS", dataset={"path": "none/none", "revision": "1"}, description="Made in memory.", type="STS",
            category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman", reference=None,
            date=("2020-01-01", "2020-01-02"), domains=["Written"], task_subtypes=[], license="not specified",
            annotations_creators="derived", dialect=[], sample_creation="created", bibtex_citation="",
            modalities=["text"],
        )  # fmt: skip

        def load_data(self, *_, **__):
            rows = {"sentence1": [f"a{i}" for i in range(6)], "sentence2": [f"b{i}" for i in range(6)]}
            rows["score"] = [float(i) for i in range(6)]
            self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
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
