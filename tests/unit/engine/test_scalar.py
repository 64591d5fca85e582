"""A scalar head on packed rows says what Hugging Face's classifier says of each rendered conversation alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_kinds import kind_for
from random_groups import random_groups
from tiny_models import FAMILIES, VOCABULARY, tiny, weights_digest
from tiny_runs import Scenario, objective, run, same_optimizer, save_tiny, store, train_alone, train_spec
from tiny_tokenizers import CHATML, NO_END, THINKING, byte_level
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import make_chat
from rayalign.data.group import Candidate, Group
from rayalign.data.micro_batches import StepCounts
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.data.schema import Example
from rayalign.data.tokenize import to_group
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.metrics import read_metrics
from rayalign.engine.model.attention import CONCATENATED_ONLY, first_kind
from rayalign.engine.model.forward import Policy, ScalarModel, last_positions, root_module
from rayalign.engine.model.parity import choose_attention
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.engine.model.scalar import PADDING, ScalarHead, head_written_as, prepare_export
from rayalign.engine.objective import Objective
from rayalign.errors import UserError
from rayalign.judge import make_scorer
from rayalign.methods import Statistics, resolve
from rayalign.types import PackedBatch

CPU = torch.device("cpu")
K = 4
SCORE = frozenset({"score"})
GROUPS = random_groups((1, 2, 4, 2), vocabulary=VOCABULARY, prompt_tokens=(4, 10))
TALKS = [
    ("What is it?", ("The sky.", "It is blue, of course: the sky is blue.")),
    ("Why?", ("So", "because of the answer to the question")),
]
UNCLASSIFIED = {"granite", "llama4", "mamba"}


def classifier(name: str, *, seed: int = 0) -> PreTrainedModel:
    """The family's classifier with one output, random everywhere."""
    config = copy.deepcopy(tiny(name).config)
    config.num_labels, config.pad_token_id = 1, None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model.eval()


def packed(
    groups: Sequence[Group] = GROUPS, *, layout: Layout = "packed", row_tokens: int | None = 64, dummy: bool = False
) -> PackedBatch:
    positions = range(len(groups))
    return pack(
        groups, positions=positions, num_candidates=K, pad_id=0, row_tokens=row_tokens, layout=layout, dummy=dummy
    )


def alone(model: PreTrainedModel, groups: Sequence[Group] = GROUPS) -> Tensor:
    """Hugging Face's own logit of each prompt with each candidate."""
    ids = [torch.tensor([[*group.prompt_ids, *own.ids]]) for group in groups for own in group.candidates]
    return torch.stack([model(input_ids=sequence).logits[0, 0] for sequence in ids])


def weighted(scores: Tensor) -> Tensor:
    return scores @ torch.randn(len(scores), generator=torch.Generator().manual_seed(3))


