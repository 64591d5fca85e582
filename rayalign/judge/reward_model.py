"""A scorer that is a model with a scalar head, in Hugging Face's layout for sequence classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Group
from rayalign.data.schema import Example, Turns, assistant, user
from rayalign.data.shared_prompt import transcript
from rayalign.data.tokenize import to_group
from rayalign.engine.model.context import context_of, refuse_unknown_ids, vocabulary_of
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.pretrained import ModelSpec, load_model, model_tokenizer, refuse_unusable
from rayalign.engine.model.scalar import ScalarHead, head_written_as
from rayalign.errors import UserError
from rayalign.judge.base import ScorerUnusable

FIELD = "scorer.model"
TOKENS_PER_BATCH = 16_384
UNCUT = TokenBudget(max_prompt_tokens=2**30, max_tokens=2**31)


class RewardModelScorer:
    """Reads prompt and reply as the model's chat template writes them, and answers with its one logit, float32.

    A model that ``method: reward_model`` trained reads them as it did in training, with or without a template. The
    model is loaded with the first call; what is longer than its context, or has a token beyond its embedding, is an
    error, not cut.

    Raises:
        UserError: there is no such model, it has no trained head of one output, or no token to pad with.
    """

    def __init__(self, *, model: str, revision: str | None = None) -> None:
        self.directory = model_directory(model, revision, field=FIELD)
        self.spec = ModelSpec(
            config=ModelConfig(name=str(self.directory)), head=ScalarHead(), trained_head=True, field=FIELD
        )
        skeleton = refuse_unusable(self.spec)
        self.context, self.vocabulary = context_of(skeleton.config), vocabulary_of(skeleton)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = None
        self.chat: Chat | None = None

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Scorer`."""
        self._load()
        ids = [self._ids(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        for own, reply in zip(ids, replies, strict=True):
            name = f"scorer: what ends in the reply {reply[:40]!r}"
            refuse_unknown_ids(own, self.vocabulary, str(self.directory), self.tokenizer, name=name)
        longest = max(map(len, ids), default=0)
        if self.context is not None and longest > self.context.tokens:
            raise UserError(
                f"scorer: a prompt and reply of {longest} tokens do not fit {self.directory}, which reads "
                f"{self.context.tokens} ({self.context.reason})"
            )
        scores = [0.0] * len(ids)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        while order:
            count = max(1, TOKENS_PER_BATCH // len(ids[order[0]]))
            batch, order = order[:count], order[count:]
            for row, value in zip(batch, self._forward([ids[row] for row in batch]), strict=True):
                scores[row] = value
        return scores

    def _load(self) -> None:
        if self.model is not None:
            return
        try:
            self.tokenizer, model = model_tokenizer(self.spec), load_model(self.spec, place=self.device)
        except UserError as error:
            raise ScorerUnusable(str(error)) from error
        if self.tokenizer.pad_token_id is None:
            raise ScorerUnusable(
                f"scorer.model: the tokenizer in {self.directory} has no padding token; set one and save it"
            )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        head = head_written_as(model.config)
        self.chat = make_chat(self.tokenizer, template=head.template, stop=head.stop) if head else None
        self.model = model

    def _ids(self, prompt: str | Turns, reply: str) -> list[int]:
        if self.chat is not None:
            return self._written(prompt, reply, self.chat)
        turns = (*(user(prompt) if isinstance(prompt, str) else prompt), *assistant(reply))
        if self.tokenizer.chat_template is None:
            text = transcript(turns, generation_prompt=False)
            return list(self.tokenizer(text)["input_ids"])
        rendered = self.tokenizer.apply_chat_template(list(turns), tokenize=False)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _written(self, prompt: str | Turns, reply: str, chat: Chat) -> list[int]:
        """As training writes them: prompt and reply tokenized apart, the reply closed by its end token."""
        answer = reply if isinstance(prompt, str) else assistant(reply)
        found = to_group(Example(format="preference", prompt=prompt, candidates=(answer,), drawn=True), chat, UNCUT)
        if not isinstance(found, Group):
            raise UserError(f"scorer: a reply cannot be tokenized: {found}")
        return [*found.prompt_ids.tolist(), *found.candidates[0].ids.tolist()]

    @torch.no_grad()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return [float(value) for value in logits[:, 0].float().tolist()]
