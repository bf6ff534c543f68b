"""Capture of blocks: what the hooks hand over, that they keep nothing, and what they survive. Tiny random encoders."""

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from s2sent_kernels import S2SentSelector, backends, consumers
from s2sent_kernels.capture import BlockCapture, _thread
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.formula.call import POOLINGS

N, D = 4, 32
SIZES = {"vocab_size": 50, "max_position_embeddings": 64}
WIDTHS = {"hidden_size": D, "num_hidden_layers": N, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, **WIDTHS)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES, **WIDTHS)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES, **WIDTHS)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(**SIZES, dim=D, n_layers=N, n_heads=2, hidden_dim=48)
    ),
}
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]],
}
family = pytest.mark.parametrize("name", FAMILIES)


def make_encoder(name="bert", seed=0):
    torch.manual_seed(seed)
    return FAMILIES[name]().eval()


def make_inputs(mask="right", seed=0):
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    if MASKS[mask] is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.tensor(MASKS[mask])}


def make_selector(num_blocks=N, seed=0, **options):
    """A selector in eval mode whose gates differ between blocks."""
    torch.manual_seed(seed)
    selector = S2SentSelector(D, num_blocks, 8, 4, **options)
    with torch.no_grad():
        selector.up.weight.mul_(8)
    return selector.eval()


def expected(encoder, inputs, blocks=range(N)):
    """The blocks' hidden states as transformers records them."""
    with torch.no_grad():
        hidden_states = encoder(**inputs, output_hidden_states=True).hidden_states
    return [hidden_states[block + 1] for block in blocks]


def assert_same(actual, wanted):
    assert len(actual) == len(wanted)
    for block, (ours, theirs) in enumerate(zip(actual, wanted, strict=True)):
        assert torch.equal(ours, theirs), block


def no_result(ignored):
    """For hooks that are lambdas: what a hook returns replaces the module's input or output."""


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert _thread.calls == []


# ---------------------------------------------------------------- what is handed over


@family
@pytest.mark.parametrize("mask", MASKS)
def test_collect_equals_output_hidden_states(name, mask):
    encoder, inputs = make_encoder(name), make_inputs(mask)
    with BlockCapture(encoder) as capture, torch.no_grad():
        assert capture.blocks == (0, 1, 2, 3)
        assert_same(capture.collect(**inputs), expected(encoder, inputs))


@pytest.mark.parametrize(
    "blocks, indices",
    [([1], (1,)), ([-1, 0], (0, 3)), ((-3, -2, -1), (1, 2, 3)), (range(2), (0, 1)), ("last:3", (1, 2, 3))],
)
def test_chosen_blocks_come_lowest_first(blocks, indices):
    encoder, inputs = make_encoder(), make_inputs()
    capture = BlockCapture(encoder, blocks)
    assert capture.blocks == indices
    with torch.no_grad():
        assert_same(capture.collect(**inputs), expected(encoder, inputs, indices))


@family
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"gate_norm": None, "block_prior": True}, {"profile": "official"}])
def test_pool_is_pool_of_collected(name, mask, options, kept_or_streamed):
    encoder, inputs, selector = make_encoder(name), make_inputs(mask), make_selector(**options)
    capture = BlockCapture(encoder)
    for pooling in POOLINGS:
        with torch.no_grad():
            pooled = capture.pool(selector, pooling=pooling, **inputs)
            wanted = selector.pool(expected(encoder, inputs), inputs.get("attention_mask"), pooling=pooling)
        torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=1e-6)


def test_mask_given_as_none():
    encoder, inputs, selector = make_encoder(), make_inputs("none"), make_selector()
    capture = BlockCapture(encoder)
    with torch.no_grad():
        assert torch.equal(
            capture.pool(selector, attention_mask=None, **inputs), capture.pool(selector, **make_inputs("none"))
        )
        assert torch.equal(capture.fuse(selector, attention_mask=None, **inputs), capture.fuse(selector, **inputs))


def test_pool_of_some_blocks(kept_or_streamed):
    encoder, inputs, selector = make_encoder(), make_inputs("left"), make_selector(2)
    with torch.no_grad():
        pooled = BlockCapture(encoder, [-1, 1]).pool(selector, **inputs)
        wanted = selector.pool(expected(encoder, inputs, (1, 3)), inputs["attention_mask"])
    torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not backends()["triton"].usable, reason=backends()["triton"].reason)
