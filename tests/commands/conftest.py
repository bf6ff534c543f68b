"""The files of `s2sent evaluate` and `inspect`, and folders that hold encoder and selector."""

import json

import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, waiting


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("S2SENT_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "SILENCE", 1e6)  # no line more on a slow machine


@pytest.fixture
def all_too_long(monkeypatch):
    """Whatever is waited for takes too long."""
    for name in ("SILENCE", "SHORT"):
        monkeypatch.setattr(waiting, name, 0.0)
    monkeypatch.setattr(waiting, "LOOK", 1e6)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a model, a selector, an STS file and transfer files."""
    folder = tmp_path_factory.mktemp("evaluate")
    encoder, tokenizer = make_encoder_and_tokenizer()
    encoder.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    selector = S2SentSelector(16, 3, 4, 4, block_prior=True)
    selector.save_pretrained(folder / "selector")
    path = folder / "selector" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scalar_mix": [0.2, 0.3, 0.5]}))
    rows = [f"test\t{i % 6}\t{TEXTS[i]}\t{TEXTS[(3 * i + 1) % 8]}\tall" for i in range(8)]
    rows.append(f"dev\t1\t{TEXTS[0]}\t{TEXTS[1]}\tall")
    (folder / "sts.tsv").write_text("\n".join(["split\tscore\tsentence1\tsentence2\tsubset", *rows]) + "\n")
    labelled = [f"{split}\t{int('moon' in text)}\t{text}" for split in ("train", "test") for text in TEXTS * 6]
    (folder / "words.tsv").write_text("\n".join(["split\tlabel\ttext", *labelled]) + "\n")
    return folder


@pytest.fixture(scope="module", params=["sentence-transformers", "transformers"])
def whole(request, places):
    """A folder that holds encoder and selector, and the embeddings of what was saved."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer

    from s2sent_kernels.sentence_transformers import S2SentPooling
    from s2sent_kernels.transformers import S2SentModel

    folder, options = places / request.param, {"blocks": [1, 3], "pooling": "cls", "bottleneck": 4}
    torch.manual_seed(1)
    if request.param == "transformers":
        model, tokenizer = S2SentModel.from_encoder(places / "model", **options), make_encoder_and_tokenizer()[1]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            return folder, model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).embedding
    transformer = Transformer(str(places / "model"))
    pooling = S2SentPooling.behind(transformer, **options)
    model = library.SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()
    model.save(str(folder))
    return folder, model.encode(TEXTS, convert_to_tensor=True)
