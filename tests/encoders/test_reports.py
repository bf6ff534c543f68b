"""What users of libraries of this kind have reported, where a wrong value would come without an error."""

import json
from pathlib import Path

import pytest
import torch
from builders import TEXTS, save_encoder

pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
import huggingface_hub  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels import Embedder, servers  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.commands import export  # noqa: E402
from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402
from s2sent_kernels.sources import LoadError  # noqa: E402
from s2sent_kernels.transformers import S2SentModel  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    save_encoder(tmp_path / "encoder")
    return tmp_path / "encoder"


def model_of(folder, *between, **options):
    torch.manual_seed(0)
    transformer = Transformer(str(folder), **options)
    pooling = S2SentPooling.behind(transformer, "last:2", bottleneck=4, frequencies=2)
    return SentenceTransformer(modules=[transformer, *between, pooling], device="cpu").eval()


def test_a_transformers_own_limit_is_the_embedders(folder, tmp_path):
    model = model_of(folder, processing_kwargs={"text": {"max_length": 5}})
    model.save(str(tmp_path / "model"))
    long = [" ".join(TEXTS)]
    wanted = load(tmp_path / "model", device="cpu").encode(long)
    embedder = Embedder.from_pretrained(tmp_path / "model", device="cpu")
    assert embedder.max_length == 5
    torch.testing.assert_close(torch.from_numpy(embedder.encode(long)), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


def test_other_ways_to_tokenize_are_refused(folder, tmp_path):
    model_of(folder, processing_kwargs={"text": {"add_special_tokens": False}}).save(str(tmp_path / "model"))
    with pytest.raises(LoadError, match="processing_kwargs add_special_tokens = False"):
        Embedder.from_pretrained(tmp_path / "model", device="cpu")


def test_servers_truncate_where_the_model_does(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "_write_model", lambda *_: None)  # the graph is not what is asked for
    model = model_of(folder, processing_kwargs={"text": {"max_length": 5}})
    servers.export_folder(model, tmp_path / "served")
    assert json.loads((tmp_path / "served" / "sentence_bert_config.json").read_text())["max_seq_length"] == 5
    model = model_of(folder, processing_kwargs={"text": {"add_special_tokens": False}})
    with pytest.raises(
        ValueError, match=r"model: expected a Transformer that .* processing_kwargs add_special_tokens = False"
    ):
        servers.export_folder(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_saved_truncate_dim_is_the_embedders(folder, tmp_path):
    model = model_of(folder)
    model.truncate_dim = 6
    model.save(str(tmp_path / "model"))
    embedder = Embedder.from_pretrained(tmp_path / "model", device="cpu")
    assert embedder.dimension == 6 and embedder.encode(TEXTS).shape == (len(TEXTS), 6)
    assert embedder.encode(TEXTS, truncate_dim=9).shape == (len(TEXTS), 9) and embedder.encode([]).shape == (0, 6)
    assert (embedder.encode(TEXTS) == embedder.encode(TEXTS, truncate_dim=9)[:, :6]).all()
    with pytest.raises(ValueError, match="truncate_dim: expected at most 16, as many features as there are, got 17"):
        Embedder.from_pretrained(tmp_path / "model", device="cpu", truncate_dim=17)


class Doubled(torch.nn.Module):
    """A module that changes tokens before they are pooled, as CNN and LSTM of sentence-transformers do."""

    def forward(self, features, **_):
        return features | {"token_embeddings": 2 * features["token_embeddings"]}


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_in_between_is_refused(folder, grad):
    model = model_of(folder, Doubled())
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="features: expected the token_embeddings that"):
        model(model.preprocess(TEXTS))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_features_of_another_call_are_refused(folder, grad, pooling):
    model = model_of(folder)
    transformer, module = model
    module.pooling = pooling
    with torch.set_grad_enabled(grad):
        first = transformer(model.preprocess([TEXTS[0], TEXTS[0]]))
        transformer(model.preprocess([TEXTS[1], TEXTS[0]]))
        with pytest.raises(ValueError, match="features: expected the "):
            module(first)
        again = transformer(model.preprocess([TEXTS[1], TEXTS[0]]))
        assert module(again)["sentence_embedding"].shape == (2, 16)


LOADERS = {
    "load": lambda whole, encoder: load(whole, device="cpu"),
    "Embedder": lambda whole, encoder: Embedder.from_pretrained(whole, device="cpu"),
    "from_encoder": lambda whole, encoder: S2SentModel.from_encoder(encoder, "last:2", bottleneck=4),
}


@pytest.mark.parametrize("of_hub", [True, False])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", LOADERS)
def test_no_bar_of_weights_unasked(name, asked, of_hub, folder, tmp_path, capfd):
    """And those of a hub are left as they were, within and after."""
    model_of(folder).save(str(tmp_path / "model"))
    log, hub = transformers.logging, huggingface_hub.utils
    if not hasattr(log, "set_tqdm_hook"):
        pytest.skip("an earlier release of transformers")
    before = log.get_verbosity(), log.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    seen = []

    def watched(factory, args, kwargs):
        seen.append(hub.are_progress_bars_disabled())
        return factory(*args, **kwargs)

    hook = log.set_tqdm_hook(watched)
    try:
        log.enable_progress_bar()
        if not of_hub:
            hub.disable_progress_bars()
        (log.set_verbosity_info if asked else log.set_verbosity_warning)()
        capfd.readouterr()
        LOADERS[name](tmp_path / "model", folder)
        shown = "Loading weights" in capfd.readouterr().err
        assert shown == (asked and name != "Embedder")
        assert log.is_progress_bar_enabled() and hub.are_progress_bars_disabled() != of_hub
        assert seen and set(seen) == {not of_hub}
    finally:
        log.set_tqdm_hook(hook)
        log.set_verbosity(before[0])
        (log.enable_progress_bar if before[1] else log.disable_progress_bar)()
        (hub.disable_progress_bars if before[2] else hub.enable_progress_bars)()


def test_the_log_of_transformers_stays_its_users(folder, tmp_path):
    model_of(folder).save(str(tmp_path / "model"))
    log = transformers.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    try:
        log.set_verbosity_info()
        log.enable_progress_bar()
        Embedder.from_pretrained(tmp_path / "model", device="cpu")
        with pytest.raises(LoadError):
            Embedder.from_pretrained(tmp_path / "nothing", device="cpu")
        assert log.get_verbosity() == log.INFO and log.is_progress_bar_enabled()
    finally:
        log.set_verbosity(before[0])
        if not before[1]:
            log.disable_progress_bar()


def test_another_default_dtype(folder, tmp_path):
    model_of(folder).save(str(tmp_path / "model"))
    wanted = Embedder.from_pretrained(tmp_path / "model", device="cpu").encode(TEXTS)
    torch.set_default_dtype(torch.float64)
    try:
        embedder = Embedder.from_pretrained(tmp_path / "model", device="cpu")
        assert (embedder.encode(TEXTS) == wanted).all() and embedder.encode([]).dtype == wanted.dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_folder_of_t5_gives_its_encoder(tmp_path):
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path)
    model = S2SentModel.from_encoder(tmp_path, "last:2", bottleneck=4, frequencies=2)
    assert isinstance(model.encoder, transformers.T5EncoderModel)
    assert model(torch.tensor([[5, 6, 7]]), torch.ones(1, 3)).embedding.shape == (1, 16)


@pytest.mark.parametrize("kind, said", [("classifier", True), ("model", False)])
def test_the_export_of_a_classifier_says_what_it_leaves_out(kind, said, tmp_path, monkeypatch, capsys):
    saved = Path(__file__).parents[1] / "data" / kind
    monkeypatch.setitem(export.WRITERS, ".onnx", lambda pipeline, path: path.write_bytes(b""))
    assert main(["export", "--model", str(saved), "--output", str(tmp_path / "a.onnx"), "--device", "cpu"]) == 0
    assert ("is a classifier: its embeddings are exported, and not its labels" in capsys.readouterr().err) == said
