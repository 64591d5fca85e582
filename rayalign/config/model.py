"""The ``model`` block: what is trained, in which precision, from where."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rayalign.config.fields import BY_CONTENT, MAY_CHANGE, Block, ModelPath


def _layers(value: object) -> object:
    """``q_proj,v_proj`` is a list of two; PEFT's ``all-linear`` is every linear layer, which is no list here."""
    if not isinstance(value, str):
        return value
    return () if value in ("all-linear", "all") else tuple(name.strip() for name in value.split(","))


Checkpointing = Literal[False, True, "selective"]


class LoraConfig(Block):
    """Low-rank adapters instead of all weights; a reward model's head is trained whole beside them."""

    rank: int = Field(default=16, ge=1)
    """Inner dimension of an adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped while training."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_layers)] = ()
    """Names of what gets an adapter, layers or experts' fused tensors; empty, or all-linear: every linear layer of the
    blocks.

    Experts that are fused into one tensor get one only if they are named, such as gate_up_proj: it costs the memory of
    a second copy of all experts while a layer computes. Which layers have one, and which none, is said at the start.
    """


class ModelConfig(Block):
    """The policy before the first step, and the reference."""

    name: Annotated[ModelPath, BY_CONTENT]
    """A folder in Hugging Face layout, or a model on the hub."""
    revision: Annotated[str | None, BY_CONTENT] = None
    """Commit, tag or branch on the hub."""
    reference: Annotated[ModelPath | None, BY_CONTENT] = None
    """The reference policy; null: the policy before the first step."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; what is trained stays float32. auto: bfloat16 on CUDA, float32 on CPU."""
    lora: LoraConfig | None = None
    gradient_checkpointing: Annotated[Checkpointing, MAY_CHANGE] = False
    """true: compute activations again in the backward pass, for less memory and more time. With selective, results of
    matrix products and attention are kept, and the rest is computed again."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """true: torch.compile the blocks for training; the first steps compile, which takes a while."""
    trust_remote_code: Annotated[bool, MAY_CHANGE] = False
    """Run Python code that comes with the model."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights in final/; auto: that of the model's own files. Checkpoints are float32 always."""
    text_only: bool = False
    """For a model of texts and images: load, train and save only the part for texts."""
    from_scratch: bool = False
    """Initialise the weights with the run's seed: ``name`` is a folder with config.json and a tokenizer only."""

    @model_validator(mode="after")
    def _compiled_or_selective(self) -> Self:
        if self.compile and self.gradient_checkpointing == "selective":
            raise ValueError("a compiled block hides what selective keeps: write gradient_checkpointing: true or false")
        return self
