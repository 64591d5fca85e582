"""Proof that a model family reads packed rows as it reads plain sequences, before any row is packed."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rayalign.data.group import Candidate, Group
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.engine.attention import attention_kind
from rayalign.engine.forward import root_module
from rayalign.engine.scalar import is_scalar
from rayalign.errors import UserError

TOLERANCE = 1e-3
"""Nats per token, or units of score. Float32 rounding stays below 1e-5; a wrong mask is off by about 1."""

_WINDOW, _VOCABULARY, _WIDTH = 8, 48, 64

log = logging.getLogger(__name__)


def choose_layout(model: PreTrainedModel, *, device: torch.device | None = None) -> Layout:
    """The layout that ``model``'s family is proven to read right: ``packed`` where possible, else ``concatenated``.

    The proof is a float32 forward against transformers' own forward of each sequence alone, on a random model of the
    same configuration with fewer layers (one of each type), a small vocabulary and a window shorter than the sequences.
    A family outside the table of attention families is tried as it is, on plain sequences. ``device`` is where the
    family will compute, if the model's weights wait elsewhere. The result is kept in
    ``$RAYALIGN_CACHE`` (default ``~/.cache/rayalign``), one file per configuration, attention implementation and
    transformers version.

    Raises:
        UserError: not even plain sequences give the log-probabilities that transformers gives.
    """
    path = _cache_directory() / "parity" / f"{_key(model, device or model.device)}.json"
    if path.is_file():
        differences = json.loads(path.read_text(encoding="utf-8"))
    else:
        differences = measure(model, device=device)
        _write(path, differences)
    for layout in ("packed", "concatenated"):
        if differences.get(layout, float("inf")) <= TOLERANCE:
            return layout
        if layout in differences:
            log.warning(
                "%s models read %s rows wrongly: token log-probs or scores differ by up to %.3g from plain sequences",
                model.config.model_type,
                layout,
                differences[layout],
            )
    numbers, unit = ("scores", "") if is_scalar(model) else ("log-probs", " nats")
    raise UserError(
        f"model.name: {numbers} of {model.config.model_type} models differ by {differences['concatenated']:.3g}{unit} "
        "from what transformers computes, so this family cannot be trained"
    )


def measure(model: PreTrainedModel, *, device: torch.device | None = None) -> dict[str, float]:
    """Largest |Δ log-prob| of a token, in nats, or |Δ score|, for every layout that the family may use."""
    known = attention_kind(model.config).reach is not None
    layouts: tuple[Layout, ...] = ("packed", "concatenated") if known else ("concatenated",)
    probe = shrunken(model, device) if known else model
    groups = _groups()
    with torch.no_grad():
        expected = (plain_score if is_scalar(probe) else plain_token_logp)(probe, groups)
        return {layout: _difference(probe, groups, layout, expected) for layout in layouts}


def plain_token_logp(model: PreTrainedModel, groups: Sequence[Group]) -> Float[Tensor, " N"]:
    """Response log-probs by the model's own forward, one sequence at a time, in the packer's order."""
    columns = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long().to(model.device)
            logp = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(dim=-1)
            columns.append(logp.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0])
    return torch.cat(columns)


def plain_score(model: PreTrainedModel, groups: Sequence[Group]) -> Float[Tensor, " C"]:
    """Every candidate's score by the model's own backbone and head, one sequence at a time."""
    scores = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long().to(model.device)
            scores.append(model.score(model.base_model(input_ids=ids[None]).last_hidden_state)[0, -1, 0].float())
    return torch.stack(scores)


def shrunken(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """A small random model of the same class: weights large enough that every mistake shows."""
    config = copy.deepcopy(model.config)
    config.vocab_size, config.pad_token_id = _VOCABULARY, None
    for name, most in {
        "sliding_window": _WINDOW,
        "attention_chunk_size": _WINDOW,
        "intermediate_size": _WIDTH,
        "moe_intermediate_size": _WIDTH,
        "num_hidden_layers": 2,
    }.items():
        if (getattr(config, name, None) or 0) > most:
            setattr(config, name, most)
    if isinstance(attention_kind(config).reach, Mapping):
        config.layer_types = sorted(set(config.layer_types))
        config.num_hidden_layers = len(config.layer_types)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        probe = type(model)(config).float()
        for parameter in probe.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return probe.to(device or model.device).eval()


def _groups() -> list[Group]:
    """Ragged groups of 1, 2 and 4 candidates, most of them longer than the window."""
    random = np.random.default_rng(0)

    def ids(shortest: int, longest: int) -> np.ndarray:
        return random.integers(0, _VOCABULARY, random.integers(shortest, longest + 1)).astype(np.int32)

    def candidate() -> Candidate:
        tokens = ids(1, 3 * _WINDOW)
        return Candidate(ids=tokens, mask=np.ones(len(tokens), dtype=np.bool_))

    return [
        Group(prompt_ids=ids(2, 2 * _WINDOW), candidates=tuple(candidate() for _ in range(num_candidates)))
        for num_candidates in (2, 1, 4)
    ]


def _difference(probe: PreTrainedModel, groups: Sequence[Group], layout: Layout, expected: Tensor) -> float:
    batch = pack(
        groups, positions=range(len(groups)), num_candidates=4, pad_id=0, row_tokens=8 * _WINDOW, layout=layout
    )
    moved: dict[str, Any] = {
        name: value.to(probe.device) for name in batch.__slots__ if isinstance(value := getattr(batch, name), Tensor)
    }
    batch = replace(batch, **moved)
    scores = root_module(probe, layout=layout)(batch, needs=frozenset({"score"}))
    found = scores.score[batch.candidate_mask] if is_scalar(probe) else scores.token_logp
    return float((found - expected).abs().max())


def _key(model: PreTrainedModel, device: torch.device) -> str:
    volatile = {"_name_or_path", "transformers_version", "dtype", "architectures"}
    config: PretrainedConfig = model.config
    facts = {name: value for name, value in config.to_dict().items() if name not in volatile}
    text = json.dumps(facts, sort_keys=True, default=str)
    context = f"{transformers.__version__} {type(model).__name__} {config._attn_implementation} {device.type}"
    return hashlib.sha256(f"{context}\n{text}".encode()).hexdigest()[:32]


def _cache_directory() -> Path:
    return Path(os.environ.get("RAYALIGN_CACHE", "~/.cache/rayalign")).expanduser()


def _write(path: Path, differences: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(differences), encoding="utf-8")
    os.replace(temporary, path)
