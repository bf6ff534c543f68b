"""Training on two processes: what one trains on the same global batches."""

from pathlib import Path

import pytest
import torch
from builders import pairs, save_encoder, sentences
from torch import nn
from two_processes import run_both

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from s2sent_kernels.sentence_transformers import S2SentPooling, load
from s2sent_kernels.tools import contrastive, processes, training
from s2sent_kernels.tools.examples import Examples

BATCH, COUNT = 8, 32


def without_dropout(encoder, **options):
    torch.manual_seed(0)
    transformer = Transformer(str(encoder))
    pooling = S2SentPooling.behind(transformer, "last:2", bottleneck=4, frequencies=4, block_prior=True, **options)
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu").double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def examples():
    rows = [(*pair, other) for pair, other in zip(pairs(COUNT), sentences(COUNT, 1), strict=True)]
    return Examples(("anchor", "positive", "negative"), rows, True)


def dev():
    one, other = (list(side) for side in zip(*pairs(6), strict=True))
    return one * 2, other + other[::-1], [1.0] * 6 + [0.0] * 6


def train(folder, batch):
    """Until patience ends it; every process asks for 3 epochs."""
    recipe = training.Recipe(epochs=3, batch_size=batch, learning_rate=1e-3, patience=1)
    training.fine_tune(without_dropout(folder / "encoder"), examples(), folder / f"batch{batch}", recipe, dev=dev())


def train_in_parts(folder, batch, mini_batch):
    """One epoch without batch norm, the encoder on ``mini_batch`` examples at once."""
    recipe = training.Recipe(epochs=1, batch_size=batch, learning_rate=1e-3, mini_batch=mini_batch)
    model = without_dropout(folder / "encoder", gate_norm=None)
    training.fine_tune(model, examples(), folder / f"parts{batch}", recipe)


def refuse_too_few(folder):
    """What is said where there are rows enough, but no batch without a text that repeats."""
    rows = [(anchor, "the cat") for anchor, _ in pairs(8)]
    try:
        recipe = training.Recipe(epochs=1, batch_size=4)
        training.fine_tune(
            without_dropout(folder / "encoder"), Examples(("anchor", "positive"), rows, True), folder / "few", recipe
        )
    except ValueError as error:
        print("few", error)


def in_a_process(folder):
    torch.set_num_threads(1)
    train_in_parts(Path(folder), BATCH // 2, 3)
    refuse_too_few(Path(folder))
    train(Path(folder), BATCH // 2)
    print("dropout", torch.rand(1).item())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of what one process and what two trained; and what both printed."""
    folder = tmp_path_factory.mktemp("processes")
    save_encoder(folder / "encoder")
    train(folder, BATCH)
    train_in_parts(folder, BATCH, None)
    return folder, run_both(__file__, f"in_a_process({str(folder)!r})")


def test_two_processes_train_what_one_trains(trained):
    folder, _ = trained
    one, two = (load(folder / f"batch{size}", device="cpu").state_dict() for size in (BATCH, BATCH // 2))
    before = without_dropout(folder / "encoder").state_dict()
    assert any(not torch.equal(one[name].double(), before[name]) for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_mini_batches_in_two_processes_are_one_batch(trained):
    folder, _ = trained
    one, two = (load(folder / f"parts{size}", device="cpu").state_dict() for size in (BATCH, BATCH // 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_too_few_for_two_processes(trained):
    for told in trained[1]:
        assert "few examples: expected 4 at once for each of 2 processes without a text that repeats, got 8 of" in told


def test_each_process_has_its_own_dropout(trained):
    first, second = (text.splitlines()[-1] for text in trained[1])
    assert first.startswith("dropout") and first != second


def test_what_has_no_gradient_is_frozen_meanwhile(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "sync_statistics", lambda module: module)
    encoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2), nn.Linear(2, 2)).train()
    encoder[0].bias.requires_grad_(False)
    with processes.joined(encoder, lambda: encoder[2](encoder[1](encoder[0](torch.ones(1, 2))))):
        assert [parameter.requires_grad for parameter in encoder.parameters()] == [
            True,
            False,
            True,
            True,
            False,
            False,
        ]
        assert encoder.training and all(parameter.grad is None for parameter in encoder.parameters())
    assert [parameter.requires_grad for parameter in encoder.parameters()] == [True, False, True, True, True, True]


def test_a_text_that_another_process_has_is_no_negative(monkeypatch):
    """As two processes, the other of which has this one's second row first: its positive, and its anchor as a negative."""
    torch.manual_seed(0)
    ids = torch.arange(12).view(6, 2) + 7
    columns = [ids[:2], ids[2:4], ids[4:]]
    others = [ids[[1, 0]], ids[[3, 2]], torch.stack([ids[1], ids[5]])]
    embedded = {tuple(row.tolist()): torch.randn(4) for row in ids}
    mine, theirs = (
        [torch.stack([embedded[tuple(row.tolist())] for row in part]) for part in side] for side in (columns, others)
    )
    features = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in columns]
    loss = contrastive.GatheredNegatives(nn.Identity(), scale=20.0)
    pieces = iter([*theirs[1:], *(contrastive._fingerprints(part, torch.ones_like(part)) for part in others[1:])])
    both = lambda part: torch.cat([part, next(pieces)])  # noqa: E731
    monkeypatch.setattr(contrastive, "all_gather", both)
    monkeypatch.setattr(contrastive, "all_gather_with_grad", both)
    loss._texts = [contrastive._fingerprints(**part) for part in features]
    got = loss.compute_loss_from_embeddings(mine, torch.zeros(2))
    wanted = []
    for row, negatives in enumerate(
        (
            # this process's, then the other's: without the positive that is this row's own, and with the second anchor
            (mine[1][1], *mine[2], theirs[1][0], *theirs[2]),
            # without the second positive again, and without its own anchor
            (mine[1][0], *mine[2], theirs[1][1], theirs[2][1]),
        )
    ):
        candidates = torch.stack([mine[1][row], *negatives])
        scores = 20 * torch.cosine_similarity(mine[0][row], candidates)
        wanted.append(scores.logsumexp(dim=0) - scores[0])
    torch.testing.assert_close(got, torch.stack(wanted).mean())


def test_fingerprints_do_not_depend_on_padding():
    left = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    right = torch.tensor([[5, 6, 0, 0, 0], [6, 5, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]])
    one, other = (contrastive._fingerprints(*side) for side in (left, right))
    assert one[0] == other[0] and len({*one.tolist(), *other.tolist()}) == 3
