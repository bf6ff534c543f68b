"""Small batches in the static shapes of CUDA graphs. Here a replay runs the function again; test_devices.py has real graphs."""

import numpy as np
import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, batch_runner, replay
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.embedder import Embedder
from s2sent_kernels.export import Pipeline
from s2sent_kernels.replay import GraphReplay

CPU = torch.device("cpu")


class Repeated(GraphReplay):
    """Without a GPU: static inputs and output as in a graph."""

    captured = 0

    def _capture(self, inputs):
        self.captured += 1
        run, static = self._run, {name: tensor.clone() for name, tensor in inputs.items()}
        output = run(static)

        class Graph:
            def replay(self):
                output.copy_(run(static))

        return replay._Graph(Graph(), static, output)


def test_a_batch_takes_the_smallest_shape_that_holds_it():
    seen = []

    def run(inputs):
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return inputs["input_ids"].sum(dim=1, keepdim=True).float()

    graphs = Repeated(run, CPU)
    ids = torch.arange(1, 52).view(3, 17)
    for _ in range(2):
        found = graphs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert found[:, 0].tolist() == ids.sum(1).tolist()
    assert graphs.captured == 1 and list(graphs._graphs) == [(4, 24)]
    assert seen[-1]["attention_mask"].sum(1).tolist() == [17, 17, 17, 1]  # no row is without a token
    assert GraphReplay.fits(8, 256) and not GraphReplay.fits(9, 16) and not GraphReplay.fits(1, 257)


def make(monkeypatch, kind, **options):
    encoder, tokenizer = make_encoder_and_tokenizer()
    torch.manual_seed(0)
    pipeline = Pipeline(BlockCapture(encoder, "last:2"), S2SentSelector(16, 2, 8, 4).eval()).eval()
    model = Embedder(pipeline, tokenizer, **options)
    runner = model._run
    monkeypatch.setattr(runner, "_graphs", kind(runner._pool_padded, CPU))
    return model


def test_few_texts_are_replayed_and_many_are_not(monkeypatch):
    model = make(monkeypatch, Repeated)
    wanted = make(monkeypatch, lambda *_: None).encode(TEXTS)
    for texts in (TEXTS, TEXTS[:1], TEXTS[:3], TEXTS[:1]):
        np.testing.assert_allclose(model.encode(texts), wanted[: len(texts)], atol=2e-6)
    graphs = model._run._graphs
    assert graphs.captured == 3 and set(graphs._graphs) == {(8, 16), (1, 16), (4, 16)}
    np.testing.assert_allclose(model.encode(TEXTS * 2), np.concatenate([wanted] * 2), atol=2e-6)
    assert graphs.captured == 3


class Impossible(GraphReplay):
    def __call__(self, inputs):
        raise RuntimeError("a CUDA graph of 1 x 16 tokens cannot be captured: why; cuda_graphs=False goes without")


def test_a_graph_that_cannot_be_captured_is_said_once(monkeypatch):
    model = make(monkeypatch, Impossible)
    with pytest.warns(UserWarning, match="cannot be captured: why") as warned:
        found = [model.encode(TEXTS[:1]) for _ in range(2)]
    assert len(warned) == 1 and (found[0] == found[1]).all()


def test_a_graph_that_was_asked_for_raises(monkeypatch):
    model = make(monkeypatch, Impossible)
    monkeypatch.setattr(model._run, "_graphs_wanted", True)
    with pytest.raises(RuntimeError, match="cuda_graphs=False goes without"):
        model.encode(TEXTS[:1])
    assert isinstance(model._run, batch_runner.BatchRunner)
