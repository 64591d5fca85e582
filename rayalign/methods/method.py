"""What a method is: a frozen record that names a pure loss, its parameters and what it needs to see.

This room knows no model, file or cluster. A loss gets tensors and returns unreduced terms; the engine divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from rayalign.errors import UserError
from rayalign.methods._fields import refuse_odd_numbers
from rayalign.types import Round, Scored

Need = Literal[
    "ref_logp",  # [B, K] Σ log π_ref over response tokens
    "ref_token_logp",  # [N]
    "behavior_logp",  # [B, K]
    "behavior_token_logp",  # [N] under the distribution really drawn from
    "reward",  # [B, K] a scorer's number
    "label",  # [B, K] 1 desirable, 0 undesirable
    "soft_label",  # [B, K] P(chosen preferred to rejected) in column 0; NaN = 1
    "margin",  # [B, K] the annotators' margin in column 0; NaN = 0
    "log_sum_p2",  # [N] token statistics of the forward
    "log_max_p",
    "plain_token_logp",
    "entropy",
    "rank",  # [B, K] place in the annotators' order, 0 is best, equal places are ties
    "value",  # [N] scalar head before every token: a critic's
    "score",  # [B, K] scalar head at every candidate's last token: a reward model's
    "advantage",  # [N] made by round_prepare
    "return",
    "old_value",  # [N] the critic's values when the round was opened
    "mismatched",  # candidate 1 of every group is another prompt's completion (KTO's KL estimate)
]
PREPARED: frozenset[Need] = frozenset({"advantage", "return"})
"""Needs that no data carry: ``round_prepare`` makes them."""
Over = Literal["pairs", "groups", "sequences", "tokens", "constant"]
DataPolicy = Literal["off_policy", "on_policy", "hybrid"]


class MethodConfig(BaseModel):
    """Parameters that every method has. Subclasses add their own; defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, data: Any) -> Any:
        return refuse_odd_numbers(cls, data)

    logit_temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of policy, reference and behavior alike: the temperature that the data were drawn at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One unreduced part of a loss: the engine forms weight · Σ(per_item · mask) / (global count of ``over``).

    Example: DPO on B pairs is ``Term(name="dpo", per_item=losses, mask=scored.pair_mask, over="pairs")``.
    """

    name: str
    per_item: Float[Tensor, " items"]
    mask: Bool[Tensor, " items"]
    over: Over
    """``constant``: divided by nothing; the method has divided already (by an all-reduced statistic, say)."""
    weight: float = 1.0
    count: Float[Tensor, ""] | None = None
    """The step's items, where only ``statistics`` know how many count; None: as many as the plan has of ``over``."""

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise UserError(f"term {self.name!r}: over {self.over!r} is none of {' | '.join(get_args(Over))}")
        if self.per_item.shape != self.mask.shape:
            raise UserError(
                f"term {self.name!r}: per_item has the shape {list(self.per_item.shape)} and mask "
                f"{list(self.mask.shape)}: give one number per item, which the engine averages"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a loss may know of the whole step, equal on every worker and in every micro-batch."""

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """What ``step_prepare`` returned, summed over every micro-batch of every worker; no gradient."""
    groups_per_step: int = 1
    seed: int = 0
    step: int = 0


Loss = Callable[[Scored, Any, Statistics], tuple[Term, ...]]
RoundPrepare = Callable[[Round, Any], dict[str, Tensor]]
StepPrepare = Callable[[Scored, Any, Statistics], dict[str, Tensor]]
Metrics = Callable[[Scored, Any, Statistics], dict[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method is a value, not a trainer."""

    name: str
    config: type[MethodConfig]
    loss: Loss
    """(scored, config, statistics) → terms, with gradient through ``scored.scores`` only."""
    needs: frozenset[Need] = frozenset()
    candidates: Literal["one", "pair", "ranking", "group"] = "pair"
    """``ranking``: two or more in an order, stored as a pair or as completions with rewards."""
    trains: Literal["policy", "scalar"] = "policy"
    """What is trained: a language model, or a backbone with a scalar head. The latter has no log-probabilities; its
    forward answers the needs ``value`` and ``score``."""
    data_policies: frozenset[DataPolicy] = frozenset({"off_policy", "on_policy", "hybrid"})
    paper: str = ""
    """Where the equation stands, for the documentation and the report."""
    requires_auxiliary: bool = False
    """True for MPO: its KL protection is auxiliary data, so a configuration must name it or say ``auxiliary: []``."""
    refuses_truncated_sampling: bool = False
    """True for ratio methods: top-p or top-k samples have no density under the policy's full softmax."""
    extra_needs: Callable[[Any], frozenset[Need]] | None = None
    """Needs that depend on the parameters, such as MPO's optional reference."""
    smallest_group: int = 2
    """Fewest candidates of one prompt that a method of groups can learn from."""
    round_prepare: RoundPrepare | None = None
    """(round, config) → new per-token columns [N], such as ``advantage``: once per committed round, no gradient.

    What it returns is stored beside the round, so that every worker and every restart reads the same numbers. It sees
    the columns in ``needs`` but its own, and those that the ``critic`` needs.
    """
    critic: Method | None = None
    """What trains a second model, one with a scalar head, on the same groups and with the same parameters.

    Its values of a whole round, taken before the first step on it, are the column ``old_value`` of the round.
    """
    round_limit: Callable[[Any], tuple[str, float] | None] | None = None
    """config → a metric and the value above which the remaining passes over a round are skipped; with a critic."""
    step_prepare: StepPrepare | None = None
    """Per step, no gradient, one call per micro-batch: sums that the engine adds up over all of them."""
    metrics: Metrics | None = None
    """Further metrics as name → (sum, count), added up over the step and divided."""

    def __post_init__(self) -> None:
        if self.critic is not None and (self.critic.trains != "scalar" or self.round_prepare is None):
            raise ValueError(f"{self.name}: a critic trains a scalar head, on what round_prepare makes of its values")
        if self.critic is None and self.round_limit is not None:
            raise ValueError(f"{self.name}: round_limit is read where a critic is trained, and there is none")

    @property
    def learns_alone(self) -> bool:
        """Whether one completion of a prompt is enough: rewards are compared over the whole round."""
        return self.candidates == "group" and self.smallest_group == 1

    def needed(self, config: MethodConfig) -> frozenset[Need]:
        """Everything the loss will look at under ``config``."""
        return self.needs | (self.extra_needs(config) if self.extra_needs else frozenset())

    def needed_of_round(self, config: MethodConfig) -> frozenset[Need]:
        """Everything that ``round_prepare`` may look at or make: the critic reads the same columns."""
        return self.needed(config) | (self.critic.needed(config) - {"value"} if self.critic else frozenset())


def record_problem(method: Method) -> str:
    """What is wrong with a record; empty where its parts are of the kinds that they are to be."""
    functions = ("loss", "extra_needs", "round_prepare", "round_limit", "step_prepare", "metrics")
    for name in functions:
        value = getattr(method, name)
        if not callable(value) and (name == "loss" or value is not None):
            return f"{name} is {value!r}, which is no function"
    if not (isinstance(method.config, type) and issubclass(method.config, MethodConfig)):
        return f"config is {method.config!r}, which is no subclass of rayalign.methods.MethodConfig"
    hints = get_type_hints(Method)
    for name in ("candidates", "trains"):
        if getattr(method, name) not in get_args(hints[name]):
            return f"{name} is {getattr(method, name)!r}; write {' | '.join(get_args(hints[name]))}"
    for name, known in (("needs", get_args(Need)), ("data_policies", get_args(DataPolicy))):
        unknown = sorted(map(str, set(getattr(method, name)) - set(known)))
        if unknown:
            return f"{name} has {unknown[0]!r}; there are {' | '.join(known)}"
    return ""


def margin(values: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """chosen − rejected; candidate 0 is chosen, candidate 1 is rejected."""
    return values[:, 0] - values[:, 1]
