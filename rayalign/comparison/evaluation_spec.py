"""What an evaluation measures and with what, the same for every policy, and what its numbers depend on."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from rayalign import __version__
from rayalign.comparison.baseline import baseline_spec
from rayalign.comparison.prompts import prompt_sets
from rayalign.config.run import EvaluatedRun, RunConfig
from rayalign.config.scoring import ScorerConfig
from rayalign.engine.model.folder import is_adapter
from rayalign.engine.model.precision import EXACT
from rayalign.engine.model.pretrained import ModelSpec, refuse_unusable
from rayalign.errors import UserError
from rayalign.judge.evaluator import EvaluationSpec, Evaluator
from rayalign.placement import Share
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import ALONE, EngineOptions
from rayalign.run.identity import scorer_identity, spec_digest
from rayalign.run.model import model_spec, reference_spec, saved_precision, scoring_spec, stop_ids
from rayalign.run.readers import refuse_long_questions
from rayalign.run.resolve import MEMORY_ALONE, MEMORY_BESIDE_A_WORKER, resolve_run
from rayalign.run.stages import Stages
from rayalign.runtime.pool import Pool
from rayalign.storage.artifacts import digest_of

MEASURED_KL = ("kl_rb", "k1")
"""Estimators of KL(π‖π_ref) that every point carries, the leading one first."""
KEPT = "replies"
"""What is kept beside the numbers: every prompt and reply, for :mod:`rayalign.verbs.export`."""
TEXT_RULE = 2
"""Raised by hand when replies are written otherwise for scorers: 2 keeps special tokens and white space."""


def evaluation_spec(evaluated: EvaluatedRun, stages: Stages) -> EvaluationSpec:
    """What ``evaluate`` says, with its files read. Policies are scored as they are sampled: untempered."""
    run, evaluate = evaluated.run, evaluated.evaluate
    sampling = evaluate.sampling
    sets = prompt_sets(evaluated, stages)
    for prompts in sets.values():
        refuse_long_questions(prompts, evaluated)
    baseline = baseline_spec(evaluated)
    if run.evaluation_engine != "hf":
        refuse_other_kinds(run, baseline)
    return EvaluationSpec(
        reference=replace(scoring_spec(run, stages.session), logit_temperature=1.0),
        prompt_sets=sets,
        engine=run.evaluation_engine,
        options=evaluation_options(evaluated, stages),
        saved=saved_precision(run),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            num_samples=sampling.samples,
            seed=run.seed,
            stop_ids=stop_ids(run),
        ),
        scorers=evaluate.all_scorers,
        judge=evaluate.judge,
        baseline=baseline,
    )


def refuse_other_kinds(run: RunConfig, baseline: ModelSpec | None) -> None:
    """Raise UserError where an engine that replaces its weights in place would be given another kind of model."""
    others = {"model.reference": reference_spec(run), "evaluate.baseline": baseline}
    own = held_tensors(model_spec(run))
    for field, spec in others.items():
        if spec is None or spec == model_spec(run):
            continue
        if is_adapter(spec.directory()) or held_tensors(spec) != own:
            raise UserError(
                f"{field}: {spec.name} is no model of the policy's kind, whole and of the same shape, as "
                f"{run.evaluation_engine} needs it to sample both: write evaluate.sampling.engine: hf"
            )


def held_tensors(spec: ModelSpec) -> dict[str, torch.Size]:
    """Shape of every tensor of a model, by name, without reading one."""
    return {name: tensor.shape for name, tensor in refuse_unusable(spec).state_dict().items()}


def evaluation_pool(name: str, run: RunConfig, spec: EvaluationSpec, *, share: Share, actors: int) -> Pool:
    """Up to ``actors`` processes, each with as many devices as its engine takes."""
    python = run.rollout.python if run.rollout is not None and spec.engine == run.rollout.engine else None
    options = spec.options
    if share.gpus:
        options = replace(options, memory_share=min(1.0, share.gpus) * options.memory_share)
    if options.tensor_parallel > 1 and share.gpus:
        share = replace(share, gpus=float(options.tensor_parallel))
    return Pool(name, Evaluator, replace(spec, options=options), share=share, most=actors, python=python)


def evaluation_options(evaluated: EvaluatedRun, stages: Stages) -> EngineOptions:
    """How the engine that samples an evaluation shares its devices: in turns with the models that measure."""
    if evaluated.run.evaluation_engine == "hf":
        return ALONE
    asked = resolve_run(evaluated.run, stages.session).engine
    return replace(asked, takes_turns=True, memory_share=memory_share(evaluated))


def memory_share(evaluated: EvaluatedRun) -> float:
    """Share of a GPU that such an engine takes in its turn; models that score keep their part of it meanwhile."""
    rollout, config = evaluated.run.rollout, evaluated.evaluate
    if rollout is not None and rollout.gpu_memory_utilization is not None:
        return rollout.gpu_memory_utilization
    asked = [*config.all_scorers, *([config.judge] if config.judge is not None else [])]
    return MEMORY_BESIDE_A_WORKER if any(holds_model(scorer) for scorer in asked) else MEMORY_ALONE


def holds_model(scorer: ScorerConfig) -> bool:
    """Whether a scorer or judge loads a model in the process that asks it."""
    return scorer.name == "reward_model" or (scorer.name == "llm" and scorer.engine is not None)


def evaluation_digest(spec: EvaluationSpec) -> str:
    """What a policy's numbers depend on beside it."""
    return digest_of(instrument_digests(spec))


def instrument_digests(spec: EvaluationSpec) -> dict[str, str]:
    """Digests of prompts, scorers, judge, sampling, reference and baseline, and of how they are put to use."""
    saved = [asdict(spec.saved) | {"exact": sorted(spec.saved.exact)}] if spec.saved != EXACT else []
    held = ["bfloat16"] if spec.reference.parameter_dtype == "bfloat16" else []  # other values change no number
    engine = [spec.engine] if spec.engine != "hf" else []
    return {
        "reference": digest_of([spec_digest(spec.reference.model), spec.reference.model.config.dtype, *saved, *held]),
        "prompts": digest_of({name: list(map(asdict, prompts)) for name, prompts in spec.prompt_sets.items()}),
        "scorers": digest_of([scorer_identity(scorer) for scorer in spec.scorers]),
        "judge": digest_of(scorer_identity(spec.judge) if spec.judge is not None else None),
        "baseline": digest_of(spec_digest(spec.baseline) if spec.baseline is not None else None),
        "sampling": digest_of([asdict(spec.sampling), *engine] if engine else asdict(spec.sampling)),
        "package": digest_of([MEASURED_KL, KEPT, TEXT_RULE, __version__]),
    }