@pytest.mark.parametrize("mask", ["none", "right"])
def test_streamed_pool_has_the_same_bits_with_triton(mask, streamed):
    device = "cpu" if triton_interprets() else "cuda"
    encoder, selector = make_encoder().to(device), make_selector(backend="triton").to(device)
    inputs = {key: value.to(device) for key, value in make_inputs(mask).items()}
    capture = BlockCapture(encoder)
    with torch.no_grad():
        wanted = selector.pool(capture.collect(**inputs), inputs.get("attention_mask"))
        assert torch.equal(capture.pool(selector, **inputs), wanted)


def test_fuse_is_the_selector_on_collected():
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector()
    with torch.no_grad():
        fused = BlockCapture(encoder).fuse(selector, **inputs)
        assert torch.equal(fused, selector(expected(encoder, inputs), inputs["attention_mask"]))
    assert (fused[inputs["attention_mask"] == 0] == 0).all()


def test_batch_norm_in_training_counts_like_pool(kept_or_streamed):
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector().train()
    other = copy.deepcopy(selector)
    with torch.no_grad():
        pooled = BlockCapture(encoder).pool(selector, **inputs)
        wanted = other.pool(expected(encoder, inputs), inputs["attention_mask"])
    torch.testing.assert_close(pooled, wanted, rtol=1e-4, atol=1e-5)
    for (key, ours), theirs in zip(selector.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=key)


def test_inference_mode_and_bfloat16():
    encoder, inputs, selector = make_encoder().bfloat16(), make_inputs(), make_selector()
    with torch.inference_mode():
        pooled = BlockCapture(encoder).pool(selector, **inputs)
        wanted = selector.pool(expected(encoder, inputs), inputs["attention_mask"])
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, wanted, rtol=2**-7, atol=1e-3)


# ---------------------------------------------------------------- memory


def living_outputs(encoder, run):
    """For each block that starts, which earlier blocks' outputs are still alive."""
    outputs, alive, handles = {}, [], []

    def started(module, args):
        alive.append([block for block, output in outputs.items() if output() is not None])

    def ended(block, module, args, output):
        outputs[block] = weakref.ref(output[0] if isinstance(output, tuple) else output)

    for block, module in enumerate(BlockCapture(encoder)._modules):
        handles.append(module.register_forward_pre_hook(started))
        handles.append(module.register_forward_hook(lambda *args, block=block: ended(block, *args)))
    run()
    for handle in handles:
        handle.remove()
    return alive, [block for block, output in outputs.items() if output() is not None]


@family
def test_streaming_lets_hidden_states_go(name, streamed):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    capture = BlockCapture(encoder)
    with torch.no_grad():
        alive, after = living_outputs(encoder, lambda: capture.pool(selector, **inputs))
        assert alive == [[], [0], [1], [2]]  # each block's input alone, as in the encoder without hooks
        assert after == []
        assert living_outputs(encoder, lambda: encoder(**inputs)) == (alive, after)
        alive, after = living_outputs(encoder, lambda: capture.collect(**inputs))
        assert alive == [[], [0], [0, 1], [0, 1, 2]]  # the probe sees what is kept
        assert after == []


@family
def test_small_hidden_states_are_kept_until_they_are_pooled(name):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    capture = BlockCapture(encoder)
    with torch.no_grad():
        alive, after = living_outputs(encoder, lambda: capture.pool(selector, **inputs))
    assert alive == [[], [0], [0, 1], [0, 1, 2]]
    assert after == []


def test_the_share_of_memory_decides_what_is_kept(monkeypatch):
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector()
    with torch.no_grad(), BlockCapture(encoder) as capture:
        size = sum(state.nbytes for state in capture.collect(**inputs))
        for memory, kept in ((256 * size, True), (256 * size - 1, False)):
            monkeypatch.setattr(consumers, "_memory_of", lambda device, memory=memory: memory)
            alive, _ = living_outputs(encoder, lambda: capture.pool(selector, **inputs))
            assert (alive[-1] == [0, 1, 2]) is kept


def test_streams_in_grad_mode_where_nothing_requires_a_gradient(streamed):
    encoder, inputs = make_encoder().requires_grad_(False), make_inputs()
    frozen, trained = make_selector().requires_grad_(False), make_selector()
    capture = BlockCapture(encoder)
    assert living_outputs(encoder, lambda: capture.pool(frozen, **inputs))[0] == [[], [0], [1], [2]]
    assert living_outputs(encoder, lambda: capture.pool(trained, **inputs))[0] == [[], [0], [0, 1], [0, 1, 2]]
    capture.pool(trained, **inputs).sum().backward()
    assert trained.down.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- gradients


