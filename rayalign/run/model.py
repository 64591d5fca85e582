"""A run's configuration as the specifications that the engine and the stages take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rayalign.config.compare import INITIAL
from rayalign.config.fields import portable
from rayalign.config.run import RunConfig
from rayalign.config.scoring import PATIENCE, RewardModelScorerConfig, RuleScorerConfig, ScorerConfig
from rayalign.data.chat import Chat
from rayalign.data.closing import policy_template
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.folder import model_digest, model_directory, tokenizer_digest
from rayalign.engine.model.generation import end_ids
from rayalign.engine.model.precision import EXACT, Precision
from rayalign.engine.model.pretrained import ModelSpec, kept_precision, load_tokenizer
from rayalign.engine.model.scalar import ScalarHead
from rayalign.errors import UserError
from rayalign.imports import source_digest
from rayalign.judge import parameters_of
from rayalign.runtime.datasets import load_chat
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import PENDING, digest_of
from rayalign.storage.manifest import file_digest

CPU_ROW_TOKENS = 2048
"""On a CPU rows of this length are as fast as any and hold a batch in few of them; on CUDA one row is fastest."""
UNTRAINED = f"{PENDING}initial"
"""Stands for the digests of a model that the ``initial`` run has not trained yet; only plans meet it."""


def model_spec(run: RunConfig) -> ModelSpec:
    """What is trained, before the first step: a policy, or a backbone with a scalar head."""
    model = run.model
    scalar = run.method.record.trains == "scalar"
    return ModelSpec(
        name=model.name,
        revision=model.revision,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        gradient_checkpointing=model.gradient_checkpointing,
        from_scratch=model.from_scratch,
        seed=run.seed,
        text_only=model.text_only,
        head=scalar_head(run) if scalar else None,
    )


def scalar_head(run: RunConfig) -> ScalarHead:
    """A scalar head, which reads conversations as the run writes them."""
    return ScalarHead(
        template=run.data.template,
        stop=run.data.end,
        template_kwargs=run.data.chat_template_kwargs,
        date=run.data.date,
    )


def trained_spec(run: RunConfig) -> ModelSpec:
    """The same as it is trained: compiled, with an adapter that is trained in its place, or neither."""
    return replace(model_spec(run), compile=run.model.compile, lora=run.model.lora)


def reference_spec(run: RunConfig) -> ModelSpec:
    """The reference: ``model.reference``, or the policy before the first step."""
    own = run.model.reference
    return model_spec(run) if own is None else other_spec(run, own, field="model.reference")


def critic_model(run: RunConfig) -> ModelSpec:
    """What a method's critic starts from, with a scalar head where it has none."""
    head = scalar_head(run)
    own = run.critic.model if run.critic is not None else None
    if own is None:
        return replace(model_spec(run), compile=run.model.compile, head=head)
    spec = other_spec(run, own, field="critic.model")
    return replace(spec, gradient_checkpointing=run.model.gradient_checkpointing, compile=run.model.compile, head=head)


def other_spec(run: RunConfig, name: str, *, field: str) -> ModelSpec:
    """A model that a run reads beside its policy, held as the policy is; ``field`` is the setting that names it."""
    return ModelSpec(
        name=name,
        dtype=run.model.dtype,
        trust_remote_code=run.model.trust_remote_code,
        text_only=run.model.text_only,
        seed=run.seed,
        field=field,
    )


def refuse_other_tokens(run: RunConfig, spec: ModelSpec) -> None:
    """Raise UserError where a token of the policy has another id in another model's tokenizer, or none."""
    model, trusts = run.model, run.model.trust_remote_code
    policy = load_tokenizer(model_directory(model.name, model.revision), trust_remote_code=trusts).get_vocab()
    other = load_tokenizer(
        model_directory(spec.name, spec.revision, field=spec.field), trust_remote_code=trusts, field=spec.field
    )
    known = other.get_vocab()
    differing = sorted((id, token) for token, id in policy.items() if known.get(token) != id)
    if differing:
        id, token = differing[0]
        raise UserError(
            f"{spec.field}: {spec.name} reads other tokens than the policy: {len(differing)} of {len(policy)} differ, "
            f"first {token!r}, which is {id} for the policy; name a model with the policy's tokenizer, or remove "
            f"{spec.field}"
        )


def scoring_spec(run: RunConfig, session: Session) -> ScoringSpec:
    """How the reference scores: as training does."""
    return ScoringSpec(
        model=reference_spec(run),
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
        row_tokens=row_tokens(session),
        logit_temperature=run.method.config.logit_temperature,
    )


def row_tokens(session: Session) -> int | None:
    return None if session.num_gpus else CPU_ROW_TOKENS


def saved_precision(run: RunConfig) -> Precision:
    """In which precision ``final/`` is written."""
    if run.model.name == INITIAL or (run.model.from_scratch and run.model.save_dtype == "auto"):
        return EXACT
    return kept_precision(model_spec(run), run.model.save_dtype)


def spec_digest(spec: ModelSpec) -> str:
    """What identifies a model's log-probs: its files, and its seed where the weights are drawn."""
    if spec.name == INITIAL:
        return UNTRAINED
    directory = model_directory(spec.name, spec.revision)
    return digest_of([model_digest(directory), spec.seed if spec.from_scratch else None])


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


def stop_ids(run: RunConfig) -> tuple[int, ...]:
    """The tokens that rollouts stop at and generation_config names; the first is what training appends."""
    if run.model.name == INITIAL:
        return ()
    return end_ids(model_directory(run.model.name, run.model.revision), chat_of(run), run.data.stop[1:])


def chat_template(run: RunConfig) -> str | None:
    """What the saved policy writes conversations with; None: what its tokenizer does already."""
    return None if run.model.name == INITIAL else policy_template(chat_of(run))


def chat_of(run: RunConfig) -> Chat:
    """How the policy's tokenizer writes conversations in this run."""
    return load_chat(run.model, run.data)


def scorer_identity(scorer: ScorerConfig) -> list[Any]:
    """What decides a scorer's numbers: its parameters, and its code or weights, where those can be known.

    Where those lie does not.
    """
    parameters = {key: value for key, value in parameters_of(scorer).items() if key not in PATIENCE}
    places: dict[str, Any] = {key: portable(parameters[key]) for key in ("function", "model") if key in parameters}
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
    return source_of(one) == source_of(other)


def source_of(scorer: ScorerConfig) -> list[Any]:
    asking = (*PATIENCE, *(("template", "api_key_env", "max_new_tokens") if scorer.name == "llm" else ()))
    return [scorer.name, {key: value for key, value in parameters_of(scorer).items() if key not in asking}]
