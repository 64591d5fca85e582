"""Digests of what decides a run's results: its settings, its data, its models, its scorer and its rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rayalign import __version__
from rayalign.config import resume
from rayalign.config.compare import INITIAL
from rayalign.config.fields import without_folder
from rayalign.config.policy import LabelConfig, unread_parameters
from rayalign.config.run import RunConfig
from rayalign.config.scoring import PATIENCE, RewardModelScorerConfig, RuleScorerConfig, ScorerConfig
from rayalign.data.store import TokenStore
from rayalign.engine.checkpoint.checkpoint import DESCRIBED
from rayalign.engine.model.folder import model_digest, model_directory, tokenizer_digest
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.errors import UserError
from rayalign.imports import source_digest
from rayalign.judge import scorer_parameters
from rayalign.rounds.streams import AnyStream, stored_parts
from rayalign.run.model import critic_model, model_spec, reference_spec
from rayalign.storage.artifacts import PENDING, digest_of
from rayalign.storage.manifest import file_digest

UNTRAINED = f"{PENDING}initial"
"""Stands for the digests of a model that the ``initial`` run has not trained yet; only plans meet it."""


def store_digests(stream: AnyStream) -> list[str]:
    """Digests of the committed stores that a stream reads."""
    stores = chain.from_iterable(part.stores for part in stored_parts(stream))
    return [TokenStore.open(store).digest for store in stores]


def run_identity(run: RunConfig, streams: Sequence[AnyStream]) -> dict[str, Any]:
    """What decides which model the run ends in: another identity does not continue its checkpoints.

    Keys of :data:`~rayalign.engine.checkpoint.checkpoint.DESCRIBED` explain the digests and decide nothing.
    """
    settings = resume.identity(run)
    identity = {
        "configuration": settings.decides,
        DESCRIBED: settings.described,
        "data": digest_of([store_digests(stream) for stream in streams]),
        "model": spec_digest(model_spec(run)),
        "package": __version__,
    }
    if run.model.reference is not None:
        identity["reference"] = spec_digest(reference_spec(run))
    if ":" in run.method.name:
        identity["method_source"] = source_digest(run.method.name)
    if run.method.record.critic is not None:
        identity["critic"] = spec_digest(critic_model(run))
    parts = chain.from_iterable(stored_parts(stream) for stream in streams)
    kept = list(chain.from_iterable(part.kept for part in parts))
    if kept:
        identity["kept"] = digest_of([file_digest(file) for file in kept])
    scorer = scorer_content(run.scorer) if run.scorer is not None else None
    if scorer is not None:
        identity["scorer"] = scorer
    if run.label is not None and ":" in run.label.name and run.data_policy.draws_rounds:  # else "data" has what it made
        identity["label"] = source_digest(run.label.name)
    return identity


def spec_digest(spec: ModelSpec) -> str:
    """What identifies a model's log-probs: its files, and its seed where the weights are drawn."""
    if spec.name == INITIAL:
        return UNTRAINED
    return digest_of([model_digest(spec.directory()), spec.seed if spec.config.from_scratch else None])


def tokenizer_identity(run: RunConfig) -> str:
    """The digest of the policy's tokenizer."""
    if run.model.name == INITIAL:
        return UNTRAINED
    return tokenizer_digest(model_directory(run.model.name, run.model.revision))


def template_digest(template: str) -> str:
    """``auto`` and ``none`` are themselves, a file is its bytes; raises UserError where it cannot be read."""
    if template in ("auto", "none"):
        return template
    try:
        return file_digest(Path(template))
    except OSError as error:
        raise UserError(f"data.template: {template} cannot be read: {error.strerror}") from error


def scorer_identity(scorer: ScorerConfig) -> list[Any]:
    """What decides a scorer's numbers: its parameters, and its code or weights, where those can be known.

    Where those lie does not.
    """
    parameters = {key: value for key, value in scorer_parameters(scorer).items() if key not in PATIENCE}
    places: dict[str, Any] = {
        key: without_folder(parameters[key]) for key in ("function", "model") if key in parameters
    }
    said = {"label": scorer.label, "name": scorer.name, "parameters": {**parameters, **places}}
    content = scorer_content(scorer)
    return [said] if content is None else [said, content]


def scorer_content(scorer: ScorerConfig) -> str | None:
    """The digest of a scorer's code or weights; None for a model behind an endpoint."""
    if isinstance(scorer, RuleScorerConfig):
        return source_digest(scorer.function)
    if isinstance(scorer, RewardModelScorerConfig) or scorer.engine:
        return model_digest(model_directory(scorer.model, scorer.revision))
    return None


def same_source(one: ScorerConfig, other: ScorerConfig) -> bool:
    """Whether two scorers or judges are one thing: the same function with the same arguments, or the same model.

    How a language model is asked makes no other of it: it rates and compares by one taste.
    """
    return scorer_source(one) == scorer_source(other)


def scorer_source(scorer: ScorerConfig) -> list[Any]:
    asking = (*PATIENCE, *(("template", "api_key_env", "max_new_tokens") if scorer.name == "llm" else ()))
    return [scorer.name, {key: value for key, value in scorer_parameters(scorer).items() if key not in asking}]


def label_identity(label: LabelConfig) -> list[Any]:
    """What decides a rule's preferences: its name and the parameters that it reads, and its code."""
    read = label.model_dump(exclude={"relabel", *unread_parameters(label.name)})
    return [{**read, "name": without_folder(label.name)}, source_digest(label.name) if ":" in label.name else None]
