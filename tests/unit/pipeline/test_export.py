"""What other tools read: AlpacaEval's outputs, TRL's pairs, a model card. And what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_runs import save_tiny

from rayalign.cli import main
from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.formats import parse_row
from rayalign.data.group import Group
from rayalign.data.records import RawRow
from rayalign.data.schema import Example
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.data.tokenize import Tokenized, to_groups
from rayalign.data.tokenize_rows import Shape, shape_group
from rayalign.engine.model.folder import tokenizer_digest
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.verbs.card import base_of, model_card
from rayalign.verbs.export import alpaca_eval
from rayalign.verbs.export_trl import trl_pairs

CONFIGURATION = {
    "name": "mine",
    "model": {"name": "Qwen/Qwen2.5-0.5B"},
    "data": {"train": [{"path": "/srv/someone/secret place/pairs.jsonl"}, {"path": "trl-lib/lib", "split": "train"}]},
    "method": {"name": "dpo", "beta": 0.1, "logit_temperature": 1.0},
    "scorer": {"api_key": "sk-planted"},
}


def written_run(directory: Path, **configuration: Any) -> Path:
    """A run's folder with everything but weights."""
    (directory / "final").mkdir(parents=True)
    (directory / "final" / "config.json").write_text("{}")
    facts = {
        "name": "mine | <b>", "status": "finished", "updated": "2026-01-01", "seed": 3, "steps": 20, "workers": 1,
        "configuration": CONFIGURATION | configuration, "versions": {"rayalign": "0.1.0", "torch": "2.13.0"},
        "git_revision": "", "data": [{"store": "s", "digest": "d", "rows": 1200, "bad": 3, "dropped": 0}],
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(facts))
    return directory


def measured(directory: Path, step: int, score: float, *, replies: bool = True) -> None:
    """Two prompts, two samples: scores ``score`` and ``score`` + 1."""
    table = [[score, score + 1.0]] * 2
    point = {
        "prompt_set": "shop", "step": step, "scores": {"oracle": table}, "kl": {"kl_rb": table, "k1": table},
        "length": [[4, 4]] * 2, "finished": [[1, 1]] * 2,
    }  # fmt: skip
    stored: dict[str, Any] = {"identity": "i", "points": [point]}
    if replies:
        texts = [[f"reply {prompt} {sample} at {step}" for sample in range(2)] for prompt in range(2)]
        stored["replies"] = {"shop": {"prompts": ["Why?", "Wer „da“?"], "replies": texts}}
    (directory / "evaluation").mkdir(exist_ok=True)
    (directory / "evaluation" / f"step_{step:06d}.json").write_text(json.dumps(stored))


def test_replies_have_alpaca_evals_fields(tmp_path: Path) -> None:
    run = written_run(tmp_path / "mine")
    measured(run, 0, 0.0)
    measured(run, 20, 1.0)
    out = tmp_path / "out" / "model_outputs.json"
    assert alpaca_eval(run, out, step=None, prompts=None, sample=0, generator=None) == 2
    assert json.loads(out.read_text()) == [
        {"instruction": "Why?", "output": "reply 0 0 at 20", "generator": "mine-step-20", "dataset": "shop"},
        {"instruction": "Wer „da“?", "output": "reply 1 0 at 20", "generator": "mine-step-20", "dataset": "shop"},
    ]
    alpaca_eval(run, out, step=0, prompts="shop", sample=1, generator="reference")
    assert json.loads(out.read_text())[1] == {
        "instruction": "Wer „da“?", "output": "reply 1 1 at 0", "generator": "reference", "dataset": "shop"
    }  # fmt: skip


def test_what_was_not_evaluated_is_no_output(tmp_path: Path) -> None:
    run = written_run(tmp_path / "mine")
    given: dict[str, Any] = {"step": None, "prompts": None, "sample": 0, "generator": None}
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match="holds no evaluation: measure a trained run with rayalign evaluate"):
        alpaca_eval(run, out, **given)
    measured(run, 20, 1.0)
    for change, message in (
        ({"step": 3}, "step 3 was not evaluated; there are 20"),
        ({"prompts": "desk"}, "no prompt set is called desk; there are shop"),
        ({"sample": 2}, "sample 2 was not drawn; there are 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            alpaca_eval(run, out, **(given | change))
    measured(run, 20, 1.0, replies=False)
    with pytest.raises(UserError, match="written by an older version, without the replies; measure again"):
        alpaca_eval(run, out, **given)
    (tmp_path / "grid" / "cells").mkdir(parents=True)
    run.rename(tmp_path / "grid" / "cells" / "dpo")
    with pytest.raises(UserError, match="name one of its cells: .*/cells/dpo"):
        alpaca_eval(tmp_path / "grid", out, **given)
    assert not out.exists()


PAIRS = [
    {"prompt": "Why is it", "chosen": " so?", "rejected": " not?"},
    {"prompt": "Who", "chosen": " he", "rejected": " she ä"},
]
CHATS = [
    {
        "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": row["prompt"]}],
        **{name: [{"role": "assistant", "content": row[name].strip()}] for name in ("chosen", "rejected")},
    }
    for row in PAIRS
]


