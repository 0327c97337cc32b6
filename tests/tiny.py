"""A policy that runs in milliseconds, as a directory that experiments load."""

import pathlib
from collections.abc import Sequence

import jax
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tiltjax.models import pretrained
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer

__all__ = ["save_policy"]


def save_policy(folder: pathlib.Path, words: Sequence[str], config: TransformerConfig | None = None) -> None:
    """Writes random weights and a tokenizer of whole words, ``<eos>`` and ``<pad>`` first of them."""
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    config = config or TransformerConfig(vocab_size=len(words), features=16, num_layers=1, num_heads=2, num_kv_heads=2,
                                         head_dim=8, mlp_features=32, rotary_dim=8)  # fmt: skip
    pretrained.save(Transformer(jax.random.key(0), config), folder, tokenizer=tokenizer)
