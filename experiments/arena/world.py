"""The world of `experiments.arena`: a task whose completions are all enumerated, and a transformer that writes them.

A completion is at most T tokens and ends with EOS or at the budget. There are few enough of them (781 for six tokens
and T = 4) to know the policy's probability of each: all 156 prefixes go through the `Transformer` at once. So a sample
of the policy is drawn from its exact law over completions, which is the same as token by token, and reward, KL and the
distance to the tilt are sums, not estimates.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tiltjax.data.candidates import Candidates
from tiltjax.losses.game import geometric_mixture_logits
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.train.method import Feedback, Players, View
from tiltjax.train.streams import root_key
from tiltjax.types import Array

__all__ = ["Space", "World", "WorldConfig", "make_space", "make_world"]

EOS = 0


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Sizes of the task and of the policy.

    Attributes:
      vocab_size: Tokens, EOS among them.
      max_tokens: T, the longest completion.
      num_prompts: Prompts, of two tokens each.
      width: Of the residual stream; two layers.
      pretraining_steps: Full-batch steps on the exact cross-entropy.
      seed: Of task and policy.
    """

    vocab_size: int = 6
    max_tokens: int = 4
    num_prompts: int = 4
    width: int = 32
    pretraining_steps: int = 300
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Space:
    """All completions, in NumPy.

    Attributes:
      completion: Tokens, padded with EOS, ``[K, T]``.
      mask: True up to and including EOS, ``[K, T]``.
      row: Which prefix each token follows, ``[K, T]``; 0 on padding.
      prefix: Tokens of all prefixes of T - 1 tokens without EOS, ``[L, T]``, the last token unused.
      where: Of every prefix of 0 to T - 1 tokens: ``(l, t)``, the place of its next-token law among those of `prefix`.
      number: ``V**T`` codes of padded completions -> index, or -1.
    """

    completion: np.ndarray
    mask: np.ndarray
    row: np.ndarray
    prefix: np.ndarray
    where: np.ndarray
    number: np.ndarray


def make_space(vocab_size: int, max_tokens: int) -> Space:
    """Enumerates completions and prefixes."""
    V, T, letters = vocab_size, max_tokens, range(1, vocab_size)
    prefixes = [p for t in range(T) for p in itertools.product(letters, repeat=t)]
    row_of = {p: i for i, p in enumerate(prefixes)}
    whole = [(*p, EOS) for p in prefixes] + list(itertools.product(letters, repeat=T))
    completion = np.array([[*y, *[EOS] * (T - len(y))] for y in whole], np.int32)
    mask = np.array([[t < len(y) for t in range(T)] for y in whole])
    row = np.array([[row_of[y[:t]] if t < len(y) else 0 for t in range(T)] for y in whole], np.int32)
    longest = [p for p in prefixes if len(p) == T - 1]
    first = {p[:t]: (i, t) for i, p in reversed(list(enumerate(longest))) for t in range(T)}
    number = np.full(V**T, -1, np.int32)
    number[completion @ V ** np.arange(T)[::-1]] = np.arange(len(whole))
    return Space(
        completion=completion,
        mask=mask,
        row=row,
        prefix=np.array([[*p, EOS] for p in longest], np.int32),
        where=np.array([first[p] for p in prefixes], np.int32),
        number=number,
    )


