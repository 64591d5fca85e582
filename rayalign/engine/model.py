"""Models and tokenizers in and out: Hugging Face directories, float32 parameters, no dropout, safetensors only."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rayalign.engine.attention import FLEX, attention_kind
from rayalign.engine.compiled import compile_blocks
from rayalign.engine.group_attention import GROUP_ATTENTION
from rayalign.engine.lora import LoraSpec, add_adapter
from rayalign.engine.scalar import HEAD_WEIGHT, ScalarHead, finish_head, prepare_export, refuse_scalar, set_one_output
from rayalign.errors import UserError
from rayalign.manifest import file_digest
from rayalign.paths import expanded

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model, and how it is held. Parameters are float32 always; ``dtype`` is what autocast computes in."""

    name: str
    """A directory in Hugging Face layout, or a Hub id."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    """Blocks are compiled where a gradient follows."""
    from_scratch: bool = False
    """``name`` holds a configuration and a tokenizer; the weights are drawn with ``seed``."""
    seed: int = 0
    head: ScalarHead | None = None
    """A scalar head in place of the vocabulary, drawn with ``seed`` unless ``name`` has one; None: a language model."""
    lora: LoraSpec | None = None
    """An adapter, drawn with ``seed``, that is trained instead of the weights, beside a whole ``head``."""
    adapter: Path | None = None
    """Where a trained adapter lies, to go on from."""


def compute_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype of autocast: ``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if spec.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if spec.dtype == "float32" else torch.bfloat16


def load_policy(
    spec: ModelSpec, *, device: torch.device | None = None, place: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to be trained on ``device`` (the CPU by default), and its tokenizer.

    Its weights are in ``place`` (``device`` by default); on the meta device it is a skeleton, and no file of weights is
    read.

    A reward model (``spec.head``) may start from a causal language model, which gets a new head, or from another reward
    model.

    Raises:
        UserError: there is no such model, or it lacks its configuration, safetensors weights or tokenizer, or it is of
            the other kind.
    """
    directory = model_directory(spec.name, spec.revision)
    device = device or torch.device("cpu")
    place = place or device
    config = AutoConfig.from_pretrained(directory, trust_remote_code=spec.trust_remote_code)
    _silence_noise(config)
    (set_one_output if spec.head is not None else refuse_scalar)(config, directory)
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": _attention_implementation(config, device),
        "trust_remote_code": spec.trust_remote_code,
    }
    kind = AutoModelForSequenceClassification if spec.head is not None else AutoModelForCausalLM
    if place.type == "meta":
        missing = {HEAD_WEIGHT}
        with place:
            model = kind.from_config(config, **options)
    elif spec.from_scratch:
        missing = {HEAD_WEIGHT}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = kind.from_config(config, **options)
    else:
        _require_weights(directory)
        with _without_report() if spec.head is not None else contextlib.nullcontext():
            model, found = kind.from_pretrained(
                directory, config=config, use_safetensors=True, output_loading_info=True, **options
            )
        missing = set(found["missing_keys"])
    tokenizer = load_tokenizer(directory, trust_remote_code=spec.trust_remote_code)
    if spec.head is not None:
        finish_head(model, missing=missing, seed=spec.seed, directory=directory)
        prepare_export(model, tokenizer, spec.head)
    if spec.lora is not None:
        add_adapter(model, spec.lora, seed=spec.seed, trained=spec.adapter)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.compile:
        compile_blocks(model, device)
    return model.to(place).train(), tokenizer


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside a model."""
    if not any(_matching(directory, TOKENIZER_FILES)):
        raise UserError(f"model.name: {directory} holds no tokenizer: save one there with tokenizer.save_pretrained")
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def model_directory(name: str, revision: str | None = None) -> Path:
    """The local directory of a model: ``name`` itself, or the Hub's files in Hugging Face's cache.

    Raises:
        UserError: ``name`` is neither.
    """
    path = expanded(name, field="model.name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {path} has no config.json: name a directory in Hugging Face layout")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(
            f"model.name: there is no directory {path}: name an existing one, or a Hub id such as org/model"
        )
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[*WEIGHT_FILES, *TOKENIZER_FILES, "*.json"])
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.name: {name!r} is no directory here and could not be had from the Hugging Face Hub ({reason}): "
            "check the spelling and the network, or download the model and name its directory"
        ) from error


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    stop_ids: Sequence[int] = (),
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a directory that ``from_pretrained`` loads with no conversion.

    ``stop_ids`` are the tokens that end a response; generation_config.json names them. ``state`` is what to write as
    the model's weights where the model itself holds only a part of them.
    """
    model.save_pretrained(directory, state_dict=dict(state) if state is not None else None)
    tokenizer.save_pretrained(directory)
    if stop_ids and model.can_generate():
        generation = copy.deepcopy(model.generation_config)
        generation.eos_token_id = list(stop_ids)
        generation.save_pretrained(directory)


def model_digest(directory: Path) -> str:
    """SHA-256 of a model's weights, configuration and code, as files."""
    return _files_digest(_matching(directory, WEIGHT_FILES))


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of a tokenizer's files, its chat template included."""
    return _files_digest(_matching(directory, TOKENIZER_FILES))


def is_renamed(model: PreTrainedModel) -> bool:
    """Whether files name or cut the weights in another way than the loaded model does, as with experts."""
    return bool(getattr(model, "_weight_conversions", None))


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the parameters and buffers in memory: equal where every bit is."""
    return state_digest(model.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """The same of a model's whole state, wherever it was gathered from."""

    def entry(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        content = hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}\n"

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return hashlib.sha256("".join(threads.map(entry, sorted(state.items()))).encode()).hexdigest()


def _files_digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.name} {_digest_of(path, facts.st_size, facts.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, size: int, modified: int) -> str:
    """A comparison asks for the same many gigabytes once per cell; a file that was written since is read again."""
    return file_digest(path)


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _require_weights(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"model.name: {directory} holds pickled weights, which run code when loaded: "
            "convert them with save_pretrained, which writes safetensors"
        )
    raise UserError(
        f"model.name: {directory} holds no weights (*.safetensors): name a trained model, or ask for random weights "
        "with model.from_scratch: true"
    )


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' warning that the head is new: it is meant to be, and anything else missing is an error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _silence_noise(config: PretrainedConfig) -> None:
    """Dropout and router jitter off: with them a policy differs from its own reference before the first step."""
    for name, value in config.get_text_config().to_dict().items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config.get_text_config(), name, 0.0)


def _attention_implementation(config: PretrainedConfig, device: torch.device) -> str | None:
    """Transformers' name of the implementation; None is its own choice."""
    if attention_kind(config).reach is not None and device.type == "cuda":
        return FLEX
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"  # sdpa leaves the cap out without saying so
    return GROUP_ATTENTION if attention_kind(config).reach is not None else None
