"""Command line and integrations on one GPU and on two; S2SENT_TEST_DEVICE=cpu checks the tests themselves on the CPU.

Several processes may form other batches than one does, and an encoder's products promise no bits across shapes. So where the
bits of two devices are compared, all texts have one length and all batches one size.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from builders import assert_close, make_sentence_transformer, save_encoder, sentences

from s2sent_kernels import S2SentSelector, backends
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.cli import main

pytest.importorskip("transformers")

from s2sent_kernels.transformers import S2SentModel

DEVICE = os.environ.get("S2SENT_TEST_DEVICE") or "cuda"
ON_CUDA = DEVICE == "cuda"
TWO = ["cuda:0", "cuda:1"] if ON_CUDA else [DEVICE] * 2
BATCH = 8
TEXTS = sentences(20 * BATCH)  # five parts
FLOAT32 = 1e-5  # of the largest magnitude: some tens of float32's steps; TF32 would be off by a hundred times that

pytestmark = pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="torch sees no CUDA device")
needs_two = pytest.mark.skipif(
    ON_CUDA and torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices"
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An encoder of 2 blocks and 16 features, a selector for it, both as an S2SentModel, and files of texts, pairs and scores."""
    root = tmp_path_factory.mktemp("devices")
    save_encoder(root / "encoder")
    torch.manual_seed(1)
    selector = S2SentSelector(16, 2, 4, 4, block_prior=True)
    selector.save_pretrained(root / "selector", about={"blocks": [0, 1]})
    make_model(root).save_pretrained(root / "model")
    (root / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    others = sentences(len(TEXTS), seed=1)
    scored = [
        f"{('dev', 'test')[i % 2]}\t{i % 6}\t{a}\t{b}" for i, (a, b) in enumerate(zip(TEXTS, others, strict=True))
    ]
    (root / "sts.tsv").write_text("\n".join(["split\tscore\tsentence1\tsentence2", *scored]) + "\n")
    rows = [f"{a}\t{b}" for a, b in zip(TEXTS[:32], others, strict=False)]
    (root / "pairs.tsv").write_text("\n".join(["anchor\tpositive", *rows]) + "\n")
    return root


def make_model(places, device="cpu"):
    """A selector whose every tensor matters."""
    import transformers

    encoder = transformers.BertModel.from_pretrained(places / "encoder").to(device)
    model = S2SentModel.from_encoder(encoder, None, bottleneck=4, block_prior=True)
    generator = torch.Generator().manual_seed(2)
    for tensor in model.selector.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return model


def make_batch(B=5, L=9, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(L) < torch.randint(1, L + 1, (B, 1), generator=generator)).long()
    ids = torch.randint(20, (B, L), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def rms(found, exact):
    assert found.shape == exact.shape
    return (found.detach().cpu().double() - exact.detach().cpu()).square().mean().sqrt().item()


def double(model):
    exact = copy.deepcopy(model).cpu().double()
    exact.selector.backend = "reference"
    return exact


def program(text, *arguments, launch=(), **environment):
    """Python in a process of its own. Without a ``launch`` it sees one GPU; with one, each process of the trainer uses one."""
    command = [sys.executable, *launch, *(("-c", text) if text else ()), *map(str, arguments)]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        **({} if launch else {"CUDA_VISIBLE_DEVICES": "0"}),
        **environment,
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------- encode


@pytest.fixture
def encode(places, tmp_path):
    pytest.importorskip("sentence_transformers")
    parquet = pytest.importorskip("pyarrow.parquet")

    def encoded(name, *devices):
        options = (
            "--model",
            places / "encoder",
            "--selector",
            places / "selector",
            "--dtype",
            "float32",
            "--batch-tokens",
            8 * BATCH,
            "--keep-text",
            "--part-rows",
            4 * BATCH,
        )
        run("encode", places / "texts.txt", "--output", tmp_path / name, *options, "--device", *devices)
        table = parquet.read_table(tmp_path / name)
        assert table["text"].to_pylist() == TEXTS
        return torch.tensor(table["embedding"].to_pylist())

    return encoded


def test_encode_gives_what_the_cpu_gives_and_the_same_bits_again(encode):
    found = encode("a.parquet", DEVICE)
    assert_close(found, encode("cpu.parquet", "cpu"), FLOAT32)
    assert torch.equal(found, encode("b.parquet", DEVICE))


@needs_two
def test_encode_on_two_devices(encode):
    assert torch.equal(encode("two.parquet", *TWO), encode("one.parquet", TWO[0]))


@needs_two
@pytest.mark.parametrize("how", ["pool", "devices"])
def test_a_sentence_transformer_on_two_devices(places, how):
    pytest.importorskip("sentence_transformers")

    model = make_sentence_transformer(places / "encoder", places / "selector").to(TWO[0])
    expected = model.encode(TEXTS, batch_size=BATCH)
    if how == "devices":
        found = model.encode(TEXTS, batch_size=BATCH, chunk_size=2 * BATCH, device=TWO)
    else:
        pool = model.start_multi_process_pool(TWO)
        try:
            found = model.encode(TEXTS, batch_size=BATCH, chunk_size=2 * BATCH, pool=pool)
        finally:
            model.stop_multi_process_pool(pool)
    assert torch.equal(torch.from_numpy(found), torch.from_numpy(expected))


# ---------------------------------------------------------------- evaluate


def test_evaluate_prints_the_cpus_table(places, tmp_path):
    for module in ("scipy", "matplotlib"):
        pytest.importorskip(module)
    tables = []
    for device in ("cpu", DEVICE):
        folder = tmp_path / f"on-{device}-{len(tables)}"
        options = ("--sts", places / "sts.tsv", "--output-dir", folder, "--device", device)
        run("evaluate", "--model", places / "encoder", "--selector", places / "selector", *options)
        tables.append(json.loads((folder / "evaluation.json").read_text())["sts"]["sts"])
    expected, found = tables
    assert sorted(found) == sorted(expected) and "s2sent" in found
    for pooling, scores in expected.items():
        assert found[pooling] == pytest.approx(scores, abs=0.01), pooling  # the last digit of the table


# ---------------------------------------------------------------- train


def train_arguments(places, output, *options):
    return [
        "train",
        "--data",
        places / "pairs.tsv",
        "--model",
        places / "encoder",
        "--output",
        output,
        "--bottleneck",
        4,
        "--device",
        DEVICE,
        *options,
    ]


@pytest.fixture
def tuned():
    """Loads a fine-tuned model; skips where the extra ``train`` is not installed."""
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from s2sent_kernels.sentence_transformers import load

    def loaded(folder):
        model = load(folder, device=DEVICE)
        assert torch.isfinite(model.encode(TEXTS, convert_to_tensor=True)).all()
        return model.state_dict()

    return loaded


def changed(state, places):
    """Whether encoder and selector were trained: a query weight and W1, whose initial values are known."""
    from transformers import BertModel

    begun = BertModel.from_pretrained(places / "encoder").state_dict()["encoder.layer.0.attention.self.query.weight"]
    (found,) = (tensor for name, tensor in state.items() if name.endswith("layer.0.attention.self.query.weight"))
    return not torch.equal(found.cpu(), begun) and state["1.selector.block_prior"].abs().max() > 0


def test_train_in_either_precision(places, tmp_path, tuned):
    states = []
    for precision in ("float32", "bfloat16"):
        options = ("--epochs", 2, "--batch-size", 8, "--precision", precision, "--dev", places / "sts.tsv")
        arguments = train_arguments(places, tmp_path / precision, *options)
        assert "dev " in program("", "-m", "s2sent_kernels.cli", *arguments)
        states.append(tuned(tmp_path / precision))
        assert changed(states[-1], places)
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in states[-1].values())
    exact, rounded = (state["1.selector.down.weight"] for state in states)
    assert not torch.equal(exact, rounded)  # autocast was on


# Three runs: whole, interrupted after its first epoch, resumed. PyTorch's own backward is deterministic only on request.
RESUME = """
import sys, torch
from transformers import TrainerCallback
from s2sent_kernels.tools import training
from s2sent_kernels.cli import main

class Interrupt(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch and state.epoch > 0.5:
            raise KeyboardInterrupt

torch.use_deterministic_algorithms(True, warn_only=True)
whole, parts, *arguments = sys.argv[1:]
assert main([*arguments, "--output", whole]) == 0
plain = training._Trainer
training._Trainer = lambda callbacks, **options: plain(callbacks=[*callbacks, Interrupt()], **options)
assert main([*arguments, "--output", parts]) == 130
training._Trainer = plain
assert main([*arguments, "--output", parts, "--resume"]) == 0
"""


def test_a_resumed_training_ends_as_an_uninterrupted_one(places, tmp_path, tuned):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = train_arguments(places, tmp_path / "unused", "--epochs", 2, "--batch-size", 8)
    program(RESUME, whole, parts, *arguments, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    expected, found = tuned(whole), tuned(parts)
    assert changed(expected, places)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


# Each process saves the model it ends with. Without --dev, which would make all of them load the best epoch's weights.
TWO_PROCESSES = """
import os, sys, torch
from s2sent_kernels.tools import training
from s2sent_kernels.cli import main

check = training.validate.finite_state
def keep(name, model):
    check(name, model)
    torch.save(model.cpu().state_dict(), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")

training.validate.finite_state = keep
sys.exit(main(sys.argv[2:]))
"""


@needs_two
def test_two_processes_train_one_model(places, tmp_path, tuned):
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "program.py"))
    arguments = train_arguments(places, tmp_path / "out", "--epochs", 2, "--batch-size", 4)
    out = program("", tmp_path, *arguments, launch=launch)
    assert out.count("wrote ") == 1 and changed(tuned(tmp_path / "out"), places)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    statistics = "1.selector.norm.running_mean"  # the losses of different last batches
    assert not torch.equal(one[statistics], other[statistics])
    for name, tensor in one.items():
        assert "running" in name or torch.equal(tensor, other[name]), name


