"""Made the files in this folder. It was run once, at revision b096b88, before the package's modules were moved into folders, and
is kept to show how they were made; some of its imports name modules of that revision.

    python tests/data/write.py

The files are not to be written again: that later code reads them, with the same bits, is what they are for. A package compiled by
AOTInductor is not among them: it is 2 MB and runs on one kind of processor.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from types import SimpleNamespace
from typing import Any

import saved
import torch
import transformers
from safetensors.torch import save_file
from saved import FOLDER, TEXTS, D, N, WordTokenizer, tokens
from torch import Tensor, nn

B, L = 4, 7


def shaken(module: Any, seed: int) -> Any:
    """No tensor of a selector at its initial value; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.25)
                tensor.mul_(torch.where(torch.rand(tensor.shape, generator=generator) < 0.4, -1.0, 1.0))
        if module.norm is not None:
            module.norm.running_var.abs_()
    return module.eval()


def write_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[7], [3], [1], [5]])
    mask = (torch.arange(L) < lengths).long()
    mask[3] = torch.tensor([0, 1, 0, 1, 1, 1, 1])
    input_ids = torch.randint(4, 20, (B, L), generator=generator)
    token_mask = (torch.arange(L) < lengths).long()
    hidden_states = {f"hidden_state_{n}": torch.randn(B, L, D, generator=generator) for n in range(N)}
    rest = {"attention_mask": mask, "input_ids": input_ids * token_mask, "token_mask": token_mask}
    save_file({**hidden_states, **rest}, FOLDER / "inputs.safetensors")


def make_bert() -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=D, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def write_selectors() -> None:
    from s2sent_kernels import S2SentSelector, pretrained

    shaken(S2SentSelector(D, N, 5, 4, block_prior=True), 1).save_pretrained(FOLDER / "selector")
    trained = shaken(S2SentSelector(D, N, 6, 2, gate_norm=None, activation="relu"), 2)
    about = {"encoder": "an/encoder", "blocks": [0, 2, 3], "pooling": "mean", "max_length": 16}
    pretrained.save(trained, FOLDER / "trained", about)
    torch.save(shaken(S2SentSelector(D, N, 4, 8, activation="relu"), 3), FOLDER / "selector.pt")
    torch.save(shaken(S2SentSelector(D, 2, 4, 2), 4), FOLDER / "selector_of_2.pt")
    official = shaken(S2SentSelector(D, N, 4, 4, profile="official", backend="reference"), 5)
    (FOLDER / "selector.pkl").write_bytes(pickle.dumps(official))


def write_sentence_transformer() -> None:
    import tokenizers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    from s2sent_kernels.sentence_transformers import S2SentPooling

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **WordTokenizer().get_vocab()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source = FOLDER / "source"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=16,
    ).save_pretrained(source)  # fmt: skip
    make_bert().save_pretrained(source)
    transformer = Transformer(str(source))
    pooling = S2SentPooling.behind(transformer, [0, 1, 3], bottleneck=5, block_prior=True, pooling="last")
    shaken(pooling.selector, 6)
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu", prompts={"query": "the old "})
    model.save(str(FOLDER / "sentence_transformer"), create_model_card=False)
    shutil.rmtree(source)
    arguments = {"hidden_size": D, "num_blocks": N, "bottleneck": 5}
    alone = S2SentPooling(arguments, [0, 1, 2], "layernorm", "cls", include_prompt=False)
    shaken(alone.selector, 7)
    torch.save(alone, FOLDER / "pooling.pt")
    shaken(alone.selector, 8)
    (FOLDER / "pooling.pkl").write_bytes(pickle.dumps(alone))


def write_models() -> None:
    from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

    model = S2SentModel.from_encoder(make_bert(), "last:3", bottleneck=5, frequencies=2, block_prior=True)
    shaken(model.selector, 9)
    model.save_pretrained(FOLDER / "model")
    torch.manual_seed(1)
    classifier = S2SentForSequenceClassification.from_encoder(
        make_bert(), [0, 1, 2], num_labels=3, block_norm=None, bottleneck=4, pooling="cls"
    )
    shaken(classifier.model.selector, 10)
    classifier.save_pretrained(FOLDER / "classifier")


