"""In which precision a trained model is saved: by itself, in that of the files that it began with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rayalign.engine.model.folder import FIELD, tensors_of, weight_files
from rayalign.engine.model.loading import DTYPES, PARTS, tensors_of_part

SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BY_HEADER = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The precision of the tensors of a saved model."""

    default: str = "float32"
    exact: frozenset[str] = frozenset()
    """Tensors that are float32 all the same, as they are in the files that the model began with."""

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """What a tensor is saved in; whole numbers stay what they are."""
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if name in self.exact else SAVED[self.default]

    def cast(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` as it is saved; what is one tensor under two names stays one."""
        made: dict[tuple[int, torch.dtype, torch.Size], Tensor] = {}
        found = {}
        for name, tensor in state.items():
            wanted = self.dtype_of(name, tensor)
            found[name] = made.setdefault((tensor.data_ptr(), wanted, tensor.shape), tensor.to(wanted))
        return found

    @torch.no_grad()
    def round(self, model: nn.Module) -> None:
        """Give a model in float32 the weights that it will have once it was saved and loaded again."""
        for name, weight in model.named_parameters():
            weight.copy_(weight.to(self.dtype_of(name, weight)))


EXACT = Precision()


def precision_of(directory: Path, wanted: SaveDtype, *, field: str = FIELD) -> Precision:
    """How a model that begins with the files in ``directory`` is saved.

    ``auto`` is what most of their bytes are in, and float32 for tensors that are float32 there.
    """
    if wanted != "auto":
        return Precision(default=wanted)
    tensors = tensors_of(weight_files(directory, field=field), field=field)
    weights: Counter[str] = Counter()
    for own in tensors.values():
        if own.dtype in BY_HEADER:
            weights[own.dtype] += torch.Size(own.shape).numel() * DTYPES[own.dtype].itemsize
    if not weights:
        return EXACT
    default = BY_HEADER[weights.most_common(1)[0][0]]
    if default == "float32":
        return EXACT
    whole = {name for name, own in tensors.items() if own.dtype == "F32"}
    named = (tensors_of_part(part, dict.fromkeys(whole)) for part in (None, *PARTS))  # a part may be loaded alone
    return Precision(default=default, exact=frozenset().union(*named))
