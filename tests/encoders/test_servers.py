"""The folder for servers: its model gives the embeddings of the model it was made from, for texts that its own tokenizer reads;
and it has what Text Embeddings Inference and Triton look for, and nothing that they could take for another model."""

import copy
import json
import pickle
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import killing
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import LayerNorm  # noqa: E402

from s2sent_kernels import onnx_backend, servers  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.export import as_pipeline  # noqa: E402
from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402
from s2sent_kernels.transformers import S2SentModel  # noqa: E402

SAVED = Path(__file__).parents[1] / "data" / "sentence_transformer"  # 4 blocks of 16 features, 16 positions
LONG = " ".join(["the moon is bright"] * 6)  # more tokens than there are positions
TEXTS = ["the cat sat on the mat", "a dog ran", "moon", "the old moon is bright", LONG]


def long_model():
    """With modules behind the pooling, in eval mode."""
    torch.manual_seed(3)
    transformer = Transformer(
        str(SAVED), config_kwargs={"num_hidden_layers": 2}
    )  # of its 4: the export takes seconds a block
    modules = [
        transformer,
        S2SentPooling.behind(transformer, None, bottleneck=4),
        LayerNorm(16),
        Dense(16, 6),
        Normalize(),
    ]
    return SentenceTransformer(modules=modules, device="cpu", prompts={"query": "a "}).eval()


@pytest.fixture(scope="module")
def model():
    return long_model()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "new" / "served"
    assert servers.export_folder(model, folder) is None
    return folder


def run(file, tokenizer, texts):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return [torch.from_numpy(array) for array in session.run(["sentence_embedding", "last_hidden_state"], inputs)]


@pytest.fixture(scope="module")
def saved(model, served, tmp_path_factory):
    """The model's own folder, with its graph where sentence-transformers looks for one."""
    folder = tmp_path_factory.mktemp("saved")
    model.save(str(folder), create_model_card=False)
    (folder / "onnx").mkdir()
    shutil.copy(served / "model.onnx", folder / "onnx" / "model.onnx")
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_its_embeddings_are_the_models(model, served):
    tokenizer = transformers.AutoTokenizer.from_pretrained(served)
    expected = torch.as_tensor(model.encode(TEXTS))
    for file in ("model.onnx", "1/model.onnx"):
        found, tokens = run(served / file, tokenizer, TEXTS)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens, found[:, None])  # one token, which is the embedding


def test_what_servers_read(served):
    assert files(served) == {
        "model.onnx", "1/model.onnx", "config.pbtxt", "config.json", "tokenizer.json", "tokenizer_config.json",
        "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    }  # fmt: skip
    assert (served / "model.onnx").samefile(served / "1" / "model.onnx")
    read = {name: json.loads((served / name).read_text()) for name in files(served) if name.endswith(".json")}
    config = read["config.json"]
    assert (config["model_type"], config["architectures"], config["pad_token_id"]) == ("bert", ["BertModel"], 0)
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (16, 2, 16)
    pooling = read["1_Pooling/config.json"]
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_cls_token"]
    assert pooling["word_embedding_dimension"] == 6
    assert read["sentence_bert_config.json"]["max_seq_length"] == 16
    assert read["config_sentence_transformers.json"] == {"prompts": {"query": "a "}}
    assert read["tokenizer.json"]["padding"] is None and read["tokenizer.json"]["truncation"] is None
    with pytest.raises(OSError, match="no file named"):  # nothing to pool by itself
        transformers.AutoModel.from_pretrained(served)


def test_tritons_configuration_is_the_graphs(served):
    text = (served / "config.pbtxt").read_text()
    assert (
        re.search(r'^backend: "onnxruntime"$', text, re.M)
        and "name:" not in text.partition("input [")[0].split("\n", 1)[1]
    )
    graph = onnx.load(served / "model.onnx", load_external_data=False).graph
    kinds = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}

    def of_graph(value):
        kind, (batch, *axes) = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        return f'{{ name: "{value.name}" data_type: {kinds[kind]} dims: [ {axes[0].dim_value or -1} ] }}'

    assert [of_graph(value) for value in (*graph.input, graph.output[0])] == re.findall(r"\{ name.*?\}", text)
    assert [value.name for value in graph.output] == ["sentence_embedding", "last_hidden_state"]


