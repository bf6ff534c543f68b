"""Small batches in the static shapes of CUDA graphs. Here a replay runs the function again; test_devices.py has real graphs."""

import copy

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
    error: Exception | None = None  # of a replay

    def _capture(self, inputs):
        self.captured += 1
        run, static = self._run, {name: tensor.clone() for name, tensor in inputs.items()}
        output, graphs = run(static), self

        class Graph:
            def replay(self):
                if graphs.error is not None:
                    raise graphs.error
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


def test_a_bucket_is_no_longer_than_the_position_table():
    seen = []

    def run(inputs):
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return inputs["input_ids"].sum(dim=1, keepdim=True).float()

    graphs = Repeated(run, CPU, limit=77, pad_id=9)
    for length, bucket in ((70, 77), (77, 77), (50, 64)):
        ids = torch.ones(1, length, dtype=torch.int64)
        graphs({"input_ids": ids, "attention_mask": ids})
        assert seen[-1]["input_ids"].tolist() == [[1] * length + [9] * (bucket - length)]
        assert seen[-1]["attention_mask"].sum() == length
    assert list(graphs._graphs) == [(1, 77), (1, 64)]


def test_an_output_is_not_overwritten_by_the_next():
    graphs = Repeated(lambda inputs: inputs["input_ids"].float(), CPU)
    ids = torch.ones(1, 16, dtype=torch.int64)
    one, other = (graphs({"input_ids": ids * value, "attention_mask": ids}) for value in (1, 2))
    assert one[0, 0] == 1 and other[0, 0] == 2


def test_weights_that_moved_are_captured_again():
    module = torch.nn.Linear(16, 2)
    graphs = Repeated(lambda inputs: inputs["input_ids"].to(module.weight.dtype) @ module.weight.T, CPU, [module])
    ids = torch.ones(1, 16, dtype=torch.int64)

    def call():
        return graphs({"input_ids": ids, "attention_mask": ids})

    call()
    with torch.no_grad():
        module.weight.fill_(1)  # in place: a graph reads the new values
    assert call().tolist() == [[16, 16]] and graphs.captured == 1
    module.double()
    assert call().dtype == torch.float64 and graphs.captured == 2
    module.weight = torch.nn.Parameter(torch.zeros(2, 16))
    assert call().tolist() == [[0, 0]] and graphs.captured == 3 and len(graphs._graphs) == 1


def test_a_copy_has_no_graph():
    graphs = Repeated(_sum, CPU)
    ids = torch.ones(1, 16, dtype=torch.int64)
    graphs({"input_ids": ids, "attention_mask": ids})
    assert copy.deepcopy(graphs)._graphs == {} and len(graphs._graphs) == 1


def _sum(inputs):
    return inputs["input_ids"].sum(dim=1, keepdim=True).float()


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
        raise replay.CannotCapture(
            "a CUDA graph of 1 x 16 tokens cannot be captured: why; cuda_graphs=False goes without"
        )


def test_a_graph_that_cannot_be_captured_is_said_once(monkeypatch):
    model = make(monkeypatch, Impossible)
    with pytest.warns(UserWarning, match="cannot be captured: why") as warned:
        found = [model.encode(TEXTS[:1]) for _ in range(2)]
    assert len(warned) == 1 and (found[0] == found[1]).all()


def test_an_error_of_a_replay_is_raised_and_no_graph_dropped(monkeypatch):
    model = make(monkeypatch, Repeated)
    wanted = model.encode(TEXTS[:1])
    graphs = model._run._graphs
    graphs.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        model.encode(TEXTS[:1])
    graphs.error = None
    assert (model.encode(TEXTS[:1]) == wanted).all() and model._run._graphs is graphs and graphs.captured == 1


def test_a_graph_that_was_asked_for_raises(monkeypatch):
    model = make(monkeypatch, Impossible)
    monkeypatch.setattr(model._run, "_graphs_wanted", True)
    with pytest.raises(RuntimeError, match="cuda_graphs=False goes without"):
        model.encode(TEXTS[:1])
    assert isinstance(model._run, batch_runner.BatchRunner)
