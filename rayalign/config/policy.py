"""The blocks about where candidates come from: ``data_policy``, ``rollout``, ``label``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from rayalign.config.data import Source
from rayalign.config.fields import AS_PATH, MAY_CHANGE, Block, Elastic, InterpreterPath, as_named, check_function

PAIR_RULES = ("best_worst", "wpo", "bradley_terry")
LABEL_RULES = (*PAIR_RULES, "best", "rewards")
PARAMETERS = {"bradley_terry": frozenset({"scale"}), "wpo": frozenset({"threshold", "gap", "rejected"})}
"""What each rule of ``label`` reads."""


def unread_parameters(rule: str) -> frozenset[str]:
    """Parameters of ``label`` that this rule does not read."""
    return frozenset[str]().union(*PARAMETERS.values()) - PARAMETERS.get(rule, frozenset())


def _parse_refresh(value: object) -> object:
    if value == "never" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r} is neither a number of steps nor never")


def _label_name(value: str, info: ValidationInfo) -> str:
    if value in LABEL_RULES:
        return value
    if ":" in value:
        return check_function(value, info)
    raise ValueError(f"{value!r} is none of {' | '.join(LABEL_RULES)} | module:function")


class CandidatesConfig(Block):
    """What may be asked of every data policy."""

    @property
    def draws_rounds(self) -> bool:
        """Whether completions are drawn while the run trains."""
        return False

    @property
    def fresh_fraction(self) -> float:
        """Share of the groups of a step that are drawn from the policy."""
        return 0.0

    @property
    def keeps_stored(self) -> bool:
        """Whether stored candidates of a prompt are scored and labelled together with the fresh ones."""
        return False


class OffPolicyConfig(CandidatesConfig):
    """Stored candidates only."""

    name: Literal["off_policy"] = "off_policy"


class RoundsConfig(CandidatesConfig):
    """What every policy with rollouts has: when it draws, and for which prompts."""

    refresh_every: Annotated[int | Literal["never"], BeforeValidator(_parse_refresh)] = 4
    """Steps that one round of rollouts serves; never: drawn once, from the initial policy."""
    lag: int = Field(default=0, ge=0)
    """Rounds between the weights that draw and those that train. 0: synchronous; 1: one is drawn while one trains."""
    prompts: Source | None = None
    """null: the prompts of data.train."""
    max_unlabelled_rounds: Annotated[int, MAY_CHANGE] = Field(default=3, ge=1)
    """Rounds in a row without any preference, or with equal rewards alone, that end the run: it learns nothing."""

    @property
    def draws_rounds(self) -> bool:
        return self.refresh_every != "never"

    @property
    def fresh_fraction(self) -> float:
        return 1.0


class OnPolicyConfig(RoundsConfig):
    """Every candidate is drawn from the policy."""

    name: Literal["on_policy"] = "on_policy"
    passes: int = Field(default=1, ge=1)
    """Times that a round is trained on, before the next one is drawn; refresh_every counts the steps of all passes."""


class HybridConfig(RoundsConfig):
    """Stored and fresh candidates."""

    name: Literal["hybrid"] = "hybrid"
    mix: Literal["groups", "candidates"] = "groups"
    """groups: a fraction of the groups is fresh; candidates: both kinds answer one prompt and are labelled together."""
    on_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of the groups that are fresh, with mix: groups."""

    @property
    def fresh_fraction(self) -> float:
        return self.on_fraction if self.mix == "groups" else 1.0

    @property
    def keeps_stored(self) -> bool:
        return self.mix == "candidates"

    @property
    def passes(self) -> int:
        """Times that a round is trained on."""
        return 1

    def unused(self) -> frozenset[str]:
        return frozenset({"on_fraction"} if self.mix == "candidates" else ())

    @model_validator(mode="after")
    def _fraction_is_read(self) -> Self:
        if self.given_without_use():
            raise ValueError("mix: candidates has both kinds in every group: remove on_fraction, or write mix: groups")
        return self


DataPolicyConfig = Annotated[
    OffPolicyConfig | OnPolicyConfig | HybridConfig, Field(discriminator="name"), BeforeValidator(as_named)
]


class RolloutConfig(Block):
    """How the policy is sampled."""

    engine: Literal["vllm", "hf"] = "vllm"
    """hf: Hugging Face's model in this package's sampler, needs nothing further; vllm: the extra of that name."""
    actors: Annotated[Elastic, MAY_CHANGE] = "auto"
    """A number, [smallest, largest], or auto."""
    samples: int = Field(default=8, ge=1)
    """Completions of one prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Samples the most probable tokens that have this share together; 1 is all. Ratio methods refuse less."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a completion at most, its end token included."""
    placement: Annotated[Literal["auto", "separate", "shared"], MAY_CHANGE] = "auto"
    """Devices of its own, or those of the training workers in turn; auto shares GPUs only where they are too few.

    separate with actors: [0, n] leaves the present nodes to training: an autoscaler adds nodes for actors."""
    tensor_parallel: Annotated[int, MAY_CHANGE] = Field(default=1, ge=1)
    """Devices of one actor, which hold one copy of the weights together."""
    gpu_memory_utilization: Annotated[float | None, MAY_CHANGE] = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory, for vllm; null: 0.9 alone, 0.4 beside a training worker."""
    transfer: Annotated[Literal["object_store", "nixl"], MAY_CHANGE] = "object_store"
    """How refreshed weights reach the actors. nixl: from device to device, with the extra of that name."""
    python: Annotated[InterpreterPath | None, MAY_CHANGE] = None
    """The interpreter of another environment, for an engine whose torch is not the trainer's."""

    def actor_range(self, auto: int) -> tuple[int, int]:
        """(fewest, most) actors, where ``auto`` stands for that many."""
        if self.actors == "auto":
            return auto, auto
        return self.actors if isinstance(self.actors, tuple) else (self.actors, self.actors)


class LabelConfig(Block):
    """How scores become chosen and rejected."""

    name: Annotated[str, AfterValidator(_label_name), AS_PATH] = "best_worst"
    """Pairs: best_worst | wpo | bradley_terry | module:function, of the list of scores → (chosen, rejected).

    best keeps one completion (for sft, best-of-K sampling), rewards all of them (for methods of groups)."""
    scale: float = Field(default=1.0, gt=0)
    """bradley_terry: chosen with probability σ(difference of scores / scale)."""
    threshold: float = 5.0
    """wpo: the chosen one scores at least this."""
    gap: float = Field(default=1.0, ge=0)
    """wpo: the rejected one scores at least this much less."""
    rejected: Literal["random", "minimum"] = "random"
    """wpo: which of those that score so much less."""
    relabel: bool = False
    """Score and label the stored completions too, with the same scorer and rule."""

    def unused(self) -> frozenset[str]:
        return unread_parameters(self.name)

    @model_validator(mode="after")
    def _every_parameter_is_read(self) -> Self:
        for key in self.given_without_use():
            rule = next(rule for rule, parameters in PARAMETERS.items() if key in parameters)
            raise ValueError(f"{self.name} does not read {key}: remove it, or write name: {rule}")
        return self
