"""Training a selector and a head on a task, from f and p: random ones in which one block says the label."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sent_kernels import S2SentSelector
from s2sent_kernels.frozen import Features, ScalarMix
from s2sent_kernels.frozen_tasks import Part, Recipe, grid, search, train
from s2sent_kernels.tools.problems import CLASSES, LABELS, NUMBERS, PROBLEMS, Problem

RECIPE = Recipe(epochs=6, batch_size=16, learning_rate=2e-2, prior_learning_rate=0.3)


def make():
    return S2SentSelector(8, 3, 4, 4, block_prior=True, gate_scale=4.0, backend="reference")


def part(seed, kind=CLASSES, rows=96):
    """The first block's features give the targets; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    features = Features(torch.randn(rows, 8, generator=generator), torch.randn(rows, 3, 8, generator=generator))
    values = features.pooled[:, 0]
    targets = {
        CLASSES: values[:, :3].argmax(dim=1),
        LABELS: (values[:, :4] > 0).float(),
        NUMBERS: 100 + 20 * values[:, 0],
    }
    return Part(features, targets[kind])


@pytest.mark.parametrize(("kind", "outputs", "least"), [(CLASSES, 3, 75), (LABELS, 4, 80), (NUMBERS, 1, 80)])
def test_it_learns_each_problem_and_keeps_the_best_epoch(kind, outputs, least):
    recipe, problem, dev = RECIPE._replace(epochs=15), Problem(kind, outputs), part(1, kind)
    trained, history = train(make(), part(0, kind, 480), problem, recipe, dev=dev)
    assert history.score > least and history.score == max(history.scores[1:])
    assert problem.score(trained.logits(dev.features), dev.targets) == pytest.approx(history.score, abs=1e-3)
    assert trained.module.block_prior.argmax() == 0 and not trained.module.training


def test_losses_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.loss.loss_utils import ForSequenceClassificationLoss as loss

    logits = torch.randn(5, 3)
    targets = {CLASSES: torch.tensor([0, 1, 2, 1, 0]), LABELS: torch.ones(5, 3), NUMBERS: torch.randn(5)}
    for kind in PROBLEMS:
        outputs = 1 if kind == NUMBERS else 3
        config = transformers.PretrainedConfig(num_labels=outputs, problem_type=kind)
        expected = loss(targets[kind], logits[:, :outputs], config)
        torch.testing.assert_close(Problem(kind, outputs).loss(logits[:, :outputs], targets[kind]), expected)


def test_scores_by_hand():
    logits = torch.tensor([[2.0, -1.0], [-1.0, 3.0], [1.0, 0.5], [-2.0, -1.0]])
    assert Problem(CLASSES, 2).score(logits, torch.tensor([0, 1, 1, 1])) == 75
    some = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # 3 of 4 found, 1 found too many
    assert Problem(LABELS, 2).score(logits, some) == 75
    numbers = torch.tensor([1.0, 2.0, 3.0])
    assert Problem(NUMBERS, 1).score(torch.tensor([[1.0], [2.0], [2.0]]), numbers) == pytest.approx(50)


class Concatenation(nn.Module):
    def forward(self, features):
        return features.pooled.flatten(1)


@pytest.mark.parametrize("pooling", [lambda: ScalarMix(3), Concatenation], ids=["mix", "concatenation"])
def test_another_module_can_be_the_pooling(pooling):
    trained, history = train(pooling(), part(0), Problem(CLASSES, 3), RECIPE._replace(epochs=15), dev=part(1))
    assert history.score > 60
    assert trained.head.in_features == (24 if pooling is Concatenation else 8)


def test_a_search_lists_all_and_keeps_the_best():
    problem, recipes = Problem(CLASSES, 3), grid(RECIPE, (1e-6, 2e-2), (0.0, 0.5), (0, 7))
    assert [(one.learning_rate, one.dropout, one.seed) for one in recipes[:3]] == [
        (1e-6, 0, 0),
        (1e-6, 0, 7),
        (1e-6, 0.5, 0),
    ]
    found = search(make, part(0), part(1), problem, recipes)
    assert [trial.recipe for trial in found.trials] == recipes
    scores = [trial.history.score for trial in found.trials]
    assert found.best is found.trials[scores.index(max(scores))] and found.best.recipe.learning_rate == 2e-2
    torch.manual_seed(found.best.recipe.seed)  # that trial alone has the same bits
    alone, history = train(make(), part(0), problem, found.best.recipe, dev=part(1))
    assert history == found.best.history
    for a, b in zip(alone.module.state_dict().values(), found.trained.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_patience_stops():
    recipe = RECIPE._replace(epochs=50, learning_rate=1e-9, prior_learning_rate=1e-9, patience=2)
    _, history = train(make(), part(0), Problem(CLASSES, 3), recipe, dev=part(1))
    assert len(history.losses) < 50 and len(history.losses) == history.kept + 2
    with pytest.raises(ValueError, match="patience: expected dev"):
        train(make(), part(0), Problem(CLASSES, 3), recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1"),
        ({"dropout": float("nan")}, "dropout: expected a number from 0 to below 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"epochs": 0}, "epochs: expected a positive number"),
    ],
)
def test_recipes_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        train(make(), part(0), Problem(CLASSES, 3), RECIPE._replace(**change))


@pytest.mark.parametrize(
    ("problem", "targets", "message"),
    [
        (Problem(CLASSES, 2), torch.full((96,), 2), "part: expected classes from 0 to 1"),
        (Problem(CLASSES, 1), torch.zeros(96, dtype=torch.int64), "outputs: expected two or more classes, got 1"),
        (Problem(LABELS, 2), torch.zeros(96), r"part: expected targets \[96, 2\] of 96 texts, got \[96\]"),
        (Problem(NUMBERS, 1), torch.full((96,), float("nan")), "part: expected finite targets"),
        (Problem("ranking", 1), torch.zeros(96), "kind: expected one of"),
    ],
)
def test_problems_and_targets_that_do_not_fit(problem, targets, message):
    with pytest.raises(ValueError, match=message):
        train(make(), Part(part(0).features, targets), problem, RECIPE)


def test_the_mean_of_regression_targets_is_where_the_head_starts():
    """Targets around 100 need no long training."""
    trained, _ = train(make(), part(0, NUMBERS), Problem(NUMBERS, 1), RECIPE._replace(epochs=1))
    values = trained.logits(part(1, NUMBERS).features)
    assert F.l1_loss(values.mean(), torch.tensor(100.0)) < 20
