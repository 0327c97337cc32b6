"""The worlds of `experiments.generation_verification_gap`: tasks on binary tokens, and one small network for all roles.

A task gives prompts and a gold reward for every completion of a prompt. The network reads (prompt, prefix, what of the
prompt is still to be decided, length of the prefix) and has two heads: log-odds of the next token, and a scalar reward
that is read off complete completions. With at most a few hundred completions per prompt all laws are exact.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.exact.tree import completions, sequence_logp
from tiltjax.types import Array

__all__ = [
    "SETS",
    "Task",
    "completion_logp",
    "completion_reward",
    "init_network",
    "parse_tasks",
    "tree_logp",
    "tree_reward",
]

LINEAR_FEATURES = 6
REWARD_SCALE = 4.0  # Of subset-sum: a miss of 1 costs 4.

SETS = {
    "core": "subset8:2000,subset1:2000,lookup8p16:4000",
    "horizon": "subset1:2000,subset2:2000,subset4:2000,subset8:2000",
    "data": "subset8:500,subset8:2000,subset8:8000",
    "controls": "linear8:2000,lookup8p16:4000,lookup8p64:2000,subsetbits8:2000",
}
"""Names for lists of tasks; "all" is the union."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A family of prompts, its gold reward, and how many preference pairs are drawn.

    Attributes:
      kind: "subset" (choose weights that sum to a target), "subsetbits" (the same, the prefix shown to the network as
        bits and not as the weights they choose), "linear" (every token has a value that the prompt gives) or "lookup"
        (match a hidden completion, one per prompt).
      horizon: Tokens per completion, H.
      num_pairs: Preference pairs to learn from.
      num_prompts: Distinct prompts of a lookup task; 0 for the others, which never run out.
    """

    kind: str
    horizon: int
    num_pairs: int
    num_prompts: int = 0

    @property
    def name(self) -> str:
        """Without the number of pairs."""
        return f"{self.kind}{self.horizon}" + (f"p{self.num_prompts}" if self.num_prompts else "")

    @property
    def label(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}:{self.num_pairs}"

    def secret(self, key: Array) -> Array:
        """What stays the same for all prompts of one world."""
        if self.kind == "linear":
            return jax.random.normal(key, (LINEAR_FEATURES, self.horizon)) / jnp.sqrt(LINEAR_FEATURES)
        if self.kind == "lookup":
            return jax.random.bernoulli(key, shape=(self.num_prompts, self.horizon)).astype(jnp.float32)
        return jnp.zeros(())

    def prompts(self, key: Array, n: int) -> Array:
        """Draws ``n`` prompts ``[n, P]``."""
        if self.kind == "linear":
            return jax.random.normal(key, (n, LINEAR_FEATURES))
        if self.kind == "lookup":
            return jax.nn.one_hot(jax.random.randint(key, (n,), 0, self.num_prompts), self.num_prompts)
        weigh, aim = jax.random.split(key)
        w = jax.random.uniform(weigh, (n, self.horizon), minval=0.2, maxval=1.0)
        share = jax.random.uniform(aim, (n, 1), minval=0.1, maxval=0.9)
        return jnp.concatenate([w, share * jnp.sum(w, axis=-1, keepdims=True)], axis=-1)

    def reward(self, secret: Array, prompt: Array) -> Array:
        """Gold reward of every completion, ``[n, K]``."""
        signs = _signs(self.horizon)
        if self.kind == "linear":
            return prompt @ secret @ signs.T
        if self.kind == "lookup":
            return self.horizon / 2 + prompt @ (2 * secret - 1) @ signs.T / 2
        return -REWARD_SCALE * jnp.abs(prompt[:, :-1] @ (signs.T + 1) / 2 - prompt[:, -1:])

    def context(self, prompt: Array, lengths: np.ndarray) -> Array:
        """What the network sees of the prompt after prefixes of the given lengths, ``[n, L, C]``."""
        n, L = prompt.shape[0], len(lengths)
        parts = [jnp.broadcast_to(prompt[:, None], (n, L, prompt.shape[1]))]
        if self.kind in ("subset", "subsetbits"):  # The weights that are still to be decided.
            to_come = np.arange(self.horizon)[None] >= lengths[:, None]
            parts.append(jnp.where(to_come[None], prompt[:, None, :-1], 0))
        length = np.eye(self.horizon + 1, dtype=np.float32)[lengths]
        parts.append(jnp.broadcast_to(length[None], (n, *length.shape)))
        return jnp.concatenate(parts, axis=-1)

    def prefix(self, prompt: Array, signs: Array) -> Array:
        """What the network sees of prefixes ``[n, ..., H]`` of -1, 1, and 0 for what is not yet written."""
        shape = jnp.broadcast_shapes(signs.shape, (prompt.shape[0], *[1] * (signs.ndim - 1)))
        signs = jnp.broadcast_to(signs, shape)
        if self.kind != "subset":
            return signs
        w = prompt[:, :-1].reshape(-1, *[1] * (signs.ndim - 2), self.horizon)
        return jnp.where(signs > 0, w, 0)


def parse_tasks(text: str) -> list[Task]:
    """Tasks of a comma-separated list such as ``core,subset4:2000``, each once, in that order.

    Raises:
      ValueError: If an entry is no set and none of ``subsetH:n``, ``subsetbitsH:n``, ``linearH:n`` and ``lookupHpP:n``.
    """
    known = {**SETS, "all": ",".join(SETS.values())}
    tasks: list[Task] = []
    for entry in ",".join(known.get(entry.strip(), entry) for entry in text.split(",")).split(","):
        match = re.fullmatch(r"(?:(subset|subsetbits|linear)(\d+)|lookup(\d+)p(\d+)):(\d+)", entry.strip())
        if not match:
            allowed = f"subsetH:n, subsetbitsH:n, linearH:n, lookupHpP:n, {', '.join(SETS)} or all"
            raise ValueError(f"tasks must be a comma-separated list of {allowed}; got {entry!r}")
        kind, horizon, lookup_horizon, num_prompts, num_pairs = match.groups()
        task = Task(kind or "lookup", int(horizon or lookup_horizon), int(num_pairs), int(num_prompts or 0))
        if not 1 <= task.horizon <= 10:
            raise ValueError(f"tasks must have a horizon between 1 and 10 to be enumerated, got {entry!r}")
        if task.num_pairs < 2 or (task.kind == "lookup" and task.num_prompts < 1):
            raise ValueError(f"tasks must have at least 2 pairs and 1 prompt, got {entry!r}")
        if task not in tasks:
            tasks.append(task)
    return tasks


def init_network(key: Array, task: Task, *, width: int) -> dict[str, Any]:
    """Two hidden layers of ``width`` and two heads that start at zero.

    The first layer is held as two matrices, for the context and for the prefix: in a tree of prefixes the former is
    applied once per prompt and length.
    """
    C = task.context(task.prompts(key, 1), np.zeros(1, int)).shape[-1]
    first = C + task.horizon
    normal = jax.random.normal(key, (first + width, width))
    return {
        "context": normal[:C] * jnp.sqrt(2 / first),
        "prefix": normal[C:first] * jnp.sqrt(2 / first),
        "bias": jnp.zeros(width),
        "hidden": normal[first:] * jnp.sqrt(2 / width),
        "hidden_bias": jnp.zeros(width),
        "policy": jnp.zeros(width),
        "policy_bias": jnp.zeros(()),
        "reward": jnp.zeros(width),
    }


def tree_logp(net: dict[str, Any], task: Task, prompt: Array) -> Array:
    """Log-probability of every completion, ``[n, K]``: the whole tree of prefixes at once."""
    H = task.horizon
    sizes = 2 ** np.arange(H)
    signs = jnp.concatenate([jnp.zeros((1, H)), *(jnp.pad(_signs(h), ((0, 0), (0, H - h))) for h in range(1, H))])
    context = task.context(prompt, np.arange(H)) @ net["context"]
    odds = _log_odds(net, context[:, np.repeat(np.arange(H), sizes)], task.prefix(prompt, signs[None]))
    levels = jnp.split(odds, np.cumsum(sizes)[:-1], axis=-1)
    return sequence_logp([jax.nn.log_sigmoid(jnp.stack([-level, level], axis=-1)) for level in levels])


def tree_reward(net: dict[str, Any], task: Task, prompt: Array) -> Array:
    """Scalar reward of every completion, ``[n, K]``."""
    context = task.context(prompt, np.array([task.horizon])) @ net["context"]
    return _trunk(net, context, task.prefix(prompt, _signs(task.horizon)[None])) @ net["reward"]


def completion_logp(net: dict[str, Any], task: Task, prompt: Array, completion: Array) -> Array:
    """Log-probability of chosen completions, ``[n, N]``, given by their numbers."""
    H = task.horizon
    signs = _signs(H)[completion]
    known = np.arange(H)[None] < np.arange(H)[:, None]
    context = task.context(prompt, np.arange(H)) @ net["context"]
    prefix = task.prefix(prompt, jnp.where(known[None, None], signs[..., None, :], 0))
    return jnp.sum(jax.nn.log_sigmoid(signs * _log_odds(net, context[:, None], prefix)), axis=-1)


def completion_reward(net: dict[str, Any], task: Task, prompt: Array, completion: Array) -> Array:
    """Scalar reward of chosen completions, ``[n, N]``."""
    context = task.context(prompt, np.array([task.horizon])) @ net["context"]
    return _trunk(net, context, task.prefix(prompt, _signs(task.horizon)[completion])) @ net["reward"]


def _signs(horizon: int) -> Array:
    """Tokens of every completion as -1 and 1, ``[K, H]``."""
    return 2.0 * completions(vocab_size=2, horizon=horizon) - 1


def _trunk(net: dict[str, Any], context: Array, prefix: Array) -> Array:
    """Features of prefixes, from the context's share of the first layer."""
    first = context + prefix @ net["prefix"]
    bias, hidden_bias = (net[name].reshape(*[1] * (first.ndim - 1), -1) for name in ("bias", "hidden_bias"))
    return jax.nn.relu(jax.nn.relu(first + bias) @ net["hidden"] + hidden_bias)


def _log_odds(net: dict[str, Any], context: Array, prefix: Array) -> Array:
    return _trunk(net, context, prefix) @ net["policy"] + net["policy_bias"]
