"""The ``data`` block and the auxiliary streams: which rows are read, and how they become tokens."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from rayalign.config.fields import (
    BY_CONTENT,
    MAY_CHANGE,
    Block,
    DataPath,
    FunctionName,
    TemplatePath,
    as_list,
)
from rayalign.config.suffixes import data_suffix, file_name
from rayalign.config.variables import Variables

Format = Literal[
    "auto",
    "preference",
    "implicit_preference",
    "ultrafeedback",
    "hh",
    "orca",
    "alpaca_preference",
    "conversation_preference",
    "openai_preference",
    "tldr",
    "shp",
    "webgpt",
    "safe_rlhf",
    "helpsteer_preference",
    "ranked",
    "ultrafeedback_raw",
    "nectar",
    "helpsteer",
    "unpaired_preference",
    "labelled_messages",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "question_answer",
    "text",
    "prompt_only",
]


COLUMNS = (
    "prompt",
    "system",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "label",
    "messages",
    "text",
    "reward",
    "rewards",
    "behavior_logps",
    "preferred",
    "chosen_score",
    "rejected_score",
    "margin",
    "soft_label",
    "tools",
    "chat_template_kwargs",
)
"""Fields of rows that a source's ``columns`` can rename."""


def _column(name: str) -> str:
    if name not in COLUMNS:
        raise ValueError(f"no row has a field {name!r}; columns maps our field to the file's: {' | '.join(COLUMNS)}")
    return name


OF_DATASETS = ("config", "data_dir", "data_files", "split", "revision")
"""Fields of a source that only a dataset has."""


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class DataSource(Block):
    """One file, dataset or maker of rows; a bare string is short for ``{path: …}``."""

    path: Annotated[DataPath | None, BY_CONTENT] = None
    """JSON, CSV, Parquet or Arrow files (globs and addresses allowed), a folder of them, or a dataset on the Hub."""
    function: Annotated[FunctionName | None, BY_CONTENT] = None
    """``module:callable``, a maker of rows: a generator of dicts; its module is found beside the YAML."""
    arguments: Annotated[dict[str, Any], BY_CONTENT] = {}
    """Keyword arguments of ``function``."""
    version: Annotated[str | int | None, BY_CONTENT] = None
    """Stands for what ``function`` reads besides its own file: another version makes the rows again."""
    config: Annotated[str | None, BY_CONTENT] = None
    """A configuration of a dataset that has several, such as main; Hugging Face calls it ``name``."""
    data_dir: Annotated[str | None, BY_CONTENT] = None
    """A folder inside a dataset, such as harmless-base."""
    data_files: Annotated[tuple[str, ...], BeforeValidator(as_list), BY_CONTENT] = ()
    """Files inside a dataset, globs allowed; they are one split, train."""
    split: Annotated[tuple[str, ...] | None, BeforeValidator(as_list), BY_CONTENT] = None
    """A split of a dataset, several, or slices such as ``train[:10%]``; null: train."""
    revision: Annotated[str | None, BY_CONTENT] = None
    """Commit, tag or branch of a dataset on the Hub; null: the newest commit, which is recorded."""
    max_samples: Annotated[int | None, BY_CONTENT] = Field(default=None, ge=1)
    """Reads no more than the first so many rows."""
    columns: Annotated[dict[Annotated[str, AfterValidator(_column)], str], BY_CONTENT] = {}
    """Our column → the file's column, where the names differ."""
    system: Annotated[str | None, BY_CONTENT] = None
    """Overrides ``data.system`` for this source; an empty text is none."""
    chat_template_kwargs: Annotated[Variables, BY_CONTENT] = {}
    """Added to ``data.chat_template_kwargs`` for this source."""
    weight: float = Field(default=1.0, gt=0)
    """Passes over the source per epoch."""
    name: Annotated[str | None, MAY_CHANGE] = None
    """What tables call a set of prompts; null: after its file or function. A dataset's configuration is ``config``."""
    format: Annotated[Format | None, BY_CONTENT] = None
    """Overrides ``data.format`` for this source."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.function is None):
            raise ValueError("a source of rows has either path or function")
        if self.arguments and self.function is None:
            raise ValueError("arguments are those of a function; this source has a path")
        if self.version is not None and self.function is None:
            raise ValueError("version is of what a function reads; this source has a path, whose content is looked at")
        given = [name for name in OF_DATASETS if getattr(self, name)]
        if given and self.function is not None:
            raise ValueError(f"{given[0]} belongs to a dataset; this source has a function")
        if given and self.path is not None and data_suffix(self.path) is not None:
            raise ValueError(f"{given[0]} belongs to a dataset; this source is a file")
        return self

    @property
    def label(self) -> str:
        """``name``, or the file's name without its ending, or the function's."""
        if self.name is not None:
            return self.name
        origin = self.path if self.path is not None else str(self.function).rpartition(":")[2]
        return file_name(origin).partition(".")[0]


Source = Annotated[DataSource, BeforeValidator(_source)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(as_list)]


class TokenBudget(Block):
    """Budgets in tokens, and what happens to what is longer."""

    max_prompt_tokens: Annotated[int, BY_CONTENT] = Field(default=512, ge=1)
    """What a prompt keeps at least where prompt and response do not fit: its beginning goes. A rollout's prompt keeps
    no more."""
    max_tokens: Annotated[int, BY_CONTENT] = Field(default=1024, ge=2)
    """Prompt and response together; beside what the prompt keeps, a longer response loses its end."""
    truncated: Annotated[Literal["keep", "drop", "close"], BY_CONTENT] = "keep"
    """A response cut at the limit. Train on it without an end token, drop its group, or close it with one. drop also
    drops a group whose prompt would be cut."""
    long_prompts: Annotated[Literal["cut", "drop"], BY_CONTENT] = "cut"
    """A prompt that would be cut: cut it, or drop its group."""

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} counts prompt and response together: "
                f"beside a prompt of max_prompt_tokens {self.max_prompt_tokens} no response fits"
            )
        return self


class RowsConfig(Block):
    """Which rows are read, and how a tokenizer writes their conversations."""

    train: Annotated[Sources, Field(min_length=1)]
    """What is trained on, or with rollouts whose prompts are completed: one source or a list."""
    eval: Annotated[Sources, MAY_CHANGE] = ()
    """Held-out pairs: their loss and accuracy are measured along with ``evaluate``."""
    format: Annotated[Format, BY_CONTENT] = "auto"
    """What the rows are; auto: found by their fields, row by row."""
    template: Annotated[TemplatePath, BY_CONTENT] = "auto"
    """auto: the tokenizer's chat template, or plain text where it has none. none: texts of rows are rendered already.
    Else a Jinja file."""
    chat_template_kwargs: Annotated[Variables, BY_CONTENT] = {}
    """Variables of the template, such as ``enable_thinking: false``; a row's own column of this name wins."""
    date: Annotated[datetime.date, BY_CONTENT] = datetime.date(2024, 7, 26)
    """What templates write that ask for today's date, so that a row has the same tokens every day."""
    system: Annotated[str | None, BY_CONTENT] = None
    """Stands before every conversation that has no system turn; a text becomes a conversation by it."""
    stop: Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)] = ("auto",)
    """The token that ends a response, or a list: the first is what training appends, samples stop at all of them.

    auto: what ends a turn in the template. Samples also stop at the tokenizer's own end token, and at those that the
    model's generation_config.json names; final/ names them all.
    """

    @property
    def end(self) -> str:
        """What training appends to a response: the first of ``stop``."""
        return self.stop[0]