def make_store(folder: Path, rows: list[dict[str, Any]], shape: Shape, *, template: str = "auto") -> Path:
    """A stage's store as the pipeline commits it."""
    tokenizer = load_tokenizer(folder / "tiny")
    examples = [parse_row(RawRow(source="rows.jsonl", line=line, value=row)) for line, row in enumerate(rows, start=1)]
    assert all(isinstance(example, Example) for example in examples)
    chat = make_chat(tokenizer, template=template)
    groups: list[Group] = []
    for example, outcome in zip(examples, to_groups(examples, chat, TokenBudget()), strict=True):  # type: ignore[arg-type]
        assert isinstance(outcome, Tokenized), outcome
        groups += shape_group(outcome.group, shape, preference=example.preference)  # type: ignore[union-attr]
    directory = folder / f"tokens-{shape}"
    prompts = [example.prompt for example in examples]  # type: ignore[union-attr]
    shard = write_shard(directory, "shard", groups, prompts=prompts)
    meta = {"inputs": {"shape": shape, "tokenizer": tokenizer_digest(folder / "tiny")}}
    commit_store(directory, [shard], meta=meta)
    return directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny", max_position_embeddings=256)
    return tmp_path


def exported(store: Path, folder: Path, **options: Any) -> list[dict[str, Any]]:
    trl_pairs(store, folder / "pairs.jsonl", **({"model": str(folder / "tiny")} | options))
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_conversations_come_back_as_turns(folder: Path) -> None:
    assert exported(make_store(folder, CHATS, "pair"), folder) == CHATS


def test_texts_come_back_as_texts_with_the_space_between(folder: Path) -> None:
    assert exported(make_store(folder, PAIRS, "pair", template="none"), folder) == PAIRS


