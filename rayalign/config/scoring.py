"""Numbers and verdicts: ``scorer``, and the ``evaluate`` block that uses scorers and a judge."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rayalign.config.data import Sources
from rayalign.config.fields import Block, FunctionName, ModelPath, listed, named


class RuleScorerConfig(Block):
    """A Python function of prompt and completions."""

    name: Literal["rule"] = "rule"
    function: FunctionName
    """``module:callable``; its module is found beside the YAML."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of ``function``."""
    unit: str = ""
    """Of its numbers, for the report; ``share`` is shown in per cent."""
    description: str = ""
    """One sentence for the report."""

    @property
    def label(self) -> str:
        """What the scorer is called in metrics and tables."""
        return self.function.rpartition(":")[2]


class RewardModelScorerConfig(Block):
    """A model with a scalar head, such as one trained by ``method: reward_model``."""

    name: Literal["reward_model"] = "reward_model"
    model: ModelPath
    revision: str | None = None

    @property
    def label(self) -> str:
        """What the scorer is called in metrics and tables."""
        return self.model.rstrip("/").rpartition("/")[2]


class LlmScorerConfig(Block):
    """A model behind an OpenAI-compatible endpoint."""

    name: Literal["llm"] = "llm"
    model: str
    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is never written here."""
    template: str | None = None
    """The question put to the model, a Jinja text; null: the built-in one."""

    @property
    def label(self) -> str:
        """What the scorer is called in metrics and tables."""
        return self.model.rpartition("/")[2]


ScorerConfig = Annotated[
    RuleScorerConfig | RewardModelScorerConfig | LlmScorerConfig, Field(discriminator="name"), BeforeValidator(named)
]


class SamplingConfig(Block):
    """How completions are drawn for an evaluation."""

    temperature: float = Field(default=1.0, gt=0)
    """The KL estimate is of the policy at temperature 1."""
    samples: int = Field(default=4, ge=1)
    """Completions of one prompt; a comparison also shows the best of up to as many of the reference's."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)


class EvaluateConfig(Block):
    """Sample, score and compare with a baseline; with neither ``every`` nor ``at``, once after the last step."""

    every: int | None = Field(default=None, ge=1)
    """Steps; the last step is always evaluated."""
    at: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(listed)] = ()
    """These steps instead of ``every``."""
    prompts: Sources = ()
    """One prompt set per entry, the first leads the report; none: the prompts of data.eval."""
    scorers: Annotated[tuple[ScorerConfig, ...], BeforeValidator(listed)] = ()
    diagnostics: Annotated[tuple[ScorerConfig, ...], BeforeValidator(listed)] = ()
    """Numbers shown beside the scores: shares of replies with a fault, say. No win is counted by them."""
    judge: ScorerConfig | None = None
    """Decides win, tie or loss against the baseline."""
    sampling: SamplingConfig = SamplingConfig()
    baseline: str = "reference"
    """What a win is counted against: the reference policy, or another run's folder or model."""

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.every is not None and self.at:
            raise ValueError("give every or at, not both")
        if list(self.at) != sorted(set(self.at)):
            raise ValueError("the steps of at must grow")
        labels = [scorer.label for scorer in (*self.scorers, *self.diagnostics)]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two scorers have the same name in tables: {', '.join(labels)}")
        return self