def test_int8_says_how_far_it_is_from_float32(model, served, tmp_path, monkeypatch):
    def write_again(module, path, outputs):
        shutil.copy(served / "model.onnx", path)

    texts = servers.shipped_sentences()
    assert len(texts) > 90 and not any(text.startswith(("#", "?")) for text in texts)
    texts = texts[:8]
    monkeypatch.setattr(servers, "shipped_sentences", lambda: texts)
    monkeypatch.setattr(servers, "write_onnx", write_again)
    agreement = servers.export_folder(model, tmp_path / "served", quantize="int8", max_length=9)
    found, expected = tmp_path / "served", served
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    assert tokenizer.model_max_length == 9
    assert json.loads((found / "sentence_bert_config.json").read_text())["max_seq_length"] == 9
    assert files(found) == files(expected)
    assert {tensor.data_type for tensor in onnx.load(found / "model.onnx").graph.initializer} >= {onnx.TensorProto.INT8}
    one, other = ([run(folder / "model.onnx", tokenizer, [text])[0] for text in texts] for folder in (expected, found))
    cosines = torch.nn.functional.cosine_similarity(torch.cat(one), torch.cat(other))
    assert agreement == (pytest.approx(cosines.mean().item()), pytest.approx(cosines.min().item()), len(texts))
    assert 0.9 < agreement.lowest < agreement.mean < 1


