"""What cannot be combined, and why. Nothing starts before these rules hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rayalign.config.method import why_not_weighted

if TYPE_CHECKING:
    from rayalign.config.run import RunConfig
    from rayalign.methods.method import Method


class Violation(NamedTuple):
    """``field`` is the dotted path of what to change."""

    field: str
    reason: str


def violations(run: RunConfig) -> list[Violation]:
    """Every reason why ``run`` is refused; empty for a legal run."""
    record = run.method.record
    return list(chain.from_iterable(rule(run, record) for rule in _RULES))


def blocks_without_use(policy: str, *, relabels: bool) -> dict[str, str]:
    """Block → what to do about it, for blocks that a data policy has no use for."""
    if policy == "on_policy":
        return {
            "filter": "on_policy has no stored pairs to choose from; remove filter, or write data_policy: off_policy"
        }
    if policy == "hybrid":
        return {}
    drawing = {"rollout": "off_policy draws no completions; remove rollout, or write data_policy: on_policy or hybrid"}
    if relabels:
        return drawing
    return drawing | {
        "label": "off_policy trusts the stored labels; remove label, or write label: {relabel: true}",
        "scorer": "off_policy scores nothing unless label: {relabel: true}; remove it, or move it to evaluate.scorers",
    }


def _unused(run: RunConfig, _record: Method) -> Iterator[Violation]:
    for block, reason in blocks_without_use(run.data_policy.name, relabels=run.relabels).items():
        if getattr(run, block) is not None:
            yield Violation(block, reason)


def _data_policy(run: RunConfig, record: Method) -> Iterator[Violation]:
    policy = run.data_policy.name
    if policy in record.data_policies:
        return
    if "behavior_token_logp" in record.needed(run.method.config):
        why = "its ratio needs each token's log-probability under the policy that drew it, which stored rows lack"
    else:
        why = "there is no policy to draw from"
    allowed = " or ".join(sorted(record.data_policies))
    yield Violation("data_policy", f"{record.name} cannot learn {policy}: {why}; write data_policy: {allowed}")


def _rounds(run: RunConfig, record: Method) -> Iterator[Violation]:
    policy = run.data_policy
    if policy.name == "off_policy":
        if run.relabels and run.scorer is None:
            yield Violation(
                "scorer", "label: {relabel: true} needs a scorer, such as scorer: {name: rule, function: …}"
            )
        return
    if run.rollout is None:
        yield Violation("rollout", f"{policy.name} draws completions; say how: rollout: {{engine: vllm, samples: 8}}")
    elif run.rollout.samples < fewest_samples(record):
        yield Violation("rollout.samples", f"{record.name} compares completions of one prompt; write at least 2")
    if run.scorer is None:
        yield Violation("scorer", f"{policy.name} needs a scorer, such as scorer: {{name: rule, function: …}}")
    if policy.name == "on_policy" and run.relabels:
        yield Violation("label.relabel", "on_policy has no stored completions to label again; remove relabel")


def _placement(run: RunConfig, _record: Method) -> Iterator[Violation]:
    rollout, policy = run.rollout, run.data_policy
    if rollout is None or policy.name == "off_policy":
        return
    if rollout.placement == "shared" and policy.lag:
        yield Violation(
            "rollout.placement", "shared lets training wait while rounds are drawn, so that lag must be 0; write lag: 0"
        )
    if rollout.tensor_parallel > 1:
        if rollout.engine == "hf":
            yield Violation("rollout.tensor_parallel", "hf samples on one device; write 1, or engine: vllm")
        if rollout.placement == "shared":
            yield Violation(
                "rollout.tensor_parallel", "shared gives an actor a part of one device; write 1, or separate"
            )
        if rollout.transfer == "nixl":
            yield Violation(
                "rollout.transfer",
                "nixl brings whole weights to one device, and tensor_parallel reads parts from a "
                "folder; write object_store, or tensor_parallel: 1",
            )


def _filter(run: RunConfig, _record: Method) -> Iterator[Violation]:
    if run.filter is not None and run.data_policy.name == "hybrid" and run.data_policy.mix == "candidates":
        yield Violation(
            "filter",
            "mix: candidates labels stored and fresh completions of a prompt together, so no pair is stored whole to "
            "be kept or left out; write mix: groups, or remove filter",
        )


def fewest_samples(record: Method) -> int:
    """How many completions of a prompt the method needs at least."""
    if record.candidates == "group":
        return record.smallest_group
    return 1 if record.candidates == "one" else 2


def _passes(run: RunConfig, _record: Method) -> Iterator[Violation]:
    policy = run.data_policy
    if policy.name != "on_policy" or policy.passes == 1:
        return
    if policy.refresh_every == "never":
        yield Violation(
            "data_policy.passes",
            "what is drawn once is trained on again in every epoch; write optim.epochs or more optim.steps",
        )
    elif policy.refresh_every % policy.passes:
        yield Violation(
            "data_policy.refresh_every",
            f"counts the steps of all {policy.passes} passes over a round; {policy.refresh_every} is no multiple of "
            f"{policy.passes}",
        )


def _label(run: RunConfig, record: Method) -> Iterator[Violation]:
    if run.label is None:
        return
    name = run.label.name
    makes = {"rewards": "rewards keeps every completion", "best": "best keeps one completion"}
    what = makes.get(name, f"{name} makes pairs")
    if record.candidates == "group" and name != "rewards":
        yield Violation("label.name", f"{what}, and {record.name} learns from groups; write label: rewards")
    elif record.candidates == "one" and "label" not in record.needs:
        if name != "best":
            yield Violation(
                "label.name", f"{what}, and {record.name} learns from one completion of a prompt; write label: best"
            )
    elif record.candidates != "group" and name in makes and (record.candidates, name) != ("ranking", "rewards"):
        yield Violation("label.name", f"{what}, and {record.name} learns from preferences; write label: best_worst")


def _room(run: RunConfig, record: Method) -> Iterator[Violation]:
    """The completions of one prompt are trained on together."""
    if run.rollout is None or run.data_policy.name == "off_policy":
        return
    kept = {"one": 2 if "mismatched" in record.needs else 1, "pair": 2}.get(record.candidates, run.rollout.samples)
    tokens = kept * run.rollout.max_new_tokens
    if tokens >= run.optim.tokens_per_micro_batch:
        yield Violation(
            "optim.tokens_per_micro_batch",
            f"{run.optim.tokens_per_micro_batch} is too small for {kept} completions of up to rollout.max_new_tokens: "
            f"{run.rollout.max_new_tokens}, which {record.name} learns from together: write more than {tokens}, room "
            "for their prompt, or lower rollout.max_new_tokens" + (" or rollout.samples" if kept > 2 else ""),
        )


def _truncated_sampling(run: RunConfig, record: Method) -> Iterator[Violation]:
    if record.refuses_truncated_sampling and run.rollout is not None and run.rollout.top_p < 1:
        yield Violation(
            "rollout.top_p",
            f"{record.name} needs the density of every completion, which truncated sampling does not have; write 1.0",
        )


def _temperature(run: RunConfig, record: Method) -> Iterator[Violation]:
    if run.rollout is None or "behavior_token_logp" not in record.needed(run.method.config):
        return
    drawn, trained = run.rollout.temperature, run.method.config.logit_temperature
    if drawn != trained:
        yield Violation(
            "method.logit_temperature",
            f"{trained:g} is not the temperature that completions are drawn at, {drawn:g}: the ratio of {record.name} "
            f"would compare two temperatures; write {drawn:g}",
        )


def _prepared(run: RunConfig, record: Method) -> Iterator[Violation]:
    if record.round_prepare is not None and run.data_policy.name in record.data_policies - {"on_policy"}:
        yield Violation(
            "data_policy",
            f"{record.name} prepares whole rounds, which only on_policy has; write data_policy: on_policy",
        )


def _critic(run: RunConfig, record: Method) -> Iterator[Violation]:
    """A critic is trained on rounds, by workers that hold it; a limit that never acts is refused."""
    policy = run.data_policy
    if record.critic is None:
        if run.critic is not None:
            yield Violation("critic", f"{record.name} trains no critic; remove it")
        return
    if policy.name != "on_policy":
        return
    if policy.refresh_every == "never":
        yield Violation(
            "data_policy.refresh_every",
            f"{record.name}'s critic values each round again, and what is drawn once is no round; write a number of "
            "steps",
        )
        return
    limit = record.round_limit(run.method.config) if record.round_limit is not None else None
    if limit is not None and policy.passes == 1:
        yield Violation(
            "data_policy.passes",
            f"{record.name} skips further passes over a round once {limit[0]} is above {limit[1]:g}, and there is one "
            "pass only; write passes: 4, or remove the limit",
        )


def _held_out(run: RunConfig, record: Method) -> Iterator[Violation]:
    if record.round_prepare is not None and run.data.eval and run.evaluate is None:
        yield Violation(
            "data.eval",
            f"{record.name} has no loss on stored rows; remove it, or write evaluate: {{…}}, which takes its prompts",
        )


def _weighting(run: RunConfig, record: Method) -> Iterator[Violation]:
    if run.weighting is not None:
        reason = why_not_weighted(record, run.weighting)
        if reason is not None:
            yield Violation("weighting", reason)


def _behavior(run: RunConfig, record: Method) -> Iterator[Violation]:
    """EXO takes candidates as the reference's; rounds after the first step are not."""
    policy = run.data_policy
    if policy.name == "off_policy" or policy.refresh_every == "never":
        return
    parameters = run.method.config.model_dump()
    for field, value in (("behavior_correction", "off"), ("behavior", "assume_reference")):
        if parameters.get(field) == value:
            yield Violation(
                f"method.{field}",
                f"{value} takes every candidate as the reference's, and rounds are drawn from the trained policy; "
                f"remove it, or write data_policy: {{name: {policy.name}, refresh_every: never}}",
            )


