"""Every model that a run reads, looked at before anything starts, and what each of them can read.

What is wrong with a model is known from its files: its configuration, the headers of its weights, its tokenizer. So it
is said in one sentence, before Ray starts and before a stage is made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayalign.config.compare import INITIAL
from rayalign.config.policy import RolloutConfig
from rayalign.config.run import EvaluatedRun, RunConfig
from rayalign.data.group import Group
from rayalign.data.store import TokenStore
from rayalign.engine.model.context import (
    DRAWN,
    Context,
    context_of,
    refuse_long_group,
    refuse_long_prompt,
    refuse_long_rows,
    refuse_unknown_group,
    refuse_unknown_ids,
    refuse_unknown_tokens,
    vocabulary_of,
)
from rayalign.engine.model.folder import is_adapter, model_directory, weights_directory
from rayalign.engine.model.kinds import is_composite, read_config
from rayalign.engine.model.lora import refuse_missing_peft
from rayalign.engine.model.pretrained import ModelSpec, model_tokenizer, refuse_unusable
from rayalign.engine.model.scalar import prepare_export
from rayalign.engine.model.targets import adapter_targets
from rayalign.engine.model.trial import ExportTrial, try_export
from rayalign.errors import UserError
from rayalign.judge.measure import Prompt
from rayalign.run.model import (
    critic_model,
    model_spec,
    reference_spec,
    saved_precision,
    stop_ids,
    trained_spec,
)
from rayalign.storage.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model as far as it is known from its files, and what became of its trial export."""

    name: str
    context: Context | None
    vocabulary: int
    """Rows of its embedding."""
    tokenizer: Any
    trial: ExportTrial | None
    """None of a model that is not trained."""
    lora: str = ""
    """What of it gets an adapter, in words."""


def refuse_unusable_models(run: RunConfig, *, draws: bool = False) -> None:
    """Raise UserError for the first of a run's models that could not be loaded, trained or saved.

    With ``draws`` its policy is only sampled.
    """
    if run.model.name != INITIAL:
        if draws:
            reader_of(model_spec(run))
        else:
            trained_reader(run)
        refuse_engine(run)
    for spec in models_beside(run):
        reader_of(spec)
        refuse_other_tokens(run, spec)
    critic = critic_to_read(run)
    if critic is not None and critic.name != INITIAL:
        reader_of(critic, trained=True)


def refuse_other_tokens(run: RunConfig, spec: ModelSpec) -> None:
    """Raise UserError where a token of the policy has another id in another model's tokenizer, or none."""
    policy, known = model_tokenizer(model_spec(run)).get_vocab(), model_tokenizer(spec).get_vocab()
    differing = sorted((id, token) for token, id in policy.items() if known.get(token) != id)
    if differing:
        id, token = differing[0]
        raise UserError(
            f"{spec.field}: {spec.name} reads other tokens than the policy: {len(differing)} of {len(policy)} differ, "
            f"first {token!r}, which is {id} for the policy; name a model with the policy's tokenizer, or remove "
            f"{spec.field}"
        )


def models_beside(run: RunConfig) -> Iterator[ModelSpec]:
    """Models of their own, which must read the policy's tokens."""
    if run.model.name == INITIAL:
        return
    if run.model.reference is not None:
        yield reference_spec(run)
    if run.critic is not None and run.critic.model is not None:
        yield critic_model(run)


def critic_to_read(run: RunConfig) -> ModelSpec | None:
    return critic_model(run) if run.method.record.critic is not None else None


def trained_reader(run: RunConfig) -> Reader:
    """The policy, or reward model, as it is trained."""
    return reader_of(trained_spec(run), trained=True)


@functools.lru_cache(maxsize=64)
def reader_of(spec: ModelSpec, *, trained: bool = False) -> Reader:
    """What a model reads; of one that is ``trained`` the export is tried too.

    Raises:
        UserError: it cannot be used.
    """
    model, tokenizer = refuse_unusable(spec), model_tokenizer(spec)
    vocabulary = vocabulary_of(model)
    trial, lora = None, ""
    if trained:
        if spec.config.lora is not None:
            refuse_missing_peft()
            lora = adapter_targets(model, spec.config.lora.target_modules).sentence()
        trial = try_export(model, tokenizer, spec)
        if spec.head is not None:
            prepare_export(model, tokenizer, spec.head)  # what it finds fault with, it says now
    return Reader(
        name=spec.name,
        context=context_of(model.config),
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        trial=trial,
        lora=lora,
    )