def test_the_command(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(servers, "write_onnx", lambda module, path, outputs: path.write_bytes(b"graph"))
    capsys.readouterr()
    for source, name in ((SAVED, "one"), (tmp_path / "whole", "two")):
        if name == "two":
            S2SentModel.from_encoder(load(SAVED, device="cpu")[0].auto_model, "last:2", bottleneck=4).save_pretrained(
                source
            )
            arguments = ["export", "--model", str(source), "--output", f"{tmp_path}/{name}/", "--device", "cpu"]
            assert main(arguments) == 2
            assert "expected a tokenizer beside it" in capsys.readouterr().err
            transformers.AutoTokenizer.from_pretrained(SAVED).save_pretrained(source)
        arguments = ["export", "--model", str(source), "--output", f"{tmp_path}/{name}/", "--device", "cpu"]
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith(f"wrote {tmp_path / name}: input_ids, attention_mask")
        assert (tmp_path / name / "tokenizer.json").is_file()
        assert main(arguments) == 2
        assert ": it is there already and not empty; name another, or remove what is in it\n" in capsys.readouterr().err
    for option in (["--quantize", "int8"], ["--max-length", "9"]):
        assert main(["export", "--output", str(tmp_path / "model.onnx"), *option]) == 2
        assert f"{option[0]}: expected with an --output FOLDER/ for servers, got the file" in capsys.readouterr().err


def test_what_is_refused(model, tmp_path, monkeypatch):
    path = tmp_path / "served"
    with pytest.raises(ValueError, match="quantize: expected one of int8 or None, got 'int4'"):
        servers.export_folder(model, path, quantize="int4")
    with pytest.raises(ValueError, match=r"model: expected float32, got torch\.bfloat16"):
        servers.export_folder(copy.deepcopy(model).bfloat16(), path)
    with pytest.raises(ValueError, match="max_length: expected a positive number, got 0"):
        servers.export_folder(model, path, max_length=0)
    with pytest.raises(ValueError, match="tokenizer: expected one beside a model that has none of its own"):
        servers.export_folder(S2SentModel.from_encoder(model[0].auto_model, None).eval(), path)
    with pytest.raises(TypeError, match="tokenizer: expected a fast one"):
        servers.export_folder(model, path, tokenizer=object())
    unlimited = copy.deepcopy(model[0].tokenizer)
    unlimited.model_max_length = int(1e30)
    assert servers._limit(model[0].auto_model, unlimited, None) == 16
    endless = torch.nn.Linear(2, 2)
    endless.config = SimpleNamespace()
    assert servers._limit(endless, unlimited, 7) == 7
    with pytest.raises(
        ValueError, match="max_length: expected a number for a tokenizer and an encoder without a limit"
    ):
        servers._limit(endless, unlimited, None)
    (path / "there").mkdir(parents=True)
    with pytest.raises(ValueError, match="path: expected a folder that does not exist yet or is empty"):
        servers.export_folder(model, path)

    def fail(*_):
        raise RuntimeError("half-way")

    monkeypatch.setattr(servers, "write_onnx", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        servers.export_folder(model, tmp_path / "other")
    assert [one.name for one in tmp_path.iterdir()] == ["served"]


def test_modules_behind_the_pooling_that_cannot_be_exported(model):
    transformer, pooling, *_ = model
    of_tokens = Dense(16, 16, module_input_name="token_embeddings")
    for modules in ([transformer, pooling, of_tokens], [transformer], [Router({"text": [transformer, pooling]})]):
        with pytest.raises(ValueError, match=r"model: expected a Transformer, an S2SentPooling .*, got \w+"):
            as_pipeline(SentenceTransformer(modules=modules, device="cpu"))


# ---------------------------------------------------------------- backend="onnx" of load


def test_a_model_that_onnx_runtime_computes(model, saved):
    options = {
        "prompts": {"query": "the old "},
        "truncate_dim": 4,
        "device": "cpu",
        "processor_kwargs": {"model_max_length": 9},
    }
    torch_model, kwargs = load(saved, **options), {"provider": "CPUExecutionProvider"}
    found = load(saved, backend="onnx", model_kwargs=kwargs, **options)
    assert kwargs == {"provider": "CPUExecutionProvider"}
    assert found.get_backend() == "onnx" and len(found) == 1 and not list(found.parameters())
    assert found.get_embedding_dimension() == torch_model.get_embedding_dimension()
    assert found.max_seq_length == 9 and found.prompts == torch_model.prompts
    for prompt in (None, "query"):
        expected = torch.as_tensor(torch_model.encode(TEXTS, prompt_name=prompt))
        embeddings = torch.as_tensor(found.encode(TEXTS, prompt_name=prompt))
        torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)
    assert found.similarity(embeddings, embeddings).shape == (5, 5)
    assert (copy.deepcopy(found).encode(TEXTS, prompt_name="query") == embeddings.numpy()).all()
    with pytest.raises(TypeError, match="a model that ONNX Runtime computes cannot be pickled"):
        pickle.dumps(found)
    with pytest.raises(ValueError, match="model: expected one of PyTorch to save, got one of ONNX Runtime"):
        found[0].save("nowhere")


def test_a_graph_is_exported_where_none_is_or_another_is_asked_for(model, saved, monkeypatch, tmp_path):
    exported = []

    def export_onnx(model, path):
        exported.append([type(module).__name__ for module in model])
        shutil.copy(saved / "onnx" / "model.onnx", path)

    monkeypatch.setattr(onnx_backend, "export_onnx", export_onnx)
    model.save(str(tmp_path), create_model_card=False)
    for folder, kwargs in ((tmp_path, None), (saved, {"export": True})):
        found = load(folder, backend="onnx", model_kwargs=kwargs, device="cpu").encode(TEXTS)
        torch.testing.assert_close(found, model.encode(TEXTS), rtol=1e-5, atol=1e-5)
    assert exported == [["Transformer", "S2SentPooling", "LayerNorm", "Dense", "Normalize"]] * 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"file_name: expected a file in .*, got 'other\.onnx'"):
        load(saved, backend="onnx", model_kwargs={"file_name": "other.onnx"}, device="cpu")
    with pytest.raises(ValueError, match="backend: expected one of torch, onnx, got 'openvino'"):
        load(saved, backend="openvino")
    graph = onnx.load(saved / "onnx" / "model.onnx")
    del graph.graph.output[0]
    onnx.save(graph, saved / "of_tokens.onnx")
    with pytest.raises(ValueError, match="expected a graph with the output sentence_embedding, got last_hidden_state"):
        load(saved, backend="onnx", model_kwargs={"file_name": "of_tokens.onnx"}, device="cpu")
    with pytest.raises(ValueError, match=r"^provider: expected one of .*CPUExecutionProvider.*, got 'Nope'$"):
        load(saved, backend="onnx", model_kwargs={"provider": "Nope"}, device="cpu")


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("model_kwargs", {"dtype": torch.float16}),
        ("model_kwargs", {"attn_implementation": "eager"}),
        ("config_kwargs", {"hidden_act": "relu"}),
    ],
)
def test_an_option_of_the_encoder_has_an_effect_on_the_graph_or_is_refused(argument, values, saved, monkeypatch):
    name = next(iter(values))
    with pytest.raises(
        ValueError, match=rf"^{argument}: expected none .* beside the graph .*model\.onnx, got {name}; with"
    ):
        load(saved, backend="onnx", device="cpu", **{argument: values})
    exported = []

    def export_onnx(model, path):
        encoder = model[0].auto_model
        exported.append((encoder.dtype, encoder.config._attn_implementation, encoder.config.hidden_act))
        shutil.copy(saved / "onnx" / "model.onnx", path)

    monkeypatch.setattr(onnx_backend, "export_onnx", export_onnx)
    options = {"model_kwargs": {"export": True}}
    options[argument] = {**options.get(argument, {}), **values}
    load(saved, backend="onnx", device="cpu", **options)
    assert len(exported) == 1 and next(iter(values.values())) in exported[0]


