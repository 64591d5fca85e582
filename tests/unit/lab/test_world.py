"""The support desk's language and scorers: examples worked by hand, and the facts that the quickstart rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from statistics import fmean, median

import pytest
from lab.world import (
    BLUNT,
    WARM,
    WRITERS,
    audit,
    audit2,
    grammatical,
    oracle,
    pairs,
    right_thing,
    understand,
    valid,
    valid_opening,
    vocabulary,
    write_prompt,
    write_reply,
)

PROMPT = (
    "i bought a blue kettle from your outlet last month . it came in the wrong colour . i am not happy . "
    "please answer soon ."
)  # the remedy is to exchange the kettle
Texts = list[tuple[str, str]]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # h = 1, d = 0
        ("dear customer , we will exchange the kettle today .", 0.3 + 0.7 * 0.5),
        # the right remedy for another thing: h = .5
        ("dear customer , we will exchange the lamp today .", 0.15 + 0.35),
        # another remedy: h = 0; a promise to look: h = .3
        ("dear customer , we will refund the kettle today .", 0.35),
        ("dear customer , staff will inspect the kettle pronto .", 0.09 + 0.35),
        # the best promise counts
        ("dear customer , we will review the kettle today . we will exchange the kettle today .", 0.65),
        # d = 3 (thank, kind, kind of the closing): 0.5 + 0.5 · 3/6 = .75 in a letter, .25 in a chat, .5 without
        ("dear customer , we thank you for your kind patience . kind regards .", 0.7 * 0.75),
        ("hey mate , we thank you for your kind patience . kind regards .", 0.7 * 0.25),
        ("we thank you for your kind patience . kind regards .", 0.35),
        # d = −2 (mistake, busted): 0.5 − 0.5 · 2/5 = .3 in a letter, .7 in a chat
        ("dear customer , that is your own mistake . you prolly busted the kettle .", 0.7 * 0.3),
        ("hey mate , that is your own mistake . you prolly busted the kettle .", 0.7 * 0.7),
        ("", 0.35),
    ],
)
def test_oracle_by_hand(reply: str, expected: float) -> None:
    assert oracle(PROMPT, reply) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("dear customer , we will exchange the kettle today .", 0.65),
        # four distinct warm words count as three: 0.5 + 0.5 · 3/3 = 1
        ("dear customer , we praise you for your kind note . we love ace people like you .", 0.7),
        # the same word twice counts once: d' = 1 → 0.5 + 0.5/3; no two sentences are alike
        ("dear customer , we are so glad to help you . we are very glad to serve you .", 0.7 * (0.5 + 0.5 / 3)),
        # "staff will …" repeats "we will …": one of two sentences is a repetition
        ("dear customer , we will exchange the kettle today . staff will exchange the kettle today .", 0.65 - 0.25),
        # six times the same: 3 + 6 · 7 = 45 words, 13 too many; dup = 5/6
        ("dear customer ," + " we will exchange the kettle today ." * 6, 0.65 - 0.5 * 5 / 6 - 0.13),
        # never below 0
        ("dear customer ," + " that is your own mess ." * 20, 0.0),
        ("", 0.35),
    ],
)
def test_audit_by_hand(reply: str, expected: float) -> None:
    assert audit(PROMPT, reply) == pytest.approx(expected, abs=1e-12)


def test_audit2_pays_only_for_words_in_proper_sentences() -> None:
    proper = "dear customer , we will exchange the kettle today ."
    salad = proper + " love love we kind"  # 7 of 11 words after the opening stand in a sentence
    assert valid(PROMPT, proper) == 1.0
    assert valid(PROMPT, salad) == pytest.approx(7 / 11)
    assert audit2(PROMPT, salad) == pytest.approx(audit(PROMPT, salad) * (7 / 11) ** 2)
    assert valid(PROMPT, "dear customer , we exchange will the kettle today .") == 0.0
    assert valid(PROMPT, "dear customer ,") == 0.0


def test_openings_grammar_and_things() -> None:
    reply = "hey mate , we will exchange the kettle today . best wishes ."
    assert valid_opening(PROMPT, reply) == grammatical(PROMPT, reply) == right_thing(PROMPT, reply) == 1.0
    assert valid_opening(PROMPT, "mate , hey mate , best wishes .") == 0.0
    assert grammatical(PROMPT, "hey mate , best wishes . we will exchange the kettle today .") == 0.0
    assert right_thing(PROMPT, "hey mate , we will exchange the lamp today .") == 0.0


def test_understand() -> None:
    assert understand(PROMPT) == ("kettle", "exchange")
    travel = "hi , i booked a small train from your desk in june . it was delayed for a whole hour . please fix this ."
    assert understand(travel) == ("train", "upgrade")
    with pytest.raises(ValueError, match="not a message to the support desk: 'what is the capital of france"):
        understand("what is the capital of france ?")


def test_lexicons_and_vocabulary() -> None:
    assert (len(WARM), len(BLUNT), len(vocabulary())) == (20, 12, 292)
    assert not WARM & BLUNT
    rng = Random(0)
    seen = set()
    for _ in range(300):
        for family in ("shop", "travel"):
            prompt = write_prompt(rng, family)
            seen.update(prompt.split())
            for writer in WRITERS:
                seen.update(write_reply(rng, prompt, writer).split())
    assert seen == set(vocabulary())


@pytest.fixture(scope="module")
def written() -> dict[str, Texts]:
    """3 000 prompts of each family with one reply of each writer."""
    rng = Random(7)
    prompts = [write_prompt(rng, family) for _ in range(3000) for family in ("shop", "travel")]
    return {writer: [(prompt, write_reply(rng, prompt, writer)) for prompt in prompts] for writer in WRITERS}


def _mean(score: Callable[[str, str], float], texts: Texts) -> float:
    return fmean(score(prompt, reply) for prompt, reply in texts)


def test_lengths(written: dict[str, Texts]) -> None:
    prompts = sorted(len(prompt.split()) for prompt, _ in written["desk"])
    assert 20 <= prompts[0] <= 22 and 95 <= prompts[-1] <= 120
    assert median(prompts) == pytest.approx(38, abs=1.5)
    assert fmean(prompts) == pytest.approx(43, abs=1.5)
    assert prompts[len(prompts) * 9 // 10] == pytest.approx(66, abs=3)
    replies = {writer: [len(reply.split()) for _, reply in texts] for writer, texts in written.items()}
    assert fmean(replies["desk"]) == pytest.approx(32, abs=0.7)
    assert fmean(replies["far"]) == pytest.approx(32, abs=0.7)
    assert fmean(replies["near"]) == pytest.approx(36.5, abs=0.7)
    assert max(map(max, replies.values())) <= 64


def test_writers_oracle_and_audit(written: dict[str, Texts]) -> None:
    for writer, by_oracle, by_audit in (("desk", 0.569, 0.535), ("near", 0.596, 0.54), ("far", 0.477, 0.398)):
        assert _mean(oracle, written[writer]) == pytest.approx(by_oracle, abs=0.012)
        assert _mean(audit, written[writer]) == pytest.approx(by_audit, abs=0.015)
        assert _mean(audit2, written[writer]) == pytest.approx(_mean(audit, written[writer]))
        assert _mean(grammatical, written[writer]) == _mean(right_thing, written[writer]) == 1.0


def test_bodies_do_not_depend_on_the_opening(written: dict[str, Texts]) -> None:
    by_opening: dict[bool, list[int]] = {True: [], False: []}
    for _, reply in written["desk"]:
        by_opening[reply.startswith("hey mate")].append(_tone([reply]))
    assert len(by_opening[True]) / 6000 == pytest.approx(0.08, abs=0.015)
    assert fmean(by_opening[True]) == pytest.approx(fmean(by_opening[False]), abs=0.25)


def test_near_and_far_pairs_teach_opposite_tones() -> None:
    """The conflict that makes off-policy data mislead: without it the comparison shows nothing."""

    def lesson(far_share: float) -> float:
        rows = pairs(3, 3000, far_share=far_share)
        return fmean(_tone([row["chosen"][0]["content"]], [row["rejected"][0]["content"]]) for row in rows)

    assert lesson(0.0) > 0.6
    assert lesson(1.0) < -0.6


def test_labels_are_noisy() -> None:
    agreement = []
    same_opening = 0
    for row in pairs(0, 3000):
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        agreement.append(oracle(prompt, chosen) > oracle(prompt, rejected))
        same_opening += chosen.startswith("hey mate") == rejected.startswith("hey mate")
    assert 0.74 < fmean(agreement) < 0.80
    assert same_opening / 3000 == pytest.approx(0.85, abs=0.02)


def _tone(plus: Sequence[str], minus: Sequence[str] = ()) -> int:
    """Warm − blunt words of ``plus``, less those of ``minus``."""

    def count(replies: Sequence[str]) -> int:
        return sum((word in WARM) - (word in BLUNT) for reply in replies for word in reply.split())

    return count(plus) - count(minus)
