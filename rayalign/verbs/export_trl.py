"""``rayalign export trl_pairs``: a store's pairs as TRL reads them, to the same tokens. Starts no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rayalign.data.group import Candidate, Group
from rayalign.data.replies import reply_text
from rayalign.data.store import TokenStore
from rayalign.data.texts import ANSWERS, Prompts
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.storage.manifest import TornDirectory
from rayalign.storage.place import Place
from rayalign.verbs.generate import write_dataset
from rayalign.verbs.stores import run_json_of_store, shape_of_store, store_manifest, store_tokenizer
from rayalign.verbs.trl import read_by_trl

Row = dict[str, Any]
OTHERWISE = "that TRL would tokenize otherwise"
UNFINISHED = "an answer was cut off, and TRL closes it: leave out the rows whose `finished` holds false"
SHORTENED = "the prompt was cut here, and is whole in the file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The rows that were written, notes on some of them, and the groups that were left out, by reason."""

    rows: int
    left_out: Mapping[str, int]
    notes: Mapping[str, int] = field(default_factory=dict)


class Pair(NamedTuple):
    """A stored pair, and what its row said."""

    prompt_ids: list[int]
    candidates: tuple[Candidate, Candidate]
    said: Mapping[str, Any]
    answers: tuple[Any, Any] | None
    """Chosen and rejected as the row had them, where they are more than plain words."""
    numbers: Row