@needs_two
@pytest.mark.skipif(not ON_CUDA, reason="several GPUs are one process's to see")
def test_one_process_takes_one_gpu(places, tmp_path, capsys, tuned):
    assert main(list(map(str, train_arguments(places, tmp_path / "out")))) == 2
    error = capsys.readouterr().err
    assert "expected one GPU a process, got" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_train_behind_a_frozen_encoder(places, tmp_path, capsys):
    """An epoch is one batch. The first loss precedes any step, so it equals the CPU's. A second run gives the same bits."""

    def train(name, device):
        options = ("--freeze-encoder", "--cache", tmp_path / f"cache-{name}", "--epochs", 5, "--batch-size", 32)
        run(*train_arguments(places, tmp_path / name, *options, "--learning-rate", 1e-2), "--device", device)
        losses = [float(loss) for loss in re.findall(r"epoch \d+: loss ([\d.]+)", capsys.readouterr().out)]
        return losses, S2SentSelector.from_pretrained(tmp_path / name).state_dict()

    (on_cpu, _), (losses, state), (_, again) = train("cpu", "cpu"), train("one", DEVICE), train("two", DEVICE)
    assert losses[0] == pytest.approx(on_cpu[0], abs=2e-4)  # printed to 1e-4
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


# ---------------------------------------------------------------- export


