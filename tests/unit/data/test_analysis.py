from __future__ import annotations

from typing import Any

import pytest
import tiny_tokenizers as tiny

from rayalign.config.data import TokenBudget
from rayalign.data.analysis import FINDINGS, FileFindings, Seen, prompt_key
from rayalign.data.chat import make_chat
from rayalign.data.formats import parse_row
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import Example
from rayalign.data.tokenize import to_groups


def example(**fields: Any) -> Example:
    parsed = parse_row(RawRow(source="f", line=1, value=fields))
    assert isinstance(parsed, Example), parsed
    return parsed


def pair(chosen: str, rejected: str, prompt: Any = "Q") -> Example:
    return example(prompt=prompt, chosen=chosen, rejected=rejected)


def counted(*examples: Example, seen: Seen | None = None) -> dict[str, int]:
    """All findings in the texts that are not zero."""
    found, seen = FileFindings(source="f"), seen or Seen()
    for each in examples:
        found.add_text(each, seen)
    return {name: count for name, count in found.counts.items() if count}


def label(completion: str, value: bool) -> Example:
    return example(prompt="Q", completion=completion, label=value)


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([pair("A", "B"), pair("A", "C"), pair("A", "B", prompt="R")], {}),
        ([pair("A", "B"), pair("A", "B"), pair("A", "B")], {"duplicates": 2}),
        ([pair("A", "B"), pair("B", "A")], {"conflicts": 1}),
        ([pair("A", "A")], {"identical": 1}),
        ([label("A", True), label("A", False), label("A", True)], {"conflicts": 1, "duplicates": 1}),
        (
            [example(chosen="\n\nHuman: Q\n\nAssistant: ", rejected="\n\nHuman: Q\n\nAssistant: B")],
            {"empty": 1},
        ),
    ],
)
def test_findings_in_texts(examples: list[Example], expected: dict[str, int]) -> None:
    assert counted(*examples) == expected


def test_duplicates_are_found_over_all_files() -> None:
    seen = Seen()
    assert counted(pair("A", "B"), seen=seen) == {}
    assert counted(pair("A", "B"), seen=seen) == {"duplicates": 1}


def test_overlap_with_held_out_prompts() -> None:
    held_out = frozenset({prompt_key(example(prompt=[{"role": "user", "content": " Q"}]))})
    assert counted(pair("A", "B"), pair("A", "B", prompt="R"), seen=Seen(eval_prompts=held_out)) == {"in_eval": 1}


def test_lengths_and_formats() -> None:
    found = FileFindings(source="f")
    for size in range(1, 101):
        found.add_text(example(prompt="p" * size, completion="c"), Seen())
    assert found.quantiles("prompt_characters") == (1, 50, 95, 100)
    assert found.quantiles("prompt_tokens") is None
    assert found.formats == {"prompt_completion": 100}


def test_bad_rows_are_gathered_by_reason() -> None:
    found = FileFindings(source="f")
    for number in (12, 3):
        found.add_bad(BadRow(source="f", line=number, reason=f"invalid UTF-8 at byte {number} of the line"))
    assert found.bad == 2 and found.reasons == {"invalid UTF-8 at byte … of the line": 2}


def test_findings_in_tokens() -> None:
    chat = make_chat(tiny.byte_level(bos="<s>"))
    settings = TokenBudget(max_prompt_tokens=4, max_tokens=8)
    examples = [
        example(prompt="12345678", completion="a"),
        example(prompt="1", completion="abcdefghij"),
        example(prompt="<s>1", completion="a"),
        example(prompt="1", completion="</s>b"),
    ]
    found = FileFindings(source="f")
    for each, outcome in zip(examples, to_groups(examples, chat, settings), strict=True):
        found.add_text(each, Seen())
        found.add_tokens(each, outcome, chat)
    assert (found.good, found.bad) == (4, 0)
    counts = {name: count for name, count in found.counts.items() if count}
    assert counts == {"long_prompts": 1, "long_responses": 1, "no_end": 1, "double_bos": 1, "spelled": 1}
    assert found.lengths["prompt_tokens"] == [9, 2, 2, 2] and found.lengths["response_tokens"] == [2, 11, 2, 6]
    report = found.as_json()
    assert report["rows"] == 4 and report["long_prompts"] == 1 and set(FINDINGS) <= set(report)


def test_dropped_rows_are_counted() -> None:
    chat = make_chat(tiny.byte_level())
    settings = TokenBudget(max_prompt_tokens=4, max_tokens=6, truncated="drop")
    each = example(prompt="1", completion="abcdefghij")
    found = FileFindings(source="f")
    found.add_tokens(each, to_groups([each], chat, settings)[0], chat)
    assert {name: count for name, count in found.counts.items() if count} == {"long_responses": 1, "dropped": 1}


def test_answers_that_differ_in_their_tool_calls_are_not_identical() -> None:
    calls = [[{"function": {"name": name, "arguments": {}}}] for name in ("look", "guess")]
    chosen, rejected = (({"role": "assistant", "content": "", "tool_calls": call},) for call in calls)
    prompt = ({"role": "user", "content": "Why?"},)
    found = FileFindings(source="calls.jsonl")
    found.add_text(Example(format="preference", prompt=prompt, candidates=(chosen, rejected)), Seen())
    assert found.counts["identical"] == 0
    found.add_text(Example(format="preference", prompt=prompt, candidates=(chosen, chosen)), Seen())
    assert found.counts["identical"] == 1