def test_of_scored_candidates_the_best_and_the_worst_are_a_pair(folder: Path) -> None:
    prompt = [{"role": "user", "content": "Why?"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("a", "b", "c")]
    rows = [
        {"prompt": prompt, "completions": completions, "rewards": [0.0, 2.0, -1.0]},
        {"prompt": prompt, "completions": completions, "rewards": [1.0, 1.0, 1.0]},
    ]
    store = make_store(folder, rows, "group")
    found = trl_pairs(store, folder / "pairs.jsonl", model=str(folder / "tiny"))
    assert (found.rows, dict(found.left_out)) == (1, {"in which all candidates score alike": 1})
    (row,) = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert row == {
        "prompt": prompt, "chosen": completions[1], "rejected": completions[2],
        "chosen_score": 2.0, "rejected_score": -1.0,
    }  # fmt: skip


def test_a_round_says_itself_whose_tokens_it_has(folder: Path) -> None:
    """A round records no shape: the method of its run does; a lone candidate is a prompt without a preference."""
    run = written_run(folder / "mine", model={"name": str(folder / "tiny")})
    made = make_store(folder, CHATS, "pair")
    store = run / "rounds" / "round_000000-abc"
    store.parent.mkdir()
    made.rename(store)
    manifest = json.loads((store / "MANIFEST.json").read_text())
    tokenizer = load_tokenizer(folder / "tiny")
    assert manifest["meta"]["inputs"]["tokenizer"] == tokenizer_digest(folder / "tiny") and tokenizer
    assert exported(store, folder, model=None) == CHATS


def test_what_holds_no_pairs_is_refused(folder: Path) -> None:
    out = folder / "pairs.jsonl"
    single = make_store(folder, [{"prompt": "Why", "completion": " so"}], "one", template="none")
    other = folder / "other"
    save_tiny(other)
    (other / "tokenizer_config.json").write_text("{}")
    pairs = make_store(folder, CHATS, "pair")
    run = written_run(folder / "mine")
    for store, model, message in (
        (single, "tiny", "holds single completions, no pairs"),
        (pairs, None, "whose tokens these are is not recorded; say --model"),
        (pairs, "other", "was made with another tokenizer than"),
        (folder / "tiny", "tiny", "is no committed store; name a round"),
        (run, "tiny", "is no committed store"),
        (folder / "absent", "tiny", "is no committed store"),
    ):
        with pytest.raises(UserError, match=message):
            trl_pairs(store, out, model=None if model is None else str(folder / model))
    with pytest.raises(UserError, match="ends in .jsonl or .parquet"):
        trl_pairs(pairs, folder / "pairs.csv", model=None)
    assert not out.exists()


def card(run: Path) -> tuple[dict[str, Any], str]:
    text = model_card(run, None).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_has_front_matter_figures_and_no_secrets(tmp_path: Path) -> None:
    run = written_run(tmp_path / "mine")
    measured(run, 0, 0.0)
    measured(run, 20, 1.0)
    front, body = card(run)
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert front["tags"] == ["rayalign", "dpo", "off-policy", "alignment"] and front["datasets"] == ["trl-lib/lib"]
    (entry,) = front["model-index"]
    metrics = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert metrics["oracle"] == 1.5 and metrics["length, tokens"] == 4
    # 1, 2 against 0, 1: three of four pairings won, one tied
    assert metrics["win rate against the reference under oracle"] == 0.875
    assert "| oracle | 1.50 | [1.50, 1.50] | 0.500 |" in body and "2 prompts × 2 samples" in body
    for text in (body, json.dumps(front)):
        assert "sk-planted" not in text and "secret place" not in text and "/srv" not in text
    assert "# mine \\| &lt;b&gt;" in body and "pairs.jsonl" in body and "(redacted)" in body
    assert "another seed" in body and "1,200 rows read, 3 bad" in body and "beta: 0.1" in body


def test_a_card_has_the_figures_of_its_own_step_or_none(tmp_path: Path) -> None:
    run = written_run(tmp_path / "mine")
    for step, score in ((5, 1.0), (10, 2.0), (25, 3.0)):
        measured(run, step, score)
        model = run / "checkpoints" / f"step_{step:06d}-a0123abcd"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    front, body = card(run / "checkpoints" / "step_000005-a0123abcd")
    metrics = {metric["name"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["oracle"] == 1.5 and "After step 5, on shop" in body
    front, body = card(run)
    assert "model-index" not in front and "| oracle |" not in body
    assert "step 20, of which nothing was measured; steps 5, 10, 25 of its run were" in body
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}")
    assert "This model was not measured; steps 5, 10, 25 of its run were" in card(run / "merged")[1]


def test_a_card_without_an_evaluation_says_so_and_a_foreign_one_stays(tmp_path: Path) -> None:
    run = written_run(tmp_path / "mine")
    front, body = card(run / "final")
    assert "model-index" not in front and "Not measured" in body
    card(run)  # written again
    readme = run / "final" / "README.md"
    readme.write_text("my own words")
    with pytest.raises(UserError, match="was not written by rayalign, and stays as it is; say --out"):
        model_card(run, None)
    assert readme.read_text() == "my own words"
    assert model_card(run, tmp_path / "card.md") == tmp_path / "card.md"
    with pytest.raises(UserError, match="belongs to no run"):
        model_card(tmp_path, None)
    (run / "final" / "config.json").unlink()
    with pytest.raises(UserError, match="holds no model: name a run that has ended"):
        model_card(run, None)


def test_a_card_says_how_the_model_is_saved(tmp_path: Path) -> None:
    run = written_run(tmp_path / "mine")
    export = {"dtype": "bfloat16", "end_tokens": ["<|im_end|>", "</s>"], "text_only": True, "lora": "model.lora: on 14"}
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "export": export}))
    _, body = card(run)
    assert "- saved in: bfloat16\n" in body and "- LoRA: on 14\n" in body
    assert "a response ends with: &lt;\\|im" in body
    assert "- Of a model for texts and images it is the part for texts alone.\n" in body


def test_the_base_is_found_through_the_runs_between(tmp_path: Path) -> None:
    first = written_run(tmp_path / "first", method={"name": "sft"})
    second = written_run(tmp_path / "second", model={"name": str(first / "final")})
    assert base_of(str(second / "final")) == (
        "Qwen/Qwen2.5-0.5B, trained with sft, trained with dpo",
        "Qwen/Qwen2.5-0.5B",
    )
    front, _ = card(second)
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert base_of(str(tmp_path / "some where")) == ("the model some where", None)


def test_the_command_line_writes_all_three(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written_run(folder / "mine")
    measured(run, 20, 1.0)
    store = make_store(folder, CHATS, "pair")
    for arguments in (
        ["alpaca_eval", str(run), "--out", str(folder / "a.json")],
        ["trl_pairs", str(store), "--model", str(folder / "tiny"), "--out", str(folder / "p.parquet")],
        ["model_card", str(run)],
    ):
        monkeypatch.setattr("sys.argv", ["rayalign", "export", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "2 replies:" in printed and "2 pairs:" in printed and "README.md" in printed
    assert len(json.loads((folder / "a.json").read_text())) == 2 and np.size(list(folder.glob("p.parquet"))) == 1