def gradients(model: PreTrainedModel, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNCLASSIFIED])
def test_scores_and_gradients_are_hugging_faces_in_every_layout(name: str) -> None:
    model = classifier(name)
    expected = alone(model)
    want = gradients(model, weighted(expected))
    layouts: list[tuple[Layout, int | None]] = [("concatenated", None)]
    if name != "bloom":
        layouts += [("packed", 64), ("packed", None)]
    for layout, row_tokens in layouts:
        batch = packed(layout=layout, row_tokens=row_tokens)
        scores = ScalarModel(model, attention=kind_for(model, layout))(batch, needs=SCORE)
        found = scores.score[batch.candidate_mask]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        got = gradients(model, weighted(found))
        assert got.keys() == want.keys()
        for parameter, gradient in want.items():
            assert (got[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, parameter


@torch.no_grad()
def test_a_value_stands_before_its_token_and_a_score_after_the_last() -> None:
    model, batch = classifier("llama"), packed()
    scores = ScalarModel(model)(batch, needs=frozenset({"value", "score"}))
    expected, last = [], []
    for group in GROUPS:
        for candidate in group.candidates:
            ids = torch.tensor([[*group.prompt_ids, *candidate.ids]])
            every = model.score(model.model(input_ids=ids).last_hidden_state)[0, :, 0]
            expected.append(every[len(group.prompt_ids) - 1 : -1])
            last.append(every[-1])
    torch.testing.assert_close(scores.value, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.score[batch.candidate_mask], torch.stack(last), atol=1e-5, rtol=1e-5)
    assert scores.token_logp.isnan().all() and scores.logp.isnan().all()
    plain = ScalarModel(model)(batch)
    assert plain.value is None and plain.score is None


def test_the_last_position_is_the_last_token_predicted_or_not() -> None:
    batch = packed()
    flat = batch.input_ids.flatten()
    for b, group in enumerate(GROUPS):
        for k, candidate in enumerate(group.candidates):
            position = last_positions(batch)[b, k]
            assert flat[position] == candidate.ids[-1]
            assert batch.position_ids.flatten()[position] == len(group.prompt_ids) + len(candidate.ids) - 1
            assert (batch.group_ids.flatten()[position], batch.branch_ids.flatten()[position]) == (b, k + 1)
    unpredicted = [
        replace(group, candidates=tuple(seen_at_the_end(candidate) for candidate in group.candidates))
        for group in random_groups((2,), vocabulary=VOCABULARY, candidate_tokens=(3, 5))
    ]
    batch = packed(unpredicted)
    assert [int(batch.input_ids.flatten()[p]) for p in last_positions(batch)[0, :2]] == [
        candidate.ids[-1] for candidate in unpredicted[0].candidates
    ]


def seen_at_the_end(candidate: Candidate) -> Candidate:
    mask = candidate.mask.copy()
    mask[-1] = False
    return replace(candidate, mask=mask)


def test_a_dummy_batch_gives_every_parameter_a_zero_gradient() -> None:
    model, method = classifier("llama"), resolve("reward_model")
    group = replace(GROUPS[1], per_candidate={"rank": torch.tensor([0.0, 1.0]).numpy()})
    scored = Objective(stream="train", method=method, config=method.config()).score(
        ScalarModel(model), packed([group], dummy=True)
    )
    (term,) = method.loss(scored, method.config(), Statistics())
    got = gradients(model, torch.where(term.mask, term.per_item, 0).sum())
    assert got.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in got.values())


@torch.no_grad()
def test_the_head_is_float32_whatever_autocast_says() -> None:
    model, batch = classifier("llama"), packed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = ScalarModel(model)(batch, needs=SCORE)
    assert scores.score.dtype == torch.float32
    expected = ScalarModel(model)(batch, needs=SCORE).score
    assert (scores.score - expected).abs().max() < 0.1


def test_the_reward_models_vector_through_the_engine() -> None:
    """V32: a head that gives six answers the vector's rewards, so that loss and its slopes are the vector's."""
    path = Path(__file__).parents[2] / "fixtures" / "vectors.json"
    vector = next(item for item in json.loads(path.read_text())["vectors"] if item["id"] == "V32")
    inputs, expected = vector["inputs"], vector["expected"]
    rewards = torch.tensor(list(zip(inputs["reward_chosen"], inputs["reward_rejected"], strict=True)))
    rank = {"rank": torch.tensor([0.0, 1.0]).numpy()}
    plain = [replace(group, per_candidate=rank) for group in random_groups((2, 2, 2), vocabulary=VOCABULARY)]
    margins = [torch.tensor([margin, math.nan]).numpy() for margin in inputs["margin"]]
    wide = [replace(group, per_candidate={**rank, "margin": own}) for group, own in zip(plain, margins, strict=True)]
    model = classifier("llama").double()
    policy, method = ScalarModel(model), resolve("reward_model")
    with torch.no_grad():
        states = torch.stack([state_at_end(model, group, k) for group in plain for k in range(2)])
        solved = torch.linalg.lstsq(states, rewards.double().flatten()[:, None]).solution
        model.score.weight.copy_(solved.T)
    counts = StepCounts(pairs=3, groups=3, sequences=6, tokens=1)
    for groups, center, suffix in ((plain, 0.0, ""), (wide, vector["params"]["center_coef"], "_margin_centered")):
        main = Objective(stream="train", method=method, config=method.config(center=center))
        scored = main.score(policy, pack(groups, positions=range(3), num_candidates=2, pad_id=0, row_tokens=64))
        scored.scores.score.retain_grad()
        total, _ = main.loss(scored, Statistics(), counts)
        total.backward()
        assert total.item() == pytest.approx(expected[f"loss{suffix}"], abs=1e-7)
        slope = torch.tensor(expected[f"grad_chosen{suffix}"], dtype=torch.float64)
        torch.testing.assert_close(scored.scores.score.grad[:, 0], slope, atol=1e-7, rtol=0)


def state_at_end(model: PreTrainedModel, group: Group, k: int) -> Tensor:
    ids = torch.tensor([[*group.prompt_ids, *group.candidates[k].ids]])
    return model.model(input_ids=ids).last_hidden_state[0, -1]


# Loading and what is written


def spec(directory: Path, **fields: Any) -> ModelSpec:
    config = ModelConfig(name=str(directory), from_scratch=fields.pop("from_scratch", False))
    return ModelSpec(config=config, **{"head": ScalarHead(), **fields})


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "causal")