def gradients(encoder, output):
    encoder.zero_grad()
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    return {key: value.grad.clone() for key, value in encoder.named_parameters() if value.grad is not None}


def assert_same_gradients(actual, wanted):
    assert actual.keys() == wanted.keys() and len(actual) > 4 * N
    for key, value in wanted.items():
        assert torch.equal(actual[key], value), key


@family
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_encoder(name, training):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector().train(training)
    capture, mask = BlockCapture(encoder), inputs["attention_mask"]
    hidden_states = encoder(**inputs, output_hidden_states=True).hidden_states[1:]
    wanted = gradients(encoder, selector.pool(hidden_states, mask))
    assert_same_gradients(gradients(encoder, capture.pool(selector, **inputs)), wanted)


def test_gradients_through_given_embeddings():
    encoder, inputs = make_encoder().requires_grad_(False), make_inputs()
    embeddings = torch.randn(3, 7, D, requires_grad=True)
    selector = make_selector().requires_grad_(False)
    BlockCapture(encoder).pool(
        selector, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]
    ).sum().backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_gradient_checkpointing(name):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder.train()
    capture = BlockCapture(encoder)
    wanted = gradients(encoder, capture.pool(selector, **inputs))
    newer = getattr(encoder, "activation_checkpointing_enable", None)  # where this name exists, the older one warns
    (newer or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    assert_same_gradients(gradients(encoder, capture.pool(selector, **inputs)), wanted)


@pytest.mark.parametrize("block_norm", [None, "final", "layernorm"])
def test_checkpoints_around_hooks_and_norms(block_norm):
    """Other code checkpoints the call of a block with its hooks, as transformers' layers do up to 5.17."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(num_hidden_layers=N, hidden_size=D)
            linear = (nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D), nn.LayerNorm(D)) for _ in range(N))
            self.layers, self.norm = nn.ModuleList(linear), nn.LayerNorm(D)
            self.checkpointed = False

        def forward(self, hidden_state, attention_mask):
            for layer in self.layers:
                if self.checkpointed:
                    hidden_state = torch.utils.checkpoint.checkpoint(layer, hidden_state, use_reentrant=False)
                else:
                    hidden_state = layer(hidden_state)
            return self.norm(hidden_state)

    encoder, selector = Encoder(), make_selector()
    inputs = {"hidden_state": torch.randn(3, 7, D), "attention_mask": make_inputs()["attention_mask"]}
    capture = BlockCapture(encoder, block_norm=block_norm)
    assert (capture._norm is encoder.norm) == (block_norm == "final")
    wanted = gradients(encoder, capture.pool(selector, **inputs))
    encoder.checkpointed = True
    assert_same_gradients(gradients(encoder, capture.pool(selector, **inputs)), wanted)


def test_a_block_that_runs_again_does_not_deliver_again():
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector()
    capture = BlockCapture(encoder)
    block = capture._modules[1]
    wanted = expected(encoder, inputs)

    def run_again(module, args, output):
        if not entered:  # once, with other inputs
            entered.append(True)
            module(torch.zeros_like(output))

    entered = []
    block.register_forward_hook(run_again)
    with torch.no_grad():
        assert_same(capture.collect(**inputs), wanted)
        entered.clear()
        pooled = capture.pool(selector, **inputs)
    torch.testing.assert_close(pooled, selector.pool(wanted, inputs["attention_mask"]).detach(), rtol=1e-5, atol=1e-6)
    assert entered


def test_a_reentrant_checkpoint_around_the_hook_is_refused():
    class Checkpointed(nn.Module):
        """As transformers' layers up to 5.17, which checkpoint the call with its hooks."""

        def __init__(self, block):
            super().__init__()
            self.block, self.gradient_checkpointing = block, True

        def __call__(self, hidden_state):
            return torch.utils.checkpoint.checkpoint(super().__call__, hidden_state, use_reentrant=True)

        def forward(self, hidden_state):
            return self.block(hidden_state)

    encoder = Toy()
    encoder.layers = nn.ModuleList(Checkpointed(block) for block in encoder.layers)
    capture = BlockCapture(encoder)
    with pytest.raises(RuntimeError, match="block 0 runs under a reentrant checkpoint"):
        capture.collect(values=torch.randn(2, 3, D, requires_grad=True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there will be no gradient
        assert len(capture.collect(values=torch.randn(2, 3, D))) == 3


# ---------------------------------------------------------------- calls, nested, failed, in threads


def test_hooks_do_nothing_outside_of_a_call():
    encoder, inputs = make_encoder(), make_inputs()
    with torch.no_grad():
        before = encoder(**inputs).last_hidden_state
        BlockCapture(encoder)
        assert torch.equal(encoder(**inputs).last_hidden_state, before)


@pytest.mark.parametrize("method", ["collect", "pool", "fuse"])
def test_a_failed_forward_leaves_nothing(method):
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector()
    capture = BlockCapture(encoder)
    arguments = () if method == "collect" else (selector,)
    with torch.no_grad():
        wanted = getattr(capture, method)(*arguments, **inputs)

        def fail(module, args):
            raise FloatingPointError("in block 2")

        handle = capture._modules[2].register_forward_pre_hook(fail)
        with pytest.raises(FloatingPointError, match="in block 2"):
            getattr(capture, method)(*arguments, **inputs)
        assert _thread.calls == []
        handle.remove()
        again = getattr(capture, method)(*arguments, **inputs)
    assert_same(again, wanted)


def test_nested_calls_do_not_mix():
    encoder, selector = make_encoder(), make_selector()
    outer, other = BlockCapture(encoder), BlockCapture(encoder, [0, 2])
    inputs, inner_inputs = make_inputs(), make_inputs("left", seed=7)
    wanted, inner_wanted = expected(encoder, inputs), expected(encoder, inner_inputs)
    inner = {}

    def nest(module, args):
        if not inner:
            inner["same"] = None  # before the calls, which pass through here again
            inner["same"] = outer.collect(**inner_inputs)
            inner["other"] = other.collect(**inner_inputs)
            inner["pooled"] = outer.pool(selector, **inner_inputs)

    outer._modules[1].register_forward_pre_hook(nest)
    with torch.no_grad():
        got = outer.collect(**inputs)
    assert_same(inner["same"], inner_wanted)
    assert_same(inner["other"], inner_wanted[::2])
    assert inner["pooled"].shape == (3, D)
    assert_same(got, wanted)


def test_one_block_listed_several_times():
    encoder, values = Toy(shared=True), torch.randn(2, 5, D)
    with torch.no_grad():
        first = encoder.layers[0](values)
        third = encoder(values)
        assert_same(BlockCapture(encoder, [0, 2]).collect(values=values), [first, third])


def test_two_captures_on_one_encoder():
    encoder, inputs = make_encoder(), make_inputs()
    first, second = BlockCapture(encoder, [0, 1]), BlockCapture(encoder, [1, 3])
    with torch.no_grad():
        assert_same(first.collect(**inputs), expected(encoder, inputs, [0, 1]))
        assert_same(second.collect(**inputs), expected(encoder, inputs, [1, 3]))
        first.remove()
        assert_same(second.collect(**inputs), expected(encoder, inputs, [1, 3]))


def test_threads_on_one_model():
    encoder, selector, repeats = make_encoder(), make_selector(), 15
    capture, barrier, wrong = BlockCapture(encoder), threading.Barrier(2, timeout=120), []
    batches = [make_inputs("right", 1), make_inputs("left", 2)]
    wanted = [expected(encoder, inputs) for inputs in batches]
    with torch.no_grad():
        pooled = [capture.pool(selector, **inputs) for inputs in batches]
    # both threads are inside the forward at once
    capture._modules[0].register_forward_pre_hook(lambda *args: no_result(barrier.wait()))

    def work(number):
        try:
            with torch.no_grad():
                for _ in range(repeats):
                    assert_same(capture.collect(**batches[number]), wanted[number])
                    assert torch.equal(capture.pool(selector, **batches[number]), pooled[number])
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- copies, pickles, removal


def test_deepcopy():
    encoder, inputs = make_encoder(), make_inputs()
    capture = BlockCapture(encoder, [1, 2])
    wanted = expected(encoder, inputs, [1, 2])
    copied = copy.deepcopy(capture)
    assert copied.encoder is not encoder
    with torch.no_grad():
        copied.encoder.get_input_embeddings().weight.mul_(2)
        assert_same(copied.collect(**inputs), expected(copied.encoder, inputs, [1, 2]))
        assert_same(capture.collect(**inputs), wanted)

        # A copy that runs within the original's call has hooks with the same key; it is not the encoder that was captured.
        handle = capture._modules[0].register_forward_hook(lambda *args: no_result(copied.encoder(**inputs)))
        assert_same(capture.collect(**inputs), wanted)
        handle.remove()
        copied.remove()
        assert_same(capture.collect(**inputs), wanted)

        alone = copy.deepcopy(encoder)  # with hooks, without a capture
        assert torch.equal(alone(**inputs).last_hidden_state, encoder(**inputs).last_hidden_state)
        assert_same(BlockCapture(alone, [1, 2]).collect(**inputs), wanted)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_capture(how):
    encoder, inputs = make_encoder("distilbert"), make_inputs()
    capture = BlockCapture(encoder, [0, -1])
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(capture))
    else:
        file = io.BytesIO()
        torch.save(capture, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert_same(loaded.collect(**inputs), capture.collect(**inputs))
    loaded.remove()
    assert all(len(module._forward_hooks) == 0 for module in loaded._modules)


def test_pickled_encoder_in_another_process(tmp_path):
    encoder, inputs = make_encoder(), make_inputs()
    capture = BlockCapture(encoder, [0, -1])
    with torch.no_grad():
        wanted = capture.collect(**inputs)
    torch.save({"encoder": encoder, "inputs": inputs, "wanted": wanted}, tmp_path / "encoder.pt")
    script = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
encoder, inputs, wanted = saved["encoder"], saved["inputs"], saved["wanted"]
with torch.no_grad():
    assert torch.equal(encoder(**inputs).last_hidden_state, wanted[-1])
    from s2sent_kernels.capture import BlockCapture, _thread
    assert _thread.calls == []
    got = BlockCapture(encoder, [0, -1]).collect(**inputs)
assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted))
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "encoder.pt")], check=True, timeout=120)


