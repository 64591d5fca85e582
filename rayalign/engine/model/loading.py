"""The one way in which weights get into a model: each tensor has its place in the files, or nothing is loaded.

Transformers matches the tensors of the files with those of the model, renamed and fused as each family needs it. Before
any is read, it matches tensors that have a shape and no content. So it is known what would be missing, left over or of
another shape. Transformers alone would draw what is missing at random, and say so in a warning.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from rayalign.engine.model.folder import FIELD, Tensor, few, tensors_of, weight_files
from rayalign.engine.model.scalar import HEAD, HEAD_WEIGHT
from rayalign.errors import UserError, first_line

META = torch.device("meta")
PARTS = ("language_model", "text_model")
"""What models of several parts call the one for texts."""
EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Where a model and its files do not fit; names are the model's, as transformers says them."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the file, shape in the model)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files that a model's weights come from, and which of them are optional."""

    directory: Path
    field: str = FIELD
    new: Collection[str] = frozenset()
    """Tensors of the model that no file needs to have, since they are drawn afterwards."""
    text_only: bool = False
    """The files hold a model of several parts, of which the one for texts is loaded."""
    backbone: str | None = None
    """Where the model has another head than the files, what the names of their common tensors begin with."""


def load_weights(blank: PreTrainedModel, source: Source) -> PreTrainedModel:
    """A model like ``blank``, which is on the meta device, with the weights of ``source`` as float32 on the host.

    Raises:
        UserError: see :func:`refuse_unfit`; or tied weights differ, or one is not a number, or infinite.
    """
    part = refuse_unfit(blank, source)
    with contextlib.ExitStack() as stack:
        files = [safe_open(file, framework="pt") for file in weight_files(source.directory, field=source.field)]
        opened = [stack.enter_context(file) for file in files]
        tensors: dict[str, Any] = {}
        for file in opened:
            tensors |= {name: file.get_slice(name) for name in file.offset_keys()}
        model, found = match_tensors(blank, tensors_of_part(part, tensors))
    refuse_mismatch(found, blank, source)
    refuse_untied(model, blank, source)
    refuse_nonfinite(model, source.directory, field=source.field)
    return model


def refuse_unfit(blank: PreTrainedModel, source: Source) -> str | None:
    """Raise UserError where the files lack a tensor of the model, have another one, or one of another shape.

    What transformers declares to be of no account does not count: tied weights, buffers that are computed, heads for
    several tokens. No weight is read. Returns what the files call the model's part, where they hold several.
    """
    tensors = tensors_of(weight_files(source.directory, field=source.field), field=source.field)
    unknown = sorted({own.dtype for own in tensors.values()} - DTYPES.keys())
    if unknown:
        raise UserError(
            f"{source.field}: {source.directory} holds tensors of type {few(unknown)}, which are quantised weights: "
            "name the model that they were made from"
        )
    shapes = {name: empty_like(own) for name, own in tensors.items()}
    parts: tuple[str | None, ...] = (None, *PARTS) if source.text_only else (None,)
    attempts: list[tuple[Mismatch, str | None]] = []
    for part in parts:
        try:
            attempts.append((match_tensors(blank, tensors_of_part(part, shapes), place=META)[1], part))
        except RuntimeError as error:
            absent = missing_experts(tensors)
            told = f"it lacks {plural(absent, 'tensor')} of its experts: {few(absent)}" if absent else first_line(error)
            raise UserError(
                f"{source.field}: transformers cannot make a {type(blank).__name__} of the tensors in "
                f"{source.directory} ({told}): copy, convert or save the model again"
            ) from error
    found, part = min(attempts, key=lambda attempt: len(attempt[0].missing))
    refuse_mismatch(found, blank, source)
    refuse_whole_numbers(blank, source, tensors_of_part(part, shapes))
    return part


