"""Where the shared prompt of two answers ends, for rows that do not say: texts, lists of turns, transcripts."""

from __future__ import annotations

import os.path
import re

from rayalign.data.schema import RowProblem, Turns, is_assistant

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}
_NO_PROMPT = "chosen and rejected share no prompt: they must begin alike"


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected): the prompt is the shared beginning without its last, perhaps unfinished, word.

    A space before that word goes with the answers, as byte-level tokenizers want it; a line end stays in the prompt.
    """
    shared = os.path.commonprefix([chosen, rejected])
    last_space = max(shared.rfind(space) for space in " \n\t")
    cut = last_space if shared[last_space : last_space + 1] == " " else last_space + 1
    if not shared[:cut].strip():
        raise RowProblem("rejected", _NO_PROMPT)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) of two whole conversations: the prompt ends at the first turn in which they differ.

    Where that turn is not an answer in both, the prompt ends at the answer before it: the candidates then share their
    first answer, which cancels in every loss of the margin.
    """
    last = min(len(chosen), len(rejected)) - 1
    cut = next((index for index in range(last) if chosen[index] != rejected[index]), last)
    while cut > 0 and not (is_assistant(chosen[cut]) and is_assistant(rejected[cut])):
        cut -= 1
    if cut <= 0:
        raise RowProblem("rejected", _NO_PROMPT)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def is_transcript(value: object) -> bool:
    """True for ``Human: … \\n\\nAssistant: …``, the format of HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcript_turns(value: str, name: str) -> Turns:
    """The turns of a transcript. Turns of one speaker in a row become one: chat templates want them to alternate."""
    pieces = _SPEAKER.split(value)
    merged: list[tuple[str, str]] = []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        if merged and merged[-1][0] == speaker:
            merged[-1] = (speaker, f"{merged[-1][1]}\n\n{said.strip()}".strip())
        else:
            merged.append((speaker, said.strip()))
    if pieces[0].strip() or len(merged) < 2 or merged[-1][0] != "Assistant":
        raise RowProblem(name, f"{name} must be a transcript that starts with Human: and ends in an Assistant: turn")
    return tuple({"role": _ROLES[speaker], "content": said} for speaker, said in merged)


def asked_transcript(value: str) -> Turns | None:
    """The turns of a transcript that waits for the assistant, ``Human: … \\n\\nAssistant:``; None for other texts."""
    if not value.lstrip().startswith("Human:") or not value.rstrip().endswith("\n\nAssistant:"):
        return None
    turns = transcript_turns(value, "prompt")
    return turns[:-1] if len(turns) > 1 and not turns[-1]["content"] else None


def transcript(turns: Turns, *, generation_prompt: bool) -> str:
    """Turns as a transcript: how a conversation reads for a tokenizer without a chat template."""
    lines = []
    for turn in turns:
        speaker = _SPEAKERS.get(turn["role"], turn["role"].capitalize())
        lines.append(f"\n\n{speaker}: {turn['content']}" if turn["content"] else f"\n\n{speaker}:")
    return "".join(lines) + ("\n\nAssistant:" if generation_prompt else "")


def prompt_text(prompt: str | Turns) -> str:
    """What a scorer and a reader see: a text or a single message as it is, a conversation as a transcript."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return transcript(prompt, generation_prompt=False)
