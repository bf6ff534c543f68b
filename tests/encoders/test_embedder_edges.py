"""Embedder where something is unusual: token types, sides, prompts, sources that wait or fail, owners that change its parts."""

import contextlib
import copy
import pickle
import queue
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from builders import TEXTS, make_encoder_and_tokenizer, sentences
from test_embedder import LONG, close, make, make_pipeline, one_by_one

from s2sent_kernels import S2SentSelector, batches, embedder, packed
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.embedder import Embedder
from s2sent_kernels.export import Pipeline

SIZES = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PROMPT = "the moon is bright under "  # 5 tokens


def pipeline_of(encoder):
    torch.manual_seed(1)
    return Pipeline(BlockCapture(encoder.eval(), "last:3"), S2SentSelector(16, 3, 8, 4).eval()).eval()


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "s2sent-tokenizer"]


@contextlib.contextmanager
def threads_end():
    yield
    end = time.monotonic() + 5
    while reader_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not reader_threads()


# ---------------------------------------------------------------- what a batch is


def typed_tokenizer():
    _, tokenizer = make_pipeline()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_token_types_are_not_packed_away():
    tokenizer, (pipeline, _) = typed_tokenizer(), make_pipeline()
    model = Embedder(pipeline, tokenizer)
    assert not model.packed and "token types" in model.padded_because
    for text, found in zip(TEXTS, model.encode(TEXTS), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs["token_type_ids"].any()
        with torch.no_grad():
            states = pipeline.capture.collect(**inputs)
            close(found, pipeline.selector.pool(states, inputs["attention_mask"])[0].numpy())
    with pytest.raises(ValueError, match=r"^packed: BertModel cannot be run packed: its tokenizer gives token types"):
        Embedder(pipeline, tokenizer, packed=True)


def test_token_types_of_a_single_text(monkeypatch):
    """Of a tokenizer whose samples have none: that text's chunk is padded, or an error."""
    monkeypatch.setattr(batches.TextTokenizer, "__init__", _untyped(batches.TextTokenizer.__init__))
    tokenizer = typed_tokenizer()
    found = Embedder(make_pipeline()[0], tokenizer)
    assert found.packed
    close(found.encode(TEXTS), Embedder(make_pipeline()[0], tokenizer, packed=False).encode(TEXTS))
    with pytest.raises(ValueError, match=r"^packed: expected texts whose token types are all 0"):
        Embedder(make_pipeline()[0], tokenizer, packed=True).encode(TEXTS)


def _untyped(init):
    def wrapped(self, *args):
        init(self, *args)
        self.typed = False

    return wrapped


@pytest.mark.parametrize("packed", [None, False])
def test_a_tokenizer_that_pads_on_the_left(packed):
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=17, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )
    _, tokenizer = make_pipeline()
    tokenizer.padding_side = "left"
    model = Embedder(pipeline_of(tf.GPT2Model(config)), tokenizer, packed=packed)
    close(model.encode(TEXTS), np.stack([model.encode(text) for text in TEXTS]))


@pytest.mark.parametrize("pad", [0, 1])
def test_a_padding_token_inside_a_text(pad):
    torch.manual_seed(0)
    encoder = tf.XLMRobertaModel(tf.XLMRobertaConfig(**SIZES, pad_token_id=pad, max_position_embeddings=90))
    _, tokenizer = make_pipeline()
    model, wanted = (Embedder(pipeline_of(encoder), tokenizer, packed=packed) for packed in (True, False))
    word = tokenizer.convert_ids_to_tokens(pad)
    texts = [f"the {word} cat sat", word, *TEXTS, f"{word} {word} moon"]
    assert pad in model._texts(texts[:1]).ids[0]
    close(model.encode(texts), np.stack([wanted.encode(text) for text in texts]))


@pytest.mark.parametrize("packed", [True, False])
def test_a_decoder_keeps_no_keys(monkeypatch, packed):
    def update(*args, **kwargs):
        raise AssertionError("keys and values are kept for a next call")

    monkeypatch.setattr(tf.DynamicCache, "update", update)
    tokenizer = make_pipeline()[1]
    model = Embedder(pipeline_of(tf.LlamaModel(tf.LlamaConfig(**SIZES))), tokenizer, packed=packed)
    assert np.isfinite(model.encode(TEXTS)).all()


# ---------------------------------------------------------------- prompts


def test_windows_are_weighted_by_the_tokens_that_count():
    model = make(max_length=9, overflow="windows", include_prompt=False)
    tokens, skip = model._texts([PROMPT + TEXTS[0]]), 6  # [CLS] and the prompt
    assert len(tokens.ids) > 1
    each = [model._run(tokens, np.array([row]), skip).wait()[0].numpy() for row in range(len(tokens.ids))]
    counted = [len(tokens.ids[0]) - skip, *map(len, tokens.ids[1:])]
    close(model.encode(TEXTS[0], prompt=PROMPT), np.average(each, axis=0, weights=counted))


