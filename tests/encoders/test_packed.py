"""Packed batches: which families can be run so, and that hidden states are those of padded batches. Tiny random encoders."""

import numpy as np
import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer
from test_families import ALL, COMMON, DECODER, D, N, make_encoder, make_selector, tf

from s2sent_kernels import packed
from s2sent_kernels.batches import TextTokenizer, Tokens, padded
from s2sent_kernels.batches import packed as pack
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.consumers import KeptStates, PooledStates
from s2sent_kernels.encoder_runner import EncoderRunner
from s2sent_kernels.packed import Layout, PackedEncoder, attend, refusal

CPU = torch.device("cpu")
WINDOWS = {
    "modernbert, windows": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(**COMMON, local_attention=6, global_attn_every_n_layers=2)
    ),
    "mistral, windows": lambda: tf.MistralModel(tf.MistralConfig(**DECODER, sliding_window=4)),
    "qwen3, windows": lambda: tf.Qwen3Model(
        tf.Qwen3Config(**DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    "llama, grouped heads": lambda: tf.LlamaModel(tf.LlamaConfig(**{**DECODER, "num_key_value_heads": 1})),
}
PACKED = [
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "electra",
    "modernbert",
    "llama",
    "qwen3",
    "mistral",
    *WINDOWS,
]
PADDED = ["t5", "mpnet", "deberta-v2"]


def encoder_of(name):
    if name in ALL:
        return make_encoder(name)
    torch.manual_seed(0)
    return WINDOWS[name]().eval()


def make_tokens(lengths, seed=3):
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, 60, length).astype(np.int32) for length in lengths]
    return Tokens(ids, np.arange(len(ids)), 0)


def packed_states(capture, tokens):
    rows = np.arange(len(tokens.ids))
    batch, kept = pack(tokens, rows), KeptStates()
    layout = Layout(batch, CPU)
    PackedEncoder(capture, CPU).run(batch, kept, layout)
    return kept.hidden_states, layout


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_equals_padded(name):
    encoder = encoder_of(name).double()  # in float64 only a mistake is visible
    before = encoder.config._attn_implementation
    capture = BlockCapture(encoder)
    assert refusal(capture, CPU) is None
    tokens = make_tokens([9, 9, 1, 14, 5, 5, 5])
    states, layout = packed_states(capture, tokens)
    assert layout.runs == [(0, 2, 9), (18, 1, 1), (19, 1, 14), (33, 3, 5)] and layout.calls == N
    inputs = padded(tokens, np.arange(7))
    mask = inputs["attention_mask"].bool()
    wanted = capture.collect(**inputs)
    assert len(states) == len(wanted) == N
    for found, state in zip(states, wanted, strict=True):
        assert found.shape == (48, D)
        torch.testing.assert_close(found, state[mask], rtol=1e-10, atol=1e-10)
    assert encoder.config._attn_implementation == before
    selector = make_selector().double()
    pooled = PooledStates(selector, None, layout.cu_seqlens, "mean")
    for block, state in enumerate(states):
        pooled.add(block, state)
    torch.testing.assert_close(pooled.result(), selector.pool(wanted, inputs["attention_mask"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PADDED)
def test_families_that_stay_padded_say_why(name):
    reason = refusal(BlockCapture(encoder_of(name)), CPU)
    assert reason is not None and "\n" not in reason
    expected = {"t5": "position_ids", "mpnet": "position_ids|replaced", "deberta-v2": "replaced|fails"}[name]
    assert any(word in reason for word in expected.split("|")), reason


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda layout: layout.runs.append(layout.runs.pop()), None),
        (
            lambda layout: layout.runs.__setitem__(
                slice(None), [(0, 1, sum(n * length for _, n, length in layout.runs))]
            ),
            "differ",
        ),
    ],
    ids=["whole", "sentences that see each other"],
)
def test_what_differs_is_refused(monkeypatch, break_it, reason):
    class Broken(Layout):
        def __init__(self, *args):
            super().__init__(*args)
            break_it(self)

    monkeypatch.setattr(packed, "Layout", Broken)
    found = refusal(BlockCapture(encoder_of("bert")), CPU)
    assert found is None if reason is None else reason in found


def test_states_that_are_not_finite_are_refused():
    """The noise of two padded runs is then infinite, and anything would be below it."""
    encoder = encoder_of("bert")
    with torch.no_grad():
        encoder.encoder.layer[N - 1].output.LayerNorm.weight[0] = float("inf")
    assert "differ" in refusal(BlockCapture(encoder), CPU)


