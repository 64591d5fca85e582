"""All 216 sequences of three tokens out of six, for six prompts, and a policy that cannot say everything. Next-token
logits are linear in sixteen parameters shared by all prompts; half of the reward's variance is not. Every method
starts at the reference and is traced in (KL, E[r]). No policy at all may lie above the frontier, the largest E[r] that
a KL allows. It is that of π\\*_β for some β. A point above it would mean that a reward or a KL is computed wrongly.
The objective of all but DPO is E[r] − 0.3 KL. *efficiency* is the gain in E[r] over the frontier's gain at the same
KL. PPO's critic is a table. RLOO, GRPO and PPO draw from the policy, the others from the reference; all see 48
sequences a step. A seed changes features, reference, reward and samples. Best of n is in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.functional.advantages import gae, grpo_advantage, kl_shaped_reward, rloo_advantage, whiten
from rayalign.methods import (
    dpo_loss,
    dpo_rw_loss,
    exo_loss,
    exo_reward_targets,
    grpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
)
from rayalign.report.frontier import FrontierPoint, score_at_kl

from ..results import NotMeasured
from .enumeration import Sequences, best_of_n, expected, frontier, kl
from .figures import band, color, finish
from .preferences import KL, REWARD
from .record import Claim, Experiment, Measured, Point, ahead
from .training import descend, generator, normal

PROMPTS, CANDIDATES, PARAMETERS, SCALE = 6, 8, 16, 0.25
BETA = 0.3
SEQUENCES = Sequences(6, 3)
AT = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 90, 150, 225, 300)
LEVELS = (0.2, 0.5)
BEST_OF = (2, 4, 8, 16)
OBJECTIVE, SLACK, EFFICIENCY = f"E[r] − {BETA} KL", "frontier − E[r]", "efficiency"
ON_POLICY = ("rloo", "grpo", "ppo")


@dataclass(frozen=True, slots=True)
class World:
    features: Tensor
    """[X, P, V, D]"""
    start: Tensor
    reward: Tensor
    """[X, Y]"""

    def logits(self, theta: Tensor) -> Tensor:
        return self.features @ theta


def world(seed: int) -> World:
    random = generator(seed)
    features = normal(random, PROMPTS, SEQUENCES.num_prefixes, SEQUENCES.vocabulary, PARAMETERS)
    start, direction = SCALE * normal(random, PARAMETERS), normal(random, PARAMETERS)
    linear = (features @ direction)[:, SEQUENCES.prefix, SEQUENCES.tokens].sum(dim=-1)
    reward = (linear / linear.std() + normal(random, PROMPTS, len(SEQUENCES))) / 2**0.5
    return World(features, start, reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Candidates of every prompt; per-token columns are flat, [X · K · T]."""

    sequence: Tensor
    """[X, K]"""
    token_logp: Tensor
    behavior_token_logp: Tensor
    ref_token_logp: Tensor
    reward: Tensor
    """[X, K]"""
    value: Tensor
    """The critic before each token."""

    @property
    def candidate_of(self) -> Tensor:
        return torch.arange(self.sequence.numel()).repeat_interleave(SEQUENCES.length)

    def summed(self, token_values: Tensor) -> Tensor:
        return token_values.view(*self.sequence.shape, -1).sum(dim=-1)

    @property
    def logp(self) -> tuple[Tensor, Tensor]:
        """(log π, log π_ref), [X, K]."""
        return self.summed(self.token_logp), self.summed(self.ref_token_logp)


def rloo(of: Groups) -> Tensor:
    behavior = of.summed(of.behavior_token_logp)
    earned = of.reward - BETA * (behavior - of.logp[1])
    return ppo_policy_loss(of.logp[0].flatten(), behavior.flatten(), rloo_advantage(earned).flatten()).mean()


def grpo(of: Groups) -> Tensor:
    advantage = grpo_advantage(of.reward).flatten()[of.candidate_of]
    columns = of.token_logp, of.behavior_token_logp, of.ref_token_logp, advantage
    return grpo_loss(*columns, kl_coef=BETA).mean()


