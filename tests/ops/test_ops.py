"""torch.ops.s2sent.*: schemas, opcheck, and fakes that describe what the implementations return."""

from pathlib import Path

import pytest
import torch
from builders import make_batch, make_gradient, make_parameters, pack
from torch._subclasses.fake_tensor import FakeTensorMode

from s2sent_kernels import ops
from s2sent_kernels.formula.call import DTYPES, POOLINGS

SCALED = ["gate.scaled", "select.scaled", "select_pool.scaled"]  # overloads of gates with a scale
PUBLIC = ["squeeze", "gate", "fuse", "select", "select_pool", *SCALED]
N, B, L, D, H, M = 3, 4, 5, 12, 5, 4


def arguments(
    name, form="padded", dtype=torch.float32, pooling="mean", requires_grad=False, B=B, norm=True, prior=True
):
    hidden_states, mask = make_batch(N, B, L, D, dtype, "none" if form == "no mask" else "mixed")
    cu_seqlens = None
    if form == "packed":
        hidden_states, cu_seqlens = pack(hidden_states, mask)
        mask = None
    hidden_states = [u.requires_grad_(requires_grad) for u in hidden_states]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    name, _, overload = name.partition(".")
    scale = 4.0 if overload else None
    made = make_parameters(N, D, H, wide, norm=norm, prior=prior, scale=scale, requires_grad=requires_grad)
    parameters = made if overload else made[:-1]
    batch = (hidden_states, mask, cu_seqlens)
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(B, D, dtype=wide, generator=generator).requires_grad_(requires_grad)
    g = torch.rand(B, N, D, dtype=wide, generator=generator).requires_grad_(requires_grad)
    return {
        "squeeze": (*batch, M, "paper", pooling, "reference"),
        "gate": (f, *parameters, N, "tanh", 1e-6, "reference"),
        "fuse": (*batch, g, "reference"),
        "select": (*batch, *parameters, M, "tanh", 1e-6, "reference"),
        "select_pool": (*batch, *parameters, M, pooling, "tanh", 1e-6, "reference"),
        "fuse_backward": (torch.rand(hidden_states[0].shape, dtype=dtype), *batch, "reference"),
        "gate_backward": (g.detach(), f, *parameters, "tanh", 1e-6, "reference"),
        "gate_pool_backward": (
            hidden_states[0].detach().reshape(-1, D)[:B],
            f,
            g,
            *parameters,
            "tanh",
            1e-6,
            "reference",
        ),
        "squeeze_backward": (
            f.detach(),
            None,
            None,
            None,
            list(hidden_states[0].shape),
            dtype,
            torch.device("cpu"),
            [True, False, True],
            mask,
            cu_seqlens,
            M,
            "paper",
            None,
            "reference",
        ),
        "squeeze_block": (
            hidden_states[0],
            0,
            N,
            torch.zeros(B, N, D, dtype=wide),
            torch.zeros(B, N, D, dtype=wide),
            mask,
            cu_seqlens,
            M,
            "paper",
            "mean",
            "reference",
        ),
    }[name]


def op(name):
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.s2sent, name), overload or "default")


# ---------------------------------------------------------------- schemas