def test_a_prompt_that_reaches_into_the_second_window_counts_in_none():
    pipeline, tokenizer = make_pipeline()
    model = Embedder(pipeline, tokenizer, max_length=24, overflow="windows", include_prompt=False)
    prompt, text = 4 * PROMPT, " ".join(["moon"] * 30)  # 20 tokens; windows of 22 start 19 tokens apart
    ids = tokenizer(prompt + text)["input_ids"]
    parts, weights = [], []
    for start in (0, 19, 38):
        row = [ids[0], *ids[1:-1][start : start + 22], ids[-1]]
        own = max(0, 21 - start)  # [CLS] and the prompt's
        mask = torch.tensor([[0] * own + [1] * (len(row) - own)])
        with torch.no_grad():
            states = pipeline.capture.collect(input_ids=torch.tensor([row]), attention_mask=torch.ones_like(mask))
            parts.append(pipeline.selector.pool(states, mask)[0].numpy())
        weights.append(int(mask.sum()))
    assert weights == [3, 22, 14]
    close(model.encode(text, prompt=prompt), np.average(parts, axis=0, weights=weights))


class Slow:
    """A tokenizer without a backend."""

    def __init__(self, fast):
        self._fast, self.pad_token_id, self.model_max_length = fast, fast.pad_token_id, fast.model_max_length
        self.truncation_side, self.all_special_ids = fast.truncation_side, fast.all_special_ids

    def __call__(self, *args, **kwargs):
        return self._fast(*args, **kwargs)


@pytest.mark.parametrize("kind", [lambda tokenizer: tokenizer, Slow])
def test_a_text_cut_on_the_left_has_lost_its_prompt(kind):
    pipeline, tokenizer = make_pipeline()
    tokenizer.truncation_side = "left"
    model = Embedder(pipeline, kind(tokenizer), max_length=12, include_prompt=False)
    long = " ".join(["moon"] * 12)
    close(model.encode(long, prompt=PROMPT), Embedder(pipeline, tokenizer, max_length=12).encode(long))


def test_the_dtype_is_the_encoders():
    model = make()
    model.encoder.bfloat16()
    assert model.dtype == torch.bfloat16


def test_a_prompt_that_does_not_fit_is_named():
    for overflow in ("truncate", "error", "windows"):
        model = make(max_length=7, overflow=overflow, include_prompt=False)
        with pytest.raises(ValueError, match=r"^prompt: expected at most 6 tokens, where a text has 7, got 7$"):
            model.encode(["moon"], prompt=PROMPT)
    with pytest.raises(ValueError, match=r"^prompt: expected at most 6 tokens, where a text has 6, got 7$"):
        make(max_length=6, overflow="error").encode(["moon"], prompt=PROMPT)
    assert make(max_length=6).encode(["moon"], prompt=PROMPT).shape == (1, 16)  # it counts, and is cut
    with pytest.raises(ValueError, match=r"^prompt: expected Unicode text"):
        make().encode(["moon"], prompt="\ud800")


def test_a_prompt_without_tokens():
    model = Embedder(*make_pipeline(special=False), include_prompt=False)
    assert (model.encode(TEXTS, prompt=" ") == model.encode(TEXTS)).all()


# ---------------------------------------------------------------- a stream that is left


def test_a_source_that_waits_holds_nobody(monkeypatch):
    monkeypatch.setattr(embedder, "FIRST_CHUNK", 4)
    monkeypatch.setattr(batches, "LEAVE", 0.05)
    waiting = queue.Queue()
    for text in TEXTS[:5]:
        waiting.put(text)
    stream = make().stream(iter(waiting.get, None))
    leave = threading.Thread(target=lambda: (next(stream), stream.close()), daemon=True)
    with threads_end():
        leave.start()
        leave.join(20)
        left = not leave.is_alive()
        for _ in range(9):  # the waiting threads end once the source has an end
            waiting.put(None)
    assert left


def test_threads_end_with_an_error_that_is_kept(monkeypatch):
    monkeypatch.setattr(embedder, "FIRST_CHUNK", 4)
    model = make()

    def run(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model._run._encoder._packed, "run", run)

    def lines():
        while True:
            yield "moon"

    with threads_end(), pytest.raises(RuntimeError, match="out of memory") as kept:
        next(model.stream(lines()))
    assert kept.value.__traceback__ is not None


def test_a_streamed_embedding_holds_no_other():
    assert all(each.base is None for each in make().stream(TEXTS))