def test_attention_in_chunks_is_refused():
    """A chunk may be longer than any sentence that is tried."""
    config = tf.Llama4TextConfig(**DECODER, attention_chunk_size=1000, intermediate_size_mlp=48, num_local_experts=1)
    assert "in chunks" in refusal(BlockCapture(tf.Llama4TextModel(config).eval()), CPU)


def encoder_that_fails_packed(error):
    """As one of remote code does that looks its attention up in a table of its own."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder_of("bert")
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            if self.config._attn_implementation == packed.NAME:
                raise error
            return self.inner(input_ids, attention_mask)

    return Own().eval()


@pytest.mark.parametrize("error", [KeyError("s2sent_packed"), AttributeError("no shape"), AssertionError()])
def test_an_encoder_that_fails_packed_is_refused(error):
    reason = refusal(BlockCapture(encoder_that_fails_packed(error)), CPU)
    assert reason.startswith(f"a packed batch fails: {type(error).__name__}: ")


def test_a_full_gpu_says_nothing_of_the_encoder():
    """An Embedder would keep the refusal for good."""
    with pytest.raises(torch.OutOfMemoryError):
        refusal(BlockCapture(encoder_that_fails_packed(torch.OutOfMemoryError("full"))), CPU)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_refused(kind):
    for name in ("bert", "modernbert", "qwen3"):
        assert refusal(BlockCapture(encoder_of(name).to(kind)), CPU) is None, name


def test_a_wrong_window_is_refused(monkeypatch):
    """A window one token too wide: the sample has a sentence that is longer than the encoder's window."""
    window = packed._window
    monkeypatch.setattr(packed, "_window", lambda causal, size: window(causal, None if size is None else size + 1))
    for name in WINDOWS:
        found = refusal(BlockCapture(encoder_of(name)), CPU)
        assert (found is None) == ("windows" not in name), name


def test_a_failing_call_leaves_the_encoders_attention_as_it_was():
    encoder = encoder_of("bert")
    before = encoder.config._attn_implementation
    capture = BlockCapture(encoder)

    class Failing:
        def add(self, block, hidden_state):
            raise KeyError("here")

    batch = pack(make_tokens([3]), np.arange(1))
    with pytest.raises(KeyError), torch.no_grad():
        PackedEncoder(capture, CPU).run(batch, Failing(), Layout(batch, CPU))
    assert encoder.config._attn_implementation == before
    with torch.no_grad():
        capture.collect(input_ids=torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="each thread an encoder of its own"):
        attend(encoder, *[torch.zeros(1, 1, 1, 1)] * 3, None)


def test_grouped_heads_and_windows_of_the_varlen_attention(monkeypatch):
    """What torch's varlen attention is called with, which runs on a GPU alone."""
    seen = {}

    def varlen_attn(query, key, value, *bounds, **options):
        seen.update(options, shapes=[list(x.shape) for x in (query, key, value)], bounds=bounds)
        return query

    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    layout = Layout(pack(make_tokens([4, 2]), np.arange(2)), CPU)
    query, key = torch.randn(4, 6, 8), torch.randn(2, 6, 8)
    out = packed._varlen(layout, query, key, key, packed._window(True, 3), 0.5)
    assert out.shape == (6, 4, 8)
    assert seen["shapes"] == [[6, 4, 8]] * 3 and seen["window_size"] == (2, 0) and seen["scale"] == 0.5
    assert seen["bounds"][0].tolist() == [0, 4, 6] and seen["bounds"][2:] == (4, 4)
    assert packed._window(False, None) == (-1, -1) and packed._window(True, None) == (-1, 0)
    assert packed._window(False, 3) == (2, 2)


def test_states_of_a_batch_come_in_its_order():
    encoder, tokenizer = make_encoder_and_tokenizer()
    tokenize = TextTokenizer(tokenizer, 32)
    tokens, rows = tokenize(TEXTS), [2, 0, 4, 1]
    with BlockCapture(encoder) as capture:
        found = EncoderRunner(capture, tokenize, True).states(tokens, rows)
        wanted = EncoderRunner(capture, tokenize, False).states(tokens, rows)
    assert torch.equal(found.attention_mask, wanted.attention_mask)
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        real = wanted.attention_mask.bool()
        torch.testing.assert_close(one[real], other[real])
        assert not one[~real].any()