def _auxiliary(run: RunConfig, record: Method) -> Iterator[Violation]:
    if record.requires_auxiliary and run.auxiliary is None:
        yield Violation(
            "auxiliary",
            f"{record.name}'s protection against drift is auxiliary data; name it, such as "
            "auxiliary: [{term: reference, data: [sft.jsonl]}], or write auxiliary: [] for the preference term alone "
            f"(called {record.name} (no KL) in every table)",
        )
    names = [stream.name for stream in run.auxiliary or ()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Violation("auxiliary", f"two streams are called {name}; give each its own name")


def _reference(run: RunConfig, record: Method) -> Iterator[Violation]:
    measured = run.evaluate is not None and record.trains == "policy"
    uses_reference = any(need.startswith("ref_") for need in record.needed(run.method.config)) or measured
    if not uses_reference and run.model.reference is not None:
        yield Violation("model.reference", f"{record.name} has no reference and nothing is evaluated; remove it")
    if not uses_reference and run.reference != type(run.reference)():
        yield Violation("reference", f"{record.name} has no reference and nothing is evaluated; remove it")
    if run.reference.place == "trainer" and record.round_prepare is not None:
        yield Violation(
            "reference.place", f"{record.name} prepares whole rounds, which hold the reference's part; write pool"
        )
    if run.reference.dtype == "bfloat16":
        if run.model.dtype == "float32":
            yield Violation(
                "reference.dtype",
                "bfloat16 is for a reference that computes in bfloat16, and model.dtype: float32 does not; write auto",
            )
        if run.reference_is_the_policy and not measured:
            yield Violation("reference.dtype", "the adapter's own model is the reference, in float32; remove it")


def _model(run: RunConfig, _record: Method) -> Iterator[Violation]:
    if run.model.lora is not None and run.model.from_scratch:
        yield Violation("model.lora", "an adapter on untrained weights learns nothing; remove lora or from_scratch")
    if run.model.revision is not None and Path(run.model.name).is_absolute():
        yield Violation("model.revision", "is of a model on the hub, and model.name is a folder; remove it")


def _scalar(run: RunConfig, record: Method) -> Iterator[Violation]:
    """A scalar head has no tokens to draw, no likelihood and no logits."""
    if record.trains == "policy":
        return
    if run.evaluate is not None and run.evaluate.model_dump(exclude={"every", "at"}, exclude_defaults=True):
        yield Violation(
            "evaluate",
            f"{record.name} trains no policy, so there is nothing to sample; leave only every or at, which say when "
            "data.eval is measured",
        )
    if run.auxiliary:
        yield Violation("auxiliary", f"{record.name} has no vocabulary, so further data have no likelihood; remove it")
    if run.method.config.logit_temperature != 1:
        yield Violation("method.logit_temperature", f"{record.name} has no logits to divide; remove it")


def _weights(run: RunConfig, _record: Method) -> Iterator[Violation]:
    """Held-out rows and prompts are each measured once."""
    prompts = run.evaluate.prompts if run.evaluate is not None else ()
    for field, sources in (("data.eval", run.data.eval), ("evaluate.prompts", prompts)):
        if any(source.weight != 1 for source in sources):
            yield Violation(field, "every row is measured once; remove weight, which is for data.train")


def _evaluation(run: RunConfig, _record: Method) -> Iterator[Violation]:
    if run.evaluate is None:
        return
    if run.evaluation_engine == "vllm" and run.model.from_scratch:
        yield Violation(
            "evaluate.sampling.engine",
            "vllm reads weights from a folder, and model.from_scratch has none; write hf",
        )
    if not run.evaluate.prompts and not run.data.eval:
        yield Violation("evaluate.prompts", "there is nothing to evaluate on; name a file here or in data.eval")
    if (run.evaluate.sampling.temperature, run.evaluate.sampling.top_p) != (1, 1):
        yield Violation("evaluate.sampling", "the KL is measured at temperature 1 and top_p 1; remove both")
    late = [step for step in run.evaluate.at if run.optim.steps is not None and step > run.optim.steps]
    if late:
        yield Violation("evaluate.at", f"step {late[0]} is never reached: optim.steps is {run.optim.steps}")


def _best(run: RunConfig, record: Method) -> Iterator[Violation]:
    """A held-out metric needs held-out rows, and more than one measurement."""
    best = run.checkpoint.best
    if best is None or not best.metric.startswith("eval_"):
        return
    if not run.data.eval or record.round_prepare is not None:
        why = "data.eval names no rows" if not run.data.eval else f"{record.name} has no loss on stored rows"
        yield Violation(
            "checkpoint.best.metric",
            f"no row of metrics has {best.metric}: {why}; write a metric of training, such as loss",
        )
    elif run.evaluate is None or not (run.evaluate.every or run.evaluate.at):
        yield Violation(
            "checkpoint.best.metric",
            f"{best.metric} is measured after the last step only, whose checkpoint is kept anyway; write "
            f"evaluate: {{every: {run.checkpoint.every}}}",
        )


def _deepspeed(run: RunConfig, _record: Method) -> Iterator[Violation]:
    if run.strategy.name != "deepspeed":
        return
    if isinstance(run.strategy.workers, tuple):
        yield Violation("strategy.workers", "deepspeed resumes with as many workers only; write one number")
    if "://" in run.storage_path:
        yield Violation("storage_path", "deepspeed needs a folder that all nodes see; write strategy: ddp or fsdp2")
    if run.model.compile:
        yield Violation("model.compile", "deepspeed trains no compiled model; write strategy: single, ddp or fsdp2")
    nonfinite = "deepspeed may have updated weights before a value is found not finite; write stop, or strategy: fsdp2"
    if run.optim.on_nonfinite == "skip":
        yield Violation("optim.on_nonfinite", nonfinite)


def _two_heads(run: RunConfig, record: Method) -> Iterator[Violation]:
    if record.trains == "policy" and record.needs & {"value", "score"}:
        yield Violation("method", f"{record.name} needs a scalar head beside the policy's log-probabilities")


_RULES: tuple[Callable[[RunConfig, Method], Iterator[Violation]], ...] = (
    _data_policy,
    _unused,
    _rounds,
    _placement,
    _filter,
    _passes,
    _label,
    _room,
    _truncated_sampling,
    _temperature,
    _prepared,
    _critic,
    _held_out,
    _behavior,
    _weighting,
    _auxiliary,
    _reference,
    _model,
    _scalar,
    _weights,
    _evaluation,
    _best,
    _deepspeed,
    _two_heads,
)
