"""Numbers and verdicts: ``scorer``, and the ``evaluate`` block that uses scorers and a judge."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from rayalign.config.data import Sources
from rayalign.config.fields import (
    AS_PATH,
    BY_CONTENT,
    MAY_CHANGE,
    Block,
    FunctionName,
    ModelPath,
    as_list,
    as_named,
    resolve_model,
)

API_KEY_ENV = "OPENAI_API_KEY"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*", re.IGNORECASE)
REFERENCE = "reference"
PATIENCE = ("timeout_seconds", "retry_seconds", "concurrency")
"""Settings of scorers that change how long a call waits, not its answer: a run may resume after they are changed."""


class RuleScorerConfig(Block):
    """A Python function of prompt and completions."""

    name: Literal["rule"] = "rule"
    function: Annotated[FunctionName, BY_CONTENT]
    """``module:callable``; its module is found beside the YAML."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of ``function``."""
    timeout_seconds: Annotated[float, MAY_CHANGE] = Field(default=60.0, gt=0, le=86_400)
    """Limit of one call: a longer one is ended and costs its prompt. Load models when the module is imported."""
    unit: Annotated[str, MAY_CHANGE] = ""
    """Unit of its numbers, for the report; ``share`` is shown in per cent."""
    description: Annotated[str, MAY_CHANGE] = ""
    """One sentence for the report."""

    @property
    def label(self) -> str:
        """What the scorer is called in metrics and tables."""
        return self.function.rpartition(":")[2]


class RewardModelScorerConfig(Block):
    """A model with a scalar head, such as one trained by ``method: reward_model``."""

    name: Literal["reward_model"] = "reward_model"
    model: Annotated[ModelPath, BY_CONTENT]
    """A folder in Hugging Face layout, such as a run's final/, or a model on the hub."""
    revision: Annotated[str | None, BY_CONTENT] = None
    """Commit, tag or branch of a model on the hub."""

    @property
    def label(self) -> str:
        """What the scorer is called in metrics and tables."""
        return self.model.rstrip("/").rpartition("/")[2]


def _address(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError(f"{value!r} is no address; write https://host/v1")
    return value


def _variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):  # perhaps the key itself: it is not repeated
        raise ValueError("not the name of an environment variable; give the variable that holds the key, not the key")
    return value


class LlmScorerConfig(Block):
    """A language model that is asked: behind an OpenAI-compatible endpoint, or loaded by a rollout engine.

    As a scorer it rates replies, as a judge it compares two.
    """

    name: Literal["llm"] = "llm"
    engine: Literal["hf", "vllm"] | None = None
    """Loads the model in the processes that score; null: it is behind base_url."""
    base_url: Annotated[Annotated[str, AfterValidator(_address)] | None, MAY_CHANGE] = None
    """Such as https://api.openai.com/v1; ``/chat/completions`` is asked."""
    model: Annotated[str, Field(min_length=1), AS_PATH]
    """As the endpoint calls it; with engine a folder, or a name on the hub."""
    revision: Annotated[str | None, BY_CONTENT] = None
    """Commit, tag or branch of a model on the hub."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of an answer; a longer one is none. null: 512 with engine, and the endpoint's own limit without."""
    api_key_env: Annotated[str, AfterValidator(_variable), MAY_CHANGE] = API_KEY_ENV
    """The environment variable that holds the endpoint's key; the key itself is never written here."""
    timeout_seconds: Annotated[float, MAY_CHANGE] = Field(default=120.0, gt=0, le=86_400)
    """Limit of one call to the endpoint."""
    retry_seconds: Annotated[float, MAY_CHANGE] = Field(default=600.0, ge=0, le=86_400)
    """How long a call is retried while the endpoint is busy or does not answer. An endpoint that has never answered
    gets one minute."""
    concurrency: Annotated[int, MAY_CHANGE] = Field(default=8, ge=1, le=1_000)
    """Calls to the endpoint at once, of each process that scores."""
    template: str | None = None
    """The question, a Jinja text of prompt and reply; a judge's of prompt, first and second. null: the built-in one."""

    @field_validator("model")
    @classmethod
    def _folder_of_an_engine(cls, value: str, info: ValidationInfo) -> str:
        return resolve_model(value, info) if info.data.get("engine") else value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.engine is None) == (self.base_url is None):
            raise ValueError("say where the model is: base_url: https://… or engine: hf | vllm")
        if self.engine is None and self.revision is not None:
            raise ValueError("revision is of a model that engine loads; an endpoint has its own")
        of_endpoint = {name: type(self).model_fields[name].default for name in ("api_key_env", *PATIENCE)}
        for name, default in of_endpoint.items():
            if self.engine is not None and getattr(self, name) != default:
                raise ValueError(f"{name} is of an endpoint; a model that engine loads has none")
        return self

    @property
    def label(self) -> str:
        """What the scorer is called in metrics and tables."""
        return self.model.rstrip("/").rpartition("/")[2]


ScorerConfig = Annotated[
    RuleScorerConfig | RewardModelScorerConfig | LlmScorerConfig, Field(discriminator="name"), BeforeValidator(as_named)
]


class SamplingConfig(Block):
    """How completions are drawn for an evaluation."""

    temperature: float = Field(default=1.0, gt=0)
    """The KL estimate is of the policy at temperature 1."""
    samples: int = Field(default=4, ge=1)
    """Completions of one prompt; a comparison also shows the best of up to as many of the reference's."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """As rollout.top_p."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a completion at most, its end token included."""


def _baseline(value: str, info: ValidationInfo) -> str:
    return value if value == REFERENCE else resolve_model(value, info)


class EvaluateConfig(Block):
    """Sample, score and compare with a baseline; with neither ``every`` nor ``at``, once after the last step."""

    every: int | None = Field(default=None, ge=1)
    """Steps; the last step is always evaluated."""
    at: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_list)] = ()
    """These steps instead of ``every``."""
    prompts: Sources = ()
    """One prompt set per entry, the first leads the report; none: the prompts of data.eval."""
    scorers: Annotated[tuple[ScorerConfig, ...], BeforeValidator(as_list)] = ()
    """Each gives every reply a number; the first leads the report."""
    diagnostics: Annotated[tuple[ScorerConfig, ...], BeforeValidator(as_list)] = ()
    """Numbers shown beside the scores: shares of replies with a fault, say. No win is counted by them."""
    judge: ScorerConfig | None = None
    """Decides win, tie or loss of every sample against the baseline's with the same prompt and seed."""
    max_missing_fraction: float = Field(default=0.05, ge=0, le=1)
    """A scorer or judge that leaves more samples unanswered ends the evaluation; fewer are counted as missing."""
    sampling: SamplingConfig = SamplingConfig()
    baseline: Annotated[str, AfterValidator(_baseline)] = REFERENCE
    """What a win is counted against: the reference policy, or another run's folder or model."""

    @property
    def all_scorers(self) -> tuple[ScorerConfig, ...]:
        """The scorers, and the diagnostics after them."""
        return (*self.scorers, *self.diagnostics)

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.every is not None and self.at:
            raise ValueError("give every or at, not both")
        if list(self.at) != sorted(set(self.at)):
            raise ValueError("the steps of at must grow")
        labels = [scorer.label for scorer in self.all_scorers]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two scorers have the same name in tables: {', '.join(labels)}")
        return self
