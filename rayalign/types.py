"""Tensor records that every room shares.

The legend of letters, used in every shape of this package:

    B  prompt groups in a micro-batch          R  packed rows
    K  candidates per group (ragged: masked)   L  tokens per packed row
    N  predicted response tokens               V  vocabulary

Token ``n`` belongs to candidate ``candidate_of[n] = b * K + k``. All log-probabilities are float32 (float64 in tests)
and in nats, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

PADDING_GROUP = -1


class MissingNeed(LookupError):
    """A loss asked for something its method record does not declare, or its data does not carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch of prompt groups; a prompt is stored once per row and shared by its candidates there."""

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    """Position inside the sequence prompt + candidate: every candidate continues from the prompt's end."""
    group_ids: Int[Tensor, "R L"]
    """0 … B-1, or -1 on padding."""
    branch_ids: Int[Tensor, "R L"]
    """0 on the prompt, k + 1 on candidate k."""
    parent_of_branch: Int[Tensor, " branches"]
    """All 0 today: branches may one day hang on branches (trajectories)."""
    predict_from: Int[Tensor, " N"]
    """Flat position (row * L + column) whose hidden state predicts token n."""
    target_ids: Int[Tensor, " N"]
    candidate_of: Int[Tensor, " N"]
    """b * K + k; ascending."""
    candidate_mask: Bool[Tensor, "B K"]
    """False where a group has fewer than K candidates, and on whole dummy groups."""
    group_index: Int[Tensor, " B"]
    """The group's position in its stream (not its row in a file): step = position // groups_per_step."""
    per_candidate: Mapping[str, Float[Tensor, "B K"]] = field(default_factory=dict)
    """reward, label, ref_logp, behavior_logp …; a missing value is NaN, never 0."""
    per_token: Mapping[str, Float[Tensor, " N"]] = field(default_factory=dict)
    """ref_token_logp, behavior_token_logp, advantage, return, old_value …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one forward of one model says about one batch."""

    token_logp: Float[Tensor, " N"]
    """NaN, as ``logp`` is, where the model has a scalar head instead of a vocabulary."""
    logp: Float[Tensor, "B K"]
    """Sum of ``token_logp`` over the candidate's response tokens; 0 where there is no candidate."""
    length: Int[Tensor, "B K"]
    """Number of predicted response tokens; 0 where there is no candidate."""
    log_sum_p2: Float[Tensor, " N"] | None = None
    """log Σ_v π(v)² at temperature 1, without gradient."""
    log_max_p: Float[Tensor, " N"] | None = None
    """log max_v π(v) at temperature 1, without gradient."""
    plain_token_logp: Float[Tensor, " N"] | None = None
    """``token_logp`` at temperature 1, without gradient: what WPO weighs by."""
    entropy: Float[Tensor, " N"] | None = None
    value: Float[Tensor, " N"] | None = None
    """A scalar head on the state that token n is predicted from, so before it: what a critic says of the state."""
    score: Float[Tensor, "B K"] | None = None
    """The same head on each candidate's last token, its end token included: what a reward model says of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Everything a loss may look at. Asking for an undeclared need raises :class:`MissingNeed` with its name."""

    batch: PackedBatch
    scores: Scores
    needs: frozenset[str] = frozenset()

    def candidate(self, name: str) -> Float[Tensor, "B K"]:
        """A per-candidate column such as ``"reward"`` or ``"ref_logp"``, or the forward's ``"score"``."""
        self._require(name)
        if name in self.batch.per_candidate:
            return self.batch.per_candidate[name]
        if name == "score" and self.scores.score is not None:
            return self.scores.score
        raise MissingNeed(f"the data carries no per-candidate column {name!r}")

    def token(self, name: str) -> Float[Tensor, " N"]:
        """A per-token column such as ``"behavior_token_logp"``, or a token statistic of the forward."""
        self._require(name)
        if name in self.batch.per_token:
            return self.batch.per_token[name]
        statistic: Tensor | None = getattr(self.scores, name, None) if name in Scores.__slots__ else None
        if statistic is None:
            raise MissingNeed(f"neither the data nor the forward carries per-token {name!r}")
        return statistic

    def _require(self, name: str) -> None:
        require_declared(name, self.needs)

    @property
    def pair_mask(self) -> Bool[Tensor, " B"]:
        """True where both candidates of a pair are real."""
        return self.batch.candidate_mask[:, :2].all(dim=1)

    @property
    def group_mask(self) -> Bool[Tensor, " B"]:
        """True where the group has at least one real candidate (dummy groups have none)."""
        return self.batch.candidate_mask.any(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """All groups of one round, as ``round_prepare`` sees them: their columns, before the trainer reads a token.

    N counts the tokens of the whole round. Floating columns are float64, since sums run over all of them.
    """

    candidate_of: Int[Tensor, " N"]
    """b * K + k; ascending."""
    candidate_mask: Bool[Tensor, "B K"]
    per_candidate: Mapping[str, Float[Tensor, "B K"]]
    """reward …; NaN where the scorer failed on the prompt, and where there is no candidate."""
    per_token: Mapping[str, Float[Tensor, " N"]]
    needs: frozenset[str] = frozenset()

    def candidate(self, name: str) -> Float[Tensor, "B K"]:
        """A per-candidate column such as ``"reward"``."""
        require_declared(name, self.needs)
        if name not in self.per_candidate:
            raise MissingNeed(f"the round carries no per-candidate column {name!r}")
        return self.per_candidate[name]

    def token(self, name: str) -> Float[Tensor, " N"]:
        """A per-token column such as ``"behavior_token_logp"``."""
        require_declared(name, self.needs)
        if name not in self.per_token:
            raise MissingNeed(f"the round carries no per-token column {name!r}")
        return self.per_token[name]


def require_declared(name: str, needs: frozenset[str]) -> None:
    """Raise :class:`MissingNeed` for a name that the method's record does not declare."""
    if name not in needs:
        declared = ", ".join(sorted(needs)) or "nothing"
        raise MissingNeed(f"{name!r} is used but not declared: the method's `needs` declares {declared}")
