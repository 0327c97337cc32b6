"""A tiny policy and ragged candidates that several tests train on."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.data import candidates as batches
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer

CONFIG = TransformerConfig(vocab_size=32, features=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
                           mlp_features=32, rotary_dim=8)  # fmt: skip


@functools.cache
def tiny_model(seed=0):
    return Transformer(jax.random.key(seed), CONFIG)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bigram:
    """A policy that sees the token before: where the test is about what surrounds a model, and compiles much less."""

    embedding: jax.Array
    """Logits by the token before; of this name, a mesh splits it over tensor and fsdp."""

    def score(self, prompt, prompt_mask, completion, *, temperature=1.0, support=None):
        first = jnp.broadcast_to(prompt[:, :1, None], (*completion.shape[:2], 1))
        before = jnp.concatenate([first, completion[..., :-1]], axis=-1)
        return SimpleNamespace(logp=jax.nn.log_softmax(self.embedding / temperature)[before, completion])


def bigram(seed=0):
    return Bigram(jnp.asarray(np.random.default_rng(seed).normal(size=(32, 32)), jnp.float32))


def ragged_candidates(num_prompts=16, num_candidates=2, seed=0):
    """Prompts of 1 to 6 tokens, completions of 1 to 7: token counts differ between any two parts of the batch."""
    rng = np.random.default_rng(seed)

    def tokens(longest):
        return rng.integers(1, 32, rng.integers(1, longest + 1)).tolist()

    prompts = [tokens(6) for _ in range(num_prompts)]
    completions = [[tokens(7) for _ in range(num_candidates)] for _ in prompts]
    batch = batches.from_tokens(prompts, completions, pad_id=0, prompt_length=6, completion_length=7)
    shape = (num_prompts, num_candidates)
    return dataclasses.replace(
        batch,
        reward=rng.normal(size=shape).astype(np.float32),
        ref_logp=rng.normal(-9, 1, shape).astype(np.float32),
        where=None,
    )