def test_a_new_head_is_normal_and_depends_on_the_seed_only(causal: Path) -> None:
    before = torch.get_rng_state()
    heads = [load_policy(spec(causal, seed=seed))[0].score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 32)
    drawn = torch.randn(1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(heads[0].detach(), (drawn / 33**0.5).float())
    scratch = load_policy(spec(causal, from_scratch=True, seed=1))[0]
    assert torch.equal(scratch.score.weight, heads[2])
    assert len(before) == len(torch.get_rng_state())


def test_the_backbone_is_the_language_models(causal: Path) -> None:
    policy, reward = load_policy(ModelSpec(config=ModelConfig(name=str(causal))))[0], load_policy(spec(causal))[0]
    assert isinstance(root_module(reward, first_kind(reward.config, reward.device)), ScalarModel)
    assert isinstance(root_module(policy, first_kind(policy.config, policy.device)), Policy)
    theirs, ours = policy.model.state_dict(), reward.model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_saved_head_is_loaded_again_whatever_the_seed(causal: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(spec(causal, seed=5))
    save_pretrained(model, tokenizer, tmp_path / "rm", stop_ids=(4,))
    again, _ = load_policy(spec(tmp_path / "rm", seed=9))
    assert weights_digest(again) == weights_digest(model)
    save_pretrained(*load_policy(spec(tmp_path / "rm", seed=9)), tmp_path / "again", stop_ids=(4,))
    for path in (tmp_path / "rm").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_wrong_kind_of_model_is_named(causal: Path, tmp_path: Path) -> None:
    save_pretrained(*load_policy(spec(causal)), tmp_path / "rm")
    with pytest.raises(UserError, match="has no LM head; name a causal language model"):
        load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path / "rm"))))
    config = copy.deepcopy(tiny("llama", vocab_size=330).config)
    config.num_labels = 3
    save_pretrained(AutoModelForSequenceClassification.from_config(config), byte_level(), tmp_path / "three")
    with pytest.raises(UserError, match="three has 3 outputs; a reward model has one"):
        load_policy(spec(tmp_path / "three"))
    save_tiny(tmp_path / "granite", "granite")
    with pytest.raises(UserError, match="has no AutoModelForSequenceClassification for granite"):
        load_policy(spec(tmp_path / "granite"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", [CHATML, NO_END], ids=["a line end after the end", "no end"])
def test_hugging_face_scores_rendered_conversations_alike(template: str, side: str, tmp_path: Path) -> None:
    """With the exported model, tokenizer and template alone; our own scorer, too."""
    tokenizer = byte_level(template=template)
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "causal")
    save_pretrained(*load_policy(spec(tmp_path / "causal")), tmp_path / "rm")
    chat = make_chat(tokenizer)
    groups = [to_group(Example(format="ranked", prompt=p, candidates=c), chat, TokenBudget()) for p, c in TALKS]
    scoring = ScoringSpec(model=spec(tmp_path / "rm"), tokens_per_micro_batch=512, row_tokens=128)
    ours = [float(score) for own in FrozenModel(scoring, CPU).scores(groups) for score in own]

    theirs = AutoTokenizer.from_pretrained(tmp_path / "rm", padding_side=side)
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        for prompt, replies in TALKS
        for reply in replies
    ]
    texts = [theirs.apply_chat_template(talk, tokenize=False) for talk in talks]
    assert all(text.endswith(chat.end_text) for text in texts)
    batch = theirs(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert model.config.pad_token_id == theirs.pad_token_id is not None
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(found, torch.tensor(ours), atol=1e-5, rtol=0)
    scorer = make_scorer("reward_model", model=str(tmp_path / "rm"))
    prompts = [talk[0]["content"] for talk in talks]
    assert scorer.score(prompts, [talk[1]["content"] for talk in talks]) == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("template", [None, THINKING], ids=["raw text", "not prefix-stable"])
def test_our_scorer_reads_what_training_read_where_a_template_cannot_say_it(
    template: str | None, tmp_path: Path
) -> None:
    tokenizer = byte_level(template=template, bos="<s>")
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "causal")
    save_pretrained(*load_policy(spec(tmp_path / "causal")), tmp_path / "rm")
    chat = make_chat(tokenizer)
    groups = [to_group(Example(format="ranked", prompt=p, candidates=c), chat, TokenBudget()) for p, c in TALKS]
    scoring = ScoringSpec(model=spec(tmp_path / "rm"), tokens_per_micro_batch=512, row_tokens=128)
    ours = [float(score) for own in FrozenModel(scoring, CPU).scores(groups) for score in own]
    scorer = make_scorer("reward_model", model=str(tmp_path / "rm"))
    prompts = [prompt for prompt, replies in TALKS for _ in replies]
    assert scorer.score(prompts, [reply for _, replies in TALKS for reply in replies]) == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_padding_that_would_hide_the_end_token_is_replaced(pad: str | None, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = pad
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path)
    model, found = load_policy(spec(tmp_path))
    assert found.pad_token == PADDING and model.config.pad_token_id == found.pad_token_id == len(tokenizer)
    embedding = model.get_input_embeddings().weight
    assert embedding.shape[0] == len(tokenizer) + 1 == model.config.vocab_size and not embedding[-1].any()
    rows = len(tokenizer)
    prepare_export(model, found, ScalarHead())
    assert len(model.get_input_embeddings().weight) == rows + 1


