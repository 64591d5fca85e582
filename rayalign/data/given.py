"""What a row's texts are taken for: words, in which control tokens are words too, unless rows are rendered already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rayalign.data.schema import Example, Turns, assistant, user
from rayalign.data.shared_prompt import asked_transcript
from rayalign.data.spelled import ControlTokens


def as_asked(example: Example) -> Example:
    """A prompt ``Human: … Assistant:`` as turns, and its answers as those of such a transcript."""
    turns = asked_transcript(example.prompt) if isinstance(example.prompt, str) and not example.continues else None
    if turns is None:
        return example
    answers = tuple(assistant(answer.strip()) for answer in example.candidates if isinstance(answer, str))
    return replace(example, prompt=turns, candidates=answers)


def text_as_turns(example: Example) -> Example:
    """A text as what a user says, and texts after it as answers, unless they carry it on."""
    if not isinstance(example.prompt, str) or example.continues:
        return example
    answers = tuple(assistant(answer) for answer in example.candidates if isinstance(answer, str))
    return replace(example, prompt=user(example.prompt), candidates=answers)


def begun_once(example: Example, begin: str) -> Example:
    """A text without a prompt that spells the token that begins texts: the token is the prompt."""
    if example.prompt != "" or not begin or not example.candidates:
        return example
    (text, *_) = example.candidates
    if not isinstance(text, str) or not text.startswith(begin):
        return example
    return replace(example, prompt=begin, candidates=(text.removeprefix(begin),))


def shielded(example: Example, controls: ControlTokens) -> Example:
    """The example in whose words control tokens are broken; the same one where it has none.

    A text may begin with the token that begins texts: it has it once in any case.
    """
    broken = replace(
        example,
        prompt=_shielded_prompt(example.prompt, controls),
        candidates=controls.shield(example.candidates),
        tools=controls.shield(example.tools),
        template_kwargs=controls.shield(example.template_kwargs),
    )
    return example if broken == example else broken


def _shielded_prompt(prompt: str | Turns, controls: ControlTokens) -> str | Turns:
    if isinstance(prompt, str) and controls.begin and prompt.startswith(controls.begin):
        return controls.begin + str(controls.shield(prompt.removeprefix(controls.begin)))
    shield: str | Turns = controls.shield(prompt)
    return shield


def restore_controls(example: Example, controls: ControlTokens) -> Example:
    """The words as they were."""
    return replace(example, prompt=controls.restore(example.prompt), candidates=controls.restore(example.candidates))


def refuse_rendered(example: Example, controls: ControlTokens, *, end: str, was_text: bool) -> None:
    """Raise :class:`RowProblem` where a text is a rendered conversation, or an answer ends in the ``end`` token.

    ``was_text``: the prompt was a text, of which a turn is made.
    Answers of which the row says whether they were finished were drawn: what stands in them is what a model wrote.
    """
    for words in _words(example.prompt):
        controls.refuse_rendered(words, may_begin=isinstance(example.prompt, str), is_prompt=was_text)
    for answer in example.candidates if example.finished is None else ():
        for words in _words(answer):
            controls.refuse_rendered(words, end=end)


def _words(said: str | Turns) -> Iterator[str]:
    if isinstance(said, str):
        yield said
    else:
        yield from (turn["content"] for turn in said if turn["role"] != "tool")