class DataConfig(TokenBudget, RowsConfig):
    """Rows → prompt groups."""

    on_bad_row: Annotated[Literal["quarantine", "fail"], MAY_CHANGE] = "quarantine"
    """quarantine: write the row and the reason to quarantine.jsonl and continue."""
    max_bad_fraction: Annotated[float, MAY_CHANGE] = Field(default=0.01, ge=0, le=1)
    """More bad rows than this end the run."""
    shard_mb: int = Field(default=128, ge=1)
    """Size of a full shard of a token store, in MiB of tokens and columns: what is read, sent and kept together."""
    shuffle_shards: Annotated[int, Field(ge=1)] | Literal["all"] = 16
    """Rows are drawn in random order from so many shards at a time, which are taken in random order.

    A store of no more shards is shuffled as a whole, and with all a store of any size is.
    """

    @property
    def window(self) -> int | None:
        """Shards that are shuffled together; None: all."""
        return None if self.shuffle_shards == "all" else self.shuffle_shards


class FilterConfig(Block):
    """Which of the stored pairs are trained on; ``data.eval``, auxiliary data and fresh samples are not touched."""

    policy_logp_quantile: float = Field(gt=0, lt=1)
    """Keep the pairs at or above this quantile of the initial policy's mean log-probability per token."""


class AuxiliaryConfig(Block):
    """Likelihood of further data as a regulariser: forward KL to the policy that wrote them, up to a constant."""

    name: str = Field(default="sft", pattern=r"^[A-Za-z0-9_.-]+$")
    """Names the stream in metrics."""
    term: Literal["reference", "pretrain"] = "reference"
    """reference: responses of the reference policy, given their prompts; pretrain: whole texts, rows with `text`."""
    data: Annotated[Sources, Field(min_length=1)]
    """Rows with a prompt and a completion, or for pretrain with a text."""
    weight: float = Field(default=0.1, gt=0)
    """Factor of this term in the loss."""
    reduction: Literal["sequence", "token"] = "sequence"
    """Mean over sequences of the summed negative log-likelihood, or mean over tokens."""
    groups_per_step: int = Field(default=16, ge=1)
    """Rows of this stream in one optimizer step, over all workers."""

    @field_validator("name")
    @classmethod
    def _not_the_main_stream(cls, name: str) -> str:
        if name == "train":
            raise ValueError("train is the stream of data.train; choose another name")
        return name
