"""Capture over encoder families: which blocks and final norms are found, what is handed over, and what the hooks of a post-norm
and of a pre-norm family survive. Tiny random encoders."""

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import transformers as tf
from torch import nn

from s2sent_kernels import S2SentSelector, families
from s2sent_kernels.capture import BlockCapture, _thread
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.transformers import S2SentModel

N, D = 4, 32
COMMON = {
    "vocab_size": 64,
    "hidden_size": D,
    "num_hidden_layers": N,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**COMMON, "num_key_value_heads": 2, "head_dim": 16}
POST_NORM = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**COMMON)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**COMMON)),
    "xlm-roberta": lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**COMMON)),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**COMMON)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=64, max_position_embeddings=64, dim=D, n_layers=N, n_heads=2, hidden_dim=48)
    ),
    "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**COMMON, embedding_size=16)),
    "deberta-v2": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(**COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm")
    ),
    "nomic-bert": lambda: tf.NomicBertModel(tf.NomicBertConfig(**{**COMMON, "head_dim": 16})),
    "albert": lambda: tf.AlbertModel(tf.AlbertConfig(**COMMON, embedding_size=8)),
    "albert, two groups": lambda: tf.AlbertModel(tf.AlbertConfig(**COMMON, embedding_size=8, num_hidden_groups=2)),
}
PRE_NORM = {
    "modernbert": lambda: tf.ModernBertModel(tf.ModernBertConfig(**COMMON)),
    "t5": lambda: tf.T5EncoderModel(
        tf.T5Config(vocab_size=64, d_model=D, d_kv=16, d_ff=48, num_layers=N, num_heads=2, pad_token_id=0)
    ),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**DECODER)),
    "qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(**DECODER)),
    "mistral": lambda: tf.MistralModel(tf.MistralConfig(**DECODER)),
}
ALL = {**POST_NORM, **PRE_NORM}
family = pytest.mark.parametrize("name", ALL)
one_of_each = pytest.mark.parametrize(
    "name", ["bert", "modernbert", "albert"]
)  # post-norm, pre-norm, a block that is shared


def make_encoder(name, seed=0):
    """An encoder in eval mode, none of whose norms is at its initial value."""
    torch.manual_seed(seed)
    encoder = ALL[name]().eval()
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if "norm" in key.lower():
                parameter.add_(torch.rand_like(parameter))
    return encoder


@family
def test_as_many_tokens_as_there_are_positions(name):
    """One token more than the position table has rows fails; a family without a table has no limit."""
    encoder = make_encoder(name)
    count = families.positions(encoder)
    tables = {
        "bert",
        "roberta",
        "xlm-roberta",
        "mpnet",
        "distilbert",
        "electra",
        "deberta-v2",
        "albert",
        "albert, two groups",
    }
    assert (count is not None) == (name in tables)
    tokens = torch.full((1, (count or 70)), 5)
    with torch.no_grad():
        encoder(tokens, attention_mask=torch.ones_like(tokens))
        if count is not None:
            tokens = torch.full((1, count + 1), 5)
            with pytest.raises((IndexError, RuntimeError)):
                encoder(tokens, attention_mask=torch.ones_like(tokens))


def make_inputs(seed=0):
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([[7], [3], [5]])
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths).long()}


def make_selector(num_blocks=N):
    torch.manual_seed(0)
    return S2SentSelector(D, num_blocks, 8, 4).eval()


def recorded(encoder, inputs):
    """The N blocks' outputs as transformers records them, the last one after the final norm; and the final norm's input."""
    before, norm = [], families.find_final_norm(encoder)
    if norm is not None:
        handle = norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    with torch.no_grad():
        output = encoder(**inputs, output_hidden_states=True)
    if norm is not None:
        handle.remove()
        assert len(before) == 1
    return list(output.hidden_states[1:]), before, output.last_hidden_state


def assert_same(actual, wanted):
    assert len(actual) == len(wanted)
    for n, (ours, theirs) in enumerate(zip(actual, wanted, strict=True)):
        assert torch.equal(ours, theirs), n


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert _thread.calls == []


# ---------------------------------------------------------------- what is handed over


