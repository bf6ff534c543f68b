"""Pooling counts the input's tokens: not those that an encoder adds, and none by a mask that does not say which they are."""

import architectures
import pytest
import torch
import transformers as tf
from torch import nn

from s2sent_kernels import S2SentSelector, families
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.formula.call import POOLINGS
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

N, D, ADDED = architectures.N, architectures.D, 6
SIDES = {"right": [[1] * 7, [1, 1, 1, 1, 0, 0, 0]], "left": [[1] * 7, [0, 0, 0, 1, 1, 1, 1]]}


def make(name):
    return architectures.make(getattr(tf, name))


def make_inputs(side="right"):
    mask = torch.tensor(SIDES[side])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])
    return {"input_ids": ids * mask, "attention_mask": mask}


def make_selector(num_blocks=N, **options):
    torch.manual_seed(0)
    selector = S2SentSelector(D, num_blocks, 8, 4, **options).eval()
    with torch.no_grad():
        selector.up.weight.mul_(8)
    return selector


def make_big_bird():
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    attention = {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"}
    config = tf.BigBirdConfig(vocab_size=64, max_position_embeddings=128, **sizes, **attention)
    return tf.BigBirdModel(config).eval()


def long_inputs():
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, 40:] = 0
    return {
        "input_ids": torch.randint(4, 64, (2, 50), generator=torch.Generator().manual_seed(0)),
        "attention_mask": mask,
    }


class PromptTuned(nn.Module):
    """An encoder behind learned tokens of its own, as prompt tuning puts them in front of every text. Takes and returns what such
    wrappers do: the mask of the text alone, and hidden states of all tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.prompt = nn.Parameter(torch.randn(ADDED, D, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **options):
        texts = self.inner.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        rows = len(texts)
        embedded = torch.cat([self.prompt.expand(rows, -1, -1), texts], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(rows, ADDED), attention_mask], dim=1)
        return self.inner(inputs_embeds=embedded, attention_mask=attention_mask, **options)


# ---------------------------------------------------------------- tokens that encoders add


@torch.no_grad()
@pytest.mark.parametrize("name", ["LongformerModel", "LEDModel", "PegasusXModel", "CpmAntModel"])
def test_tokens_that_an_encoder_adds_and_removes_again(name, kept_or_streamed):
    encoder, selector, inputs = make(name), make_selector(), make_inputs()
    mask = inputs["attention_mask"]
    if name == "CpmAntModel":  # takes no mask
        del inputs["attention_mask"]
    if name in ("LEDModel", "PegasusXModel"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    capture = BlockCapture(encoder)
    states = capture.collect(**inputs)
    assert [state.shape for state in states] == [(2, 7, D)] * N
    assert torch.equal(states[-1][mask.bool()], architectures.returned(encoder, inputs)[mask.bool()])
    for pooling in POOLINGS:
        found = capture.pool(selector, pooling=pooling, pooling_mask=mask, **inputs)
        torch.testing.assert_close(found, selector.pool(states, mask, pooling=pooling))
    if name != "CpmAntModel":
        assert torch.equal(capture.pool(selector, **inputs), capture.pool(selector, pooling_mask=mask, **inputs))


@torch.no_grad()
@pytest.mark.parametrize("block_norm", ["final", "layernorm", None])
def test_an_encoder_that_pads_long_inputs_alone(block_norm, kept_or_streamed):
    encoder, selector, inputs = make_big_bird(), make_selector(2), long_inputs()
    seen = []
    encoder.encoder.layer[0].register_forward_hook(
        lambda module, args, output: seen.append(families.hidden_state(output).shape[1])
    )
    capture = BlockCapture(encoder, block_norm=block_norm)
    states = capture.collect(**inputs)
    assert seen == [52] and [state.shape for state in states] == [(2, 50, D)] * 2
    if block_norm != "layernorm":
        assert torch.equal(states[-1], encoder(**inputs).last_hidden_state)
    wanted = selector.pool(states, inputs["attention_mask"])
    torch.testing.assert_close(capture.pool(selector, **inputs), wanted)
    again = BlockCapture(encoder, block_norm=block_norm)  # asked in the midst of a call that keeps nothing
    torch.testing.assert_close(again.pool(selector, **inputs), wanted)


@torch.no_grad()
@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
def test_such_an_encoder_is_asked_before_it_is_compiled():
    encoder, selector, inputs = make_big_bird(), make_selector(2), long_inputs()
    capture = BlockCapture(encoder)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"states of 52 tokens of an input of 50: expected one run .* before"):
        torch.compile(capture.pool, backend="eager")(selector, **inputs)
    wanted = capture.pool(selector, **inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(capture.pool, backend="eager")(selector, **inputs), wanted)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_virtual_tokens_do_not_count(name, side, kept_or_streamed):
    """The states are the wrapped encoder's own at the text's tokens, which the virtual ones have changed."""
    encoder, selector, inputs = PromptTuned(make(name)), make_selector(), make_inputs(side)
    mask = inputs["attention_mask"]
    returned = encoder(**inputs).last_hidden_state
    assert returned.shape[1] == ADDED + 7
    capture = BlockCapture(encoder)
    states = capture.collect(**inputs)
    assert torch.equal(states[-1], returned[:, ADDED:])
    for pooling in POOLINGS:
        wanted = selector.pool([state.clone() for state in states], mask, pooling=pooling)
        torch.testing.assert_close(capture.pool(selector, pooling=pooling, **inputs), wanted)
    embedded = encoder.inner.get_input_embeddings()(inputs["input_ids"])
    found = capture.pool(selector, inputs_embeds=embedded, attention_mask=mask)
    torch.testing.assert_close(found, capture.pool(selector, **inputs))
    assert capture.fuse(selector, **inputs).shape == (2, 7, D)


def test_gradients_reach_the_virtual_tokens():
    encoder, selector, inputs = PromptTuned(make("LlamaModel")), make_selector(), make_inputs()
    BlockCapture(encoder).pool(selector, **inputs).sum().backward()
    assert encoder.prompt.grad.abs().sum() > 0


class _WithPicture(nn.Module):
    """Appends the tokens of another input, if there is one."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, attention_mask=None, picture=None):
        texts = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=texts if picture is None else torch.cat([texts, picture], dim=1))


