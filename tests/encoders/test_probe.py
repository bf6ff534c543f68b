"""Blocks and final norms as an encoder itself shows them; what it shows without a trace; and what cannot be shown."""

import copy
import pickle
import random

import accelerate
import architectures
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from s2sent_kernels import families, probe
from s2sent_kernels.capture import BlockCapture, BlockListener
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

N, D = architectures.N, architectures.D
# Whose norm has a name of its own, or stands elsewhere than beside the blocks.
RENAMED = {
    "EsmModel": "encoder.emb_layer_norm_after",
    "RobertaPreLayerNormModel": "LayerNorm",
    "MegatronBertModel": "encoder.ln",
    "MBartModel": "encoder.layer_norm",
    "CLIPTextModel": "final_layer_norm",
    "MptModel": "norm_f",
    "XGLMModel": "layer_norm",
    "XLMRobertaXLModel": "encoder.LayerNorm",
}
AMONG_LISTS = ("XLMModel", "FlaubertModel")  # whose attentions and norms are lists as long as the blocks
REFUSED = {
    "XLNetModel": r"hidden states are \[L, B, D\], the sequence first",
    "CanineModel": r"hidden state is \[2, 1, 32\], and what it returns \[2, 5, 32\]",
    "SqueezeBertModel": "its last block returns no tensor",
}
INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def make(name):
    return architectures.make(getattr(tf, name))


def bert(**sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": N, "num_attention_heads": 2, "intermediate_size": 48, **sizes}
    return tf.BertModel(tf.BertConfig(vocab_size=64, **sizes)).eval()


def at_real_tokens(state):
    return state[INPUTS["attention_mask"].bool()]


@torch.no_grad()
@pytest.mark.parametrize("name", [*RENAMED, *AMONG_LISTS])
def test_the_last_hidden_state_is_what_the_encoder_returns(name):
    encoder = make(name)
    capture = BlockCapture(encoder)
    assert capture._norm is (encoder.get_submodule(RENAMED[name]) if name in RENAMED else None)
    inputs = INPUTS | ({"decoder_input_ids": INPUTS["input_ids"]} if name == "MBartModel" else {})
    states = capture.collect(**inputs)
    assert torch.equal(at_real_tokens(states[-1]), at_real_tokens(architectures.returned(encoder, inputs)))
    if name == "MBartModel":
        return
    recorded = encoder(**inputs, output_hidden_states=True).hidden_states[1:-1]
    norm = (lambda state: state) if capture._norm is None else capture._norm
    for state, wanted in zip(states[:-1], recorded, strict=True):
        assert torch.equal(at_real_tokens(state), at_real_tokens(norm(wanted)))


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proven_is_refused_unless_no_final_norm_is_wanted(name):
    encoder = make(name)
    before = {key: dict(module._forward_hooks) for key, module in encoder.named_modules()}
    message = f"block_norm: expected None or 'layernorm' for {name}, whose final norm is unknown, got 'final': .*"
    with pytest.raises(ValueError, match=message + REFUSED[name]):
        BlockCapture(encoder)
    assert {key: dict(module._forward_hooks) for key, module in encoder.named_modules()} == before
    with pytest.raises(ValueError, match=REFUSED[name]):
        S2SentModel.from_encoder(encoder, bottleneck=4, frequencies=2)
    for block_norm in (None, "layernorm"):
        assert BlockCapture(encoder, block_norm=block_norm)._modules == families.find_blocks(encoder)


class Own(nn.Module):
    """BERT, with something behind it."""

    def __init__(self, behind):
        super().__init__()
        self.inner, self.behind = bert(), behind
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask=None):
        return (self.behind(self.inner(input_ids, attention_mask).last_hidden_state),)


class _OverTokens(nn.Module):
    def forward(self, state):
        return state - state.mean(dim=1, keepdim=True)