def ppo(of: Groups) -> Tensor:
    """Policy and critic share no parameter, so their losses are added."""
    shaped = kl_shaped_reward(
        of.reward.flatten(), of.behavior_token_logp, of.ref_token_logp, of.candidate_of, kl_coef=BETA
    )
    old = of.value.detach()
    advantage = gae(shaped, old, of.candidate_of)
    policy = ppo_policy_loss(of.token_logp, of.behavior_token_logp, whiten(advantage))
    return policy.mean() + ppo_value_loss(of.value, old, advantage + old).mean()


def dpo(of: Groups) -> Tensor:
    """Candidates two by two, the higher reward chosen."""
    pairs = [column.reshape(-1, 2) for column in (*of.logp, of.reward)]
    order = pairs[2].argsort(dim=1, descending=True)
    return dpo_loss(pairs[0].gather(1, order), pairs[1].gather(1, order), beta=BETA).mean()


def exo_rw(of: Groups) -> Tensor:
    return exo_loss(*of.logp, exo_reward_targets(of.reward, BETA), beta_pi=1.0).mean()


def dpo_rw(of: Groups) -> Tensor:
    return dpo_rw_loss(*of.logp, of.reward, beta_pi=1.0, beta_r=BETA).mean()


METHODS: Mapping[str, Callable[[Groups], Tensor]] = {
    "rloo": rloo,
    "grpo": grpo,
    "ppo": ppo,
    "exo_rw": exo_rw,
    "dpo_rw": dpo_rw,
    "dpo": dpo,
}


def draw_groups(of: World, name: str, theta: Tensor, critic: Tensor, random: torch.Generator) -> Groups:
    logits, reference = of.logits(theta), of.logits(of.start)
    behavior = logits.detach() if name in ON_POLICY else reference
    probability = SEQUENCES.logp(behavior).exp()
    sequence = torch.multinomial(probability, CANDIDATES, replacement=True, generator=random)
    prompt = torch.arange(PROMPTS)[:, None]
    prefix, token = SEQUENCES.prefix[sequence], SEQUENCES.tokens[sequence]

    def columns(table: Tensor) -> Tensor:
        return torch.log_softmax(table, dim=-1)[prompt[..., None], prefix, token].flatten()

    return Groups(
        sequence=sequence,
        token_logp=columns(logits),
        behavior_token_logp=columns(behavior),
        ref_token_logp=columns(reference),
        reward=of.reward[prompt, sequence],
        value=critic[prompt[..., None], prefix].flatten(),
    )