@family
def test_without_block_norm_equals_output_hidden_states(name):
    encoder, inputs = make_encoder(name), make_inputs()
    hidden_states, before, _ = recorded(encoder, inputs)
    with BlockCapture(encoder, block_norm=None) as capture, torch.no_grad():
        assert_same(capture.collect(**inputs), hidden_states[:-1] + (before or hidden_states[-1:]))


@family
def test_final_norm(name):
    encoder, inputs = make_encoder(name), make_inputs()
    hidden_states, _, last = recorded(encoder, inputs)
    norm = families.find_final_norm(encoder)
    assert (norm is not None) == (name in PRE_NORM)
    with BlockCapture(encoder) as capture, torch.no_grad():
        wanted = hidden_states if norm is None else [norm(state) for state in hidden_states[:-1]] + [last]
        assert_same(capture.collect(**inputs), wanted)


@one_of_each
def test_layernorm_without_parameters(name):
    encoder, inputs = make_encoder(name), make_inputs()
    with torch.no_grad():
        raw = BlockCapture(encoder, block_norm=None).collect(**inputs)
        got = BlockCapture(encoder, block_norm="layernorm").collect(**inputs)
    assert_same(got, [nn.functional.layer_norm(state, (D,)) for state in raw])


@family
def test_some_blocks_pooled(name, kept_or_streamed):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector(3)
    with torch.no_grad():
        everything = BlockCapture(encoder).collect(**inputs)
        capture = BlockCapture(encoder, [-1, 0, 2])
        assert_same(capture.collect(**inputs), [everything[0], everything[2], everything[3]])
        wanted = selector.pool([everything[0], *everything[2:]], inputs["attention_mask"])
        torch.testing.assert_close(capture.pool(selector, **inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRE_NORM)
def test_streaming_lets_normed_copies_go(name, streamed):
    """The final norm makes a copy of each chosen block: none is left when the next block, or the next norm, starts."""
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    capture, norm, normed, alive = BlockCapture(encoder), families.find_final_norm(encoder), [], []

    def count(module, args):
        alive.append(sum(copied() is not None for copied in normed))

    def keep(module, args, output):
        normed.append(weakref.ref(output))

    for module in (*capture._modules, norm):
        module.register_forward_pre_hook(count)
    norm.register_forward_hook(keep)
    with torch.no_grad():
        capture.pool(selector, **inputs)
        assert alive == [0] * (2 * N + 1) and len(normed) == N + 1  # the encoder's own norm is the last
        normed.clear(), alive.clear()
        capture.collect(**inputs)
        assert alive == [0, 0, 1, 1, 2, 2, 3, 3, 4]  # the probe sees what is kept


def test_only_the_last_run_of_a_shared_block():
    encoder, inputs = make_encoder("albert"), make_inputs()
    hidden_states = recorded(encoder, inputs)[0]
    capture = BlockCapture(encoder, "last:1")
    assert capture.blocks == (3,) and len(set(families.find_blocks(encoder))) == 1
    with torch.no_grad():
        for _ in range(2):
            assert_same(capture.collect(**inputs), hidden_states[-1:])


# ---------------------------------------------------------------- what it survives


@family
def test_gradient_checkpointing(name):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    if not encoder.supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this family")
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    capture = BlockCapture(encoder.train())

    def gradients():
        encoder.zero_grad()
        capture.pool(selector, **inputs).square().sum().backward()
        return {key: value.grad.clone() for key, value in encoder.named_parameters() if value.grad is not None}

    wanted = gradients()
    assert len(wanted) > 4 * N
    newer = getattr(encoder, "activation_checkpointing_enable", None)
    (newer or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    got = gradients()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


@one_of_each
@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
def test_compiled(name):
    encoder, inputs = make_encoder(name), make_inputs()
    wanted = BlockCapture(copy.deepcopy(encoder))
    torch._dynamo.reset()
    capture = BlockCapture(torch.compile(encoder, backend="eager"))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(capture.collect(**inputs), wanted.collect(**inputs))
    torch._dynamo.reset()


@family
@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
def test_compiled_whole_into_one_graph(name):
    """Encoder, hooks and selector."""
    pool, selector, inputs = BlockCapture(make_encoder(name)).pool, make_selector(), make_inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(pool, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(selector, **inputs), pool(selector, **inputs))
    torch._dynamo.reset()


@one_of_each
@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
def test_compiled_whole_with_gradients(name):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    pool = BlockCapture(encoder).pool
    weights = [selector.down.weight, encoder.get_input_embeddings().weight]
    torch._dynamo.reset()
    wanted, got = (
        torch.autograd.grad(call(selector, **inputs).square().sum(), weights)
        for call in (pool, torch.compile(pool, backend="aot_eager", fullgraph=True))
    )
    torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()


@one_of_each
def test_deepcopy_and_pickle(name):
    encoder, inputs = make_encoder(name), make_inputs()
    capture = BlockCapture(encoder)
    with torch.no_grad():
        wanted = capture.collect(**inputs)
        for other in (copy.deepcopy(capture), pickle.loads(pickle.dumps(capture))):
            assert other.encoder is not encoder and other._norm is families.find_final_norm(other.encoder)
            assert_same(other.collect(**inputs), wanted)


@one_of_each
def test_loaded_in_another_process(name, tmp_path):
    encoder, inputs = make_encoder(name), make_inputs()
    capture = BlockCapture(encoder)
    with torch.no_grad():
        torch.save((capture, inputs, capture.collect(**inputs)), tmp_path / "capture.pt")
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "capture, inputs, wanted = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    got = capture.collect(**inputs)\n"
        "torch.testing.assert_close(got, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "capture.pt")], check=True, timeout=120)


def embed(capture, selector, inputs):
    torch.set_num_threads(1)
    with torch.no_grad():
        return capture.collect(**inputs), capture.pool(selector, **inputs)


@family
def test_as_a_model_of_transformers(name, tmp_path):
    """Saved, loaded, copied and pickled, each listens to its own encoder and gives the same bits."""
    model, inputs = S2SentModel.from_encoder(make_encoder(name), "last:3", bottleneck=4), make_inputs()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**inputs).embedding
        for other in (S2SentModel.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other.encoder) is type(model.encoder) and other.encoder is not model.encoder
            assert other._capture.encoder is other.encoder
            assert torch.equal(other(**inputs).embedding, wanted)


def test_a_pool_of_spawned_processes():
    """The processes receive the pickled capture, and with it the encoder."""
    cases = [(BlockCapture(make_encoder(name)), make_selector(), make_inputs()) for name in ("bert", "modernbert")]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(embed, cases)
    for (states, pooled), case in zip(found, cases, strict=True):
        wanted_states, wanted_pooled = embed(*case)
        assert_same(states, wanted_states)
        assert torch.equal(pooled, wanted_pooled)


@one_of_each
def test_threads_on_one_model(name):
    encoder, selector = make_encoder(name), make_selector()
    capture, barrier, wrong = BlockCapture(encoder), threading.Barrier(2, timeout=60), []
    batches = [make_inputs(1), make_inputs(2)]
    with torch.no_grad():
        wanted = [(capture.collect(**inputs), capture.pool(selector, **inputs)) for inputs in batches]

    def meet(module, args):
        barrier.wait()  # both threads are inside the forward at once

    capture._modules[0].register_forward_pre_hook(meet)

    def work(number):
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_same(capture.collect(**batches[number]), wanted[number][0])
                    assert torch.equal(capture.pool(selector, **batches[number]), wanted[number][1])
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["bert", "modernbert", "albert"])
def test_failed_and_repeated_forwards(name):
    encoder, inputs, selector = make_encoder(name), make_inputs(), make_selector()
    capture, runs = BlockCapture(encoder), []

    def fail(module, args):
        runs.append(module)
        if len(runs) == 3:
            raise FloatingPointError("third run")

    with torch.no_grad():
        wanted = [capture.collect(**inputs), capture.pool(selector, **inputs)]
        handles = [module.register_forward_pre_hook(fail) for module in dict.fromkeys(capture._modules)]
        with pytest.raises(FloatingPointError, match="third run"):
            capture.collect(**inputs)
        for handle in handles:
            handle.remove()
        for _ in range(2):
            assert_same(capture.collect(**inputs), wanted[0])
            assert torch.equal(capture.pool(selector, **inputs), wanted[1])
