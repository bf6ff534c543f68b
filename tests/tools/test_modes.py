"""Every file has the mode 0666 that the umask cuts, every folder 0777: who may read what is written is the caller's to say."""

import os
import stat
from pathlib import Path

import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, cache, files

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SAVED = str(Path(__file__).parents[1] / "data" / "sentence_transformer")


@pytest.fixture(params=[0o077, 0o002], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder, mask):
    """Of everything in ``folder``, and of itself."""
    found = [folder, *folder.rglob("*")]
    assert any(path.is_file() for path in found)
    wrong = {}
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~mask:
            wrong[str(path.relative_to(folder))] = oct(mode)
    assert not wrong


@pytest.fixture
def place(tmp_path, mask):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def test_atomic_writes_and_locks(place, mask):
    files.write_atomically(place / "a", b"content", sync=True)
    files.write_atomically(place / "a", b"again")
    with files.locked(place / "lock", wait=False):
        assert_modes(place, mask)


def test_selectors(place, mask):
    S2SentSelector(16, 3, 5).save_pretrained(place / "new" / "selector")
    assert_modes(place, mask)


def test_caches(place, mask):
    encoder, tokenizer = make_encoder_and_tokenizer()
    cache.make(encoder, tokenizer, TEXTS, place / "new", cache.Settings(token_frequencies=2, batch_size=3))
    assert_modes(place, mask)


@pytest.mark.parametrize("name", ["a.parquet", "a.npy", "parts"])
def test_embeddings(name, place, mask, tmp_path):
    pytest.importorskip("pyarrow")
    import fake_encoders

    from s2sent_kernels.tools import encoding

    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    request = encoding.Request([str(tmp_path / "in.txt")], part_rows=4)
    run = encoding.encode_folder if name == "parts" else encoding.encode_file
    run(request, encoding.in_this_process(fake_encoders.lengths("cpu")), place / name)
    assert_modes(place, mask)


def test_pictures(place, mask):
    pytest.importorskip("matplotlib")
    from s2sent_kernels.commands import common
    from s2sent_kernels.tools import pictures

    common.write_files(place / "new", {"gates.png": pictures.gates_picture(torch.rand(2, 3, 4))})
    assert_modes(place, mask)


def test_classifiers(place, mask):
    """Other libraries write the model's file, for its owner alone."""
    from s2sent_kernels.tools import classifier
    from s2sent_kernels.transformers import S2SentForSequenceClassification

    encoder, tokenizer = make_encoder_and_tokenizer()
    model = S2SentForSequenceClassification.from_encoder(encoder, blocks="last:2")
    with files.new_folder(place / "new") as whole:
        classifier.write(model, tokenizer, whole, 32)
    assert_modes(place, mask)


def test_models(place, mask):
    from s2sent_kernels.transformers import S2SentModel

    model = S2SentModel.from_encoder(make_encoder_and_tokenizer()[0], bottleneck=4, frequencies=2)
    model.save_pretrained(place / "model")
    pytest.importorskip("sentence_transformers")
    from s2sent_kernels.sentence_transformers import load

    (place / "pooling").mkdir()
    load(SAVED, device="cpu")[1].save(str(place / "pooling"))
    assert_modes(place, mask)


def test_other_files_of_a_folder_keep_their_mode(place, mask):
    from s2sent_kernels.transformers import S2SentModel

    (place / "model").mkdir()
    (place / "model/notes.txt").touch(mode=0o600)
    model = S2SentModel.from_encoder(make_encoder_and_tokenizer()[0], bottleneck=4, frequencies=2)
    model.save_pretrained(place / "model")
    assert stat.S_IMODE((place / "model/notes.txt").stat().st_mode) == 0o600


def test_what_a_library_wrote(place, mask):
    (place / "inner").mkdir()
    for name in ("a", "inner/b"):
        (place / name).touch(mode=0o600)
    files.open_to_umask(place)
    assert_modes(place, mask)


@pytest.mark.parametrize("mask", [0o002], ids=oct, indirect=True)  # an export takes seconds
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_exports(quantize, place, mask):
    for name in ("onnx", "onnxruntime", "onnxscript", "sentence_transformers"):
        pytest.importorskip(name)
    from s2sent_kernels import servers
    from s2sent_kernels.export import export_onnx
    from s2sent_kernels.sentence_transformers import load

    model = load(SAVED).eval()
    servers.export_folder(model, place / "new" / "folder", quantize=quantize)
    if quantize is None:
        export_onnx(model, place / "new" / "model.onnx")
    assert_modes(place, mask)