def trace(of: World, name: str, seed: int, at: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """log π after so many steps."""
    random = generator(seed, 7)
    theta = of.start.clone().requires_grad_()
    critic = torch.zeros(PROMPTS, SEQUENCES.num_prefixes, dtype=torch.float64, requires_grad=True)
    for step in descend(
        [theta, critic] if name == "ppo" else [theta],
        lambda step: METHODS[name](draw_groups(of, name, theta, critic, random)),
        lr=0.02,
        at=at,
    ):
        yield step, SEQUENCES.logp(of.logits(theta)).detach()


def measured(of: World, paths: Mapping[tuple[str, int], Tensor]) -> list[Point]:
    """Every policy against the frontier at its own KL."""
    ref_logp = SEQUENCES.logp(of.logits(of.start))
    begin = expected(ref_logp, of.reward)
    distances = [kl(logp, ref_logp) for logp in paths.values()]
    points = []
    for (key, logp), distance, best in zip(
        paths.items(), distances, frontier(ref_logp, of.reward, distances), strict=True
    ):
        reward = expected(logp, of.reward)
        values = {KL: distance, REWARD: reward, OBJECTIVE: reward - BETA * distance}
        if distance > 1e-6:
            values |= {SLACK: best - reward, EFFICIENCY: (reward - begin) / (best - begin)}
        points.append(Point(cell=key[0], at=key[1], values=values))
    return points


def measure(seed: int, at: Sequence[int] = AT) -> tuple[Point, ...]:
    of = world(seed)
    paths = {(name, step): logp for name in METHODS for step, logp in trace(of, name, seed, at)}
    ref_logp = SEQUENCES.logp(of.logits(of.start))
    paths |= {("best of n", n): best_of_n(ref_logp, of.reward, n) for n in BEST_OF}
    return tuple(measured(of, paths))


def at_kl(name: str, level: float) -> Callable[[Measured], float]:
    """E[r] where the path first crosses the level, as the report has it; raises NotMeasured where it does not."""

    def value(seed: Measured) -> float:
        path = [FrontierPoint(step=int(p.at), kl=p.values[KL], score=p.values[REWARD]) for p in seed.path(name)]
        crossing = score_at_kl(path, level)
        if crossing is None:
            raise NotMeasured(f"{name} does not reach a KL of {level}")
        return crossing.score

    return value


def claims() -> tuple[Claim, ...]:
    def smallest(name: str, quantity: str) -> Callable[[Measured], float]:
        return lambda seed: min(p.values[quantity] for p in seed.path(name) if quantity in p.values)

    def behind(one: str, other: str, level: float) -> Callable[[Measured], float]:
        return lambda seed: at_kl(one, level)(seed) - at_kl(other, level)(seed)

    return (
        *(
            Claim(text=f"{name}: smallest frontier − E[r] of all its points", value=smallest(name, SLACK), above=-1e-9)
            for name in (*METHODS, "best of n")
        ),
        Claim(text="best of n: smallest efficiency", value=smallest("best of n", EFFICIENCY), above=0.85),
        *(
            Claim(text=f"E[r] at a KL of {level}: {one} − {other}", value=behind(one, other, level))
            for one, other in (("exo_rw", "dpo_rw"), ("exo_rw", "dpo"), ("rloo", "dpo_rw"), ("rloo", "exo_rw"))
            for level in LEVELS
        ),
        *(
            Claim(text=f"{OBJECTIVE} at {AT[-1]}: {one} − {other}", value=ahead(one, other, OBJECTIVE, AT[-1]))
            for one, other in (("exo_rw", "dpo_rw"), ("exo_rw", "dpo"), ("rloo", "exo_rw"), ("rloo", "dpo"))
        ),
    )


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    of = world_frontier(seeds[0])
    left.plot(*of, color="black", linewidth=0.9, linestyle=":", label="frontier")
    for number, name in enumerate((*METHODS, "best of n")):
        path = seeds[0].path(name)
        marker = "+" if name == "best of n" else None
        x, y = [p.values[KL] for p in path], [p.values[REWARD] for p in path]
        left.plot(x, y, color=color(number), linewidth=1.3, marker=marker, label=name)
        if name in METHODS:
            band(right, name, [efficiencies(seed, name) for seed in seeds], number)
    finish(left, "KL to the reference (nats), one seed", "E[r]")
    finish(right, "step", "efficiency")


def efficiencies(seed: Measured, name: str) -> list[tuple[float, float]]:
    return [(p.at, p.values[EFFICIENCY]) for p in seed.path(name) if EFFICIENCY in p.values]


def world_frontier(seed: Measured) -> tuple[list[float], list[float]]:
    """The frontier at every KL that was measured."""
    found = [p.values for p in seed.points if SLACK in p.values]
    points = sorted((values[KL], values[REWARD] + values[SLACK]) for values in found)
    return [x for x, _ in points], [y for _, y in points]


READING = (
    "No point lies above the frontier. At an equal KL, EXO on rewards, DPO on rewards and RLOO are not told apart "
    "in this family: they walk nearly the same path. They stop at different places on it, and by the objective "
    "that they are given EXO ends above DPO on rewards and RLOO above EXO. DPO on pairs ends below EXO and RLOO. "
    "Best of n, which is bound to no family, is near the frontier throughout."
)
EXPERIMENT = Experiment(
    name="e7",
    title="Reward against KL, and the exact frontier",
    about=__doc__ or "",
    reading=READING,
    at="step or n",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Left: one seed's paths and the frontier. Right: share of the frontier's gain at the same KL, by step.",
    shown=(*BEST_OF, 45, 150, 300),
)
