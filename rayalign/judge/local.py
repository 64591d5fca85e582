"""A model that this process loads itself and asks through a rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Group
from rayalign.data.replies import reply_text
from rayalign.data.schema import Example
from rayalign.data.tokenize import to_group
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.context import context_of, refuse_unknown_ids, vocabulary_of
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.generation import end_ids
from rayalign.engine.model.kinds import read_config
from rayalign.engine.model.pretrained import ModelSpec, model_tokenizer, refuse_unusable
from rayalign.errors import UserError
from rayalign.judge.asking import RETRY_TEMPERATURE, Unanswered
from rayalign.judge.base import ScorerUnusable
from rayalign.remarks import Remarks
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import Sampler, make_sampler, refuse_missing_engine

NOTHING_IS_CUT = TokenBudget(max_prompt_tokens=2**30, max_tokens=2**31)
ROW_TOKENS = 2048


class LocalModel:
    """Answers of the model in a folder or on the hub; see :class:`rayalign.judge.asking.Ask`.

    It is loaded with the first question, and asked in its own chat template. A question that does not fit its context
    beside the answer gets none: a question without its beginning would be another.

    Raises:
        UserError: there is no such model, or its engine is not installed.
    """

    def __init__(self, *, field: str, model: str, revision: str | None, engine: str, max_new_tokens: int) -> None:
        refuse_missing_engine(engine)
        self.field = field
        self.engine = engine
        try:
            self.directory = model_directory(model, revision, field="model")
            self.vocabulary = vocabulary_of(refuse_unusable(spec_of(self.directory).model))
        except UserError as error:
            raise UserError(f"{field}.{error}") from error
        self.name = f"{model} ({engine})"
        self.remarks = Remarks()
        self.max_new_tokens = max_new_tokens
        self.sampler: Sampler | None = None

    def __call__(self, questions: Sequence[str], *, attempt: int) -> list[str | Unanswered]:
        """See :class:`rayalign.judge.asking.Ask`; the first attempt is greedy."""
        sampler, chat = self._load()
        params = SamplingParams(
            temperature=RETRY_TEMPERATURE if attempt else 0.0,
            max_new_tokens=self.max_new_tokens,
            seed=attempt,
            stop_ids=self.stop_ids,
        )
        prompts = [self._prompt_ids(question, chat) for question in questions]
        longest = self.context - self.max_new_tokens
        asked = [place for place, ids in enumerate(prompts) if len(ids) <= longest]
        answers: list[str | Unanswered] = [
            Unanswered(
                f"a question of {len(ids)} tokens and max_new_tokens {self.max_new_tokens} do not fit the model's "
                f"context of {self.context}"
            )
            for ids in prompts
        ]
        if not asked:
            return answers
        for drawn in sampler.generate([prompts[place] for place in asked], params, keys=asked):
            place = asked[drawn.prompt_index]
            text = reply_text(chat.tokenizer, drawn.token_ids, finished=True, prompt_ids=prompts[place])
            cut = Unanswered(f"the answer was cut at {self.max_new_tokens} tokens, see max_new_tokens")
            answers[place] = text if drawn.finish_reason == "stop" else cut
        return answers

    def _load(self) -> tuple[Sampler, Chat]:
        if self.sampler is None:
            try:
                spec = spec_of(self.directory)
                self.chat = make_chat(model_tokenizer(spec.model))
                self.stop_ids = end_ids(self.directory, self.chat)
                self.context = tokens_of(self.directory)
                sampler = make_sampler(self.engine, spec, device())
                sampler.load(spec.model)
            except UserError as error:
                raise ScorerUnusable(f"{self.field}.{error}") from error
            self.sampler = sampler
        return self.sampler, self.chat

    def _prompt_ids(self, question: str, chat: Chat) -> list[int]:
        """The question as one turn of a user."""
        example = Example(format="prompt_only", prompt=question, candidates=(), drawn=True)
        group = to_group(example, chat, NOTHING_IS_CUT)
        if not isinstance(group, Group):
            raise ScorerUnusable(f"{self.field}.model: {self.directory} cannot be asked: {group}")
        ids = [int(token) for token in group.prompt_ids]
        try:
            refuse_unknown_ids(ids, self.vocabulary, str(self.directory), chat.tokenizer, name="a question")
        except UserError as error:
            raise ScorerUnusable(f"{self.field}.model: {error}") from error
        return ids


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spec_of(directory: Path) -> ScoringSpec:
    model = ModelSpec(config=ModelConfig(name=str(directory)), field="model")
    return ScoringSpec(model=model, tokens_per_micro_batch=ROW_TOKENS, row_tokens=ROW_TOKENS)


def tokens_of(directory: Path) -> int:
    """Tokens that a model can read and write together; very many where its configuration names no limit."""
    context = context_of(read_config(directory))
    return context.tokens if context is not None else 2**30