def test_remove():
    encoder, inputs = make_encoder(), make_inputs()
    with BlockCapture(encoder) as capture:
        assert all(len(module._forward_hooks) == 1 for module in capture._modules)
    assert all(len(module._forward_hooks) == 0 for module in capture._modules)
    capture.remove()
    with pytest.raises(RuntimeError, match="hooks were removed"):
        capture.collect(**inputs)


# ---------------------------------------------------------------- torch.compile


@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
@pytest.mark.parametrize("how", ["given compiled", "compiled in place", "block by block"])
def test_compiled_encoder(how):
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector()
    uncompiled = BlockCapture(copy.deepcopy(encoder))
    options = {"backend": "eager", "fullgraph": True}
    torch._dynamo.reset()
    if how == "given compiled":
        capture = BlockCapture(torch.compile(encoder, **options))
    else:
        capture = BlockCapture(encoder)
        for module in [encoder] if how == "compiled in place" else capture._modules:
            module.compile(**{**options, "fullgraph": how == "compiled in place"})
    with torch.no_grad():
        plain = uncompiled.encoder(**inputs).last_hidden_state
        wanted, pooled = uncompiled.collect(**inputs), uncompiled.pool(selector, **inputs)
        for _ in range(2):
            torch.testing.assert_close(capture.encoder(**inputs).last_hidden_state, plain)
            torch.testing.assert_close(capture.collect(**inputs), wanted)
            torch.testing.assert_close(capture.pool(selector, **inputs), pooled)
    torch._dynamo.reset()