def export_facts(run: RunConfig) -> dict[str, Any]:
    """What ``final/`` will be, beside its weights: as ``run.json`` has it, and as it is said before the first step."""
    if run.model.name == INITIAL:
        return {}
    reader, precision = trained_reader(run), saved_precision(run)
    facts: dict[str, Any] = {"dtype": precision.default}
    if run.method.record.trains == "policy":
        facts["end_tokens"] = reader.tokenizer.convert_ids_to_tokens(list(stop_ids(run)))
    directory = model_directory(run.model.name, run.model.revision)
    base = weights_directory(directory)
    if is_adapter(directory):
        facts["base"] = f"{base} with the adapter in {directory} merged"
    if run.model.text_only and is_composite(read_config(base, trust_remote_code=run.model.trust_remote_code)):
        facts["text_only"] = True
    if run.model.lora is not None:
        facts |= {"lora": reader.lora, "adapter": True}
        trial = reader.trial
        if trial is not None and trial.difference is not None and not trial.writes_adapter:
            facts["adapter"] = "none: peft would read it otherwise than it was trained; final/ is the merged model"
        if is_adapter(directory):
            facts["adapter"] = (
                "none: it would belong upon a model that is an adapter merged; final/ is the merged model"
            )
    return facts


def export_sentences(run: RunConfig) -> Iterator[str]:
    """The same as lines for a person; nothing where it is as anybody expects."""
    facts = export_facts(run)
    if "base" in facts:
        yield f"model.name: the run starts from {facts['base']}"
    if facts.get("dtype", "float32") != "float32":
        why = "as the model's own files are" if run.model.save_dtype == "auto" else "as model.save_dtype says"
        yield f"final/ will be saved in {facts['dtype']}, {why}; checkpoints are float32"
    if len(facts.get("end_tokens", ())) > 1:
        yield f"samples stop at {', '.join(facts['end_tokens'])}; training appends the first"
    if "lora" in facts:
        yield facts["lora"]
    if facts.get("adapter", True) is not True:
        yield f"final/adapter: {facts['adapter']}"
    if "text_only" in facts:
        yield "model.text_only: final/ will hold the part for texts alone"


def refuse_engine(run: RunConfig) -> None:
    """Raise UserError where vLLM would sample another model than the one that is trained."""
    field = "rollout.engine"
    if run.rollout is None or run.rollout.engine != "vllm":
        if run.evaluation_engine != "vllm":
            return
        field = "evaluate.sampling.engine"
    directory = model_directory(run.model.name, run.model.revision)
    if is_adapter(directory):
        raise UserError(
            f"{field}: vllm reads the weights of a whole model, and {directory} is an adapter: write hf, or "
            "merge the adapter with peft's merge_and_unload and save the model"
        )
    if run.model.text_only:
        raise UserError(f"{field}: vllm reads all parts of a model, and model.text_only leaves some: write hf")
    context = context_of(read_config(directory, trust_remote_code=run.model.trust_remote_code))
    if context is not None and context.rope == "dynamic":
        raise UserError(f"{field}: vllm stretches dynamic RoPE for every text, and training does not: write hf")


def readers_of(run: RunConfig) -> list[Reader]:
    """All models that read a run's rows."""
    if run.model.name == INITIAL:
        return []
    critic = critic_to_read(run)
    specs = [model_spec(run), *models_beside(run), *([critic] if critic is not None else [])]
    return [reader_of(spec) for spec in dict.fromkeys(specs)]


def refuse_unreadable(store: Place, run: RunConfig) -> None:
    """Raise UserError where a row of a store is too long for one of a run's models, or has a token beyond it."""
    opened = TokenStore.open(store)
    for reader in readers_of(run):
        refuse_long_rows(opened, reader.context, reader.name)
        refuse_unknown_tokens(opened, reader.vocabulary, reader.name, reader.tokenizer)


def refuse_unanswerable(store: Place, run: RunConfig, rollout: RolloutConfig) -> None:
    """The same of a store of prompts, whose completions are drawn."""
    opened = TokenStore.open(store)
    for reader in readers_of(run):
        refuse_long_rows(opened, reader.context, reader.name, new_tokens=rollout.max_new_tokens)
        refuse_unknown_tokens(opened, reader.vocabulary, reader.name, reader.tokenizer)


def refuse_group(group: Group, readers: Sequence[Reader], *, new_tokens: int = 0, drawn: str = DRAWN) -> None:
    """The same of one row that is not stored; with ``new_tokens`` so many are drawn after its prompt."""
    for reader in readers:
        refuse_long_group(group, reader.context, reader.name, new_tokens=new_tokens, drawn=drawn)
        refuse_unknown_group(group, reader.vocabulary, reader.name, reader.tokenizer)


def refuse_long_questions(prompts: tuple[Prompt, ...], evaluated: EvaluatedRun) -> None:
    """The same of prompts that an evaluation completes."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    for reader in readers_of(evaluated.run):
        try:
            refuse_long_prompt(longest, evaluated.evaluate.sampling.max_new_tokens, reader.context)
        except UserError as error:
            raise UserError(f"evaluate.prompts: {error}") from error
        for prompt in prompts:
            name = f"evaluate.prompts: {prompt.text[:40]!r}"
            refuse_unknown_ids(prompt.ids, reader.vocabulary, reader.name, reader.tokenizer, name=name)
