"""Every text encoder of the installed transformers, made tiny and random, and what BlockCapture makes of it.

python tests/architectures.py          # writes the table of docs/encoders.md; about four minutes on one core
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from s2sent_kernels import families, probe

PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
MARK = "<!-- written by tests/architectures.py -->\n\n"
VERDICTS = ("proven", "refused", "by name", "no blocks")
N, D = 3, 32
LARGEST = 5_000_000  # parameters
# Arguments of configurations that make a model tiny; each is given where a configuration has such an attribute.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size", "n_words"), 64),
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embed_dim", "embedding_size"), D),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers"), N),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), N),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 48),
    **dict.fromkeys(("d_inner", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size", "global_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_2d_position_embeddings"), 128
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "encoder_num_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "moe_top_k", "num_experts_per_token", "num_selected"), 2),
    "decoder_num_experts": 4,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "n_group": 1,
    "topk_group": 1,
    "projection_dim": D,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
    "decoder_start_token_id": 1,
    "attention_window": 8,
    "hidden_dropout_prob": 0.0,
}


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
ROPED = (
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "GlmOcrTextModel",
    "Glm4vTextModel",
    "Glm4vMoeTextModel",
    "GlmImageTextModel",
)
# Of single models; None leaves one of the above out.
OWN: dict[str, dict[str, Any]] = {
    "FunnelModel": {"num_hidden_layers": None, "block_sizes": [1, 1, 1]},
    "FunnelBaseModel": {"num_hidden_layers": None, "block_sizes": [1, 1, 1]},
    "GPTNeoModel": {"attention_types": [[["global"], N]], "num_layers": N},
    "LiltModel": {"hidden_size": 48, "num_attention_heads": 2, "channel_shrink_ratio": 2},
    "LukeModel": {"entity_vocab_size": 64, "entity_emb_size": D},
    "LayoutLMv3Model": {"coordinate_size": 5, "shape_size": 6},
    "Mamba2Model": {"head_dim": 16, "num_heads": 4, "expand": 2, "n_groups": 1},
    "ProphetNetModel": {"num_hidden_layers": None},
    "ReformerModel": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16), "attn_layers": ["local"] * N},
    **{name: {"rope_parameters": ROPE} for name in ROPED},
    "RoCBertModel": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
}


class Row(NamedTuple):
    """``verdict``: one of ``VERDICTS``. ``detail``: where blocks and norm are, or why they are not known."""

    name: str
    verdict: str
    detail: str


def classes() -> list[type]:
    """Every base model of transformers that takes token ids."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names: set[str] = set()
    for mapping in (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES):
        for value in mapping.values():
            names.update([value] if isinstance(value, str) else value)
    found = []
    for name in sorted(names):
        cls: Any = getattr(transformers, name, None)
        if cls is None or "DummyObject" in type(cls).__name__:  # not public, or of a package that is not installed
            continue
        taken = inspect.signature(cls.forward).parameters if isinstance(cls, type) else ()
        if "input_ids" in taken and getattr(cls, "config_class", None) is not None:
            found.append(cls)
    return found


def _arguments(cls: Any) -> dict[str, Any]:
    """Of its configuration, where it is to be tiny."""
    default = cls.config_class()
    known = {*inspect.signature(cls.config_class.__init__).parameters, *vars(default)}
    known |= {"hidden_size", "num_hidden_layers"} & set(dir(default))
    found = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        found["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    found |= OWN.get(cls.__name__, {})
    return {name: value for name, value in found.items() if value is not None}


def make(cls: Any, seed: int = 0) -> nn.Module:
    """A tiny random model in eval mode, none of whose norms is at its initial value. Raises what the model raises."""
    config = cls.config_class(**_arguments(cls))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > LARGEST:
        raise NotImplementedError(f"it still has {count / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model: nn.Module = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name.lower() or name.split(".")[-2:-1] == ["ln"]):
                parameter.add_(torch.rand_like(parameter))
    return model


def returned(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What the encoder returns, of the stack that the capture follows."""
    output: Any = model(**inputs, **families.without_cache(model))
    encoders = getattr(output, "encoder_last_hidden_state", None)
    return getattr(output, "last_hidden_state", None) if encoders is None else encoders


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two sentences, one of them with padding on the right."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0]])
    taken = inspect.signature(model.forward).parameters
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "decoder_input_ids": ids}
    return {name: tensor for name, tensor in inputs.items() if name in taken}


def row(cls: Any) -> Row | None:
    """What BlockCapture makes of such a model; None where no tiny one can be made."""
    name = cls.__name__
    try:
        model = make(cls)
    except Exception:
        return None
    try:
        found = probe.find(model)
    except probe.Unproven as error:
        return Row(name, "refused", str(error))
    except probe.CannotRun as error:
        return Row(name, "by name", str(error).partition("\n")[0])
    except ValueError as error:
        return Row(name, "no blocks", str(error).removeprefix("encoder: "))
    names = {id(module): place for place, module in model.named_modules()}
    blocks = names[id(found.blocks[-1])].rpartition(".")[0]
    detail = f"`{blocks}`" + ("" if found.norm is None else f", then `{names[id(found.norm)]}`")
    return Row(name, "proven", detail)


def rows() -> list[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [found for cls in classes() if (found := row(cls)) is not None]


def table(found: list[Row]) -> str:
    """The lines of the page after its ``MARK``."""
    import transformers

    numbers = {verdict: sum(each.verdict == verdict for each in found) for verdict in VERDICTS}
    counted = ", ".join(f"{number} {verdict}" for verdict, number in numbers.items())
    lines = [f"transformers {transformers.__version__}: {counted}.", "", "| model | | blocks and norm, or why not |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {each.name} | {each.verdict} | {each.detail.replace('|', '/')} |" for each in found]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(text + MARK + table(rows()), encoding="utf-8")
    print(PAGE)
