"""A selector whose weights are quantised as torchao does it, by tensors that only their own operators understand: the gate runs
as ordinary modules, compiled too, and files are refused with a reason."""

import pytest
import torch
from builders import assert_close, make_batch, make_selector
from torch import nn
from torch.utils import _pytree as pytree

from s2sent_kernels import S2SentSelector, plan

N, D = 3, 16


class Eighths(torch.Tensor):
    """Stands for torchao's tensors: int8 multiples of 1/8, which every operator of PyTorch reads as float32, and no other."""

    @staticmethod
    def __new__(cls, whole):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32, device=whole.device)

    def __init__(self, whole):
        self.whole = whole

    @classmethod
    def of(cls, weight):
        return cls((weight.detach() * 8).round().clamp(-127, 127).to(torch.int8))

    def __repr__(self):  # torch's would read its values, which it has not while it is traced
        return f"Eighths({list(self.shape)})"

    def __tensor_flatten__(self):
        return ["whole"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["whole"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(f"Eighths does not know {function}")
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            return cls(function(args[0].whole))
        args, kwargs = pytree.tree_map_only(cls, lambda t: t.whole.float() / 8, (args, kwargs or {}))
        return function(*args, **kwargs)


def by_hand(selector):
    for part in (selector.down, selector.up):
        part.weight = nn.Parameter(Eighths.of(part.weight), requires_grad=False)


def by_torchao(selector):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(selector, quantization.Int8WeightOnlyConfig())


@pytest.fixture(params=[by_hand, by_torchao])
def quantised(request):
    """A quantised selector, and an ordinary one with the weights that it stands for."""
    selector, same = (make_selector(N, D, dtype=torch.float32, block_prior=True) for _ in range(2))
    request.param(selector)
    with torch.no_grad():
        for part, like in ((same.down, selector.down), (same.up, selector.up)):
            part.weight.copy_(like(torch.eye(part.in_features)).T - like.bias[:, None])
    return selector, same


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ways(selector):
    """Every way to call it."""

    def block_by_block(states, mask):
        pool = selector.blockwise(mask)
        for block, state in enumerate(states):
            pool.add(block, state)
        return pool.result()

    return {"forward": selector, "pool": selector.pool, "gates": selector.gates, "blockwise": block_by_block}


@torch.no_grad()
@pytest.mark.parametrize("way", ["forward", "pool", "gates", "blockwise"])
def test_it_computes_with_what_its_weights_stand_for(quantised, way):
    selector, same = quantised
    batch = make_batch(N, D=D, dtype=torch.float32, mask="right")
    assert plan.plain_tensors(selector) is None
    assert_close(ways(selector)[way](*batch), ways(same)[way](*batch), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", ["forward", "pool", "gates"])
def test_compiled(quantised, way):
    selector, same = quantised
    batch = make_batch(N, D=D, dtype=torch.float32, mask="right")
    compiled = torch.compile(
        lambda states, mask: ways(selector)[way](states, mask), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(*batch), ways(same)[way](*batch), 1e-5)


def test_a_file_is_refused_and_nothing_written(quantised, tmp_path):
    selector, _ = quantised
    with pytest.raises(
        ValueError, match=r"^down\.weight: expected an ordinary tensor to save, got (Eighths|Int8Tensor): "
    ):
        selector.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_within_a_sentence_transformer(tmp_path):
    module = pytest.importorskip("s2sent_kernels.sentence_transformers")
    pooling = module.S2SentPooling({"hidden_size": D, "num_blocks": N, "bottleneck": 4}, [0, 1, 2])
    by_hand(pooling.selector)
    with pytest.raises(ValueError, match=r"^selector\.down\.weight: expected an ordinary tensor"):
        pooling.save(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_within_a_model_of_transformers(tmp_path):
    module = pytest.importorskip("s2sent_kernels.transformers")
    import transformers

    sizes = {"hidden_size": D, "num_hidden_layers": N, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    model = module.S2SentModel.from_encoder(encoder, None, bottleneck=4)
    by_hand(model.selector)
    with pytest.raises(ValueError, match=r"^down\.weight: expected an ordinary tensor"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_saved_before_is_quantised_again(quantised, tmp_path):
    """What the error advises."""
    _, same = quantised
    same.save_pretrained(tmp_path)
    loaded = S2SentSelector.from_pretrained(tmp_path)
    by_hand(loaded)
    batch = make_batch(N, D=D, dtype=torch.float32)
    with torch.no_grad():
        assert loaded.pool(*batch).isfinite().all()