@dataclasses.dataclass(frozen=True)
class World:
    """Task, reference policy, and what the loop needs to know of them.

    Attributes:
      config: Sizes.
      space: All completions.
      prompt: ``[P, 2]``.
      params: Of the pretrained policy: the model, and two critics that read its last hidden state.
      corpus_logp: The law that it was pretrained on, ``[P, K]``, nats.
      ref_logp: Its own law, ``[P, K]``, nats.
      reward: Gold, ``[P, K]``; mean 0 and standard deviation 1 under the reference.
      cost: Likewise, but less the mean that is allowed: a policy is safe where its mean cost is at most 0.
      correct: The best fifth of the reference's completions, ``[P, K]``.
      answer: The last token before EOS, ``[K]``; -1 for the empty completion.
    """

    config: WorldConfig
    space: Space
    prompt: np.ndarray
    params: Any
    corpus_logp: np.ndarray
    ref_logp: np.ndarray
    reward: np.ndarray
    cost: np.ndarray
    correct: np.ndarray
    answer: np.ndarray

    def outputs(self, params: Any, prompt: Array) -> tuple[Array, Array]:
        """Log-probability of every next token after every prefix, ``[P, rows, V]``, and the law, ``[P, K]``."""
        model, space = params["model"], self.space
        completion = jnp.broadcast_to(space.prefix[None], (len(prompt), *space.prefix.shape))
        hidden = model.hidden(prompt, jnp.ones(prompt.shape, bool), completion)
        states = hidden[:, space.where[:, 0], space.where[:, 1]]
        rows = jax.nn.log_softmax(states @ model.projection().T)
        return rows, self.law(rows)

    def law(self, rows: Array) -> Array:
        """Log-probability of every completion, ``[..., K]``, from that of every next token."""
        space = self.space
        return jnp.sum(jnp.where(space.mask, rows[..., space.row, space.completion], 0), axis=-1)

    def logp(self, params: Any) -> Array:
        """The policy's law on the task's prompts, ``[P, K]``."""
        return self.outputs(params, jnp.asarray(self.prompt))[1]

    def view(self, params: Any, candidates: Candidates, *, temperature: float = 1.0) -> View:
        """What the loop asks of a policy: only the drawn candidates are scored."""
        model = params["model"]
        hidden = model.hidden(candidates.prompt, candidates.prompt_mask, candidates.completion)
        logits = jax.nn.log_softmax(hidden @ model.projection().T / temperature)
        return View(
            token_logp=jnp.take_along_axis(logits, candidates.completion[..., None], axis=-1)[..., 0],
            entropy=-jnp.sum(jnp.exp(logits) * logits, axis=-1),
            self_certainty=-jnp.mean(logits, axis=-1) - jnp.log(float(logits.shape[-1])),
            value=hidden @ params["critic"]["kernel"] + params["critic"]["bias"].reshape(1, 1, 1, -1),
        )

    def batch_of_prompts(self, size: int) -> Candidates:
        """``size`` prompts, all of them in turn; nothing else is in it."""
        at = np.arange(size) % len(self.prompt)
        empty = np.zeros((size, 0, self.config.max_tokens), np.int32)
        prompt = self.prompt[at]
        return Candidates(
            prompt=jnp.asarray(prompt),
            prompt_mask=jnp.ones(prompt.shape, bool),
            completion=jnp.asarray(empty),
            completion_mask=jnp.asarray(empty > 0),
        )

    def sampler(self, demonstrations: Array, *, mixture: float = 0.5, temperature: float = 1.0) -> Callable:
        """A `tiltjax.train.method.Sample` that draws from exact laws.

        Args:
          demonstrations: Log-probability of the source "data", ``[P, K]``.
          mixture: Of the source "mixture".
          temperature: Of every source but "greedy", "data" and "corpus".
        """

        def laws(players: Players, source: str) -> tuple[Array, Array]:
            who = {"previous": players.previous, "reference": players.reference, "initial": players.initial}
            if source in ("data", "corpus"):
                logp = demonstrations if source == "data" else jnp.asarray(self.corpus_logp)
                return jnp.zeros((len(self.prompt), len(self.space.where), self.config.vocab_size)), logp
            rows, logp = self.outputs(who.get(source, players.state.params), jnp.asarray(self.prompt))
            if source == "mixture":
                other, _ = self.outputs(players.reference, jnp.asarray(self.prompt))
                rows = geometric_mixture_logits(rows, other, mixture=mixture)
                logp = self.law(rows)
            if source == "greedy":
                logp = self.law(jnp.where(rows == jnp.max(rows, axis=-1, keepdims=True), 0.0, -1e9))
            elif temperature != 1:
                rows = jax.nn.log_softmax(rows / temperature)
                logp = self.law(rows)
            return rows, logp

        def sample(key: Array, players: Players, source: str, prompts: Candidates, num: int) -> Candidates:
            rows, logp = laws(players, source)
            at = self._prompt_number(prompts.prompt)
            drawn = jax.random.categorical(key, logp[at][:, None], shape=(len(at), num))
            space = self.space
            completion, mask, row = (jnp.asarray(x)[drawn] for x in (space.completion, space.mask, space.row))
            token_logp = jnp.where(mask, rows[at[:, None, None], row, completion], 0)
            return Candidates(
                prompt=prompts.prompt,
                prompt_mask=prompts.prompt_mask,
                completion=completion,
                completion_mask=mask,
                old_token_logp=token_logp,
            )

        return sample

    def score(self, candidates: Candidates) -> Feedback:
        """Gold feedback, by looking up."""
        V, T = self.config.vocab_size, self.config.max_tokens
        code = candidates.completion @ (V ** np.arange(T)[::-1])
        y, x = jnp.asarray(self.space.number)[code], self._prompt_number(candidates.prompt)[:, None]
        tables = {name: jnp.asarray(getattr(self, name))[x, y] for name in ("reward", "cost", "correct")}
        return Feedback(answer=jnp.asarray(self.answer)[y], **tables)

    def _prompt_number(self, prompt: Array) -> Array:
        same = jnp.all(prompt[:, None] == jnp.asarray(self.prompt)[None], axis=-1)
        return jnp.argmax(same, axis=-1)

    def tilt(self, beta: Any) -> Array:
        """The optimum of ``E reward - beta KL``, ``[P, K]``, nats."""
        return jax.nn.log_softmax(self.ref_logp + self.reward / beta)

    def equilibrium(self, beta: float, *, steps: int = 400) -> np.ndarray:
        """Of the game of Bradley-Terry preferences in which both sides pay ``beta`` per nat, ``[P, K]``, nats.

        Magnetic mirror descent, which converges for this step size (`tiltjax.exact.game` has the bound).
        """
        ref, reward = (np.asarray(x, np.float64) for x in (self.ref_logp, self.reward))
        step, laws = min(4 * beta, 2.0), []
        for log_ref, r in zip(ref, reward, strict=True):
            wins, law = 1 / (1 + np.exp(r[None] - r[:, None])), log_ref
            for _ in range(steps):
                law = (law + step * (beta * log_ref + wins @ np.exp(law))) / (1 + step * beta)
                law = law - np.log(np.exp(law).sum())
            laws.append(law)
        return np.stack(laws).astype(np.float32)

    def constrained(self, beta: float) -> np.ndarray:
        """The optimum of ``E reward - beta KL`` with a mean cost of at most 0 over all prompts, ``[P, K]``, nats."""
        ref, reward, cost = (np.asarray(x, np.float64) for x in (self.ref_logp, self.reward, self.cost))

        def law(multiplier: float) -> np.ndarray:
            x = ref + (reward - multiplier * cost) / beta
            x = x - x.max(axis=-1, keepdims=True)
            return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

        low, high = 0.0, 0.0 if np.sum(np.exp(law(0.0)) * cost) <= 0 else 64.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if np.sum(np.exp(law(middle)) * cost) > 0 else (low, middle)
        return law(high).astype(np.float32)


