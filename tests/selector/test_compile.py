"""torch.compile(fullgraph=True), static and dynamic, forward and backward; torch.export of the module in eval mode.

"plain" is what "auto" means on the CPU: plain PyTorch, traced through. "ops" goes through torch.ops.s2sent.*, as a
fused backend does. Most tests use the backend aot_eager, which traces everything and compiles nothing.
"""

import io

import pytest
import torch
from builders import assert_close, make_batch, make_gradient, make_parameters, make_selector, pack, table, through_ops

import s2sent_kernels as s2

N, B, L, D, H, M = 3, 4, 6, 16, 5, 4
CLOSE = 1e-5
PATHS = ("forward", "pool")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["plain", "ops"])
def backend(request, monkeypatch):
    return "auto" if request.param == "plain" else through_ops(monkeypatch)


def selector_for(backend, training=False, **options):
    return make_selector(N, D, M, H=H, dtype=torch.float32, backend=backend, **options).train(training)


def batch_for(form="mask", B=B, L=L, requires_grad=True, seed=0):
    """Keyword arguments of forward and pool."""
    hidden_states, mask = make_batch(N, B, L, D, torch.float32, "none" if form == "none" else "right", seed=seed)
    where = {"attention_mask": mask} if form == "mask" else {}
    if form == "packed":
        hidden_states, where["cu_seqlens"] = pack(hidden_states, mask)
    return {"hidden_states": [u.requires_grad_(requires_grad) for u in hidden_states], **where}


