"""FSDP2 by the recipe of docs/training.md: two processes on gloo compute and train what one does with the whole batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
import transformers

from s2sent_kernels import absent, consumers, sync_statistics
from s2sent_kernels.transformers import S2SentModel

PAGE = (
    next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file()) / "docs" / "training.md"
)
NORMS = ("batch", None)
UNITS = ("root", "blocks", "recipe")


def recipe():
    """The functions of the page."""
    code = re.search(r"## FSDP2.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S).group(1)
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def make_model(norm, scale=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    options = {"bottleneck": 4, "block_prior": True, "gate_norm": norm, "gate_scale": scale}
    return S2SentModel.from_encoder(encoder, "last:2", **options).double()


def make_batch(rows=slice(None)):
    ids = torch.randint(5, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([6, 4, 5, 1, 6, 6, 2, 3])[:, None]
    return {"input_ids": ids[rows], "attention_mask": mask[rows].long()}


def shard(model, units):
    from torch.distributed.fsdp import fully_shard

    if units == "recipe":
        return recipe()["shard"](model)
    for block in model.encoder.encoder.layer if units == "blocks" else ():
        fully_shard(block)
    return fully_shard(sync_statistics(model))


@torch.no_grad()
def outputs(model, rows):
    """The embedding, of hidden states that are kept and of those that are pooled as they come; tokens and gates."""
    batch, share = make_batch(rows), consumers.KEPT_SHARE
    kept = model(**batch).embedding
    consumers.KEPT_SHARE = 0
    streamed = model(**batch).embedding
    consumers.KEPT_SHARE = share
    more = model(**batch, output_tokens=True, output_gates=True)
    return [kept, streamed, more.tokens, more.gates]


def trained(model, rows):
    """Two steps on ``rows`` of the batch, then the outputs for them."""
    own = [p for name, p in model.named_parameters() if name.endswith("gate_scale")]
    rest = [p for p in model.parameters() if not any(p is one for one in own)]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": own, "lr": 1e-2}], lr=1e-3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**make_batch(rows)).embedding.square().sum(dim=1).mean().backward()
        optimizer.step()
    return outputs(model.eval(), rows)


def in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows, found = slice(4 * rank, 4 * rank + 4), {}
    for norm in NORMS:
        for units in UNITS:
            scale = 4.0 if units == "recipe" else None
            model = shard(make_model(norm, scale), units)
            if units == "root":
                states = [torch.zeros(1, 2, 16, dtype=torch.float64)] * 2
                try:
                    model.selector.pool(states)
                except ValueError as error:
                    found["outside"] = str(error)
            found[norm, units] = trained(model, rows)
            recipe()["save"](model, f"{folder}/{norm}-{units}")
            if units == "recipe":
                selector, batch = model.selector, torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(2))
                states = list(batch.double())
                pool = selector.blockwise()
                with torch.no_grad():
                    for block, state in enumerate(states):
                        pool.add(block, state)
                    found[norm, "methods"] = [
                        selector(states),
                        selector.pool(states),
                        selector.gates(states),
                        pool.result(),
                    ]
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder with the models that two processes saved, and what each found."""
    folder = tmp_path_factory.mktemp("sharded")
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}"
    code += "; import test_fsdp as t; t.in_a_process(int(sys.argv[1]), sys.argv[2])"
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # else FSDP2 takes the one GPU for both
    running = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], env=on_cpu) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=300) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("norm", NORMS)
def test_two_processes_train_what_one_trains(sharded, norm, units):
    folder, found = sharded
    model = make_model(norm, 4.0 if units == "recipe" else None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = trained(model, slice(None))
    for rank in (0, 1):
        for got, all_rows in zip(found[rank][norm, units], wanted, strict=True):
            torch.testing.assert_close(got, all_rows[4 * rank : 4 * rank + 4], rtol=1e-6, atol=1e-8)
    saved = S2SentModel.from_pretrained(folder / f"{norm}-{units}", dtype=torch.float64)
    assert absent.needed(saved.missing_weights, saved.encoder) == saved.unexpected_weights == []
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], tensor, rtol=1e-6, atol=1e-8, msg=name)
    assert all(
        not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if "selector" in name
    )


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
def test_a_selector_of_its_own_gathers_for_its_methods(sharded, norm):
    folder, found = sharded
    selector = S2SentModel.from_pretrained(folder / f"{norm}-recipe", dtype=torch.float64).selector
    states = list(torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(2)).double())
    pooled = selector.pool(states)
    for rank in (0, 1):
        for got, wanted in zip(
            found[rank][norm, "methods"], (selector(states), pooled, selector.gates(states), pooled), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_a_shard_alone_is_refused(sharded):
    for found in sharded[1]:
        assert found["outside"].startswith("down: expected parameters that FSDP2 has gathered, got a shard of them: ")