def test_a_dtype_that_onnx_runtime_does_not_compute_in(saved):
    with pytest.raises(ValueError, match=r"^dtype: expected torch\.float32 or torch\.float16 .*, got torch\.bfloat16"):
        load(saved, backend="onnx", model_kwargs={"dtype": torch.bfloat16, "export": True}, device="cpu")


# ---------------------------------------------------------------- damaged graphs


def assert_refused(path, config):
    with pytest.raises(ValueError) as caught:
        onnx_backend.Graph(path, config, "CPUExecutionProvider")
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: "), message
    return message


@pytest.fixture
def graph(served, tmp_path):
    shutil.copy(served / "model.onnx", tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


CONFIG = SimpleNamespace(hidden_size=16)


def test_a_graph_of_every_length(graph):
    content = graph.read_bytes()
    onnx_backend.Graph(graph, CONFIG, "CPUExecutionProvider")
    for length in (*range(0, len(content) - 1, len(content) // 50), 1, 2, 9, len(content) - 1):
        graph.write_bytes(content[:length])
        assert assert_refused(graph, CONFIG).endswith(onnx_backend.REMEDY)


def bits(graph):
    """Of the beginning and of places all over the file: an error of one line, or a graph that is another one."""
    content = graph.read_bytes()
    for place in (*range(64), *range(64, len(content), len(content) // 60)):
        data = bytearray(content)
        data[place] ^= 1 << (place % 8)
        graph.write_bytes(data)
        try:
            onnx_backend.Graph(graph, CONFIG, "CPUExecutionProvider")
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{graph}: "), error


def test_bits_of_a_graph(graph):
    killing.finished(lambda: bits(graph))


@pytest.mark.parametrize("content", [b"7", b"{}", b"\xff" * 64, b"\0" * 4096], ids=["7", "json", "ff", "zeros"])
def test_what_is_no_graph(graph, content):
    graph.write_bytes(content)
    assert_refused(graph, CONFIG)


def test_a_graph_whose_sizes_are_absurd(graph):
    """A tensor of 8 TB by its sizes, and none by its bytes."""
    model = onnx.load(graph)
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([2**41])
    graph.write_bytes(model.SerializeToString())

    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert_refused(graph, CONFIG)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    killing.finished(measured)


def test_a_damaged_graph_of_a_saved_model_is_named(saved, graph, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / onnx_backend.FILE
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ONNX Runtime cannot load it: "):
        load(tmp_path / "copy", backend="onnx", device="cpu")