@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
def test_compiled_for_every_batch_and_length():
    encoder, inputs, selector = make_encoder(), make_inputs(), make_selector()
    torch._dynamo.reset()
    with BlockCapture(encoder) as capture, torch.no_grad():
        compiled = torch.compile(capture.pool, backend="eager", fullgraph=True, dynamic=True)
        for rows, length in ((slice(None), None), (slice(2), 3)):
            some = {name: tensor[rows, :length] for name, tensor in inputs.items()}
            torch.testing.assert_close(compiled(selector, **some), capture.pool(selector, **some))
    torch._dynamo.reset()


# ---------------------------------------------------------------- errors


class Toy(nn.Module):
    """An encoder of linear blocks, for behaviour that real encoders rarely show."""

    def __init__(self, depth=3, listed=None, shared=False, skip=None, output=lambda value: value):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=depth, hidden_size=D)
        blocks = [nn.Linear(D, D) for _ in range(depth if listed is None else listed)]
        self.layers = nn.ModuleList(blocks[:1] * depth if shared else blocks)
        self.skip, self.output = skip, output
        for block in self.layers:
            block.register_forward_hook(lambda module, args, value: self.output(value))

    def forward(self, values, attention_mask=None):
        for index, block in enumerate(self.layers):
            if index != self.skip:
                values = block(values)
                values = values[0] if isinstance(values, tuple) else values
        return values


