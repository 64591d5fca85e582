"""``rayalign sample``: what several models say to the same prompts, with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import Chat, make_chat
from rayalign.data.formats import parse_row
from rayalign.data.records import BadRow
from rayalign.data.replies import reply_text
from rayalign.data.schema import Example, Turns, assistant, user
from rayalign.data.shared_prompt import prompt_text
from rayalign.data.tokenize import Tokenized, to_groups
from rayalign.data.tokenize_rows import Unit, read_chunks
from rayalign.engine.model.context import refuse_unknown_ids, vocabulary_of
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.generation import end_ids
from rayalign.engine.model.pretrained import ModelSpec, load_policy
from rayalign.errors import UserError
from rayalign.report.formatting import printable
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.hf import HfEngine

SETTINGS = TokenBudget(max_prompt_tokens=4096, max_tokens=8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledModel:
    """One model as it is asked."""

    name: str
    chat: Chat
    engine: HfEngine
    stop_ids: tuple[int, ...]
    vocabulary: int

    @classmethod
    def load(cls, name: str) -> SampledModel:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=name), field="sample"), device=device)
        chat = make_chat(tokenizer)
        return cls(
            name=name,
            chat=chat,
            engine=HfEngine(model),
            stop_ids=end_ids(model_directory(name, field="sample"), chat),
            vocabulary=vocabulary_of(model),
        )

    def answers(
        self, prompts: Sequence[str | Turns], params: SamplingParams, *, typed: bool = False
    ) -> list[list[str]]:
        """Texts by prompt and sample; a prompt's noise depends on its place alone, so that every model has the same.

        ``typed``: the prompts are of no file, and markup in them is words.
        """
        examples = [Example(format="prompt_only", prompt=prompt, candidates=(), drawn=typed) for prompt in prompts]
        ids = []
        for example, outcome in zip(examples, to_groups(examples, self.chat, SETTINGS), strict=True):
            if not isinstance(outcome, Tokenized):
                raise UserError(f"{prompt_text(example.prompt)[:80]!r} cannot be tokenized: {outcome}")
            ids.append(outcome.group.prompt_ids.tolist())
            name = f"the prompt {prompt_text(example.prompt)[:40]!r}"
            refuse_unknown_ids(ids[-1], self.vocabulary, self.name, self.chat.tokenizer, name=name)
        texts: list[list[str]] = [[] for _ in prompts]
        for completion in self.engine.generate(ids, replace(params, stop_ids=self.stop_ids)):
            finished, prompt_ids = completion.finish_reason == "stop", ids[completion.prompt_index]
            text = reply_text(self.chat.tokenizer, completion.token_ids, finished=finished, prompt_ids=prompt_ids)
            texts[completion.prompt_index].append(text if finished else f"{text} …")
        return texts


def sample(
    models: Sequence[str], file: Path | None, params: SamplingParams, *, interactive: bool, console: Console
) -> None:
    """Print a table per prompt, or talk until the input ends.

    Raises:
        UserError: neither prompts nor ``-i`` is given, or a model or prompt cannot be used.
    """
    if (file is None) == (not interactive):
        raise UserError("name a file of prompts with --prompts, or write -i to type them")
    speakers = [SampledModel.load(name) for name in models]
    if interactive:
        return converse(speakers, params, console)
    assert file is not None
    prompts = read_prompts(file)
    answers = [speaker.answers(prompts, params) for speaker in speakers]
    for place, prompt in enumerate(prompts):
        table = Table(title=table_text(prompt_text(prompt)), title_justify="left", title_style="bold", show_lines=True)
        for speaker in speakers:
            table.add_column(table_text(speaker.name), overflow="fold")
        for number in range(params.num_samples):
            table.add_row(*(table_text(own[place][number]) for own in answers))
        console.print(table)


def table_text(text: str) -> str:
    """A text of data or a model, in a table."""
    return escape(printable(text))


def converse(speakers: Sequence[SampledModel], params: SamplingParams, console: Console) -> None:
    """Every model carries on its own conversation."""
    talks: list[Turns] = [() for _ in speakers]
    while True:
        try:
            said = console.input("you: ")
        except EOFError:
            return
        if not said.strip():
            continue
        for place, speaker in enumerate(speakers):
            talks[place] = (*talks[place], *user(said))
            ((reply, *_),) = speaker.answers([talks[place]], replace(params, num_samples=1), typed=True)
            talks[place] = (*talks[place], *assistant(reply))
            console.print(f"{speaker.name}: {printable(reply)}", markup=False, highlight=False)


def read_prompts(file: Path) -> list[str | Turns]:
    """The prompts of a file of rows; a bad row is an error."""
    found: list[str | Turns] = []
    unit = Unit(path=str(file))
    for row in chain.from_iterable(read_chunks(unit)):
        example = row if isinstance(row, BadRow) else parse_row(row, format="auto", columns={})
        if isinstance(example, BadRow):
            raise UserError(f"--prompts: {example}")
        found.append(example.prompt)
    if not found:
        raise UserError(f"--prompts: {file} holds no prompt")
    return found