@torch.no_grad()
def test_tokens_of_another_input_are_no_padding():
    """They count where there is no mask, and need a place in one."""
    encoder, selector, inputs = _WithPicture(make("BertModel")), make_selector(), make_inputs()
    capture, picture = BlockCapture(encoder), torch.randn(2, 3, D)
    states = capture.collect(input_ids=inputs["input_ids"], picture=picture)
    assert states[-1].shape == (2, 10, D)
    found = capture.pool(selector, input_ids=inputs["input_ids"], picture=picture)
    assert torch.equal(found, selector.pool(states))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[B, L\] = \[2, 10\], got \[2, 7\]"):
        capture.pool(selector, picture=picture, **inputs)


# ---------------------------------------------------------------- masks of other forms


def of_pairs(mask):
    """[B, 1, L, L]: every token sees the real ones."""
    return mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1).bool()


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_a_mask_of_pairs_and_a_mask_to_pool_by(side):
    inputs = make_inputs(side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model = S2SentModel.from_encoder(make("BertModel"), bottleneck=8)
    wanted = model(**inputs, output_tokens=True)
    found = model(ids, of_pairs(mask), pooling_mask=mask)
    torch.testing.assert_close(found.embedding, wanted.embedding)
    tokens = model(ids, of_pairs(mask), pooling_mask=mask, output_tokens=True)
    torch.testing.assert_close(tokens.tokens, wanted.tokens)
    torch.testing.assert_close(model.capture.fuse(model.selector, pooling_mask=mask, **inputs), wanted.tokens)
    classifier = S2SentForSequenceClassification.from_model(model)
    logits = classifier(ids, of_pairs(mask), pooling_mask=mask).logits
    torch.testing.assert_close(logits, classifier(**inputs).logits)
    fewer = mask * (mask.cumsum(1) > 1)  # tokens that are seen, and not counted
    states = model.capture.collect(**inputs)
    torch.testing.assert_close(model(**inputs, pooling_mask=fewer).embedding, model.selector.pool(states, fewer))


def test_a_mask_that_does_not_say_which_tokens_count():
    """Nothing runs, and the error names what to pass."""
    inputs, runs = make_inputs(), []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model = S2SentModel.from_encoder(make("BertModel"), bottleneck=8)
    model.encoder.register_forward_pre_hook(lambda module, args: runs.append(args))
    classifier = S2SentForSequenceClassification.from_model(model)
    longer = torch.cat([mask.new_ones(2, 4), mask], dim=1)  # as beside a cache of four tokens
    for other, got in (
        (of_pairs(mask), r"shape \[2, 1, 7, 7\]"),
        (longer, r"shape \[2, 11\]"),
        ({"full_attention": of_pairs(mask)}, "dict"),
    ):
        message = rf"attention_mask: expected shape \[B, L\] = \[2, 7\] to pool by, got {got}: pass pooling_mask"
        for call in (
            lambda other=other: model(ids, other),
            lambda other=other: model(ids, other, output_gates=True),
            lambda other=other: classifier(ids, other),
            lambda other=other: model.capture.fuse(model.selector, input_ids=ids, attention_mask=other),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match=r"pooling_mask: expected shape \[B, L\] = \[2, 7\], got \[2, 1, 7, 7\]"):
        model(ids, mask, pooling_mask=of_pairs(mask))
    with pytest.raises(TypeError, match="pooling_mask: expected a tensor or None, got list"):
        model(ids, mask, pooling_mask=[1, 1])
    assert runs == []


# ---------------------------------------------------------------- behind sentence-transformers


class _Transformer(nn.Module):
    """Called with features, as sentence-transformers calls its own."""

    def __init__(self, encoder):
        super().__init__()
        self.auto_model = encoder

    def forward(self, features):
        return {**features, "token_embeddings": self.auto_model(**features).last_hidden_state}


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("called", ["with features", "with keywords", "with positions"])
@pytest.mark.parametrize("encoder", ["LongformerModel", "PromptTuned"])
def test_a_pooling_of_sentence_transformers(encoder, called, grad_mode, kept_or_streamed):
    pooling_class = pytest.importorskip("s2sent_kernels.sentence_transformers").S2SentPooling
    encoder, inputs = make(encoder) if encoder != "PromptTuned" else PromptTuned(make("BertModel")), make_inputs("left")
    transformer = _Transformer(encoder) if called == "with features" else encoder
    pooling = pooling_class.behind(transformer, bottleneck=8).eval()
    call = {
        "with features": lambda: transformer(inputs),
        "with keywords": lambda: encoder(**inputs),
        "with positions": lambda: encoder(*inputs.values()),
    }[called]
    with grad_mode():
        call()
        found = pooling(dict(inputs))["sentence_embedding"]
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), BlockCapture(encoder, "last:3").pool(pooling.selector, **inputs))
    with torch.enable_grad():  # in which hidden states are kept
        call()
        wanted = {
            "with features": "features: expected the attention_mask that the transformer was called with, got another",
        }.get(called, r"features: expected an attention_mask \[B, L\] .* got shape \[2, 1, 7, 7\]")
        with pytest.raises(ValueError, match=wanted):
            pooling({"attention_mask": of_pairs(inputs["attention_mask"])})