class _Twice(nn.Module):
    """A norm whose name tells nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, state):
        return nn.functional.rms_norm(state, (D,), self.weight) * 2


def test_a_norm_is_what_acts_on_each_token_with_one_weight_a_feature():
    encoder = Own(_Twice()).eval()
    assert BlockCapture(encoder)._norm is encoder.behind
    assert BlockCapture(Own(nn.Dropout()).eval())._norm is None
    for behind in (nn.Linear(D, D), _OverTokens(), nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))):
        with pytest.raises(ValueError, match="neither its last block's hidden state nor a norm of it"):
            BlockCapture(Own(behind).eval())


class _Wrapper(nn.Module):
    """As adapters are put around an encoder."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_an_encoder_in_a_wrapper_that_names_no_input():
    encoder = make("EsmModel")
    assert BlockCapture(_Wrapper(encoder))._norm is encoder.encoder.emb_layer_norm_after


def test_of_norms_that_compute_the_same_the_named_one():
    """Of a fresh model all norms do."""
    torch.manual_seed(0)
    encoder = tf.LlamaModel(make("LlamaModel").config).eval()
    assert BlockCapture(encoder)._norm is encoder.norm


# ---------------------------------------------------------------- without a trace


class _Counting(nn.Module):
    """Draws numbers of every kind, and writes to a buffer and to itself, in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.modes = 0, []

    def forward(self, state):
        self.calls += 1
        self.seen += 1
        torch.rand(1), random.random(), np.random.rand()
        return state


def test_nothing_of_the_encoder_is_changed():
    encoder = Own(_Counting()).train()
    encoder.inner.encoder.layer[1].eval()
    fired = []
    for module in encoder.modules():
        module.register_forward_hook(lambda module, args, output: fired.append(module))
        module.register_forward_pre_hook(lambda module, args: fired.append(module))
    other = BlockListener(encoder, [0])
    torch.manual_seed(5), random.seed(5), np.random.seed(5)

    def snapshot():
        hooks = {key: (list(m._forward_hooks), list(m._forward_pre_hooks)) for key, m in encoder.named_modules()}
        flags = {key: m.training for key, m in encoder.named_modules()}
        tensors = {key: (id(t), t._version, t.clone()) for key, t in encoder.state_dict(keep_vars=True).items()}
        return hooks, flags, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), tensors

    before = snapshot()
    probe.find(encoder)
    after = snapshot()
    assert fired == [] and encoder.behind.seen == 0 and not other.heard
    assert before[:2] == after[:2] and before[3] == after[3] and (before[4] == after[4]).all()
    assert torch.equal(before[2], after[2])
    for key, (name, version, tensor) in before[5].items():
        assert after[5][key][:2] == (name, version) and torch.equal(after[5][key][2], tensor)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_while_another_call_runs():
    """A capture that is made within a call of the same encoder does not disturb that call."""
    encoder, made = bert(), []
    outer = BlockCapture(encoder)
    with torch.no_grad():
        wanted = outer.collect(**INPUTS)
        hook = outer._modules[1].register_forward_hook(lambda *args: made.append(BlockCapture(encoder, [0])))
        got = outer.collect(**INPUTS)
        hook.remove()
    assert len(made) == 1 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# ---------------------------------------------------------------- encoders that cannot be asked


def test_an_encoder_of_other_inputs_is_trusted_by_its_names():
    """As before encoders were asked."""
    encoder = make("BrosModel")
    with pytest.raises(probe.CannotRun, match="bbox"):
        probe.find(encoder)
    assert BlockCapture(encoder)._norm is None
    llama = make("LlamaModel")
    llama.forward = lambda *args, **kwargs: None  # as libraries do that wrap a model
    with pytest.raises(probe.CannotRun, match="the forward of its LlamaModel was replaced"):
        probe.find(llama)
    assert BlockCapture(llama)._norm is llama.norm


def test_an_encoder_whose_modules_were_placed_on_devices():
    """accelerate replaces their forward by a function of the module."""
    encoder = make("EsmModel")
    accelerate.hooks.attach_align_device_hook_on_blocks(encoder, execution_device={"": "cpu"})
    accelerate.hooks.add_hook_to_module(encoder.encoder, accelerate.hooks.ModelHook())
    assert "forward" in encoder.encoder.__dict__
    assert BlockCapture(encoder)._norm is encoder.encoder.emb_layer_norm_after


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_tell_nothing(value):
    llama = make("LlamaModel")
    with torch.no_grad():
        llama.norm.weight.fill_(value)
    with pytest.raises(probe.CannotRun, match="tells nothing"):
        probe.find(llama)
    assert BlockCapture(llama)._norm is llama.norm


def test_a_full_gpu_is_not_taken_for_an_encoder_that_cannot_run():
    class Full(nn.Module):
        def forward(self, state):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        BlockCapture(Own(Full()).eval())


@torch.no_grad()
@pytest.mark.parametrize("name", ["EsmModel", "XLMModel"])
def test_an_encoder_without_weights_is_asked_at_the_first_run(name):
    encoder = make(name)
    wanted = BlockCapture(encoder).collect(**INPUTS)
    with torch.device("meta"):
        empty = type(encoder)(encoder.config).eval()
    capture = BlockCapture(empty)
    assert not capture._settled
    empty.load_state_dict(encoder.state_dict(), assign=True)
    for key, buffer in encoder.named_buffers():  # those that are not saved
        parent, _, child = key.rpartition(".")
        empty.get_submodule(parent)._buffers[child] = buffer
    for each in (copy.deepcopy(capture), pickle.loads(pickle.dumps(capture)), capture):
        assert all(torch.equal(a, b) for a, b in zip(each.collect(**INPUTS), wanted, strict=True))
        assert each._settled and sum(len(module._forward_hooks) for module in each.encoder.modules()) == N


def test_a_refusal_at_the_first_run():
    encoder = make("XLNetModel")
    with torch.device("meta"):
        empty = type(encoder)(encoder.config).eval()
    capture = BlockCapture(empty)
    empty.load_state_dict(encoder.state_dict(), assign=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="the sequence first"):
            capture.collect(**INPUTS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["EsmModel", "XLMModel"])
def test_a_model_is_asked_when_it_is_loaded(name, tmp_path):
    """Before torch.compile traces it, which cannot ask."""
    model = S2SentModel.from_encoder(make(name), bottleneck=4, frequencies=2)
    for whole in (model, S2SentForSequenceClassification.from_model(model)):
        whole.save_pretrained(tmp_path)
        loaded = type(whole).from_pretrained(tmp_path)
        capture = getattr(loaded, "model", loaded).capture
        assert capture._settled and (capture._norm is None) == (name == "XLMModel")
        assert torch.equal(loaded(**INPUTS)[0], whole(**INPUTS)[0])


@torch.no_grad()
@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
def test_a_compiled_encoder_is_asked_uncompiled():
    encoder = make("EsmModel")
    wanted = BlockCapture(encoder).collect(**INPUTS)
    torch._dynamo.reset()
    capture = BlockCapture(torch.compile(encoder, backend="eager"))
    assert capture._norm is encoder.encoder.emb_layer_norm_after
    torch.testing.assert_close(capture.collect(**INPUTS), wanted)
    encoder.compile(backend="eager")
    assert BlockCapture(encoder)._norm is encoder.encoder.emb_layer_norm_after
    torch._dynamo.reset()


# ---------------------------------------------------------------- every architecture


@pytest.mark.slow
@torch.no_grad()
def test_every_text_encoder_of_transformers():
    """A proven one's last hidden state is what it returns, on other inputs too; and the table of docs/encoders.md is that of the
    installed version."""
    found = architectures.rows()
    wrong = []
    for row in found:
        model = architectures.make(getattr(tf, row.name))
        if row.verdict == "refused":
            with pytest.raises(ValueError, match="block_norm"):
                BlockCapture(model)
        if row.verdict != "proven":
            continue
        inputs = architectures.inputs_of(model)
        state = BlockCapture(model).collect(**inputs, **families.without_cache(model))[-1]
        real = inputs["input_ids"] != 0
        if not torch.equal(state[real], architectures.returned(model, inputs)[real]):
            wrong.append(row.name)
    assert wrong == []
    assert sum(row.verdict == "proven" for row in found) > 150
    written = architectures.PAGE.read_text(encoding="utf-8").partition(architectures.MARK)[2]
    if written.startswith(f"transformers {tf.__version__}:"):
        assert written == architectures.table(found), "python tests/architectures.py writes the table again"
