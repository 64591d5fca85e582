"""What the rows of a token store say: their prompts, for scorers and people, and what else is not in the tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayalign.data.group import Candidate, Group
from rayalign.data.schema import Example, Turns
from rayalign.data.shard import Said
from rayalign.data.shared_prompt import prompt_text
from rayalign.data.store import TokenStore
from rayalign.storage.manifest import TornDirectory

ANSWERS = "answers"


def said_to_keep(example: Example, variables: Mapping[str, Any], answers: Sequence[str | Turns]) -> Said:
    """What is kept of an example: its prompt, tools and variables, and ``answers`` that are more than plain words.

    ``variables`` hold for every row; plain words can be read off the tokens.
    """
    kept: dict[str, Any] = {}
    if example.tools:
        kept["tools"] = list(example.tools)
    if variables or example.template_kwargs:
        kept["chat_template_kwargs"] = {**variables, **example.template_kwargs}
    if not all(map(_is_plain, answers)):
        kept[ANSWERS] = list(answers)
    return {"prompt": example.prompt, **kept} if kept else example.prompt


def kept_answers(example: Example, whole: Group, group: Group) -> list[str | Turns]:
    """The answers of ``group``, which holds some candidates of the ``whole`` group of an example."""
    place = {id(candidate): number for number, candidate in enumerate(whole.candidates)}
    return [example.candidates[place[id(own)]] for own in group.candidates if id(own) in place]


def _answer(candidate: Candidate, stored: Group, answers: Sequence[Any]) -> Any:
    """What the row said for this candidate; None where it is none of the stored ones."""
    of = zip(stored.candidates, answers, strict=True)
    return next((said for own, said in of if np.array_equal(own.ids, candidate.ids)), None)


def _is_plain(answer: str | Turns) -> bool:
    return isinstance(answer, str) or (len(answer) == 1 and answer[0].keys() <= {"role", "content"})


class Prompts:
    """By row of the store.

    Raises TornDirectory where the store has no prompts, or what a row says is damaged.
    """

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __getitem__(self, row: int) -> str | Turns:
        prompt: str | Turns = self.said(row)["prompt"]
        return prompt

    def said(self, row: int) -> Mapping[str, Any]:
        """``prompt``, and where the row has them ``tools``, ``chat_template_kwargs`` and ``answers``."""
        try:
            found: Said = json.loads(self.store.said(row))
        except ValueError as error:
            raise TornDirectory(f"{self.store.index.name(row)}: what the row says is damaged: {error}") from error
        return found if isinstance(found, Mapping) else {"prompt": found}

    def again(self, row: int, stored: Group, made: Group) -> Said:
        """The same for a group that holds some of the ``stored`` candidates, and others: null stands for these."""
        found = dict(self.said(row))
        if answers := found.pop(ANSWERS, None):
            kept = [_answer(candidate, stored, answers) for candidate in made.candidates]
            found |= {ANSWERS: kept} if any(kept) else {}
        prompt: Said = found["prompt"]
        return found if len(found) > 1 else prompt

    def text(self, row: int) -> str:
        """What a scorer reads."""
        return prompt_text(self[row])
