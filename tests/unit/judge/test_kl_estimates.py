"""kl_rb and k1 against the sum over every reply that a policy can give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny
from tiny_runs import CPU, save_tiny
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForCausalLM

from rayalign.config.model import ModelConfig
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.head import HeadForm, HeadInput, token_divergence
from rayalign.engine.model.pretrained import ModelSpec, save_pretrained
from rayalign.functional.kl import exact_kl
from rayalign.judge.measure import Prompt, kl_estimates
from rayalign.rollout.base import Completion

PROMPT = (17, 42, 99)
END = 3


def sharp(directory: Path, seed: int, vocabulary: int | None = None) -> Path:
    """A random model whose distributions are far from uniform."""
    tokenizer = byte_level(template=CHATML)
    model = tiny("llama", seed=seed, vocab_size=vocabulary or len(tokenizer), tie_word_embeddings=False)
    model.get_output_embeddings().weight.data.mul_(2)
    save_pretrained(model, tokenizer, directory)
    return directory


def frozen(directory: Path) -> FrozenModel:
    return FrozenModel(
        ScoringSpec(
            model=ModelSpec(config=ModelConfig(name=str(directory))), tokens_per_micro_batch=400, row_tokens=200
        ),
        CPU,
    )


@torch.no_grad()
def reply_logp(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of [END] alone, and [V, V] of every reply of two tokens; a reply that begins with END is none of them."""
    model = AutoModelForCausalLM.from_pretrained(directory).double()
    first = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(0)
    contexts = torch.tensor([[*PROMPT, token] for token in range(len(first))])
    second = model(contexts).logits[:, -1].log_softmax(1)
    joint = first[:, None] + second
    joint[END] = -torch.inf
    return first[END], joint


def enumerated(policy: Path, reference: Path) -> tuple[float, np.ndarray]:
    (end, joint), (ref_end, ref_joint) = reply_logp(policy), reply_logp(reference)
    logp = torch.cat([joint.flatten(), end[None]])
    ratio = torch.where(logp.isinf(), 0.0, logp - torch.cat([ref_joint.flatten(), ref_end[None]]))
    return float((logp.exp() * ratio).sum()), logp.exp().numpy()


def drawn(probability: np.ndarray, count: int) -> list[Completion]:
    vocabulary = round((len(probability) - 1) ** 0.5)
    found = np.random.default_rng(5).choice(len(probability), size=count, p=probability / probability.sum())
    ids = [(END,) if index == vocabulary**2 else divmod(int(index), vocabulary) for index in found]
    return [
        Completion(prompt_index=index // 20, sample_index=index % 20, token_ids=tokens, finish_reason="length",
                   behavior_token_logp=(0.0,) * len(tokens), sampler_logp=(0.0,) * len(tokens))
        for index, tokens in enumerate(ids)
    ]  # fmt: skip


def test_both_estimate_the_enumerated_kl_and_the_exact_terms_vary_less(tmp_path: Path) -> None:
    policy, reference = sharp(tmp_path / "policy", seed=0), sharp(tmp_path / "reference", seed=1)
    exact, probability = enumerated(policy, reference)
    completions = drawn(probability, 600)
    prompts = [Prompt(ids=PROMPT, prompt="")] * 30
    kl_rb, k1 = kl_estimates(frozen(policy), frozen(reference), prompts, completions)
    errors = {name: values.std(ddof=1) / len(values) ** 0.5 for name, values in (("rb", kl_rb), ("k1", k1))}
    assert exact > 0.3
    assert abs(kl_rb.mean() - exact) < 3 * errors["rb"]
    assert abs(k1.mean() - exact) < 3 * errors["k1"]
    assert errors["rb"] < 0.7 * errors["k1"]
    assert kl_rb.min() > 0 > k1.min()


def test_a_reference_has_no_kl_to_itself(tmp_path: Path) -> None:
    model = frozen(save_tiny(tmp_path / "tiny"))
    completions = drawn(np.full(300**2 + 1, 1 / (300**2 + 1)), 40)
    kl_rb, k1 = kl_estimates(model, model, [Prompt(ids=PROMPT, prompt="")] * 2, completions)
    assert not kl_rb.any() and not k1.any()


def test_heads_of_two_sizes_have_k1_only(tmp_path: Path) -> None:
    size = len(byte_level(template=CHATML))
    policy, reference = sharp(tmp_path / "policy", seed=0), sharp(tmp_path / "padded", seed=0, vocabulary=size + 6)
    completions = drawn(np.full(300**2 + 1, 1 / (300**2 + 1)), 20)
    kl_rb, k1 = kl_estimates(frozen(policy), frozen(reference), [Prompt(ids=PROMPT, prompt="")], completions)
    assert np.isnan(kl_rb).all() and np.isfinite(k1).all()


@pytest.mark.parametrize("form", [HeadForm(), HeadForm(scale=0.5, softcap=2.0)])
def test_chunks_do_not_matter(form: HeadForm) -> None:
    """One, three and all tokens at a time, against the plain definition; the reference in other chunks."""
    random = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(7, 8, generator=random) for _ in range(2))
    weight, ref_weight = (torch.randn(11, 8, generator=random) for _ in range(2))
    target = torch.arange(7)

    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        plain = form.scale * hidden @ weight.T
        return plain if form.softcap is None else form.softcap * torch.tanh(plain / form.softcap)

    def given(hidden: torch.Tensor, weight: torch.Tensor, rows: int) -> HeadInput:
        own = HeadForm(scale=form.scale, softcap=form.softcap, chunk_bytes=rows * 11 * 4)
        return HeadInput(hidden=hidden, weight=weight, bias=None, form=own)

    expected = exact_kl(logits(hidden, weight), logits(ref_hidden, ref_weight))
    for rows, ref_rows in ((1, 1), (3, 7), (7, 3), (7, 7)):
        found = token_divergence(given(hidden, weight, rows), given(ref_hidden, ref_weight, ref_rows), target)
        torch.testing.assert_close(found.kl, expected)
        torch.testing.assert_close(found.logp, logits(hidden, weight).log_softmax(1)[range(7), range(7)])
        assert found.kl.dtype == torch.float32
