"""The models of a run and how they read and write: what is trained, its reference, its critic."""

from __future__ import annotations

from dataclasses import replace

import torch

from rayalign.config.compare import INITIAL
from rayalign.config.model import ModelConfig
from rayalign.config.run import RunConfig
from rayalign.data.chat import Chat
from rayalign.data.closing import policy_template
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.generation import end_ids
from rayalign.engine.model.parameter_dtype import refuse_rounded
from rayalign.engine.model.precision import EXACT, Precision
from rayalign.engine.model.pretrained import ModelSpec, compute_dtype, kept_precision
from rayalign.engine.model.scalar import ScalarHead
from rayalign.runtime.preparer import load_chat
from rayalign.runtime.session import Session


def model_spec(run: RunConfig) -> ModelSpec:
    """What is trained, before the first step: a policy, or a backbone with a scalar head."""
    return replace(trained_spec(run), config=run.model.model_copy(update={"compile": False, "lora": None}))


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
    scalar = run.method.record.trains == "scalar"
    return ModelSpec(config=run.model, seed=run.seed, head=scalar_head(run) if scalar else None)


def reference_spec(run: RunConfig) -> ModelSpec:
    """The reference: ``model.reference``, or the policy before the first step."""
    own = run.model.reference
    return model_spec(run) if own is None else other_spec(run, own, field="model.reference")


def critic_model(run: RunConfig) -> ModelSpec:
    """What a method's critic starts from, with a scalar head where it has none."""
    own = run.critic.model if run.critic is not None else None
    trained = {"compile": run.model.compile, "gradient_checkpointing": run.model.gradient_checkpointing}
    spec = model_spec(run) if own is None else other_spec(run, own, field="critic.model")
    return replace(spec, config=spec.config.model_copy(update=trained), head=scalar_head(run))


def other_spec(run: RunConfig, name: str, *, field: str) -> ModelSpec:
    """A model that a run reads beside its policy, held as the policy is; ``field`` is the setting that names it."""
    config = ModelConfig(
        name=name,
        dtype=run.model.dtype,
        trust_remote_code=run.model.trust_remote_code,
        text_only=run.model.text_only,
    )
    return ModelSpec(config=config, seed=run.seed, field=field)


def scoring_spec(run: RunConfig, session: Session) -> ScoringSpec:
    """How the reference scores: as training does; raises UserError where its parameters cannot be held as asked."""
    refuse_rounded(run.reference.dtype, compute_dtype(model_spec(run), torch.device(session.device)))
    return ScoringSpec(
        model=reference_spec(run),
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
        row_tokens=session.row_tokens,
        logit_temperature=run.method.config.logit_temperature,
        parameter_dtype=run.reference.dtype,
    )


def saved_precision(run: RunConfig) -> Precision:
    """In which precision ``final/`` is written."""
    if run.model.name == INITIAL or (run.model.from_scratch and run.model.save_dtype == "auto"):
        return EXACT
    return kept_precision(model_spec(run), run.model.save_dtype)


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
