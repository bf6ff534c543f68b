"""Mistakes that give numbers: each is told once."""

import warnings

import pytest
import torch
from small import B, D, L, N

from s2sent_kernels import S2SentSelector, input_tokens


@pytest.fixture
def selector():
    return S2SentSelector(D, N, bottleneck=4)


@pytest.mark.parametrize("call", ["forward", "pool", "gates"])
def test_training_mode_without_gradients(selector, call):
    hidden_states = [torch.randn(B, L, D) for _ in range(N)]
    function = selector if call == "forward" else getattr(selector, call)
    with torch.no_grad(), pytest.warns(UserWarning, match="in training mode ran without gradients"):
        function(hidden_states)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(hidden_states)
        with torch.no_grad():
            selector.eval()
            function(hidden_states)
            selector.train()
            selector.norm.eval()
            function(hidden_states)


def test_it_is_told_once(selector):
    hidden_states = [torch.randn(B, L, D) for _ in range(N)]
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(3):
            selector.pool(hidden_states)
    assert len(told) == 1


@pytest.mark.parametrize("name", ["attention_mask", "pooling_mask"])
def test_a_batch_of_padding(name):
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    given = mask if name == "pooling_mask" else None
    with pytest.warns(UserWarning, match="no token of this batch counts"):
        input_tokens.mask_of(inputs, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask[1, 0] = 1  # a sentence without tokens beside others is a sentence of length 0
        input_tokens.mask_of(inputs, given)
        input_tokens.mask_of({"input_ids": ids[:0], "attention_mask": mask[:0]}, given if given is None else given[:0])
