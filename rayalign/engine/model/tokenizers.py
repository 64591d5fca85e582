"""Tokenizers in: of a model's folder or of a Hub id. Processes that only tokenize import no more than this."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayalign.engine.model.folder import FAILURES, FIELD, refuse_pointers, tokenizer_directory
from rayalign.errors import UserError, first_line


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False, field: str = FIELD) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, or of the folder of an adapter's base.

    Raises:
        UserError: there is none, transformers refuses it, or it writes control tokens as words.
    """
    place = tokenizer_directory(directory, field=field)
    refuse_pointers(place, field=field)
    return open_tokenizer(str(place), trust_remote_code=trust_remote_code, field=field)


def open_tokenizer(name: str, *, trust_remote_code: bool = False, field: str = FIELD) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a Hub id; raises as :func:`load_tokenizer` does."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except FAILURES as error:
        raise UserError(f"{field}: the tokenizer in {name} cannot be loaded: {first_line(error)}") from error
    if not isinstance(found.model_max_length, int | float):
        raise UserError(
            f"{field}: the tokenizer in {name} says model_max_length: {found.model_max_length!r}, no number"
        )
    if getattr(found, "split_special_tokens", False):
        raise UserError(
            f"{field}: the tokenizer in {name} says split_special_tokens: true, so that the control tokens of its "
            "chat template become words: remove that from tokenizer_config.json"
        )
    return found