@pytest.mark.parametrize(
    "blocks, error, message",
    [
        ([], ValueError, "blocks: expected at least one index, got none"),
        ([0, 4], ValueError, "blocks: expected indices from -4 to 3 of 4 blocks, got 4"),
        ([-5], ValueError, "blocks: expected indices from -4 to 3 of 4 blocks, got -5"),
        ([3, -1], ValueError, r"blocks: expected each block once, got \[3, -1\]"),
        (2, TypeError, "blocks: expected a sequence of integers, 'last:N' or None, got int"),
        ("first:3", ValueError, "blocks: expected indices or 'last:N' with N from 1 to 4, got 'first:3'"),
        ("last:5", ValueError, "blocks: expected indices or 'last:N' with N from 1 to 4, got 'last:5'"),
        ("last:0", ValueError, "got 'last:0'"),
        ("last:", ValueError, "got 'last:'"),
        ([0.5], TypeError, "blocks: expected integers, got float"),
        ([True], TypeError, "blocks: expected integers, got bool"),
    ],
)
def test_wrong_blocks(blocks, error, message):
    with pytest.raises(error, match=message):
        BlockCapture(make_encoder(), blocks)


def test_encoders_without_blocks():
    with pytest.raises(TypeError, match=r"encoder: expected a torch\.nn\.Module, got str"):
        BlockCapture("bert")
    with pytest.raises(ValueError, match=r"encoder: expected a config with one of num_hidden_layers, .* got Linear"):
        BlockCapture(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"encoder: expected an nn.ModuleList of 3 blocks, .* got Toy"):
        BlockCapture(Toy(listed=2))
    with pytest.raises(ValueError, match=r"block_norm: expected one of .* got 'rms'"):
        BlockCapture(make_encoder(), block_norm="rms")


def test_selector_and_encoder_that_do_not_fit():
    encoder, inputs = make_encoder(), make_inputs()
    capture = BlockCapture(encoder, [0, 1])
    encoder.register_forward_pre_hook(lambda *args: pytest.fail("the encoder ran"))
    narrow = S2SentSelector(16, 2, 8, 4)
    for method in (capture.pool, capture.fuse):
        with pytest.raises(ValueError, match="selector: expected num_blocks = 2, as many as captured, got 4"):
            method(make_selector(), **inputs)
        with pytest.raises(ValueError, match="selector: expected hidden_size = 32 as the encoder's, got 16"):
            method(narrow, **inputs)
    for grad_mode in (torch.no_grad, torch.enable_grad):
        with grad_mode(), pytest.raises(ValueError, match="pooling: expected one of"):
            capture.pool(make_selector(2), pooling="max", **inputs)
    with pytest.raises(ValueError, match="selector: expected hidden_size = 32"):
        BlockCapture(make_encoder("distilbert"), [0, 1]).pool(narrow, **inputs)


def test_mask_of_another_shape():
    encoder, selector = Toy(), make_selector(3)
    capture, values = BlockCapture(encoder), torch.randn(2, 5, D)
    for grad_mode in (torch.no_grad, torch.enable_grad):
        with grad_mode(), pytest.raises(ValueError, match=r"attention_mask: expected shape .* got \[2, 4\]"):
            capture.pool(selector, values=values, attention_mask=torch.ones(2, 4))


@torch.no_grad()
def test_blocks_that_never_ran_or_gave_no_tensor():
    values, selector = torch.randn(2, 5, D), make_selector(3)
    capture = BlockCapture(Toy(skip=1))
    with pytest.raises(RuntimeError, match="block 1 never ran in this forward"):
        capture.collect(values=values)
    with pytest.raises(RuntimeError, match="block 1 never ran in this forward"):
        capture.pool(selector, values=values)
    assert len(BlockCapture(Toy(skip=1), [0, 2]).collect(values=values)) == 2
    assert len(BlockCapture(Toy(output=lambda value: (value, None))).collect(values=values)) == 3
    with pytest.raises(TypeError, match="block 0: expected a tensor or a tuple led by one, got dict"):
        BlockCapture(Toy(output=lambda value: {"value": value})).collect(values=values)
