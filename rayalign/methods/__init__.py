"""Every objective, by name, and its arithmetic as plain functions. Importing this package does not import torch."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayalign.errors import UserError
from rayalign.imports import load_object

if TYPE_CHECKING:
    from rayalign.methods._clipped import ppo_policy_loss
    from rayalign.methods.composition import compose
    from rayalign.methods.dpo import dpo_loss
    from rayalign.methods.dpo_rw import dpo_rw_loss
    from rayalign.methods.exo import exo_loss, exo_pref_targets, exo_reward_targets
    from rayalign.methods.grpo import grpo_loss
    from rayalign.methods.hinge import hinge_loss
    from rayalign.methods.ipo import ipo_loss
    from rayalign.methods.kto import kto_loss
    from rayalign.methods.method import Method, MethodConfig, Need, Statistics, Term, margin
    from rayalign.methods.mpo import mpo_loss
    from rayalign.methods.orpo import orpo_loss
    from rayalign.methods.ppo import ppo_value_loss
    from rayalign.methods.reinforce import reinforce_loss
    from rayalign.methods.reward_model import ranking_loss, reward_model_loss
    from rayalign.methods.robust_dpo import robust_dpo_loss
    from rayalign.methods.sft import sft_loss
    from rayalign.methods.simpo import simpo_loss
    from rayalign.methods.slic import slic_loss
    from rayalign.methods.weighting import WPOWeighting
    from rayalign.methods.wpo import wpo_pair_weight, wpo_unpaired_weight, wpo_weight

METHODS: Mapping[str, str] = {
    "dpo": "rayalign.methods.dpo:METHOD",
    "dpo_rw": "rayalign.methods.dpo_rw:METHOD",
    "exo_pref": "rayalign.methods.exo:EXO_PREF",
    "exo_rw": "rayalign.methods.exo:EXO_RW",
    "grpo": "rayalign.methods.grpo:METHOD",
    "hinge": "rayalign.methods.hinge:METHOD",
    "ipo": "rayalign.methods.ipo:METHOD",
    "kto": "rayalign.methods.kto:METHOD",
    "mpo": "rayalign.methods.mpo:METHOD",
    "orpo": "rayalign.methods.orpo:METHOD",
    "ppo": "rayalign.methods.ppo:METHOD",
    "reinforce_pp": "rayalign.methods.reinforce_pp:METHOD",
    "reward_model": "rayalign.methods.reward_model:METHOD",
    "rloo": "rayalign.methods.rloo:METHOD",
    "robust_dpo": "rayalign.methods.robust_dpo:METHOD",
    "sft": "rayalign.methods.sft:METHOD",
    "simpo": "rayalign.methods.simpo:METHOD",
    "slic": "rayalign.methods.slic:METHOD",
    "wpo": "rayalign.methods.wpo:METHOD",
}
"""Name → "module:attribute" of its :class:`Method`. A user's own method needs no entry: its name is that string."""

_MODULE_OF: Mapping[str, str] = {
    "Method": "method",
    "MethodConfig": "method",
    "Need": "method",
    "Statistics": "method",
    "Term": "method",
    "WPOWeighting": "weighting",
    "compose": "composition",
    "dpo_loss": "dpo",
    "dpo_rw_loss": "dpo_rw",
    "exo_loss": "exo",
    "exo_pref_targets": "exo",
    "exo_reward_targets": "exo",
    "grpo_loss": "grpo",
    "hinge_loss": "hinge",
    "ipo_loss": "ipo",
    "kto_loss": "kto",
    "margin": "method",
    "mpo_loss": "mpo",
    "orpo_loss": "orpo",
    "ppo_policy_loss": "_clipped",
    "ppo_value_loss": "ppo",
    "ranking_loss": "reward_model",
    "reinforce_loss": "reinforce",
    "reward_model_loss": "reward_model",
    "robust_dpo_loss": "robust_dpo",
    "sft_loss": "sft",
    "simpo_loss": "simpo",
    "slic_loss": "slic",
    "wpo_pair_weight": "wpo",
    "wpo_unpaired_weight": "wpo",
    "wpo_weight": "wpo",
}

__all__ = [
    "METHODS",
    "Method",
    "MethodConfig",
    "Need",
    "Statistics",
    "Term",
    "WPOWeighting",
    "compose",
    "dpo_loss",
    "dpo_rw_loss",
    "exo_loss",
    "exo_pref_targets",
    "exo_reward_targets",
    "grpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "margin",
    "mpo_loss",
    "orpo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reinforce_loss",
    "resolve",
    "reward_model_loss",
    "robust_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "wpo_pair_weight",
    "wpo_unpaired_weight",
    "wpo_weight",
]


def resolve(name: str) -> Method:
    """The method called ``name``, or the one at ``"my_pkg.losses:METHOD"``.

    Raises:
        UserError: nothing has that name (the nearest names are in the message), or it is no method.
    """
    from rayalign.methods.method import Method, record_problem

    if name not in METHODS and ":" not in name:
        plain = name.lower().replace("-", "_")
        near = [plain] if plain in METHODS else difflib.get_close_matches(plain, METHODS, n=3) or sorted(METHODS)
        raise UserError(
            f"no method is called {name!r}; did you mean {' or '.join(near)}? Your own is my_pkg.losses:METHOD"
        )
    if name.partition(":")[0].endswith(".py"):
        # Workers receive a loss as the name of its module and of the function in it; a lone file has no such name.
        raise UserError(f"{name!r}: a method is named by its module, not by its file: write my_pkg.losses:METHOD")
    method = load_object(METHODS.get(name, name))
    if not isinstance(method, Method):
        raise UserError(f"{name!r} is a {type(method).__name__}, not a rayalign.methods.Method")
    problem = "" if name in METHODS else record_problem(method)
    if problem:
        raise UserError(f"{name!r}: {problem}")
    return method


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
