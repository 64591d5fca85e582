"""``generation_config.json``: how a model's authors let it generate, and which tokens end its answers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from rayalign.data.chat import Chat
from rayalign.engine.model.folder import CONFIG, FIELD, read_json, weights_directory
from rayalign.engine.model.loading import quiet_transformers
from rayalign.errors import UserError

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that mean something only where tokens are drawn."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

log = logging.getLogger(__name__)


def generation_config(directory: Path, model: PreTrainedModel, *, field: str = FIELD) -> GenerationConfig | None:
    """What a model's folder says of generating, in a form that can be saved again; None for a model that cannot.

    Transformers loads a contradictory file, and refuses to save it. Where settings of sampling stand beside
    ``do_sample: false``, it becomes true; ids below 0 are left out. Of what is refused for another reason only the
    token ids stay.

    Raises:
        UserError: the file is no JSON.
    """
    if not model.can_generate():
        return None
    path = generation_file(directory, field=field)
    told = model.generation_config.to_diff_dict() if path is None else read_json(path, field)
    facts = {name: value for name, value in told.items() if value is not None}
    _, problem = load_settings(facts)
    for change, candidate in repaired_settings(facts):
        found, refused = load_settings(candidate)
        if found is not None and not refused:
            if problem:
                warn_of_repair(path or weights_directory(directory, field=field) / CONFIG, problem, change)
            return found
    raise AssertionError("a file of token ids alone is never refused")


@functools.lru_cache(maxsize=64)
def warn_of_repair(path: Path, problem: str, change: str) -> None:
    """Say it once in a process, which may load a model several times."""
    log.warning("%s contradicts itself (%s): %s", path, problem, change)


def repaired_settings(facts: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(what is changed, the settings then), from none to all but the token ids."""
    yield "", facts
    ids = {name: facts[name] for name in TOKENS if is_token(facts.get(name))}
    known = {name: value for name, value in facts.items() if name in ids or name not in TOKENS}
    yield "ids below 0 are left out", known
    if any(name in facts for name in SAMPLING):
        yield "do_sample is taken for true", {**known, "do_sample": True}
    yield f"of its settings only {', '.join(ids) or 'none'} are kept", ids


def load_settings(facts: Mapping[str, Any]) -> tuple[GenerationConfig | None, str]:
    """The settings as transformers holds them, and why it would not save them; an empty text if it would."""
    with quiet_transformers():
        try:
            found = GenerationConfig.from_dict(dict(facts))
            found.validate(strict=True)
        except (ValueError, TypeError) as error:
            return None, " ".join(str(error).split()).partition(". ")[0].removeprefix("GenerationConfig is invalid: - ")
    return found, ""


def is_token(value: Any) -> bool:
    """Whether it is the id of a token, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return all(type(one) is int and one >= 0 for one in values) and bool(values)


def generation_file(directory: Path, *, field: str = FIELD) -> Path | None:
    """The file of a model, or of an adapter's base; None where there is none."""
    base = weights_directory(directory, field=field)
    return next((place / FILE for place in (directory, base) if (place / FILE).is_file()), None)


def end_ids(directory: Path, chat: Chat, also: Sequence[str] = (), *, field: str = FIELD) -> tuple[int, ...]:
    """The tokens that end a response, each once; first the one that training appends, which ends a turn.

    The others are those ``also`` named, the tokenizer's own, and those that the model's files name: whatever serves the
    model stops there too, and a sample that ends in one of them is finished.

    Raises:
        UserError: one that is named is no single token.
    """
    named = [single_token(chat.tokenizer, text) for text in also]
    files = (generation_file(directory, field=field), weights_directory(directory, field=field) / CONFIG)
    found: Any = next((own for path in files if path and (own := read_json(path, field).get("eos_token_id"))), None)
    told = (found if isinstance(found, list) else [found]) if is_token(found) else []
    known = set(chat.tokenizer.get_vocab().values())
    ids = [chat.end_id, *named, chat.tokenizer.eos_token_id, *told]
    return tuple(dict.fromkeys(int(token) for token in ids if token in known))


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"data.stop: {text!r} is {len(ids)} tokens of this tokenizer; name one token")
    return int(ids[0])