def write_captures() -> None:
    """On an encoder of torch alone, whose pickles do not change with the versions of other libraries."""
    from s2sent_kernels.capture import BlockCapture, BlockListener

    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, N, nn.LayerNorm(D), enable_nested_tensor=False).eval()
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    encoder.config = SimpleNamespace(num_hidden_layers=N, hidden_size=D)
    kept = copy.deepcopy(encoder)
    listener = BlockListener(copy.deepcopy(encoder), [0, 1])
    torch.save(listener, FOLDER / "listener.pt")
    capture = BlockCapture(encoder, [0, 2])
    torch.save(encoder, FOLDER / "encoder.pt")
    torch.save(capture, FOLDER / "capture.pt")
    assert not any(layer._forward_hooks for layer in kept.layers)


def write_cache() -> None:
    from s2sent_kernels import cache
    from s2sent_kernels.transformers import S2SentModel

    vocabulary = WordTokenizer().get_vocab()

    def call(self: Any, texts: list[str], max_length: int, **_: Any) -> Any:
        rows = [[vocabulary[word] for word in text.split()][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})

    WordTokenizer.__call__ = call
    encoder = S2SentModel.from_pretrained(FOLDER / "model").encoder
    cache.make(encoder, WordTokenizer(), TEXTS, FOLDER / "cache", saved.SETTINGS())
    for lock in (FOLDER / "cache").glob(".*"):
        lock.unlink()


class EveryOp(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        from s2sent_kernels import S2SentSelector

        self.selector = shaken(S2SentSelector(D, N, 5, 4, block_prior=True), 11)
        self.backend = backend
        self.groups = {"native": 1, "reference": N}[backend]

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        *u, mask = arguments
        ops, last, s = torch.ops.s2sent, self.backend, self.selector
        norm = (s.norm.weight, s.norm.bias, s.norm.running_mean, s.norm.running_var)
        gate = (s.down.weight, s.down.bias, s.up.weight, s.up.bias, *norm, s.block_prior)
        f, p = ops.squeeze(u, mask, None, 4, "paper", "mean", last)
        pooled = ops.select_pool(u, mask, None, *gate, 4, "cls", "tanh", 1e-6, last)
        tokens = ops.select(u, mask, None, *gate, 4, "relu", 1e-6, last)
        g = ops.gate(f, *gate, N, "tanh", 1e-6, last)
        v = ops.fuse(u, mask, None, g, last)
        dg = ops.fuse_backward(v, u, mask, None, last)
        du = ops.squeeze_backward(
            f, p, v, g, [B, L, D], torch.float32, torch.device("cpu"), [True] * N, mask, None, 4, "paper", "mean", last
        )
        sums, of_blocks = f.new_zeros(B, self.groups, D), f.new_zeros(B, N, D)
        for block in range(N):
            ops.squeeze_block(u[block], block, N, sums, of_blocks, mask, None, 4, "paper", "last", last)
        gate_grads = ops.gate_backward(dg, f, *gate, "tanh", 1e-6, last)
        pool_grads = ops.gate_pool_backward(pooled[0], f, p, *gate, "tanh", 1e-6, last)
        return f, p, *pooled, *tokens, g, v, dg, *du, sums, of_blocks, *gate_grads[:3], *pool_grads[:3]


def write_programs() -> None:
    hidden_states, mask = saved.states()
    for backend in saved.BACKENDS:
        with torch.no_grad():
            program = torch.export.export(EveryOp(backend).eval(), (*hidden_states, mask))
        torch.export.save(program, FOLDER / f"ops_{backend}.pt2")


def main() -> None:
    torch.set_num_threads(1)
    write_inputs()
    write_selectors()
    write_sentence_transformer()
    write_models()
    write_captures()
    write_cache()
    write_programs()
    expected = {}
    with torch.no_grad():
        for name, case in saved.CASES.items():
            expected |= {f"{name}: {key}": tensor.detach().contiguous().clone() for key, tensor in case().items()}
    save_file(expected, FOLDER / "expected.safetensors")
    (FOLDER / "environment.json").write_text(json.dumps(saved.environment(), indent=1) + "\n")
    assert tokens()["input_ids"].shape == (B, L)


if __name__ == "__main__":
    main()
