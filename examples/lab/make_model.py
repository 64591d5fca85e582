"""Write ``model/``: configuration and word-level tokenizer of the support desk's 250 176-parameter Llama, no weights.

    python -m examples.lab.make_model

Weights are initialised from the run's seed. Three heads of 32: vLLM's CPU kernels take heads of 32, 64, … only.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from .world import vocabulary

FOLDER = Path(__file__).parent / "model"
PAD, BOS, REPLY, EOS, UNKNOWN = "<pad>", "<bos>", "<reply>", "<eos>", "<unk>"
MAX_TOKENS = 256
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ bos_token + message.content }}"
    "{%- else -%}{{ '<reply>' + message.content + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<reply>' }}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, ids in the order of the special tokens and then of the alphabet."""
    words = (PAD, BOS, REPLY, EOS, UNKNOWN, *vocabulary())
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[REPLY],
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Hidden 96, 2 layers, 3 heads of 32, MLP 256, tied embeddings."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,
        dtype="float32",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_model(folder: Path) -> None:
    """Write configuration, generation configuration and tokenizer in Hugging Face layout."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_model(FOLDER)
