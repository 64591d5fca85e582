"""The ``data`` block and the auxiliary streams: which rows are read, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from rayalign.config.fields import (
    BY_CONTENT,
    DATA_SUFFIXES,
    MAY_CHANGE,
    Block,
    DataPath,
    FunctionName,
    TemplatePath,
    listed,
)

Format = Literal[
    "auto",
    "preference",
    "implicit_preference",
    "ultrafeedback",
    "hh",
    "ranked",
    "unpaired_preference",
    "prompt_completion",
    "messages",
    "text",
    "prompt_only",
]


COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "label",
    "messages",
    "text",
    "rewards",
    "behavior_logps",
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


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class DataSource(Block):
    """One file, dataset or maker of rows; a bare string is short for ``{path: …}``."""

    path: Annotated[DataPath | None, BY_CONTENT] = None
    """JSONL, JSON or Parquet files (globs allowed), or a dataset on the hub."""
    function: Annotated[FunctionName | None, BY_CONTENT] = None
    """``module:callable``, a maker of rows: a generator of dicts; its module is found beside the YAML."""
    arguments: Annotated[dict[str, Any], BY_CONTENT] = {}
    """Keyword arguments of ``function``."""
    split: Annotated[str | None, BY_CONTENT] = None
    """Of a dataset on the hub, such as train."""
    revision: Annotated[str | None, BY_CONTENT] = None
    """Commit, tag or branch of a dataset on the hub."""
    columns: Annotated[dict[Annotated[str, AfterValidator(_column)], str], BY_CONTENT] = {}
    """Our column → the file's column, where the names differ."""
    weight: float = Field(default=1.0, gt=0)
    """Passes over the source per epoch."""
    name: Annotated[str | None, MAY_CHANGE] = None
    """What tables call a set of prompts; null: after its file or function."""
    format: Annotated[Format | None, BY_CONTENT] = None
    """Overrides ``data.format`` for this source."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.function is None):
            raise ValueError("a source of rows has either path or function")
        if self.arguments and self.function is None:
            raise ValueError("arguments are those of a function; this source has a path")
        if self.function is not None and (self.split or self.revision):
            raise ValueError("split and revision belong to a dataset; this source has a function")
        if self.path is not None and self.path.endswith(DATA_SUFFIXES) and (self.split or self.revision):
            raise ValueError("split and revision belong to a dataset; this source is a file")
        return self

    @property
    def label(self) -> str:
        """``name``, or the file's name without its ending, or the function's."""
        if self.name is not None:
            return self.name
        origin = self.path if self.path is not None else str(self.function).rpartition(":")[2]
        return origin.rstrip("/").rpartition("/")[2].partition(".")[0]


Source = Annotated[DataSource, BeforeValidator(_source)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(listed)]


class DataConfig(Block):
    """Rows → prompt groups."""

    train: Annotated[Sources, Field(min_length=1)]
    """What is trained on, or with rollouts whose prompts are completed: one source or a list."""
    eval: Annotated[Sources, MAY_CHANGE] = ()
    """Held-out pairs: their loss and accuracy are measured along with ``evaluate``."""
    format: Annotated[Format, BY_CONTENT] = "auto"
    """What the rows are; auto: found by their fields, row by row."""
    template: Annotated[TemplatePath, BY_CONTENT] = "auto"
    """auto: the tokenizer's chat template, or plain text where it has none; else a Jinja file."""
    stop: str = "auto"
    """The token that ends a response. auto: what ends a turn in the template."""
    max_prompt_tokens: Annotated[int, BY_CONTENT] = Field(default=512, ge=1)
    """Longer prompts lose their beginning."""
    max_tokens: Annotated[int, BY_CONTENT] = Field(default=1024, ge=2)
    """Prompt and response together; longer responses lose their end."""
    truncated: Annotated[Literal["keep", "drop", "close"], BY_CONTENT] = "keep"
    """A response cut at the limit: train on it without an end token, drop its group, or close it with one."""
    on_bad_row: Annotated[Literal["quarantine", "fail"], MAY_CHANGE] = "quarantine"
    """quarantine: write the row and the reason to quarantine.jsonl and go on."""
    max_bad_fraction: Annotated[float, MAY_CHANGE] = Field(default=0.01, ge=0, le=1)
    """More bad rows than this end the run."""

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} counts prompt and response together: "
                f"beside a prompt of max_prompt_tokens {self.max_prompt_tokens} no response fits"
            )
        return self


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
            raise ValueError("train is the stream of data.train; call this one otherwise")
        return name