def refuse_whole_numbers(blank: PreTrainedModel, source: Source, shapes: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where a weight is whole numbers in the files, of which the scale is kept elsewhere or lost."""
    whole = [name for name, own in shapes.items() if not own.is_floating_point()]
    if not whole:
        return
    state = blank.state_dict()
    try:
        found = match_tensors(blank, {name: own for name, own in shapes.items() if name not in whole}, place=META)[1]
        used = [name for name in found.missing if name not in source.new and state[name].is_floating_point()]
    except RuntimeError:  # some of a layer's experts are left, and not others
        used = whole
    if used:
        raise UserError(
            f"{source.field}: {source.directory} holds whole numbers for {plural(used, 'tensor')}: {few(used)}. Such "
            "weights are quantised: name the model that they were made from"
        )


def tensors_made_of(blank: PreTrainedModel, source: Source, names: Collection[str]) -> frozenset[str]:
    """The tensors of the model that are made of the given ones of the files, alone or with others."""
    part = refuse_unfit(blank, source)
    tensors = tensors_of(weight_files(source.directory, field=source.field), field=source.field)
    shapes = tensors_of_part(part, {name: empty_like(own) for name, own in tensors.items()})
    others = {name: own for name, own in shapes.items() if name not in names}
    try:
        before, after = (set(match_tensors(blank, given, place=META)[1].missing) for given in (shapes, others))
    except RuntimeError:  # some of a layer's experts are left, and not others: they become one tensor
        return frozenset()
    return frozenset(after - before)


def match_tensors(
    blank: PreTrainedModel, tensors: Mapping[str, Any], *, place: torch.device | None = None
) -> tuple[PreTrainedModel, Mismatch]:
    """A model like ``blank`` with the given tensors, in ``place`` or the host's memory, and where they do not fit."""
    with quiet_transformers():
        model, found = type(blank).from_pretrained(
            None,
            config=blank.config,
            state_dict=dict(tensors),
            dtype=torch.float32,
            device_map={"": place} if place is not None else None,
            attn_implementation=blank.config._attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, Mismatch(
        missing=tuple(sorted(found["missing_keys"])),
        unexpected=tuple(sorted(name for name in found["unexpected_keys"] if not is_mask(name, tensors))),
        other_shape=tuple(sorted((name, tuple(own), tuple(wanted)) for name, own, wanted in found["mismatched_keys"])),
    )


def is_mask(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor without a place is a causal mask, or what masked scores become: old files hold them."""
    if name not in tensors:
        return False
    shape = tensors[name].shape if isinstance(tensors[name], torch.Tensor) else tensors[name].get_shape()
    return name.endswith(".masked_bias") or (len(shape) == 4 and shape[0] == shape[1] == 1 < shape[2] == shape[3])


def refuse_mismatch(found: Mismatch, blank: PreTrainedModel, source: Source) -> None:
    """Raise UserError for what does not fit, in one sentence with the remedy."""
    missing = [name for name in found.missing if name not in source.new]
    unexpected = list(found.unexpected)
    if source.text_only:
        unexpected = []
    if source.backbone is not None:
        ours = (f"{source.backbone}.", *(() if HEAD_WEIGHT in source.new else (f"{HEAD}.",)))
        unexpected = [name for name in unexpected if name.startswith(ours)]
    where, kind = f"{source.field}: {source.directory}", type(blank).__name__
    total = len(blank.state_dict())
    if empty := [name for name, own, _ in found.other_shape if 0 in own]:
        raise UserError(
            f"{where} holds {plural(empty, 'tensor')} without content: {few(empty)}. They were saved while a strategy "
            "such as ZeRO-3 or FSDP held their values elsewhere: gather them, and save the model again"
        )
    if found.other_shape:
        name, own, wanted = found.other_shape[0]
        others = f" ({len(found.other_shape)} tensors have another shape)" if len(found.other_shape) > 1 else ""
        raise UserError(
            f"{where}: {name} is {shape_text(own)} in the files, and {shape_text(wanted)} by config.json{others}: the "
            "two are of different models; copy both from one place"
        )
    if missing and (renamed := common_change(missing, found.unexpected)):
        old, new = renamed
        raise UserError(
            f"{where}: {len(missing)} of the {total} tensors of a {kind} have other names in the files: "
            + (f"{new!r} precedes them" if new else f"{old!r} is missing before them")
            + f", as in {found.unexpected[0]}. Save the model without what was wrapped around it, or rename them"
        )
    if missing == [HEAD_WEIGHT]:
        also = f", which have {few(unexpected or found.unexpected)} instead" if found.unexpected else ""
        raise UserError(
            f"{where} has no trained scalar head: {HEAD_WEIGHT} is not in its files{also}. One that is drawn at random "
            "would give random scores: name a model for sequence classification that was trained, or rename its head"
        )
    if missing == ["lm_head.weight"]:
        raise UserError(
            f"{where} has no lm_head.weight, and its config.json says tie_word_embeddings: false, so that the head "
            "would be random: write true there if the model uses its embedding as head, or name a folder that has one"
        )
    if missing:
        also = f"; it has {few(unexpected)} instead" if unexpected else ""
        raise UserError(
            f"{where} lacks {len(missing)} of the {total} tensors of a {kind}, which would be random: {few(missing)}"
            f"{also}. Copy, convert or save the model again"
        )
    if unexpected:
        raise UserError(
            f"{where} holds {plural(unexpected, 'tensor')} that a {kind} has no place for: {few(unexpected)}. Either "
            "config.json belongs to another model, or they are of no use: then load the model with transformers and "
            "save it again"
        )


def refuse_untied(model: PreTrainedModel, blank: PreTrainedModel, source: Source) -> None:
    """Raise UserError where one tensor by the configuration is two in the files: serving engines would read one."""
    untied = sorted(blank.all_tied_weights_keys.keys() - model.all_tied_weights_keys.keys())
    if untied:
        raise UserError(
            f"{source.field}: {source.directory} holds {untied[0]} and {blank.all_tied_weights_keys[untied[0]]}, which "
            "differ and are one tensor by config.json: write tie_word_embeddings: false there, or copy config.json and "
            "files from one place"
        )


def refuse_nonfinite(model: PreTrainedModel, directory: Path, *, field: str = FIELD) -> None:
    """Raise UserError where a weight is not a number, or infinite: it names the tensor."""
    bad = [name for name, weight in model.named_parameters() if weight.numel() and not is_finite_tensor(weight)]
    if bad:
        raise UserError(
            f"{field}: {directory} holds weights that are no finite numbers, in {len(bad)} of its "
            f"tensors: {few(bad)}. Whatever is computed with them is NaN; name another checkpoint of that model"
        )


def is_finite_tensor(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def common_change(missing: Collection[str], unexpected: Collection[str]) -> tuple[str, str] | None:
    """(what the names of the missing tensors begin with, what replaces it in the unexpected ones); None without one."""
    left, name = set(unexpected), min(missing)
    for wrapper in sorted(other.removesuffix(name) for other in left if other.endswith(f".{name}")):
        if all(f"{wrapper}{other}" in left for other in missing):
            return "", wrapper
    for wrapper in sorted(name.removesuffix(other) for other in left if name.endswith(f".{other}")):
        if all(other.startswith(wrapper) and other.removeprefix(wrapper) in left for other in missing):
            return wrapper, ""
    return None


def missing_experts(names: Collection[str]) -> list[str]:
    """Tensors that some experts of a layer have and others lack, in files with a tensor for each expert."""
    found: dict[str, dict[str, set[str]]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[3], set()).add(match[2])
    missing: list[str] = []
    for layer, parts in found.items():
        experts = set().union(*parts.values())
        for rest, own in parts.items():
            missing += [f"{layer}{expert}{rest}" for expert in experts - own]
    return sorted(missing)


def tensors_of_part(part: str | None, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of one part, by the names that they have in a model of that part alone.

    ``model.language_model.norm.weight`` and ``language_model.model.norm.weight`` are both ``model.norm.weight``.
    """
    if part is None:
        return dict(tensors)
    own = {}
    for name, tensor in tensors.items():
        pieces = name.split(".")
        if part in pieces or "lm_head" in pieces:
            own[".".join(piece for piece in pieces if piece != part)] = tensor
    return own


def empty_like(tensor: Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=META)


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"


def plural(items: Collection[object], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own report and its bar: what does not fit is an error here."""
    before, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bar:
            transformers_logging.enable_progress_bar()