def test_what_an_exported_model_says_of_its_conversations(tmp_path: Path) -> None:
    tokenizer = byte_level(template=CHATML)
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path)
    raw = load_policy(spec(tmp_path, head=ScalarHead(template="none", stop="</s>")))
    assert head_written_as(raw[0].config) == ScalarHead(template="none", stop="</s>")
    assert raw[1].chat_template is None
    other = load_policy(spec(tmp_path, head=ScalarHead(stop="</s>")))[1]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert other.apply_chat_template(turns, tokenize=False).endswith("assistant\nb</s>")
    assert other.apply_chat_template(turns[:1], tokenize=False).endswith("a<|im_end|>\n")
    opened = other.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert opened.endswith("b<|im_end|>\n<|im_start|>assistant\n")
    assert head_written_as(tiny("llama").config) is None


def test_parity_is_proven_for_the_head_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))
    assert choose_attention(classifier("qwen3_windowed")).layout == "packed"
    assert choose_attention(classifier("bloom")) == CONCATENATED_ONLY
    assert len(list((tmp_path / "parity").iterdir())) == 2


# Learning


def separable(count: int) -> list[Group]:
    """Pairs in which the chosen answer holds more small token ids."""
    groups = random_groups([2] * count, vocabulary=300, candidate_tokens=(6, 12), seed=7)
    return [
        replace(
            group,
            candidates=tuple(
                replace(candidate, ids=(candidate.ids % 20 + (20 if k == 0 else 60)).astype(candidate.ids.dtype))
                for k, candidate in enumerate(group.candidates)
            ),
            per_candidate={"rank": torch.tensor([0.0, 1.0]).numpy()},
        )
        for group in groups
    ]


