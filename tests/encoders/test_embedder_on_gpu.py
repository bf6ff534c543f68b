"""Embedder on a GPU: torch's varlen attention, CUDA graphs, copies that overlap. Tiny random encoders."""

import threading

import numpy as np
import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer, sentences
from test_packed import PACKED, encoder_of

from s2sent_kernels import S2SentSelector, embedder
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.embedder import Embedder
from s2sent_kernels.export import Pipeline
from s2sent_kernels.packed import refusal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def make(device, dtype, **options):
    encoder, tokenizer = make_encoder_and_tokenizer()
    torch.manual_seed(1)
    pipeline = Pipeline(BlockCapture(encoder, "last:3"), S2SentSelector(16, 3, 8, 4).eval()).eval()
    encoder.to(dtype)
    return Embedder(pipeline.to(device), tokenizer, **options)


def cosines(found, wanted):
    return (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)


@pytest.mark.parametrize("name", PACKED)
def test_the_families_are_packed_in_half_precision(name):
    encoder = encoder_of(name).to("cuda", torch.bfloat16)
    assert refusal(BlockCapture(encoder), torch.device("cuda", 0)) is None


def test_float32_is_padded():
    model = make("cuda", torch.float32)
    assert not model.packed and "needs float16 or bfloat16" in model.padded_because


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_it_gives_what_the_cpu_gives(monkeypatch, dtype, packed):
    monkeypatch.setattr(embedder, "FIRST_CHUNK", 16)
    monkeypatch.setattr(embedder, "LARGEST_CHUNK", 64)
    texts = sentences(300) + TEXTS
    wanted = make("cpu", torch.float32).encode(texts)
    model = make("cuda", dtype, packed=packed)
    found = model.encode(texts, batch_tokens=100)
    assert cosines(found, wanted).min() > 0.998
    assert (model.encode(texts, batch_tokens=100) == found).all()
    assert (np.stack(list(model.stream(iter(texts), batch_tokens=100))) == found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_graph_gives_what_a_call_gives(dtype):
    model = make("cuda", dtype, cuda_graphs=True)
    plain = make("cuda", dtype, cuda_graphs=False, packed=False)
    for texts in (TEXTS[:1], TEXTS, TEXTS[:3], TEXTS[1:2], TEXTS[:1], ["moon " * 100]):
        found, wanted = model.encode(texts), plain.encode(texts)
        assert cosines(found, wanted).min() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)
    assert len(model._run._graphs._graphs) == 4


def test_weights_that_moved_are_captured_again():
    model = make("cuda", torch.float32, cuda_graphs=True)
    before = model.encode(TEXTS[:1])
    model.encoder.half()  # the graph's weights are freed
    assert cosines(model.encode(TEXTS[:1]), before).min() > 0.998
    assert len(model._run._graphs._graphs) == 1


def test_replays_on_streams_of_their_own_take_turns():
    model = make("cuda", torch.bfloat16, cuda_graphs=True)
    wanted, wrong = [model.encode(text) for text in TEXTS], []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                wrong.extend(t for t, each in zip(TEXTS, wanted, strict=True) if (model.encode(t) != each).any())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")
def test_on_another_device_than_the_current_one():
    texts = sentences(100)
    one, other = (make(device, torch.bfloat16) for device in ("cuda:0", "cuda:1"))
    assert (one.encode(texts) == other.encode(texts)).all()
    assert (one.encode(texts[:1]) == other.encode(texts[:1])).all()
