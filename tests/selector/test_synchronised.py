"""sync_statistics: several processes train as one that has all of their sentences."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from builders import make_batch, make_gradient, make_selector
from torch import nn

from s2sent_kernels import S2SentSelector, sync_statistics
from s2sent_kernels.synchronised import Processes

N, B, L, D, H, M = 3, 8, 6, 16, 5, 4
SPLITS = ((5, 3), (8, 0), (1, 7))  # sentences of each process
WAYS = {
    "pool": (lambda selector, states, mask: selector.pool(states, mask), {}),
    "tokens": (lambda selector, states, mask: selector(states, mask), {}),
    "cumulative": (lambda selector, states, mask: selector.pool(states, mask), {"momentum": None}),
    "without an affine map": (lambda selector, states, mask: selector.pool(states, mask), {"affine": False}),
}


# Process groups by the device of the tensors: on GPUs each process has its own.
GROUPS = {"gloo": "cpu", "nccl": "cuda"}


def made(backend, dtype, options, device="cpu"):
    selector = make_selector(N, D, M, H=H, dtype=dtype, backend=backend, block_prior=True, gate_scale=4.0).train()
    if "affine" in options:
        selector.norm = nn.BatchNorm1d(N * D, eps=1e-6, affine=False).to(dtype)
    if "momentum" in options:
        selector.norm.momentum = None
    return selector.to(device)


def batch_of(dtype, device="cpu", seed=0):
    states, mask = make_batch(N, B, L, D, dtype, "right", seed=seed)
    return [u.to(device) for u in states], mask.to(device)


def steps(selector, way, rows):
    """Two steps on ``rows`` of the batch: outputs, gradients and buffers, by name."""
    found, weight = {}, selector.down.weight
    for step in range(2):
        states, mask = batch_of(weight.dtype, weight.device, step)
        upstream = make_gradient(WAYS[way][0](copy.deepcopy(selector), states, mask))[rows]
        states = [u[rows].clone().requires_grad_() for u in states]
        out = WAYS[way][0](selector, states, mask[rows])
        selector.zero_grad()
        out.backward(upstream)
        found |= {f"{step} u{n}": u.grad for n, u in enumerate(states)} | {f"{step} out": out.detach()}
        found |= {f"{step} {name}": p.grad.clone() for name, p in selector.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in selector.named_buffers()}
    return {name: tensor.cpu() for name, tensor in found.items()}


def cases():
    for backend in ("reference", "native", "auto"):
        for dtype in (torch.float64, torch.float32):
            if backend != "native" or dtype == torch.float32:
                for way in WAYS:
                    yield backend, dtype, way


def in_a_process(rank, folder, group):
    """What a process of two computes: of its rows the outputs, of the parameters its part of the gradient."""
    torch.set_num_threads(1)
    device = GROUPS[group]
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(group, f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for split in SPLITS:
        rows = slice(0, split[0]) if rank == 0 else slice(split[0], B)
        for case in cases():
            backend, dtype, way = case
            selector = sync_statistics(made(backend, dtype, WAYS[way][1], device))
            found[split, case] = steps(selector, way, rows)
    alone = [dist.new_group([one]) for one in (0, 1)][rank]
    if rank == 0:  # which does not wait: neither is joined with the other process
        made("auto", torch.float32, {}, device).pool(*batch_of(torch.float32, device))
        sync_statistics(made("auto", torch.float32, {}, device), alone).pool(*batch_of(torch.float32, device))
    selector = sync_statistics(made("auto", torch.float32, {}, device))
    states, mask = batch_of(torch.float32, device)
    few = slice(0, 1 - rank)  # one sentence in all
    try:
        selector.pool([u[few] for u in states], mask[few])
    except ValueError as error:
        found["one"] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=list(GROUPS))
def measured(request, tmp_path_factory):
    if GROUPS[request.param] == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("processes")
    code = f"import sys; sys.path[:0] = {sys.path!r}; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    code += "; import test_synchronised as t; t.in_a_process(int(sys.argv[1]), *sys.argv[2:])"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen([*command, str(rank), str(folder), request.param]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=300) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], GROUPS[request.param]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[0]}-{str(case[1])[6:]}-{case[2]}")
def test_two_processes_equal_one(measured, split, case):
    backend, dtype, way = case
    results, device = measured
    wanted = steps(made(backend, dtype, WAYS[way][1], device), way, slice(0, B))
    one, other = (found[split, case] for found in results)
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    for name, value in wanted.items():
        kind = name.partition(" ")[2]
        if kind == "out" or (kind.startswith("u") and kind[1:].isdigit()):
            got = torch.cat([one[name], other[name]])
        elif kind:  # the gradient of the sum of both losses
            got = one[name] + other[name]
        else:
            assert torch.equal(one[name], other[name]), name
            got = one[name]
        scale = max(1.0, wanted.get(f"{name[0]} up.weight", value).abs().max().item() if kind == "up.bias" else 0.0)
        scale = max(scale, value.abs().max().item())
        assert (got - value).abs().max().item() <= bound * scale, name


def test_one_sentence_over_all_processes_is_refused_in_each(measured):
    results, _ = measured
    assert all(found["one"].startswith("expected two sentences or more over all processes") for found in results)


def test_a_process_alone_is_not_changed():
    states, mask = make_batch(N, B, L, D, torch.float32, "right")
    selector, marked = (make_selector(N, D, M, H=H, dtype=torch.float32).train() for _ in range(2))
    assert sync_statistics(marked) is marked and marked.processes == Processes(None)
    assert type(marked.norm) is nn.BatchNorm1d
    assert torch.equal(selector.pool(states, mask), marked.pool(states, mask))
    assert torch.equal(selector.norm.running_var, marked.norm.running_var)


def test_what_is_marked():
    whole = nn.Sequential(nn.Linear(2, 2), S2SentSelector(8, 2, 4, 2), nn.Sequential(S2SentSelector(8, 2, 4, 2)))
    assert sync_statistics(whole) is whole
    assert all(part.processes == Processes(None) for part in whole.modules() if isinstance(part, S2SentSelector))
    for again in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert all(part.processes is None for part in again.modules() if isinstance(part, S2SentSelector))
    with pytest.raises(ValueError, match=r"^module: expected a selector somewhere in it, got Linear without"):
        sync_statistics(nn.Linear(2, 2))