def make_world(config: WorldConfig, *, leaves: Sequence[np.ndarray] | None = None) -> World:
    """Draws a task, and pretrains the policy on its corpus in place.

    The corpus is a random token tree per prompt. The reward of a completion is a sum of values of its tokens, of its
    pairs of neighbouring tokens, and of the length, drawn once; every prompt has its own share of each.

    Args:
      config: Sizes.
      leaves: Arrays of the pretrained policy, from another process; None trains it.
    """
    space, rng = make_space(config.vocab_size, config.max_tokens), np.random.default_rng(config.seed)
    P, V, K = config.num_prompts, config.vocab_size, len(space.completion)
    pairs = list(itertools.product(range(1, V), repeat=2))
    if len(pairs) < P:
        raise ValueError(f"num_prompts must be at most {len(pairs)} for vocab_size={V}, got {P}")
    prompt = np.array([pairs[i] for i in rng.permutation(len(pairs))[:P]], np.int32)
    rows = rng.normal(size=(P, len(space.where), V))
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    corpus = np.where(space.mask, rows[:, space.row, space.completion], 0).sum(-1).astype(np.float32)

    model_config = TransformerConfig(
        vocab_size=V, features=config.width, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=config.width // 2,
        mlp_features=2 * config.width, rotary_dim=config.width // 2, remat="none",
    )  # fmt: skip
    critic = {"kernel": jnp.zeros((config.width, 2)), "bias": jnp.zeros(2)}
    params = {"model": Transformer(root_key(config.seed), model_config), "critic": critic}
    blank = np.zeros((P, K), np.float32)
    world = World(config=config, space=space, prompt=prompt, params=params, corpus_logp=corpus, ref_logp=blank,
                  reward=blank, cost=blank, correct=blank > 0, answer=_answers(space))  # fmt: skip
    params = _pretrained(world) if leaves is None else jax.tree.unflatten(jax.tree.structure(params), leaves)
    ref_logp = np.asarray(jax.jit(world.logp)(params), np.float32)
    reward = _standardised(_features(rng, space, P, V), ref_logp)
    cost = _standardised(0.6 * reward + 0.8 * _standardised(_features(rng, space, P, V), ref_logp), ref_logp) - 0.3
    return dataclasses.replace(world, params=params, ref_logp=ref_logp, reward=reward, cost=cost.astype(np.float32),
                               correct=_top(reward, ref_logp, 0.2))  # fmt: skip