def registered():
    return sorted(
        name.removeprefix("s2sent::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("s2sent::")
    )


def test_the_public_ops_are_registered():
    assert set(PUBLIC) <= set(registered())


def test_schemas_stay():
    """Exported programs and compiled packages call the ops by these."""
    wanted = (Path(__file__).parents[1] / "data" / "schemas.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("::")[2].partition("(")[0] for line in wanted]
    assert [str(op(name)._schema) for name in names] == wanted
    assert {name.partition(".")[0] for name in names} == {name for name in ops.__all__ if name != "write_once"}
    assert sorted(names) == registered()


@pytest.mark.parametrize("name", registered())
def test_no_schema_has_defaults(name):
    schema = op(name)._schema
    assert not any(argument.has_default_value() for argument in schema.arguments)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_backend_is_a_str_of_the_schema(name):
    schema = op(name)._schema
    backend = {argument.name: argument for argument in schema.arguments}["backend"]
    assert str(backend.type) == "str"
    assert not schema.is_mutable
    assert all(out.alias_info is None for out in schema.returns)
    assert torch.Tag.pt2_compliant_tag in op(name).tags


@pytest.mark.parametrize("name", PUBLIC)
def test_auto_is_a_backend_of_the_ops(name, monkeypatch):
    monkeypatch.setenv("S2SENT_BACKEND", "reference")  # in place of "auto"
    named = torch.utils._pytree.tree_leaves(op(name)(*arguments(name)))
    auto = torch.utils._pytree.tree_leaves(op(name)(*arguments(name)[:-1], "auto"))
    for a, b in zip(named, auto, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_bad_backend_is_an_error(name):
    with pytest.raises(ValueError, match=r"backend: expected .*'cuda'"):
        op(name)(*arguments(name)[:-1], "cuda")


# ---------------------------------------------------------------- opcheck


def check(name, args):
    result = torch.library.opcheck(op(name), args)
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4, result


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "name, form, options",
    [
        ("squeeze", "padded", {}),
        ("squeeze", "no mask", {"pooling": None}),
        ("squeeze", "packed", {"pooling": "last"}),
        ("gate", "padded", {}),
        ("gate", "padded", {"norm": False, "prior": False}),
        ("fuse", "padded", {}),
        ("fuse", "no mask", {}),
        ("fuse", "packed", {}),
        ("select", "padded", {"prior": False}),
        ("select", "no mask", {}),
        ("select", "packed", {"norm": False}),
        ("select_pool", "padded", {}),
        ("select_pool", "no mask", {"pooling": "cls"}),
        ("select_pool", "packed", {"pooling": "last", "norm": False, "prior": False}),
        ("gate.scaled", "padded", {}),
        ("select.scaled", "packed", {"prior": False}),
        ("select_pool.scaled", "padded", {"norm": False}),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value or "defaults"),
)
def test_opcheck(name, form, options, requires_grad):
    check(name, arguments(name, form, requires_grad=requires_grad, **options))


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_of_other_dtypes(name, dtype):
    check(name, arguments(name, dtype=dtype, requires_grad=True))


def test_opcheck_where_some_hidden_states_need_no_gradient():
    hidden_states, *rest = arguments("squeeze", requires_grad=True)
    check("squeeze", ([hidden_states[0], hidden_states[1].detach(), hidden_states[2]], *rest))
    hidden_states, *rest = arguments("select_pool", requires_grad=True)
    check("select_pool", ([hidden_states[0].detach(), hidden_states[1], hidden_states[2].detach()], *rest))


def test_opcheck_of_official_squeeze():
    hidden_states, mask, _, M, _, pooling, backend = arguments("squeeze", requires_grad=True)
    check("squeeze", (hidden_states, mask, None, M, "official", pooling, backend))


@pytest.mark.parametrize(
    "name",
    [
        "squeeze_backward",
        "fuse_backward",
        "gate_backward",
        "gate_pool_backward",
        "squeeze_block",
        "gate_backward.scaled",
        "gate_pool_backward.scaled",
    ],
)
def test_opcheck_of_the_ops_underneath(name):
    check(name, arguments(name))


# ---------------------------------------------------------------- fakes


def describe(outputs):
    return [(tuple(t.shape), t.dtype, t.device.type) for t in torch.utils._pytree.tree_leaves(outputs)]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["padded", "no mask", "packed"])
@pytest.mark.parametrize("B", [4, 1, 0])
def test_fakes_tell_the_truth(name, dtype, form, B):
    poolings = [None, *POOLINGS] if name == "squeeze" else ["last"]
    for pooling in poolings:
        args = arguments(name, form, dtype, pooling, B=B)
        real = op(name)(*args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            fake = op(name)(*fakes)
        assert describe(fake) == describe(real)


def test_squeeze_without_pooling_returns_an_empty_second():
    _, p = op("squeeze")(*arguments("squeeze", pooling=None))
    assert p.shape == (B, 0, D) and p.numel() == 0


def fake_and_real(name, args):
    real = torch.utils._pytree.tree_leaves(op(name)(*args))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        return torch.utils._pytree.tree_leaves(op(name)(*fakes)), real


@pytest.mark.parametrize("name", ["squeeze", "fuse", "select", "select_pool"])
@pytest.mark.parametrize("layout", ["column", "cut", "expanded"])
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_fakes_know_the_strides(name, layout, mask):
    """An output never inherits the odd strides of a hidden state: compiled code relies on the fake's strides."""
    hidden_states, attention_mask = make_batch(N, B, L, D, torch.float32, mask, layout)
    fake, real = fake_and_real(name, (hidden_states, attention_mask, *arguments(name)[2:]))
    assert [t.stride() for t in fake] == [t.stride() for t in real]
    assert all(t.is_contiguous() for t in real)


@pytest.mark.parametrize("kind", ["strided", "expanded"])
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_fakes_know_the_strides_of_gradients(kind, mask):
    hidden_states, attention_mask = make_batch(N, B, L, D, torch.float32, mask)
    f, g, shape = torch.randn(B, D), torch.rand(B, N, D), list(hidden_states[0].shape)
    dv, dg, df, dp = (make_gradient(t, kind) for t in (hidden_states[0], g, f, g))
    rest = (
        shape,
        torch.float32,
        torch.device("cpu"),
        [True] * N,
        attention_mask,
        None,
        M,
        "paper",
        "mean",
        "reference",
    )
    for name, args in (
        ("fuse_backward", (dv, hidden_states, attention_mask, None, "reference")),
        (
            "gate_backward",
            (dg, f, *make_parameters(N, D, H, torch.float32, prior=True)[:-1], "tanh", 1e-6, "reference"),
        ),
        ("gate_pool_backward", (df, f, dp, *make_parameters(N, D, H, torch.float32)[:-1], "tanh", 1e-6, "reference")),
        ("squeeze_backward", (df, None, None, None, *rest)),
        ("squeeze_backward", (None, dp, None, None, *rest)),
        ("squeeze_backward", (None, None, dv, g, *rest)),
        ("squeeze_backward", (df, dp, dv, g, *rest)),
    ):
        fake, real = fake_and_real(name, args)
        assert [t.stride() for t in fake] == [t.stride() for t in real], name


@pytest.mark.parametrize("name", PUBLIC)
def test_fakes_validate_too(name):
    """A compiled call with bad shapes fails while tracing, with the message of the eager one."""
    args = list(arguments(name))
    if name.startswith("gate"):
        args[0] = args[0][:, :-1]
    else:
        args[0] = [*args[0][:-1], args[0][-1][:, :-1]]
    with pytest.raises(ValueError) as real:
        op(name)(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError) as fake:
        op(name)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    assert str(fake.value) == str(real.value)


# ---------------------------------------------------------------- gradients they must not write into


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_is_written_into(name):
    """Neither inputs nor the incoming gradient change."""
    args = arguments(name, requires_grad=True, dtype=torch.float64)
    leaves = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    before = [t.detach().clone() for t in leaves]
    out = torch.utils._pytree.tree_leaves(op(name)(*args))
    gradients = [make_gradient(t, seed=i) for i, t in enumerate(out)]
    kept = [t.clone() for t in gradients]
    torch.autograd.backward(out, gradients)
    for a, b in zip([*leaves, *gradients], [*before, *kept], strict=True):
        assert torch.equal(a, b)
    grads = [t.grad for t in leaves if t.grad is not None]
    assert len({t.data_ptr() for t in grads}) == len(grads), "two gradients share memory"
    assert not {t.data_ptr() for t in grads} & {t.data_ptr() for t in gradients}


def test_buffers_and_gradients_of_another_shape_are_refused():
    u = torch.randn(3, 4, 8)
    rest = (None, None, 2, "paper", "mean", "reference")
    for groups in (torch.zeros(3, 8, 2).mT, torch.zeros(3, 2, 8, dtype=torch.float64), torch.zeros(2, 2, 8)):
        with pytest.raises(ValueError, match="squeezed_groups: expected"):
            torch.ops.s2sent.squeeze_block(u, 0, 2, groups, torch.zeros(3, 2, 8), *rest)
    with pytest.raises(ValueError, match="grad_squeezed: expected shape"):
        torch.ops.s2sent.squeeze_backward(
            torch.zeros(1, 8), None, None, None, [3, 4, 8], torch.float32, torch.device("cpu"), [True, True], *rest
        )
    with pytest.raises(ValueError, match="grad_fused: expected shape"):
        torch.ops.s2sent.fuse_backward(torch.zeros(3, 2, 8), [u, u], None, None, "reference")


def test_the_dispatcher_is_left_out_only_where_it_does_nothing():
    """Private path of inference: not under autograd, tracing, transforms, modes or forward mode, nor for tensor subclasses."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from s2sent_kernels import GateParameters
    from s2sent_kernels.ops.library import without_dispatcher

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    hidden_states = [torch.randn(2, 3, 4) for _ in range(2)]
    weight = torch.randn(1, 4, requires_grad=True)
    parameters = GateParameters(weight, *(torch.randn(1) for _ in range(3)))
    seen = {}

    def ask(*_):
        return without_dispatcher((*hidden_states, *parameters))

    seen["grad"] = ask()
    with torch.no_grad():
        assert ask()
        with Mode():
            seen["mode"] = ask()
        with torch.autograd.forward_ad.dual_level():
            seen["forward mode"] = ask()
        torch.func.vmap(lambda x: x + seen.setdefault("vmap", ask()))(torch.zeros(2))
        seen["subclass"] = without_dispatcher((hidden_states[0].as_subclass(Subclass), *parameters))
    assert without_dispatcher((*hidden_states, *parameters.each(torch.Tensor.detach)))
    assert seen == dict.fromkeys(seen, False) and len(seen) == 5