def test_it_learns_a_separable_world(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", initializer_range=0.05)
    stream = store(tmp_path / "pairs", separable(48), groups_per_step=12)
    scenario = Scenario(model=model, streams=(stream,), objectives=(objective("reward_model"),), lr=3e-3, steps=12)
    found = run(scenario)
    assert found.loss[-1] < 0.3 < found.loss[0]
    assert found.metrics[0]["rewards/accuracies"] < 0.9 < found.metrics[-1]["rewards/accuracies"]


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost right after the third step, that is one step after a checkpoint: nothing differs in the end."""
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level(template=CHATML, eos="<|im_end|>")
    tokenizer.pad_token = "<|im_end|>"  # so that a row is added to the embedding, once
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    stream = store(tmp_path / "pairs", separable(16), groups_per_step=4)
    scenario = Scenario(
        model=tmp_path / "model", streams=(stream,), objectives=(objective("reward_model", center=0.01),), steps=6
    )
    identity = {"method": "reward_model"}
    whole = train_spec(tmp_path / "whole", scenario, identity=identity)
    train_alone(whole, scenario)
    lost = train_spec(tmp_path / "lost", scenario, identity=identity)

    def interrupt(row: Any) -> None:
        if row["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_alone(lost, scenario, on_step=interrupt)
    seen: list[int] = []
    train_alone(lost, scenario, on_step=lambda row: seen.append(row["step"]))
    assert seen == [3, 4, 5, 6]
    names = {path.name for path in (tmp_path / "whole" / "final").iterdir()}
    assert {"model.safetensors", "config.json", "chat_template.jinja"} <= names
    for name in names:
        assert (tmp_path / "lost" / "final" / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()
    assert same_optimizer(*(next((tmp_path / run / "checkpoints").glob("step_000006-*")) for run in ("whole", "lost")))
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "lost")]
    clocks = {"seconds", "seconds_waiting_for_data", "seconds_saving"}
    kept = [[{name: value for name, value in row.items() if name not in clocks} for row in each] for each in rows]
    assert kept[0] == kept[1] and len(kept[0]) == 6
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "lost" / "final")


def test_one_step_is_plain_hugging_faces(tmp_path: Path) -> None:
    """Loss and gradient of all pairs of each ranking, written a second time on the classifier itself."""
    model = classifier("llama")
    ranks = [[1.0, 0.0], [2.0, 0.0, 2.0, 1.0], [0.0, 1.0]]
    groups = [
        replace(group, per_candidate={"rank": torch.tensor(rank).numpy()})
        for group, rank in zip(GROUPS[1:], ranks, strict=True)
    ]
    method = resolve("reward_model")
    main = Objective(stream="train", method=method, config=method.config(center=0.01))
    counts = StepCounts(pairs=3, groups=3, sequences=8, tokens=1)
    total, _ = main.loss(main.score(ScalarModel(model), packed(groups)), Statistics(), counts)
    got = gradients(model, total)

    losses = []
    for group, rank in zip(groups, ranks, strict=True):
        scores = alone(model, [group])
        pairs = [(i, j) for i in range(len(rank)) for j in range(len(rank)) if rank[i] < rank[j]]
        own = [-F.logsigmoid(scores[i] - scores[j]) + 0.01 * (scores[i] + scores[j]) ** 2 for i, j in pairs]
        losses.append(torch.stack(own).mean())
    plain = torch.stack(losses).mean()
    assert total.item() == pytest.approx(plain.item(), abs=1e-6)
    for name, gradient in gradients(model, plain).items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)