def _pretrained(world: World) -> Any:
    target = jax.nn.softmax(jnp.asarray(world.corpus_logp))
    steps = world.config.pretraining_steps
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @functools.partial(jax.jit, static_argnames="steps")
    def run(params, *, steps):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: -jnp.mean(jnp.sum(target * world.logp(p), axis=-1)))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return run(world.params, steps=steps)


def _features(rng: np.random.Generator, space: Space, P: int, V: int) -> np.ndarray:
    """A reward ``[P, K]`` that is half the same for all prompts."""

    def one() -> np.ndarray:
        token, pair = rng.normal(size=V), rng.normal(size=(V, V))
        y, m = space.completion, space.mask
        both = m[:, 1:] & m[:, :-1]
        return (np.where(m, token[y], 0).sum(-1) + np.where(both, pair[y[:, :-1], y[:, 1:]], 0).sum(-1)
                + rng.normal() * m.sum(-1))  # fmt: skip

    shared = one()
    return np.stack([shared + one() for _ in range(P)])


def _standardised(x: np.ndarray, ref_logp: np.ndarray) -> np.ndarray:
    p = np.exp(ref_logp.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    mean = (p * x).sum(-1, keepdims=True)
    return ((x - mean) / np.sqrt((p * (x - mean) ** 2).sum(-1, keepdims=True))).astype(np.float32)


def _top(reward: np.ndarray, ref_logp: np.ndarray, share: float) -> np.ndarray:
    """The completions of largest reward, as many as hold ``share`` of the reference's mass."""
    order = np.argsort(-reward, axis=-1)
    above = np.cumsum(np.take_along_axis(np.exp(ref_logp), order, axis=-1), axis=-1)
    best = np.zeros(reward.shape, bool)
    np.put_along_axis(best, order, above <= share, axis=-1)
    return best


def _answers(space: Space) -> np.ndarray:
    letters = np.where(space.mask & (space.completion != EOS), np.arange(space.mask.shape[1])[None], -1).max(-1)
    return np.where(letters < 0, -1, space.completion[np.arange(len(letters)), letters]).astype(np.int32)