def trl_pairs(store: Place, out: Path, *, model: str | None) -> Exported:
    """Write a store's pairs with TRL's columns: ``prompt``, ``chosen``, ``rejected``, and what belongs to them.

    They are turns where TRL makes the stored tokens of those, and else texts that are rendered already; every row that
    is written was tokenized as TRL does. Of groups of K scored candidates: the best and the worst by reward.

    Raises:
        UserError: the folder is no committed store, or holds no pairs, or its tokenizer is not known.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: write a file that ends in .jsonl or .parquet")
    manifest = store_manifest(store)
    shape = shape_of_store(store, manifest)
    if shape not in ("pair", "group", "ranking"):
        raise UserError(
            f"{store} holds {'single completions' if shape in ('one', 'labelled') else shape + 's'}, no pairs: name a "
            "round of a pairwise or a group method, or a store of pairs"
        )
    run = run_json_of_store(store)
    trusts = bool(run and run["configuration"]["model"].get("trust_remote_code"))
    tokenizer = load_tokenizer(store_tokenizer(store, manifest, model), trust_remote_code=trusts)
    left_out: Counter[str] = Counter()
    pairs = list(_pairs(store, shape, left_out))
    rows, notes = _readable(pairs, tokenizer, left_out)
    if not rows:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        raise UserError(f"{store} holds no pair ({reasons or 'it is empty'})")
    write_dataset(out, rows)
    return Exported(rows=len(rows), left_out=left_out, notes=notes)


def _pairs(store: Place, shape: str, left_out: Counter[str]) -> Iterator[Pair]:
    """The pairs in the order of their lines; what is none is counted."""
    opened = TokenStore.open(store)
    prompts = Prompts(opened)
    for index in np.argsort(opened.index.arrays["line"], kind="stable").tolist():
        group = opened[index]
        found = chosen_and_rejected(group, shape)
        if isinstance(found, str):
            left_out[found] += 1
            continue
        try:
            said = prompts.said(index)
        except TornDirectory as error:
            raise UserError(f"{store}: {error}") from error
        answers = said.get(ANSWERS, ())
        whole = len(answers) == len(group.candidates)
        chosen, rejected = found
        yield Pair(
            prompt_ids=group.prompt_ids.tolist(),
            candidates=(group.candidates[chosen], group.candidates[rejected]),
            said=said,
            answers=(answers[chosen], answers[rejected]) if whole else None,
            numbers=numbers_of(group, found),
        )


def _readable(pairs: Sequence[Pair], tokenizer: Any, left_out: Counter[str]) -> tuple[list[Row], Counter[str]]:
    """The rows in the form that TRL reads right of more pairs, and notes on them; the others are counted."""
    forms: list[Callable[[Pair, Any], Row | None]] = [partial(trl_turns, stripped=True), trl_turns, trl_texts]
    best: tuple[list[Row], Counter[str]] = ([], Counter())
    for form in forms:
        rows: list[Row] = []
        notes: Counter[str] = Counter()
        for pair in pairs:
            row = form(pair, tokenizer)
            found = None if row is None else differences_in_trl(pair, row, tokenizer)
            if row is not None and found is not None:
                rows.append(row)
                notes.update(found)
        if len(rows) > len(best[0]):
            best = rows, notes
    if lost := len(pairs) - len(best[0]):
        left_out[OTHERWISE] += lost
    return best


def trl_turns(pair: Pair, tokenizer: Any, *, stripped: bool = False) -> Row | None:
    """The pair as conversations, which TRL renders by the tokenizer's template; None without one.

    ``stripped``: without the white space around an answer, which may be the template's own.
    """
    if tokenizer.chat_template is None:
        return None
    prompt = pair.said["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    texts = [
        reply_text(tokenizer, own.ids.tolist(), finished=own.finished, prompt_ids=pair.prompt_ids)
        for own in pair.candidates
    ]
    chosen, rejected = pair.answers or ((text.strip() for text in texts) if stripped else texts)
    row = {"prompt": turns, "chosen": _turns(chosen), "rejected": _turns(rejected)}
    row |= {name: pair.said[name] for name in ("tools", "chat_template_kwargs") if name in pair.said}
    return row | _finished(pair) | pair.numbers


def _turns(answer: Any) -> list[Row]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else [dict(turn) for turn in answer]


def trl_texts(pair: Pair, tokenizer: Any) -> Row:
    """The pair as texts that are rendered already; TRL puts the tokens in front that the tokenizer does."""
    lead = tokenizer("", add_special_tokens=True)["input_ids"]
    ids = pair.prompt_ids[len(lead) :] if lead and pair.prompt_ids[: len(lead)] == lead else pair.prompt_ids
    texts = [tokenizer.decode(own.ids.tolist(), skip_special_tokens=False) for own in pair.candidates]
    chosen, rejected = (text.removesuffix(str(tokenizer.eos_token or "")) for text in texts)  # TRL adds it
    prompt = tokenizer.decode(ids, skip_special_tokens=False)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | _finished(pair) | pair.numbers


def _finished(pair: Pair) -> Row:
    """``finished`` where an answer was cut off."""
    finished = [own.finished for own in pair.candidates]
    return {} if all(finished) else {"finished": finished}


def differences_in_trl(pair: Pair, row: Row, tokenizer: Any) -> list[str] | None:
    """What to know of a row that TRL reads as the stored tokens; None where it reads others.

    A template may write something after an answer's end, such as a line end, which TRL keeps.
    """
    try:
        read = read_by_trl(row, tokenizer)
    except Exception:  # templates raise what they like
        return None
    notes = []
    if read.prompt != pair.prompt_ids:
        bos = tokenizer.bos_token_id
        kept = pair.prompt_ids[1:] if pair.prompt_ids[:1] == [bos] else pair.prompt_ids
        before = read.prompt[: len(read.prompt) - len(kept)]
        if not kept or read.prompt[-len(kept) :] != kept or {*before} <= {bos}:  # which TRL's tokenizer adds to texts
            return None
        notes.append(SHORTENED)
    for own, theirs in zip(pair.candidates, read.candidates, strict=True):
        ids = own.ids.tolist()
        beyond = tokenizer.decode(theirs[len(ids) :], skip_special_tokens=not own.finished)
        if theirs[: len(ids)] != ids or beyond.strip():
            return None
    return notes if all(own.finished for own in pair.candidates) else [*notes, UNFINISHED]


def chosen_and_rejected(group: Group, shape: str) -> tuple[int, int] | str:
    """(chosen, rejected), or why there is none."""
    candidates = group.candidates
    if len(candidates) < 2:
        return "without a preference"
    if any(has_gaps(candidate) for candidate in candidates):
        return "with answers of several turns"
    if shape == "pair":
        return 0, 1
    rank, rewards = group.per_candidate.get("rank"), group.per_candidate.get("reward")
    if rank is not None:
        return int(rank.argmin()), int(rank.argmax())
    if rewards is None or np.isnan(rewards).any():
        return "without a reward for every candidate"
    if rewards.min() == rewards.max():
        return "in which all candidates score alike"
    return int(rewards.argmax()), int(rewards.argmin())


def has_gaps(candidate: Candidate) -> bool:
    """Whether a user's or a tool's turn stands inside."""
    return not bool(np.asarray(candidate.mask).all())


def numbers_of(group: Group, pair: tuple[int, int]) -> Row:
    """Scores of the two, and the margin and soft label of a pair, where they are known."""
    numbers: Row = {}
    rewards = group.per_candidate.get("reward")
    if rewards is not None and not np.isnan(rewards[list(pair)]).any():
        numbers = {"chosen_score": float(rewards[pair[0]]), "rejected_score": float(rewards[pair[1]])}
    for name in ("margin", "soft_label"):
        values = group.per_candidate.get(name)
        if values is not None and not np.isnan(values[0]):
            numbers[name] = float(values[0])
    return numbers


def export_lines_of_trl(exported: Exported, out: Place) -> Iterator[str]:
    yield f"{exported.rows} pairs: {out}"
    for reason, count in exported.left_out.items():
        yield f"left out: {count} groups {reason}"
    for note, count in exported.notes.items():
        yield f"in {count} pairs {note}"
