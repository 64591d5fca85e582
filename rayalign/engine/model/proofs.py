"""What was tried once about a family of models is kept: one file per configuration, class and transformers version."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from rayalign.paths import expanded

VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "architectures"})
"""Keys of a configuration that say nothing about how the model computes."""


VERSION = 3
"""Raised by hand when what is tried, or what it is compared with, changes."""


def proven(
    kind: str, model: PreTrainedModel, measure: Callable[[], Any], *, device: torch.device, on: Any = None
) -> Any:
    """The result of ``measure``, plain JSON, which depends on what ``model`` is, on the device and on ``on``.

    It is kept in ``$RAYALIGN_CACHE`` (default ``~/.cache/rayalign``), in a folder for each ``kind``.
    """
    path = cache_directory() / kind / f"{key_of(model, device, on)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, path)
    return found


def key_of(model: PreTrainedModel, device: torch.device, on: Any = None) -> str:
    config: PretrainedConfig = model.config
    facts = {name: value for name, value in config.to_dict().items() if name not in VOLATILE}
    text = json.dumps([facts, on], sort_keys=True, default=str)
    context = f"{transformers.__version__} {type(model).__name__} {config._attn_implementation} {device.type} {VERSION}"
    return hashlib.sha256(f"{context}\n{text}".encode()).hexdigest()[:32]


def cache_directory() -> Path:
    return expanded(os.environ.get("RAYALIGN_CACHE", "~/.cache/rayalign"), field="RAYALIGN_CACHE")
