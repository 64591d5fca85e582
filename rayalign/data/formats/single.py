"""One answer, or none: completions with and without a label, conversations, texts, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

from rayalign.data.formats.base import FINISHED, Body, Format, Texts, aligned, ending_in_answer, never, one_of
from rayalign.data.formats.names import is_text_alone
from rayalign.data.formats.turns import text_or_turns_said, turns_said
from rayalign.data.schema import Fields, RowProblem, Turns, assistant, is_assistant, required_text, user

CONVERSATIONS = ("messages", "conversations", "conversation")
LABELS = ("label", "kto_tag")
ASK_QUESTION = (
    "a question and an answer: write format: question_answer to learn the answer, or columns: {prompt: …} with the "
    "question's column for the prompt alone"
)


def _prompt_completion(row: Fields) -> Body:
    drawn = FINISHED in row
    completion = {"completion": text_or_turns_said(row, "completion", may_be_empty=drawn)}
    return Body(*aligned(text_or_turns_said(row, "prompt"), completion, may_be_empty=drawn))


def _unpaired_preference(row: Fields) -> Body:
    return _labelled(_prompt_completion(row), row)


def _messages(row: Fields) -> Body:
    return _conversation(row, "messages")


def _sharegpt(row: Fields) -> Body:
    return _conversation(row, one_of(row, "conversations", "conversation"))


def _conversation(row: Fields, name: str) -> Body:
    """The prompt is everything before the first answer; later answers are predicted, turns between them only seen."""
    messages = turns_said(row, name)
    first = next((index for index, turn in enumerate(messages) if is_assistant(turn)), None)
    if first is None:
        raise RowProblem(name, f"{name} has no turn of the assistant: there is nothing to learn")
    if first == 0:
        raise RowProblem(name, f"{name} starts with the assistant: there is no prompt")
    return Body(messages[:first], (ending_in_answer(messages[first:], name),))


def _labelled_messages(row: Fields) -> Body:
    """The label judges what follows the last turn of the user; answers before it belong to the prompt."""
    name = one_of(row, *CONVERSATIONS)
    messages = turns_said(row, name)
    last = max((index for index, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
    answer = messages[last + 1 :]
    if last < 0 or not answer or not is_assistant(answer[0]):
        raise RowProblem(name, f"{name} must end in a turn of the assistant after one of the user: the label is its")
    return _labelled(Body(messages[: last + 1], (ending_in_answer(answer, name),)), row)


def _labelled(body: Body, row: Fields) -> Body:
    """With the row's label; a label that is null is no verdict."""
    name = one_of(row, *LABELS)
    if name not in row:
        return body._replace(preference="undecided")
    if row[name] not in (True, False):
        raise RowProblem(name, f"{name} must be true (desirable) or false, not {row[name]!r}")
    return body._replace(columns={"label": (float(row[name]),)})


def _alpaca(row: Fields) -> Body:
    body = Body(*aligned(instructed(row), {"output": text_or_turns_said(row, "output")}))
    return _labelled(body, row) if any(name in row for name in LABELS) else body


def _question_answer(row: Fields) -> Body:
    answer = one_of(row, "answer", "response")
    return Body(
        *aligned(text_or_turns_said(row, one_of(row, "question", "query")), {answer: text_or_turns_said(row, answer)})
    )


def _text(row: Fields) -> Body:
    return Body("", (required_text(row, "text"),), continues=True)


def _prompt_only(row: Fields) -> Body:
    return Body(text_or_turns_said(row, "prompt"), ())


def instructed(row: Fields) -> Texts:
    """An instruction, its input on the next line, after the earlier questions and answers in ``history``."""
    prompt = required_text(row, "instruction")
    if row.get("input"):
        prompt = f"{prompt}\n{required_text(row, 'input')}"
    earlier = row.get("history", ())
    if not isinstance(earlier, list | tuple) or not all(_is_exchange(item) for item in earlier):
        raise RowProblem("history", "history must be a list of [question, answer]")
    turns = tuple(chain.from_iterable((*user(question), *assistant(answer)) for question, answer in earlier))
    return (*turns, *user(prompt)) if turns else prompt


def _is_exchange(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, str) for part in item)


def ending_in_question(turns: Turns, name: str) -> Turns:
    """A conversation that waits for an answer."""
    if is_assistant(turns[-1]):
        raise RowProblem(
            name, f"{name} ends in a turn of the assistant, but other columns hold the answers; remove that turn"
        )
    return turns


def _is_labelled(row: Fields) -> bool:
    return any(name in row for name in LABELS)


SINGLE: Mapping[str, Format] = MappingProxyType(
    {
        "labelled_messages": Format(
            says="A conversation, liked or not; the label judges what follows the last turn of the user.",
            read=_labelled_messages,
            needs=("|".join(CONVERSATIONS), "|".join(LABELS)),
            verdicts=LABELS,
        ),
        "unpaired_preference": Format(
            says="One answer, liked or not; a label that is null is no verdict.",
            read=_unpaired_preference,
            needs=("prompt", "completion", "|".join(LABELS)),
            may=(FINISHED,),
            verdicts=LABELS,
        ),
        "prompt_completion": Format(
            says="A prompt and its answer.",
            read=_prompt_completion,
            needs=("prompt", "completion"),
            may=(FINISHED,),
            leaves=("completion_score", "sampling"),
        ),
        "alpaca": Format(
            says="An instruction, its input on the next line, and its output; with a label for ``kto``.",
            read=_alpaca,
            needs=("instruction", "output"),
            may=("input", "history", *LABELS),
            leaves=("text",),
            guesses_prompt=True,
        ),
        "sharegpt": Format(
            says="A conversation in turns of ``from`` and ``value``, of which every answer is learned.",
            read=_sharegpt,
            needs=("conversations|conversation",),
        ),
        "messages": Format(
            says="A conversation, of which every answer is learned.",
            read=_messages,
            needs=("messages",),
            leaves=("prompt_id",),
        ),
        "question_answer": Format(
            says="A question and its answer (GSM8K).",
            read=_question_answer,
            needs=("question|query", "answer|response"),
            is_found=never,
            ask=ASK_QUESTION,
        ),
        "text": Format(
            says="A whole text.", read=_text, needs=("text",), is_found=is_text_alone, is_conversation=False
        ),
        "prompt_only": Format(says="A prompt to complete.", read=_prompt_only, needs=("prompt",)),
    }
)
