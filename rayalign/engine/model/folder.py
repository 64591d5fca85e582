"""A model's folder: where it is, which files hold its tensors, and digests of them. No weight is read here."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from rayalign.errors import UserError
from rayalign.paths import expanded
from rayalign.storage.cache import fetched
from rayalign.storage.manifest import TornDirectory, file_digest
from rayalign.storage.place import place_of

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
VOCABULARIES = ("tokenizer*", "vocab*", "*.model")
"""Files without one of which there is no tokenizer."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
INSIDE = ("*/config.json", "snapshots/*/config.json", "*/adapter_config.json")
"""Where the models of a folder of checkpoints lie, of Hugging Face's cache, or of an adapter that has a name."""
LFS_POINTER = b"version https://git-lfs"
FIELD = "model.name"
"""The setting that names a model, unless another is given."""
FAILURES = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    ImportError, StrictDataclassError,
)  # fmt: skip
"""What configurations and classes raise for values that they do not know, or that do not go together."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a file says of one tensor before it is read."""

    dtype: str
    """As safetensors writes it: F32, BF16, …"""
    shape: tuple[int, ...]


def model_directory(name: str, revision: str | None = None, *, field: str = FIELD) -> Path:
    """The local directory of a model or adapter: ``name`` itself, or the Hub's files in Hugging Face's cache.

    Raises:
        UserError: ``name`` is neither, or no model in Hugging Face's layout; ``field`` is the setting that it says.
    """
    if "://" in name:
        return _from_objects(name, field)
    path = expanded(name, field=field)
    if not path.is_dir():
        if path.is_file():
            raise UserError(f"{field}: {path} is a file: {_instead_of_file(path)}")
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(
                f"{field}: there is no directory {path}: name an existing one, or a Hub id such as org/model"
            )
        path = _from_hub(name, revision, field)
    elif revision is not None:
        raise UserError(f"{field}: {path} is a folder, which has no revision {revision}: remove revision")
    if not (path / CONFIG).is_file() and not is_adapter(path):
        raise UserError(f"{field}: {path} has no config.json: {_instead_of_config(path)}")
    return path


def is_adapter(directory: Path) -> bool:
    """Whether the folder holds an adapter of peft's, with or without its base beside it."""
    return (directory / ADAPTER_CONFIG).is_file()


