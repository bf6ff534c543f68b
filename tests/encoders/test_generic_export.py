"""torch.onnx.export of anybody's module that holds a selector: both of torch's exporters write a graph of ONNX's own operators,
and ONNX Runtime computes what eager PyTorch does, at other sizes than the traced ones."""

import copy

import pytest
import torch
import transformers
from torch import nn

from s2sent_kernels import S2SentSelector, backends
from s2sent_kernels.formula.call import POOLINGS
from s2sent_kernels.sentence_transformers import S2SentPooling
from s2sent_kernels.transformers import S2SentModel

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

N, D, VOCABULARY = 2, 16, 40
SHAPES = ((1, 1), (3, 6), (4, 11))  # none of them is the traced one
SIZES = {"hidden_size": D, "num_hidden_layers": N, "num_attention_heads": 2, "intermediate_size": 32}
NAMES = ("input_ids", "attention_mask")
SEVERAL = ["mean", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]
exporters = pytest.mark.parametrize("exporter", ["dynamo", "TorchScript"])


def make_encoder():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)).eval()


def make_selector(**options):
    """A selector whose every tensor matters."""
    torch.manual_seed(1)
    selector = S2SentSelector(D, N, 8, 4, **options)
    for tensor in selector.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.5)
    return selector.eval()


class OfStates(nn.Module):
    """A selector's method of hidden states that a layer of no interest has made."""

    def __init__(self, method, selector, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, D) for _ in range(N))
        self.method, self.selector, self.options = method, selector, options

    def forward(self, input_ids, attention_mask):
        states = [embedding(input_ids) for embedding in self.embeddings]
        return getattr(self.selector, self.method)(states, attention_mask, **self.options)


class OfModel(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.model = S2SentModel.from_encoder(make_encoder(), None, bottleneck=8, block_prior=True, **options)

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).embedding


class _Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.auto_model = make_encoder()

    def forward(self, features):
        output = self.auto_model(**{name: features[name] for name in NAMES})
        return {**features, "token_embeddings": output.last_hidden_state}


class OfPooling(nn.Module):
    """As a SentenceTransformer, whose forward takes a dictionary."""

    def __init__(self, pooling, **options):
        super().__init__()
        self.transformer = _Transformer()
        torch.manual_seed(1)
        self.pooling = S2SentPooling.behind(self.transformer, None, pooling=pooling, bottleneck=8, **options)

    def forward(self, input_ids, attention_mask):
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.pooling(self.transformer(features))["sentence_embedding"]


MODULES = {
    **{
        f"pool, {pooling}": lambda pooling=pooling: OfStates("pool", make_selector(), pooling=pooling)
        for pooling in POOLINGS
    },
    "pool, prior and scale": lambda: OfStates("pool", make_selector(block_prior=True, gate_scale=3.0)),
    "pool, no norm": lambda: OfStates("pool", make_selector(gate_norm=None)),
    "pool, official": lambda: OfStates("pool", make_selector(profile="official")),
    "tokens": lambda: OfStates("forward", make_selector()),
    "gates": lambda: OfStates("gates", make_selector()),
    "S2SentModel": OfModel,
    "S2SentPooling": lambda: OfPooling("mean"),
    "S2SentPooling, several": lambda: OfPooling(SEVERAL),
    "S2SentPooling, max": lambda: OfPooling("max"),
}


def traced_inputs():
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return torch.ones(2, 8, dtype=torch.int64), mask


def export(module, path, exporter):
    dynamic = torch.export.Dim.DYNAMIC
    if exporter == "dynamo":
        shapes = ({0: dynamic, 1: dynamic},) * 2
        program = torch.onnx.export(
            module, traced_inputs(), dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=NAMES
        )
        program.save(path)
        return
    axes = {name: {0: "batch", 1: "length"} for name in NAMES}
    torch.onnx.export(module, traced_inputs(), path, dynamo=False, dynamic_axes=axes, input_names=list(NAMES))


def make_batches():
    generator = torch.Generator().manual_seed(1)
    for rows, length in SHAPES:
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1:2, : length // 2] = 0
        mask[2:3, length - 2 :] = 0
        yield torch.randint(VOCABULARY, (rows, length), generator=generator), mask


@torch.no_grad()
def assert_as_good_as_eager(path, module):
    """The error against float64 is at most twice that of eager PyTorch, over all of the batches."""
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if isinstance(part, S2SentSelector):
            part.backend = "reference"
    found, eager = [], []
    for batch in make_batches():
        wanted, ours = exact(*batch), module(*batch)
        (result,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(NAMES, batch, strict=True)})
        assert result.shape == wanted.shape
        found.append((torch.from_numpy(result).double() - wanted).flatten())
        eager.append((ours.double() - wanted).flatten())
    error, yardstick = (torch.cat(errors).square().mean().sqrt().item() for errors in (found, eager))
    assert error <= 2 * yardstick


@exporters
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_a_graph_of_onnxs_own_operators(name, exporter, tmp_path):
    module = MODULES[name]().eval()
    with torch.set_grad_enabled(name == "S2SentModel"):
        export(module, str(tmp_path / "model.onnx"), exporter)
    assert_as_good_as_eager(str(tmp_path / "model.onnx"), module)


@exporters
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_backend_that_is_named_is_refused(exporter, tmp_path):
    if not backends()["native"].usable:
        pytest.skip(backends()["native"].reason)
    module = OfStates("pool", make_selector(backend="native")).eval()
    with pytest.raises(Exception) as error:
        export(module, str(tmp_path / "model.onnx"), exporter)
    causes = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert "a graph in ONNX takes no custom ops" in str(causes[-1])


@pytest.mark.parametrize("make", [OfModel, lambda **options: OfPooling(SEVERAL, **options)])
def test_a_program_of_torch_export(make, tmp_path):
    """It is made before anyone knows that ONNX follows: with the backend "reference" it holds torch's own operators, else the
    public ops, which ONNX does not have."""
    dynamic = torch.export.Dim.DYNAMIC
    for backend in ("reference", "auto"):
        module = make(backend=backend).eval()
        with torch.no_grad():
            program = torch.export.export(module, traced_inputs(), dynamic_shapes=({0: dynamic, 1: dynamic},) * 2)
        ops = {str(node.target) for node in program.graph.nodes if "s2sent" in str(node.target)}
        assert not any("squeeze_block" in op for op in ops)
        for batch in make_batches():
            torch.testing.assert_close(program.module()(*batch), module(*batch))
        if backend == "reference":
            assert ops == set()
            torch.onnx.export(program, dynamo=True, verbose=False, input_names=NAMES).save(tmp_path / "model.onnx")
            assert_as_good_as_eager(str(tmp_path / "model.onnx"), module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("method", ["pool", "forward"])
@torch.no_grad()
def test_a_traced_module(method, backend):
    module = OfStates(method, make_selector(backend=backend)).eval()
    traced = torch.jit.trace(module, traced_inputs())
    for batch in make_batches():
        torch.testing.assert_close(traced(*batch), module(*batch))
