"""A backbone with a scalar head in Hugging Face's layout for sequence classification: reward models, and critics.

Hugging Face reads such a model at the last token that is not padding, of a text that the chat template wrote. So
that a program that loads an exported model reads it where it was trained, its padding token ends no answer. Its chat
template ends a conversation with the end token of the last answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayalign.data.chat import make_chat
from rayalign.data.closing import closing_template
from rayalign.data.template import TODAY
from rayalign.engine.model.folder import FIELD
from rayalign.engine.model.kinds import refuse_encoder
from rayalign.errors import UserError

HEAD = "score"
"""Hugging Face's name of the head."""
HEAD_WEIGHT = f"{HEAD}.weight"
KIND = "AutoModelForSequenceClassification"
OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForMaskedLM")
"""Ends of the names of classes whose head is no scalar one on the last token."""
PADDING = "<|pad|>"
"""Added where a tokenizer has no padding token, or pads with the token that ends an answer."""
WRITTEN = "rayalign"
"""Where the configuration of an exported model says how its conversations are written: see :class:`ScalarHead`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarHead:
    """A scalar head instead of a vocabulary, and how the conversations that it reads are written."""

    template: str = "auto"
    """As ``data.template``."""
    stop: str = "auto"
    """As ``data.stop``."""
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """As ``data.chat_template_kwargs``; an exported template holds them."""
    date: date = TODAY
    """As ``data.date``; an exported template holds it."""


def is_scalar(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model, HEAD, None), nn.Linear)


def set_one_output(config: PretrainedConfig, directory: Path, *, field: str = FIELD) -> None:
    """Make ``config`` one of a single output.

    Raises:
        UserError: transformers has no classifier of this family, or the folder holds one with several outputs, or a
            head of another kind.
    """
    refuse_encoder(config, directory, field)
    known = type(config) in AutoModelForSequenceClassification._model_mapping
    if not known and KIND not in getattr(config, "auto_map", {}):
        raise UserError(
            f"{field}: transformers has no {KIND} for {config.model_type} models, so they cannot be reward models"
        )
    others = [name for name in config.architectures or () if name.endswith(OTHER_HEADS)]
    if others:
        raise UserError(
            f"{field}: {directory} is a {others[0]}; a reward model is one for sequence classification with one output"
        )
    if is_classifier(config.architectures) and config.num_labels != 1:
        raise UserError(f"{field}: {directory} has {config.num_labels} outputs; a reward model has one")
    config.num_labels = 1


def is_classifier(architectures: Sequence[str] | None) -> bool:
    """Whether the classes that a configuration names are for sequence classification."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def finish_head(model: PreTrainedModel, *, new: bool, seed: int, field: str = FIELD) -> None:
    """Draw a ``new`` head, unless the model is a skeleton.

    Raises:
        UserError: the family's head is no plain linear one.
    """
    if not is_scalar(model):
        raise UserError(
            f"{field}: {model.config.model_type} models have no linear head on every token, so they cannot be reward "
            "models"
        )
    if new and model.device.type != "meta":
        init_head(model, seed)


@torch.no_grad()
def init_head(model: PreTrainedModel, seed: int) -> None:
    """Normal with standard deviation 1 / √(hidden + 1), a function of ``seed`` alone.

    As in Stiennon et al. 2020, arXiv:2009.01325, App. B: scores of order 1 on normalised states. A head of zeros would
    give the backbone no gradient at first, and under Adam stay smaller than learning rate times steps.
    """
    weight = getattr(model, HEAD).weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * (weight.shape[1] + 1) ** -0.5
    weight.copy_(drawn)


def prepare_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: ScalarHead) -> None:
    """Make what ``save_pretrained`` writes read alike everywhere; nothing changes the second time.

    The padding token must end no answer, or Hugging Face would score the token before the end. Where one is added, the
    embedding grows by a row of zeros.
    """
    chat = make_chat(
        tokenizer, template=head.template, stop=head.stop, template_kwargs=head.template_kwargs, date=head.date
    )
    tokenizer.chat_template = closing_template(chat)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == chat.end_id:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[rows:] = 0
    # Else the padding token's gradient is dropped, and which token that is changes between this load and the next.
    model.get_input_embeddings().padding_idx = None
    text = model.config.get_text_config()
    text.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    template = "none" if head.template == "none" else "auto"
    setattr(model.config, WRITTEN, {"template": template, "stop": chat.end_text})


def head_written_as(config: PretrainedConfig) -> ScalarHead | None:
    """How the conversations of an exported model are written; None for a model that others trained."""
    found: dict[str, Any] | None = getattr(config, WRITTEN, None)
    return ScalarHead(**found) if found is not None else None
