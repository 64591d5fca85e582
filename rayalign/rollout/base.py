"""Prompt token ids in, completions with log-probabilities out: what every engine that samples agrees on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. Temperature first, then top-k, then top-p of what top-k left.

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens that hold this much probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 keeps all."""
    max_new_tokens: int = 256
    num_samples: int = 1
    """Completions of one prompt."""
    seed: int = 0
    """Seed of the whole call, such as one round's; see :meth:`RolloutEngine.generate` for what else fixes a draw."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion; the one drawn is its last token."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(f"temperature and top_k are ≥ 0 and 0 < top_p ≤ 1, not {self}")
        if self.max_new_tokens < 1 or self.num_samples < 1:
            raise ValueError(f"max_new_tokens and num_samples are ≥ 1, not {self}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn, so that a completion has no density under the full softmax."""
        return self.temperature == 0 or self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One drawn answer. The three tuples have one entry per token; log-probabilities are float32 values in nats."""

    prompt_index: int
    """The prompt's place in the call."""
    sample_index: int
    """0 … num_samples − 1."""
    token_ids: tuple[int, ...]
    """Never empty; the last one is a stop id exactly if ``finish_reason`` is ``"stop"``."""
    behavior_token_logp: tuple[float, ...]
    """Under the distribution really drawn from: temperature and truncation applied and renormalised; 0 when greedy."""
    sampler_logp: tuple[float, ...]
    """Under the full softmax at the temperature (at 1 when greedy); NaN where the engine cannot tell."""
    finish_reason: Literal["stop", "length"]


class RolloutEngine(Protocol):
    """Something that samples from the weights it holds."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        """``params.num_samples`` completions of every prompt: all of prompt 0, all of prompt 1, ….

        ``keys`` are what the prompts' randomness hangs on, such as their positions in the stream; ``None`` stands for
        their places in this call. The draw at a token is a function of (seed, key, sample, place in the completion) and
        of the model's probabilities there, so a call repeated after a failure, or split otherwise, draws the same.
        Equal prompts under different keys draw differently.

        Raises:
            ValueError: a prompt is empty, or there is not one key per prompt.
        """
        ...