def weight_files(directory: Path, *, field: str = FIELD) -> list[Path]:
    """The files of a model's tensors.

    Raises:
        UserError: there are none, or one that the index names is not there.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise UserError(f"{field}: {directory} {_instead_of_weights(directory, field)}")
    places = read_json(directory / INDEX, field).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{field}: {directory / INDEX} has no weight_map that names files: copy it again")
    names = sorted(set(places.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise UserError(
            f"{field}: {directory} lacks {len(absent)} of its {len(names)} files of weights: {few(absent)}; "
            "copy or download the model again"
        )
    return [directory / name for name in names]


def tensors_of(files: Iterable[Path], *, field: str = FIELD) -> dict[str, Tensor]:
    """What the headers of safetensors files say of their tensors, by name.

    Raises:
        UserError: a file is cut short, damaged, or a pointer of Git LFS.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.offset_keys():
                    part = opened.get_slice(name)
                    found[name] = Tensor(part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{field}: {file} {_damage(file, error)}") from error
    return found


def read_json(path: Path, field: str = FIELD) -> dict[str, Any]:
    """A file's JSON object; raises UserError where it holds none."""
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise UserError(f"{field}: {path} {_POINTER}")
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UserError(f"{field}: {path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{field}: {path} is no JSON object, such as {{…}}: copy it again")
    return found


def model_digest(directory: Path) -> str:
    """SHA-256 of a model's weights, configuration and code, as files; of an adapter also those of its base."""
    if not is_adapter(directory):
        return _files_digest(matching_in_folder(directory, WEIGHT_FILES))
    own = _files_digest(matching_in_folder(directory, (*WEIGHT_FILES, ADAPTER_CONFIG)))
    base = adapter_base(directory)
    return own if base == directory else hashlib.sha256(f"{own} {model_digest(base)}".encode()).hexdigest()


def weights_directory(directory: Path, *, field: str = FIELD) -> Path:
    """The folder of a model itself, or of the base of an adapter; raises as :func:`adapter_base` does."""
    return adapter_base(directory, field=field) if is_adapter(directory) else directory


def adapter_base(directory: Path, *, field: str = FIELD) -> Path:
    """The folder of the model that an adapter belongs to: its own where that holds a model, else what it names.

    A relative name is looked for beside the adapter, then below the current folder, then on the Hub.

    Raises:
        UserError: there is no such model.
    """
    if (directory / CONFIG).is_file():
        return directory
    facts = read_json(directory / ADAPTER_CONFIG, field)
    name = facts.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{field}: {directory / ADAPTER_CONFIG} does not say base_model_name_or_path: write it there")
    beside = directory / expanded(name, field=field)
    try:
        place = beside if beside.is_dir() else expanded(name, field=field)
        is_local = place.is_dir()
        base = model_directory(
            str(place) if is_local else name, None if is_local else facts.get("revision"), field=field
        )
    except UserError as error:
        raise UserError(f"{error}. {directory} is an adapter, and its {ADAPTER_CONFIG} names that base") from error
    if not (base / CONFIG).is_file():
        raise UserError(
            f"{field}: {directory} is an adapter whose base, {base}, is an adapter too: merge that one first, with "
            "peft's merge_and_unload"
        )
    return base


def tokenizer_directory(directory: Path, *, field: str = FIELD) -> Path:
    """Where a model's tokenizer lies: beside it, or beside an adapter's base.

    Raises:
        UserError: there is none.
    """
    if any(matching_in_folder(directory, VOCABULARIES)):
        return directory
    base = weights_directory(directory, field=field)
    if any(matching_in_folder(base, VOCABULARIES)):
        return base
    raise UserError(f"{field}: {base} holds no tokenizer: save one there with tokenizer.save_pretrained")


def refuse_pointers(directory: Path, *, field: str = FIELD) -> None:
    """Raise UserError where one of a tokenizer's files is a pointer of Git LFS."""
    for path in matching_in_folder(directory, TOKENIZER_FILES):
        if _is_pointer(path):
            raise UserError(f"{field}: {path} {_POINTER}")


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of a tokenizer's files, its chat template included."""
    return _files_digest(matching_in_folder(tokenizer_directory(directory), TOKENIZER_FILES))


def matching_in_folder(directory: Path, patterns: Sequence[str]) -> list[Path]:
    found = chain.from_iterable(directory.glob(pattern) for pattern in patterns)
    return sorted({path for path in found if path.is_file()})


def few(names: Iterable[object], most: int = 3) -> str:
    """The first few of them, for a sentence."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


def _from_objects(name: str, field: str) -> Path:
    """This node's copy of what a run wrote to an object store."""
    try:
        return fetched(place_of(name, field=field))
    except TornDirectory as error:
        raise UserError(
            f"{field}: {error}: name a folder that rayalign wrote there, such as a run's final/ or a checkpoint; copy "
            "any other model to a disk"
        ) from error


def _from_hub(name: str, revision: str | None, field: str) -> Path:
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[*WEIGHT_FILES, *TOKENIZER_FILES, "*.json"])
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{field}: {name!r} is no directory here and could not be fetched from the Hugging Face Hub ({reason}): "
            "check the spelling and the network, or download the model and name its directory"
        ) from error


def _instead_of_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return _GGUF
    return "name the directory that holds it, in Hugging Face layout"


def _instead_of_config(directory: Path) -> str:
    if any(directory.glob("*.gguf")):
        return f"it holds GGUF files. {_GGUF}"
    if any(directory.glob("consolidated*")) or (directory / "params.json").is_file():
        return "it holds weights as their authors trained them; name the model in Hugging Face layout"
    inside = matching_in_folder(directory, INSIDE)
    if inside:
        return f"name the model inside it, such as {inside[-1].parent}"
    return "name a directory in Hugging Face layout"


def _instead_of_weights(directory: Path, field: str) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        return (
            "holds pickled weights, which run code when loaded: convert them with save_pretrained, which writes "
            "safetensors"
        )
    if any(directory.glob("*.gguf")):
        return f"holds GGUF files. {_GGUF}"
    others = [path.name for path in sorted(directory.glob("*.safetensors"))]
    if others:
        return f"holds {few(others)}, but neither {WEIGHTS} nor {INDEX}, by which a model's weights are found"
    scratch = ", or ask for random weights with model.from_scratch: true" if field == FIELD else ""
    return f"holds no weights (*.safetensors): name a trained model{scratch}"


_POINTER = "is a pointer of Git LFS, not the file itself: run git lfs pull in that folder, or download the model again"
_GGUF = "GGUF is llama.cpp's format of quantised weights: name the model that it was made from"


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _damage(file: Path, error: Exception) -> str:
    if _is_pointer(file):
        return _POINTER
    return f"is cut short or damaged ({error}): copy or download it again"


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