def test_no_console(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert make().encode(TEXTS).shape == (len(TEXTS), 16)


# ---------------------------------------------------------------- threads and owners


def test_encoders_of_one_configuration_take_turns():
    """Else a batch of one is run with the attention of the other's, or of none."""
    config = make_encoder_and_tokenizer()[0].config
    before = config._attn_implementation
    one, tokenizer = tf.BertModel(config), make_pipeline()[1]
    models = [Embedder(pipeline_of(encoder), tokenizer) for encoder in (one, one, tf.BertModel(config))]
    assert len({id(model._run._encoder.lock) for model in models}) == 1
    assert make()._run._encoder.lock is not models[0]._run._encoder.lock
    texts = sentences(60)
    wanted, wrong = [model.encode(texts) for model in models], []

    def work(model, expected):
        for _ in range(6):
            try:
                wrong.extend([] if abs(model.encode(texts, batch_tokens=100) - expected).max() < 1e-5 else ["differs"])
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and config._attn_implementation == before


def test_an_attention_that_was_not_replaced_is_an_error(monkeypatch):
    model = make()
    attend = packed.attend

    def meddling(module, *args, **options):
        module.config._attn_implementation = "sdpa"  # as other code that ends before this call does
        return attend(module, *args, **options)

    tf.AttentionInterface.register(packed.NAME, meddling)
    try:
        with pytest.raises(RuntimeError, match=r"^1 of the encoder's \d attentions ran packed: other code changed"):
            model.encode(TEXTS)
    finally:
        tf.AttentionInterface.register(packed.NAME, attend)


@pytest.mark.parametrize("packed", [True, False])
def test_an_owner_that_trains_between_calls(packed):
    pipeline, tokenizer = make_pipeline()
    model = Embedder(pipeline, tokenizer, packed=packed)
    wanted = model.encode(TEXTS)
    pipeline.encoder.train()
    for call in (model.encode, model.stream):
        with pytest.raises(ValueError, match=r"^pipeline: expected it in eval mode, got it in training mode$"):
            call(TEXTS)
    pipeline.encoder.eval()
    assert (model.encode(TEXTS) == wanted).all()


def test_copies():
    model = make()
    wanted = model.encode(TEXTS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder is not model.encoder and other._run._encoder.lock is not model._run._encoder.lock
        assert (other.encode(TEXTS) == wanted).all()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("count", [1, 50])
def test_a_lone_surrogate_is_named(count):
    with pytest.raises(ValueError, match=rf"^texts: expected Unicode text, got a lone surrogate in text {count}$"):
        make().encode([*["moon"] * count, "\ud800 moon"])


def test_wrong_options():
    with pytest.raises(TypeError, match=r"^default_prompt: expected a string, got NoneType$"):
        make(default_prompt=None)
    with pytest.raises(TypeError, match=r"^max_length: expected an integer, got str$"):
        Embedder.from_pretrained("all-MiniLM-L6-v2", max_length="12", device="cpu")


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [
        ("cuda:99", ValueError, "device: 'cuda:99' cannot be used: "),
        (99, ValueError, "device: 'cuda:99' cannot be used: "),
        ("meta", ValueError, "device: 'meta' cannot be used: "),
        ("gpu", ValueError, "device: expected a torch.device, its name or None, got 'gpu'"),
        (1.0, TypeError, "device: expected a torch.device, its name or None, got float"),
    ],
)
def test_a_device_that_cannot_be_used(device, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        Embedder.from_pretrained("all-MiniLM-L6-v2", device=device)


def test_a_device_by_its_number(monkeypatch):
    monkeypatch.setattr(
        embedder.validate, "working_device", lambda _, given: torch.device(given)
    )  # which has no GPU to try
    assert embedder._device(0) == torch.device("cuda", 0) and embedder._device("cuda:1") == torch.device("cuda", 1)
    assert embedder._device("cpu") == torch.device("cpu")


def test_parameters_that_are_no_floats_keep_their_dtype(monkeypatch):
    pipeline, tokenizer = make_pipeline()
    pipeline.encoder.register_parameter("steps", torch.nn.Parameter(torch.arange(3), requires_grad=False))
    parts = _Parts(pipeline, tokenizer)
    monkeypatch.setattr(embedder.loading, "load_parts", lambda *_: parts)
    model = Embedder.from_pretrained("any", dtype="bfloat16", device="cpu")
    assert pipeline.encoder.steps.dtype == torch.int64 and model.dtype == torch.bfloat16


class _Parts:
    max_length, default_prompt, include_prompt, truncate_dim = None, "", True, None

    def __init__(self, pipeline, tokenizer):
        self.pipeline, self.tokenizer = pipeline, tokenizer


def test_long_texts_of_two_chunks(monkeypatch):
    """Windows of a second chunk are its own."""
    monkeypatch.setattr(embedder, "FIRST_CHUNK", 2)
    texts = [LONG, TEXTS[0], LONG, TEXTS[1]]
    found = make(max_length=16, overflow="windows").encode(texts)
    close(found[[1, 3]], one_by_one(TEXTS[:2]))
    close(found[0], found[2])
