"""The ``data`` block and the auxiliary streams: which rows are read, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from rayalign.config.fields import DATA_SUFFIXES, Block, DataPath, FunctionName, TemplatePath, listed

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

    path: DataPath | None = None
    """JSONL, JSON or Parquet files (globs allowed), or a dataset on the hub."""
    function: FunctionName | None = None
    """``module:callable``, a maker of rows: a generator of dicts; its module is found beside the YAML."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of ``function``."""
    split: str | None = None
    """Of a dataset on the hub, such as train."""
    revision: str | None = None
    """Commit, tag or branch of a dataset on the hub."""
    columns: dict[Annotated[str, AfterValidator(_column)], str] = {}
    """Our column → the file's column, where the names differ."""
    weight: float = Field(default=1.0, gt=0)
    """Passes over the source per epoch."""
    name: str | None = None
    """What tables call a set of prompts; null: after its file or function."""
    format: Format | None = None
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
    eval: Sources = ()
    """Held-out pairs: their loss and accuracy are measured along with ``evaluate``."""
    format: Format = "auto"
    """What the rows are; auto: found by their fields, row by row."""
    template: TemplatePath = "auto"
    """auto: the tokenizer's chat template, or plain text where it has none; else a Jinja file."""
    stop: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] = ("auto",)
    """The token that ends a response, or a list: the first is what training appends, samples stop at all of them.

    auto: what ends a turn in the template. Samples also stop at the tokenizer's own end token, and at those that the
    model's generation_config.json names; final/ names them all.
    """
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Longer prompts lose their beginning."""
    max_tokens: int = Field(default=1024, ge=2)
    """Prompt and response together; longer responses lose their end."""
    truncated: Literal["keep", "drop", "close"] = "keep"
    """A response cut at the limit: train on it without an end token, drop its group, or close it with one."""
    on_bad_row: Literal["quarantine", "fail"] = "quarantine"
    """quarantine: write the row and the reason to quarantine.jsonl and go on."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """More bad rows than this end the run."""

    @property
    def end(self) -> str:
        """What training appends to a response: the first of ``stop``."""
        return self.stop[0]

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
