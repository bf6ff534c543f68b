"""Drawn calls of the engine under S2SENT_TEST_BACKEND ("native" where unset and built, else "reference") against the float64
reference, by fixed seeds: the same cases everywhere. ``make fuzz SECONDS=3600`` draws others."""

import fuzz_calls
import fuzz_cases
import fuzz_engine
import fuzz_errors
import pytest
import torch
from fuzz_cases import Case, cases
from hypothesis import given, seed

from s2sent_kernels.formula import reference

PARTS = 8  # so that workers share them
EXAMPLES = 10 if fuzz_engine.INTERPRETED else 250


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny, and workers compete for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not fuzz_engine.USABLE, reason=fuzz_engine.REASON)
@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_calls(part):
    @seed(part)
    @fuzz_engine.settings(EXAMPLES)
    @given(cases(fuzz_engine.DTYPES, small=fuzz_engine.INTERPRETED))
    def every_result_is_within_its_bound(case):
        fuzz_calls.check(case, fuzz_engine.BACKEND, fuzz_engine.DEVICE)

    every_result_is_within_its_bound()


# ---------------------------------------------------------------- the error model itself

PLAIN = Case(
    N=6,
    B=4,
    L=20,
    D=24,
    M=4,
    H=16,
    dtype="float32",
    magnitude=1.0,
    parameter_dtype="float32",
    mask="right",
    mask_dtype="bool",
    empty=False,
    strides="contiguous",
    profile="paper",
    norm=True,
    prior=1.0,
    scale=4.0,
    activation="tanh",
    pooling="mean",
    training=True,
    eps=1e-6,
    momentum=0.1,
    module=False,
    gradient="random",
    frozen="nothing",
    seed=0,
)


def test_a_case_is_replayed_from_its_text():
    assert Case.from_json(PLAIN.as_json()) == PLAIN


@pytest.mark.parametrize("beyond_many", [False, True])
def test_what_few_draws_refuse_is_judged_by_many(beyond_many, monkeypatch):
    judge, judged = fuzz_errors.judge, []

    def refuse(case, actual, truth, draws):
        judged.append(len(draws) - 1)
        bound = judge(case, actual, truth, draws)
        return bound._replace(ratio=2.0) if beyond_many or judged[-1] == fuzz_errors.DRAWS else bound

    monkeypatch.setattr(fuzz_errors, "judge", refuse)
    if beyond_many:
        with pytest.raises(fuzz_calls.Wrong, match="output: error"):
            fuzz_calls.check(PLAIN, "reference")
    else:
        fuzz_calls.check(PLAIN, "reference")
    assert judged[:2] == [fuzz_errors.DRAWS, fuzz_errors.MANY]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_bound_is_tight(pooling, training):
    """A share of 2^-15 of a tensor's largest number is found in every result: engines that compute in 16 bits err by more."""
    case = PLAIN._replace(pooling=pooling, training=training)
    inputs = fuzz_cases.build(case)
    out, grad = fuzz_calls.run(case, inputs, "reference", None)
    draws = fuzz_errors.Wobbled(case, inputs, fuzz_errors.unit(case)).results(grad)
    for name, tensor in out.items():
        if name == "gradient of gate_scale" or (name == "gradient of up_bias" and training):
            continue  # sums that cancel, the second to zero
        truth = draws[name][0]
        assert fuzz_errors.judge(case, tensor, truth, draws[name]).ratio <= 1, name
        moved = tensor + tensor.abs().max() * 2**-15
        assert fuzz_errors.judge(case, moved, truth, draws[name]).ratio > 1, name


@pytest.mark.parametrize("wrong", ["f is off by 1e-5", "a token is dropped"])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_small_error_of_squeeze_is_found(monkeypatch, wrong, pooling):
    """It reaches the result through the gates alone. The same call without it is right."""
    right = reference.squeeze_block

    def squeeze_block(hidden_state, place, tokens, reading):
        if hidden_state.dtype == torch.float64:  # the truth
            return right(hidden_state, place, tokens, reading)
        if wrong == "a token is dropped":
            hidden_state = hidden_state.clone()
            hidden_state[0, 20] = 0
        share, pooled = right(hidden_state, place, tokens, reading)
        return share * (1 + 1e-5) if wrong == "f is off by 1e-5" else share, pooled

    case = PLAIN._replace(L=40, mask="none", training=False, pooling=pooling)
    fuzz_calls.check(case, "reference")
    monkeypatch.setattr(reference, "squeeze_block", squeeze_block)
    with pytest.raises(fuzz_calls.Wrong, match="error"):
        fuzz_calls.check(case, "reference")


@pytest.mark.skipif(not fuzz_engine.USABLE, reason=fuzz_engine.REASON)
@pytest.mark.parametrize("number", range(len(fuzz_cases.CONFIGURATIONS)))
def test_drawn_calls_of_a_fixed_configuration(number):
    @seed(number)
    @fuzz_engine.settings(2 if fuzz_engine.INTERPRETED else 20)
    @given(fuzz_cases.cases_of(fuzz_cases.CONFIGURATIONS[number], 6 if fuzz_engine.INTERPRETED else 40))
    def every_result_is_within_its_bound(case):
        assert Case.from_json(case.as_json()) == case
        fuzz_calls.check(case, fuzz_engine.BACKEND, fuzz_engine.DEVICE)

    every_result_is_within_its_bound()


def test_nan_is_never_right():
    draws = torch.zeros(1 + fuzz_errors.DRAWS, 3)
    assert fuzz_errors.judge(PLAIN, torch.tensor([0.0, float("nan"), 0.0]), draws[0], draws).ratio > 1


def test_what_a_wrong_engine_gives_is_found(monkeypatch):
    right = fuzz_calls.s2.select_pool

    def wrong(hidden_states, *arguments, backend, **options):
        out = right(hidden_states, *arguments, backend="reference", **options)
        return out if backend == "reference" and hidden_states[0].dtype == torch.float64 else out * 1.001

    monkeypatch.setattr(fuzz_calls.s2, "select_pool", wrong)
    with pytest.raises(fuzz_calls.Wrong, match=r'output: error .*"N": 6'):
        fuzz_calls.check(PLAIN._replace(gradient=None, training=False), fuzz_engine.BACKEND)