def step(function, selector, batch):
    """The output, and the gradients of hidden states and parameters, and the buffers afterwards."""
    selector.zero_grad()
    for u in batch["hidden_states"]:
        u.grad = None
    out = function(**batch)
    out.backward(make_gradient(out))
    found = {
        "out": out,
        **{f"u{n}": u.grad for n, u in enumerate(batch["hidden_states"])},
        **dict(selector.named_buffers()),
    }
    found |= {name: parameter.grad for name, parameter in selector.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def method(selector, path):
    return selector.forward if path == "forward" else selector.pool


def assert_same_steps(compiled, eager, selector, batches):
    """Batch after batch, compiled and eager, from the same state."""
    for batch in batches:
        state = {name: value.clone() for name, value in selector.state_dict().items()}
        expected = step(eager, selector, batch)
        selector.load_state_dict(state)
        actual = step(compiled, selector, batch)
        assert actual.keys() == expected.keys()
        for name, e in expected.items():
            # In front of a batch norm this gradient is 0, and what is left is rounding in sums as large as the weight's.
            zero = name == "up.bias" and selector.training
            scale = max(1.0, expected["up.weight"].abs().max().item()) if zero else 1.0
            assert_close(actual[name], e, CLOSE * scale, name)


@table(
    "path, training, profile",
    [
        ("forward", False, "paper"),
        ("pool", True, "paper"),
        ("forward", True, "official"),
        ("pool", False, "official"),
    ],
)
def test_static(backend, path, training, profile):
    selector = selector_for(backend, training, profile=profile)
    compiled = torch.compile(method(selector, path), fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same_steps(compiled, method(selector, path), selector, [batch_for(), batch_for(seed=1)])


@table(
    "path, training, form",
    [
        ("forward", False, "mask"),
        ("forward", True, "packed"),
        ("forward", True, "none"),
        ("pool", False, "packed"),
        ("pool", True, "mask"),
        ("pool", False, "none"),
    ],
)
def test_dynamic(backend, path, training, form):
    """One graph for every B and L: the second shape must not recompile."""
    selector = selector_for(backend, training, block_prior=True, gate_scale=4.0)
    compiled = torch.compile(method(selector, path), fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_steps(compiled, method(selector, path), selector, [batch_for(form)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_steps(
            compiled, method(selector, path), selector, [batch_for(form, B=7, L=9), batch_for(form, B=3, L=17)]
        )


@pytest.mark.parametrize("path, training", [("forward", False), ("pool", True)])
def test_official_dynamic(backend, path, training):
    selector = selector_for(backend, training, profile="official")
    compiled = torch.compile(method(selector, path), fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_steps(compiled, method(selector, path), selector, [batch_for(), batch_for(B=7, L=9)])


def test_every_pooling(backend):
    selector = selector_for(backend)

    def function(**batch):
        return torch.cat([selector.pool(**batch, pooling=pooling) for pooling in ("cls", "last")])

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_steps(compiled, function, selector, [batch_for()])


@pytest.mark.parametrize("grad", [False, True])
def test_without_gradients(backend, grad):
    selector = selector_for(backend).requires_grad_(grad)
    batch = batch_for(requires_grad=False)
    compiled = torch.compile(selector, fullgraph=True, backend="aot_eager")  # the module itself
    with torch.set_grad_enabled(grad):
        assert_close(compiled(**batch), selector(**batch), CLOSE)
        gates = torch.compile(selector.gates, fullgraph=True, backend="aot_eager")
        assert_close(gates(**batch), selector.gates(**batch), CLOSE)


@table(
    "path, training, form, mode",
    [
        ("forward", False, "mask", "plain"),
        ("forward", False, "packed", "no_grad"),
        ("forward", True, "none", "inference_mode"),
        ("pool", False, "mask", "no_grad"),
        ("pool", True, "packed", "inference_mode"),
        ("pool", False, "none", "plain"),
    ],
)
def test_dynamic_without_gradients(backend, path, training, form, mode):
    """ "plain": nothing requires a gradient."""
    selector = selector_for(backend, training).requires_grad_(mode != "plain")
    compiled = torch.compile(method(selector, path), fullgraph=True, dynamic=True, backend="aot_eager")
    with {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        for B, L in ((4, 6), (7, 9)):
            batch = batch_for(form, B=B, L=L, requires_grad=False)
            assert_close(compiled(**batch), method(selector, path)(**batch), CLOSE)


@pytest.mark.parametrize("path", PATHS)
def test_changed_parts(backend, path):
    """The gate through its parts as modules."""
    selector = selector_for(backend)
    selector.up = torch.nn.Sequential(selector.up, torch.nn.Dropout(0.5)).eval()
    compiled = torch.compile(method(selector, path), fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_steps(compiled, method(selector, path), selector, [batch_for(), batch_for(B=7, L=9)])


def test_some_hidden_states_need_no_gradient(backend):
    selector = selector_for(backend)
    batch = batch_for()
    batch["hidden_states"][1].requires_grad_(False)
    for path in PATHS:
        out = torch.compile(method(selector, path), fullgraph=True, backend="aot_eager")(**batch)
        out.backward(make_gradient(out))
    assert batch["hidden_states"][1].grad is None
    assert batch["hidden_states"][0].grad.any()


@pytest.mark.parametrize("layout", ["column", "cut", "expanded"])
@pytest.mark.parametrize("path", PATHS)
def test_any_strides(backend, path, layout):
    selector = selector_for(backend)
    hidden_states, mask = make_batch(N, B, L, D, torch.float32, "right", layout, requires_grad=True)
    compiled = torch.compile(method(selector, path), fullgraph=True, backend="aot_eager")
    assert_same_steps(
        compiled, method(selector, path), selector, [{"hidden_states": hidden_states, "attention_mask": mask}]
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_functions(backend, dynamic):
    parameters = make_parameters(N, D, H, torch.float32, requires_grad=True)

    def function(hidden_states, mask):
        f, p = s2.squeeze(hidden_states, mask, pooling="mean", backend=backend)
        g = s2.gate(f, parameters, num_blocks=N, backend=backend)
        v = s2.fuse(hidden_states, g, mask, backend=backend)
        w = s2.select(hidden_states, parameters, mask, backend=backend)
        o = s2.select_pool(hidden_states, parameters, mask, backend=backend)
        return (g * p).sum(1) + o, v + w

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, L in ((4, 6), (5, 9)):
        hidden_states, mask = make_batch(N, B, L, D, torch.float32, "right", requires_grad=True)
        inputs = [*hidden_states, parameters.down_weight, parameters.up_bias, parameters.norm_weight]
        results = []
        for call in (function, compiled):
            out = call(hidden_states, mask)
            results.append([*out, *torch.autograd.grad(out, inputs, [make_gradient(t) for t in out])])
        for e, a in zip(*results, strict=True):
            assert_close(a, e, CLOSE)


def test_the_ops_stay_in_the_graph(monkeypatch):
    """Through the ops the graph holds one op per stage and no arithmetic on hidden states."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    selector = selector_for(through_ops(monkeypatch))
    torch.compile(selector.pool, fullgraph=True, backend=keep)(**batch_for())
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("s2sent.select_pool" in name for name in called) == 1


def test_a_bad_shape_is_a_readable_error(backend):
    compiled = torch.compile(selector_for(backend).pool, backend="aot_eager")
    batch = batch_for()
    batch["attention_mask"] = batch["attention_mask"][:, :-1]
    with pytest.raises(Exception, match="attention_mask: expected shape"):
        compiled(**batch)


# ---------------------------------------------------------------- inductor


@pytest.mark.parametrize("path, training", [("pool", False), ("forward", True)])
def test_inductor(backend, path, training):
    selector = selector_for(backend, training)
    compiled = torch.compile(method(selector, path), fullgraph=True, dynamic=True)
    assert_same_steps(compiled, method(selector, path), selector, [batch_for(), batch_for(B=7, L=9)])


def test_inductor_under_strides(monkeypatch):
    """Inductor relies on the strides that the fakes promise."""
    selector = selector_for(through_ops(monkeypatch))
    hidden_states, mask = make_batch(N, B, L, D, torch.float32, "right", "column", requires_grad=True)
    compiled = torch.compile(lambda **batch: selector(**batch) * 2.0, fullgraph=True)
    batch = {"hidden_states": hidden_states, "attention_mask": mask}
    out = compiled(**batch)
    assert_close(out, selector(**batch) * 2.0, CLOSE)
    out.backward(make_gradient(out, "strided"))


# ---------------------------------------------------------------- export


class Pool(torch.nn.Module):
    def __init__(self, selector, pooling="mean"):
        super().__init__()
        self.selector, self.pooling = selector, pooling

    def forward(self, hidden_states, attention_mask):
        return self.selector.pool(hidden_states, attention_mask, pooling=self.pooling)


def exported(module, strict):
    batch = batch_for(requires_grad=False)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=512)}
    return torch.export.export(
        module.eval(),
        (batch["hidden_states"], batch["attention_mask"]),
        strict=strict,
        dynamic_shapes={"hidden_states": [sizes] * N, "attention_mask": sizes},
    )


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    "path, strict",
    [
        ("forward", False),
        ("forward", True),
        ("mean", False),
        ("mean", True),
        ("cls", False),
        ("last", False),
    ],
)
@pytest.mark.parametrize("how", ["reference", "ops"])
def test_export(path, strict, how, monkeypatch):
    """B and L stay free; backend "reference" leaves aten ops alone; saved and loaded it computes the same."""
    selector = selector_for(through_ops(monkeypatch) if how == "ops" else "reference", block_prior=True)
    module = selector if path == "forward" else Pool(selector, path)
    program = exported(module, strict)
    called = targets(program)
    assert called
    if how == "reference":
        assert all(name.startswith(("aten.", "<built-in function", "_operator")) for name in called), called
        assert not any("s2sent" in name for name in called)
    else:
        assert any(name.startswith("s2sent.") for name in called)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B, L in ((4, 6), (1, 2), (9, 33)):
        hidden_states, mask = make_batch(N, B, L, D, torch.float32, "mixed")
        for call in (program.module(), loaded):
            assert_close(call(hidden_states, mask), module(hidden_states, mask), CLOSE)


@pytest.mark.parametrize("profile, norm", [("official", "batch"), ("paper", None)])
def test_export_of_other_selectors(profile, norm):
    selector = selector_for("reference", profile=profile, gate_norm=norm)
    hidden_states, mask = make_batch(N, B, L, D, torch.float32, "right")
    sizes = {0: torch.export.Dim("batch")}
    free = {"hidden_states": [sizes] * N, "attention_mask": sizes}
    program = torch.export.export(Pool(selector).eval(), (hidden_states, mask), dynamic_shapes=free)
    assert all(name.startswith(("aten.", "<built-in function", "_operator")) for name in targets(program))
    hidden_states, mask = make_batch(N, 9, L, D, torch.float32, "right")
    assert_close(program.module()(hidden_states, mask), selector.pool(hidden_states, mask), CLOSE)


def test_export_packed():
    selector = selector_for("reference")

    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.selector = selector

        def forward(self, hidden_states, cu_seqlens):
            return self.selector.pool(hidden_states, cu_seqlens=cu_seqlens)

    tokens, ends = {0: torch.export.Dim("tokens", min=2)}, {0: torch.export.Dim("ends", min=3)}
    batch = batch_for("packed", requires_grad=False)
    program = torch.export.export(
        Packed().eval(),
        (batch["hidden_states"], batch["cu_seqlens"]),
        dynamic_shapes={"hidden_states": [tokens] * N, "cu_seqlens": ends},
    )
    assert all(name.startswith(("aten.", "<built-in function", "_operator")) for name in targets(program))
    batch = batch_for("packed", B=9, L=11, requires_grad=False)
    assert_close(program.module()(*batch.values()), selector.pool(**batch), CLOSE)


def test_gate_of_a_symbolic_number_of_blocks(backend):
    """N may be computed from a shape that varies."""
    gate = torch.compile(
        lambda f, parameters, n: s2.gate(f, parameters, num_blocks=n, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for blocks in (3, 4):
        parameters, f = make_parameters(blocks, 8, 5, torch.float32), torch.randn(2, 8)
        assert_close(gate(f, parameters, blocks), s2.gate(f, parameters, num_blocks=blocks, backend=backend), 1e-6)
