"""A small random model of the class and configuration of a large one: what is true of its family shows there too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from rayalign.engine.model.context import rope_settings
from rayalign.engine.model.folder import FAILURES

WINDOW, VOCABULARY, WIDTH, POSITIONS = 8, 48, 64, 16
LENGTHS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "keep_window_size", "local_attention",
    "attention_chunk_size", "floor_scale", "index_topk", "index_topk_blocks", "index_block_size",
)  # fmt: skip
"""Numbers of tokens in configurations: what is nearer, or among so many, is treated otherwise than the rest."""
MOST_PARAMETERS = 100_000_000
"""The largest model that is made only to be tried: 400 MB."""
CPU = torch.device("cpu")


def shrunken(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel | None:
    """Fewer layers (one of each type), a small vocabulary, and whatever ends with the length ends before a short text.

    Weights are large enough that every mistake shows. None where no small model can be made.
    """
    for make in (fewer_layers, smaller):
        try:
            config = make(copy.deepcopy(model.config))
            shorten(config)
            with torch.device("meta"):
                fits = num_parameters(randomly_initialised(model, config)) <= MOST_PARAMETERS
            if fits:
                return randomised(partial(randomly_initialised, model, config), device or model.device)
        except FAILURES:
            continue  # the family does not come in that shape
    return None


def probe_for(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A small random model that computes as ``model`` does, or ``model`` itself where none can be made."""
    small = shrunken(model, device)
    return small if small is not None and computes(small) else model


@torch.no_grad()
def computes(model: PreTrainedModel) -> bool:
    """Whether a model reads a text at all."""
    try:
        model.base_model(input_ids=torch.arange(1, 6, device=model.device)[None], use_cache=False)
    except FAILURES:
        return False
    return True


def shorten(config: PretrainedConfig) -> None:
    """Have windows and RoPE, and whatever else changes with the position or the length of a text, do so early."""
    text = config.get_text_config()
    for name in LENGTHS:
        if isinstance(size := getattr(text, name, None), int) and size > WINDOW:
            setattr(text, name, WINDOW)
    shorten_rope(text)


def shorten_rope(config: PretrainedConfig) -> None:
    """Where RoPE changes with the position or the length of a text, have it do so early."""
    for rope in rope_settings(config):
        if rope["rope_type"] == "dynamic":
            config.max_position_embeddings = POSITIONS
        if rope.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = POSITIONS


def randomised(make: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """The model that is made, with new weights that depend on nothing else; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        probe = make()
        for parameter in probe.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return probe.to(device).eval()


def miniature(model: PreTrainedModel) -> PreTrainedModel | None:
    """A small random model of the same class and configuration, whatever the family; None where none can be made.

    Unlike :func:`shrunken` it need not read texts as the family is known to: it shows what becomes of its tensors.
    """
    if num_parameters(model) <= MOST_PARAMETERS:
        return randomised(lambda: randomly_initialised(model, copy.deepcopy(model.config)), CPU)
    for make in (smaller, fewer_layers):
        try:
            config = make(copy.deepcopy(model.config))
            with torch.device("meta"):
                fits = num_parameters(randomly_initialised(model, config)) <= MOST_PARAMETERS
            if fits:
                return randomised(partial(randomly_initialised, model, config), CPU)
        except FAILURES:
            continue  # the family does not come in that shape
    return None


def randomly_initialised(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    made: PreTrainedModel = type(model)(config).float()
    made.generation_config = GenerationConfig()  # not the one that is made of this configuration: it may be invalid
    return made


def num_parameters(model: PreTrainedModel) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def fewer_layers(config: PretrainedConfig) -> PretrainedConfig:
    """One layer of each kind, by everything that is said of layers one by one; a small vocabulary."""
    for own in (config, *(getattr(config, name) for name in config.sub_configs)):
        total = getattr(own, "num_hidden_layers", None)
        if not isinstance(total, int):
            continue
        facts = own.to_dict()
        lists = {name: value for name, value in facts.items() if isinstance(value, list) and len(value) == total}
        kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True)) or [()] * total
        kept = sorted({kinds.index(kind) for kind in set(kinds)})
        kept = kept if len(kept) > 1 else list(range(min(2, total)))
        for name, value in lists.items():
            setattr(own, name, [value[layer] for layer in kept])
        own.num_hidden_layers = len(kept)
        if getattr(own, "first_k_dense_replace", 0):
            own.first_k_dense_replace = 1
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id = VOCABULARY, None
    if getattr(text, "unpadded_vocab_size", None):
        text.unpadded_vocab_size = VOCABULARY - 8
    return config


def smaller(config: PretrainedConfig) -> PretrainedConfig:
    """Also narrow: few heads and experts, and layers of little width."""
    config = fewer_layers(config)
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    grouped = getattr(text, "num_key_value_heads", None) not in (None, text.num_attention_heads)
    text.num_attention_heads, text.hidden_size = 4, 4 * width
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = 2 if grouped else 4
    for name, most in {
        "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1,
    }.items():  # fmt: skip
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > most:
            setattr(text, name, most)
    return config