@torch.no_grad()
def test_exported_to_onnx(places, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    onnxruntime = pytest.importorskip("onnxruntime")
    run("export", "--model", places / "model", "--output", tmp_path / "model.onnx", "--device", DEVICE)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    model, batch = make_model(places), make_batch(device="cpu")
    exact = double(model)(**batch).embedding
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    assert rms(torch.from_numpy(found), exact) <= 2 * rms(model(**batch).embedding, exact)


def can_compile():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils.cpp_extension import CUDA_HOME

    try:
        return bool(get_cpp_compiler()) and not (ON_CUDA and CUDA_HOME is None)
    except InvalidCxxCompiler:
        return False


@pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler, or no CUDA toolkit")
@torch.no_grad()
def test_exported_as_a_package(places, tmp_path):
    path = tmp_path / "model.pt2"
    run("export", "--model", places / "model", "--output", path, "--device", DEVICE)
    if ON_CUDA or backends()["native"].usable:
        assert b"s2sent::select_pool" in path.read_bytes()
    package, model = torch._inductor.aoti_load_package(str(path)), make_model(places).to(DEVICE)
    for B, L in ((1, 1), (5, 9), (7, 30)):
        batch = make_batch(B, L)
        exact = double(model)(**make_batch(B, L, device="cpu")).embedding
        found = package(batch["input_ids"], batch["attention_mask"])
        assert found.device.type == DEVICE and rms(found, exact) <= 2 * rms(model(**batch).embedding, exact)


# ---------------------------------------------------------------- transformers


def test_bfloat16_forward_and_backward(places):
    """Error against float64 at most twice that of the same model with PyTorch's own selector; same bits again."""
    model = make_model(places).bfloat16().to(DEVICE)
    plain, again, exact = copy.deepcopy(model), copy.deepcopy(model), double(model)
    plain.selector.backend = "reference"

    def results(some):
        embedding = some(**make_batch(32, 20, device=some.device)).embedding
        weights = torch.rand(embedding.shape, generator=torch.Generator().manual_seed(3)).to(embedding)
        (embedding * weights).sum().backward()
        encoder, selector = (
            torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
            for part in (some.encoder, some.selector)
        )
        return embedding, selector, encoder

    found, repeated = results(model), results(again)
    assert found[0].dtype == torch.bfloat16 and found[0].device.type == DEVICE
    for one, other, truth in zip(found, results(plain), results(exact), strict=True):
        assert rms(one, truth) <= 2 * rms(other, truth)
    assert torch.equal(found[0], repeated[0]) and torch.equal(found[1], repeated[1])


@torch.no_grad()
def test_moved_after_its_blocks_were_captured(places):
    moved, born = make_model(places).to(DEVICE), make_model(places, DEVICE)
    batch = make_batch()
    assert moved(**batch).embedding.device.type == DEVICE
    assert torch.equal(moved(**batch).embedding, born(**batch).embedding)
    back = copy.deepcopy(moved).cpu()
    on_cpu = {name: tensor.cpu() for name, tensor in batch.items()}
    assert torch.equal(back(**on_cpu).embedding, make_model(places)(**on_cpu).embedding)


def test_threads_on_one_model(places):
    """Each thread on a stream of its own, with and without gradients."""
    model = make_model(places).to(DEVICE)
    batches = [make_batch(4 + i, 9 + i, seed=i) for i in range(6)]
    expected = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected[grad] = [model(**batch).embedding for batch in batches]
    failed, done = [], []
    if ON_CUDA:
        torch.cuda.synchronize()

    def work(grad):
        with torch.cuda.stream(torch.cuda.Stream() if ON_CUDA else None), torch.set_grad_enabled(grad):
            for i in list(range(6)) * 5:
                found = model(**batches[i]).embedding
                if found.requires_grad != grad or not torch.equal(found, expected[grad][i]):
                    failed.append((grad, i))
                done.append(i)

    threads = [threading.Thread(target=work, args=(grad,)) for grad in (False, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 90 and not failed


@torch.no_grad()
def test_compiled(places):
    model = make_model(places).to(DEVICE)
    with BlockCapture(model.encoder) as capture:
        compiled = torch.compile(capture.pool, fullgraph=True, dynamic=True)
        for B, L in ((5, 9), (7, 30)):
            exact = double(model)(**make_batch(B, L, device="cpu")).embedding
            batch = make_batch(B, L)
            found = compiled(model.selector, **batch)
            assert rms(found, exact) <= 2 * rms(model(**batch).embedding, exact)
