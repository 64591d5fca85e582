"""What a YAML may say of a run: every block, every default. Unknown keys and illegal pairings are errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from rayalign.config.candidates import Drawing, Labelling
from rayalign.config.data import AuxiliaryConfig, DataConfig, FilterConfig
from rayalign.config.fields import MAY_CHANGE, Block, as_list, as_named
from rayalign.config.legality import violations
from rayalign.config.method import MethodChoice
from rayalign.config.model import ModelConfig
from rayalign.config.policy import DataPolicyConfig, LabelConfig, OffPolicyConfig, RolloutConfig
from rayalign.config.scoring import EvaluateConfig, ScorerConfig
from rayalign.config.training import (
    CheckpointConfig,
    CriticConfig,
    OptimConfig,
    ReferenceConfig,
    StrategyConfig,
    WeightingConfig,
)

if TYPE_CHECKING:
    from rayalign.methods.method import Method

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
Track = Literal["tensorboard", "wandb"]


def _free(name: str) -> str:
    if name == "artifacts":
        raise ValueError("artifacts is the folder of the stages that runs share; choose another name")
    return name


Name = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_free)]


class RunConfig(Block):
    """One training run. Results go to ``<storage_path>/<name>/``."""

    config_version: Literal[1] = 1
    """Version of this schema; a file of another version is refused."""
    name: Annotated[Name, MAY_CHANGE] = "run"
    """The folder of the results, below storage_path; the same name continues."""
    seed: int = Field(default=0, ge=0)
    """Order of the data, samples, new weights: everything that is drawn."""
    storage_path: Annotated[str, MAY_CHANGE] = Field(default="runs", min_length=1)
    """A folder that all nodes see, or s3://bucket/runs; relative: on a cluster to $RAYALIGN_STORAGE."""
    model: ModelConfig
    data: DataConfig
    filter: FilterConfig | None = None
    method: MethodChoice
    """A method's name and its own parameters; ``module:RECORD`` is one of your own."""
    weighting: Annotated[WeightingConfig | None, BeforeValidator(as_named)] = None
    auxiliary: Annotated[tuple[AuxiliaryConfig, ...] | None, BeforeValidator(as_list)] = None
    reference: ReferenceConfig = ReferenceConfig()
    data_policy: DataPolicyConfig = OffPolicyConfig()
    """Where candidates come from: stored rows, the policy itself, or both."""
    rollout: RolloutConfig | None = None
    label: Annotated[LabelConfig | None, BeforeValidator(as_named)] = None
    scorer: ScorerConfig | None = None
    """What gives completions their rewards: a function, a reward model, or a language model that is asked."""
    critic: CriticConfig | None = None
    optim: OptimConfig = OptimConfig()
    strategy: Annotated[StrategyConfig, BeforeValidator(as_named), MAY_CHANGE] = StrategyConfig()
    evaluate: Annotated[EvaluateConfig | None, MAY_CHANGE] = None
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    track: Annotated[tuple[Track, ...], BeforeValidator(as_list), MAY_CHANGE] = ("tensorboard",)
    """Where rows of metrics go beside metrics.jsonl; [] is nowhere."""
    resources: Annotated[Literal["auto"], MAY_CHANGE] = "auto"
    """auto: the processes share the cores and devices that Ray has."""

    @model_validator(mode="after")
    def _legal(self) -> Self:
        found = violations(self)
        if found:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("illegal", "{reason}", {"reason": violation.reason}),
                    loc=tuple(violation.field.split(".")),
                    input=None,
                )
                for violation in found
            ]
            raise ValidationError.from_exception_data("RunConfig", details)
        return self

    @property
    def trained_method(self) -> Method:
        """The method's record, with WPO's weight on top where the run asks for it."""
        from rayalign.methods.composition import compose  # loads torch

        record = self.method.record
        return compose(record, self.weighting) if self.weighting is not None else record

    @property
    def uses_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return bool(self.trained_method.needed(self.method.config) & {"ref_logp", "ref_token_logp"})

    @property
    def needs_reference(self) -> bool:
        """Whether groups come with the reference's log-probs; else the training processes score every batch."""
        return self.reference.place == "pool" and self.uses_reference

    @property
    def reference_is_the_policy(self) -> bool:
        """Whether the training processes score with the policy's adapter off, which needs no second model."""
        return self.reference.place == "trainer" and self.model.lora is not None and self.model.reference is None

    @property
    def reference_is_beside(self) -> bool:
        """Whether the training processes hold the reference as a second model."""
        return self.reference.place == "trainer" and self.uses_reference and not self.reference_is_the_policy

    @property
    def evaluation_engine(self) -> Literal["hf", "vllm"]:
        """What samples the policies that are evaluated."""
        wanted = self.evaluate.sampling.engine if self.evaluate is not None else "hf"
        if wanted != "auto":
            return wanted
        return self.rollout.engine if self.rollout is not None else "hf"

    @property
    def labelling(self) -> Labelling | None:
        """How candidates are scored and labelled; None where the labels of the data are trusted."""
        if self.scorer is None:
            return None
        return Labelling(scorer=self.scorer, label=self.label or LabelConfig())

    @property
    def relabelling(self) -> Labelling | None:
        """How stored completions are scored and labelled again; None where they are not."""
        return self.labelling if self.relabels else None

    @property
    def relabels(self) -> bool:
        """Whether ``label`` asks for new labels of stored completions."""
        return self.label is not None and self.label.relabel

    @property
    def drawing(self) -> Drawing | None:
        """How completions are drawn; None where the run learns from stored ones alone."""
        labelling = self.labelling
        if self.data_policy.name == "off_policy" or self.rollout is None or labelling is None:
            return None
        return Drawing(policy=self.data_policy, rollout=self.rollout, labelling=labelling)

    @property
    def evaluated(self) -> EvaluatedRun | None:
        """The run with what ``evaluate`` says; None where it is not evaluated."""
        return EvaluatedRun(run=self, evaluate=self.evaluate) if self.evaluate is not None else None

    @property
    def measures_loss(self) -> bool:
        """Whether ``data.eval`` has a loss; what is prepared of rounds, stored rows do not have."""
        return bool(self.data.eval) and self.method.record.round_prepare is None

    @property
    def has_no_kl_term(self) -> bool:
        """True for a method whose protection from drift is auxiliary data, when there is none."""
        return self.method.record.requires_auxiliary and not self.auxiliary

    @property
    def display_name(self) -> str:
        """What tables call the objective: ``ipo + wpo``, ``dpo + sft``, ``dpo + filter 0.7``, ``mpo (no KL)``."""
        record = self.method.record
        parts = [f"{record.name} (no KL)" if self.has_no_kl_term else record.name]
        if self.weighting is not None:
            parts.append("permuted wpo" if self.weighting.permute else "wpo")
        if not record.requires_auxiliary:
            parts.extend(stream.name for stream in self.auxiliary or ())
        if self.filter is not None:
            parts.append(f"filter {self.filter.policy_logp_quantile:g}")
        return " + ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedRun:
    """A run whose policies are sampled and scored, and how."""

    run: RunConfig
    evaluate: EvaluateConfig
