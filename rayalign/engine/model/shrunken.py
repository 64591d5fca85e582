"""A small random model of the class and configuration of a large one: what is true of its family shows there too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from rayalign.engine.model.attention import attention_kind
from rayalign.engine.model.context import rope_settings
from rayalign.engine.model.kinds import FAILURES

WINDOW, VOCABULARY, WIDTH, POSITIONS = 8, 48, 64, 16
MOST_PARAMETERS = 100_000_000
"""The largest model that is made only to be tried: 400 MB."""
CPU = torch.device("cpu")


def shrunken(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """Fewer layers (one of each type), a small vocabulary, and windows and RoPE that end before a short text does.

    Weights are large enough that every mistake shows.
    """
    config = copy.deepcopy(model.config)
    config.vocab_size, config.pad_token_id = VOCABULARY, None
    for name, most in {
        "sliding_window": WINDOW,
        "attention_chunk_size": WINDOW,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": 2,
    }.items():
        if (getattr(config, name, None) or 0) > most:
            setattr(config, name, most)
    if isinstance(attention_kind(config).reach, Mapping):
        config.layer_types = sorted(set(config.layer_types))
        config.num_hidden_layers = len(config.layer_types)
    shorten_rope(config)
    return randomised(lambda: type(model)(config).float(), device or model.device)


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
