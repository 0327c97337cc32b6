"""Decoding a queue of prompts on a fixed grid of slots: a candidate that has met EOS makes room for the next one.

`tiltjax.samplers.decode.decode` runs until the longest of its candidates has ended, and every other slot waits. Here G
groups of W slots work through P prompts: a free slot takes the next candidate of its group's prompt, a group whose N
candidates are all drawn takes the next prompt. The loop is one `jax.lax.while_loop` of static shapes on the device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_fraction
from tiltjax.samplers.decode import Decoded, blank, candidate_keys, decoded, draw
from tiltjax.types import Array, Bool, Float, Int, Key

__all__ = ["decode_queue", "grid_of", "occupancy"]

_REFILL = 1
"""Prompts that are run at a time when groups fall free: they rarely do so together."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    """What the loop carries.

    Attributes:
      cache: Of the model.
      first: Logits of each group's first completion token, ``[G, V]``.
      prompt: Place of each group's prompt in the queue, ``[G]``.
      following: The candidate that the group hands out next, N when all are handed out, ``[G]``.
      head: The first prompt that waits in the queue.
      left: How many candidates are not finished.
      candidate: Of each slot, N where it is free, ``[G, W]``.
      length: How many tokens the slot's candidate has, ``[G, W]``.
      token: The last of them, ``[G, W]``.
      out: Of all that is drawn, ``[P, N, T, ...]``: `tiltjax.samplers.decode.blank`.
      lengths: Of the completions, ``[P, N]``.
      steps: Decode steps so far.
    """

    cache: Any
    first: Float[Array, "..."]
    prompt: Int[Array, "..."]
    following: Int[Array, "..."]
    head: Int[Array, ""]
    left: Int[Array, ""]
    candidate: Int[Array, "..."]
    length: Int[Array, "..."]
    token: Int[Array, "..."]
    out: tuple[Array, ...]
    lengths: Int[Array, "..."]
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class _Queue:
    """What stays the same while the queue is worked through.

    Attributes:
      prompt: The whole queue, ``[P, S]``.
      prompt_mask: True on real prompt tokens.
      waiting: How many of its prompts have any.
      keys: One per candidate, ``[P, N]``.
      refill: Puts new prompts into rows of the cache.
      step: One token further.
      pick: Draws tokens from logits.
      stops: Tokens that end a completion.
      pad_id: Token that fills the rest.
      groups: G.
      slots: W.
      max_tokens: T.
    """

    prompt: Int[Array, "P S"]
    prompt_mask: Bool[Array, "P S"]
    waiting: Int[Array, ""]
    keys: Key[Array, "P N"]
    refill: Callable
    step: Callable
    pick: Callable
    stops: Int[Array, "..."]
    pad_id: int
    groups: int
    slots: int
    max_tokens: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """P, N, T, G, W."""
        return *self.keys.shape, self.max_tokens, self.groups, self.slots

    def start(self, first: Float[Array, "G V"], cache: Any) -> _State:
        """The first G prompts are in the cache, and nothing is drawn."""
        P, N, T, G, W = self.sizes
        drawn = jax.eval_shape(self.pick, self.keys[:1, :1], jnp.int32(0), first[:1, None])
        return _State(
            cache=cache,
            first=first,
            prompt=jnp.arange(G),
            following=jnp.where(jnp.arange(G) < self.waiting, 0, N),
            head=jnp.minimum(G, self.waiting),
            left=self.waiting * N,
            candidate=jnp.full((G, W), N),
            length=jnp.zeros((G, W), int),
            token=jnp.zeros((G, W), jnp.int32),
            out=blank(drawn, (P, N, T), self.pad_id),
            lengths=jnp.zeros((P, N), int),
            steps=jnp.int32(0),
        )

    def free(self, s: _State) -> Bool[Array, " G"]:
        """Which groups have handed out and finished all of their candidates."""
        _, N, *_ = self.sizes
        return jnp.all(s.candidate == N, axis=1) & (s.following == N)

    def next_prompts(self, s: _State) -> _State:
        """Puts the prompts at the head of the queue into free groups."""
        P, _, _, G, _ = self.sizes
        row = jnp.nonzero(self.free(s), size=_REFILL, fill_value=G)[0]
        place = s.head + jnp.arange(_REFILL)
        row = jnp.where(place < self.waiting, row, G)
        at = jnp.minimum(place, P - 1)
        logits, cache = self.refill(s.cache, row, self.prompt[at], self.prompt_mask[at])
        return dataclasses.replace(
            s,
            cache=cache,
            first=s.first.at[row].set(logits, mode="drop"),
            prompt=s.prompt.at[row].set(place, mode="drop"),
            following=s.following.at[row].set(0, mode="drop"),
            head=s.head + jnp.sum(row < G),
        )

    def next_candidates(self, s: _State) -> _State:
        """Gives idle slots the candidates of their group's prompt that wait."""
        _, N, *_ = self.sizes
        idle = s.candidate == N
        turn = s.following[:, None] + jnp.cumsum(idle, axis=1) - 1
        takes = idle & (turn < N)
        return dataclasses.replace(
            s,
            candidate=jnp.where(takes, turn, s.candidate),
            length=jnp.where(takes, 0, s.length),
            following=s.following + jnp.sum(takes, axis=1),
        )

    def append(self, s: _State, logits: Float[Array, "G W V"]) -> _State:
        """Draws one token for every slot at work, and frees those that it ends."""
        P, N, T, G, W = self.sizes
        logits = jnp.where((s.length == 0)[..., None], s.first[:, None], logits)
        at_work = s.candidate < N
        i, j = jnp.broadcast_to(s.prompt[:, None], (G, W)), s.candidate
        drawn = self.pick(self.keys[jnp.minimum(i, P - 1), jnp.minimum(j, N - 1)], s.length, logits)
        out = tuple(a.at[i, j, s.length].set(x, mode="drop") for a, x in zip(s.out, drawn, strict=True))
        length = s.length + 1
        ends = at_work & (jnp.isin(drawn[0], self.stops) | (length == T))
        return dataclasses.replace(
            s,
            out=out,
            lengths=s.lengths.at[i, j].set(length, mode="drop"),
            token=drawn[0],
            length=length,
            candidate=jnp.where(ends, N, s.candidate),
            left=s.left - jnp.sum(ends),
        )

    def advance(self, s: _State) -> _State:
        """One step of the model on all slots, new prompts and candidates where there is room, one token each."""
        logits, cache = self.step(s.token, s.cache, jnp.maximum(s.length - 1, 0))
        s = dataclasses.replace(s, cache=cache, steps=s.steps + 1)
        s = jax.lax.while_loop(lambda s: jnp.any(self.free(s)) & (s.head < self.waiting), self.next_prompts, s)
        return self.append(self.next_candidates(s), logits)


def decode_queue(
    key: Key[Array, "*given"],
    prompt: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    prefill: Callable[[Int[Array, "G S"], Bool[Array, "G S"]], tuple[Float[Array, "G V"], Any]],
    refill: Callable[[Any, Int[Array, " R"], Int[Array, "R S"], Bool[Array, "R S"]], tuple[Float[Array, "R V"], Any]],
    step: Callable[[Int[Array, "G W"], Any, Int[Array, "G W"]], tuple[Float[Array, "G W V"], Any]],
    *,
    groups: int,
    slots: int,
    num_candidates: int,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Decoded:
    r"""Draws N completions of each of P prompts on G groups of W slots.

    The token of prompt i, candidate j, step t comes from ``fold_in(candidate_keys(key, P, N)[i, j], t)``, as in
    `tiltjax.samplers.decode.decode`: the completions are those of plain decoding, whatever the schedule. In place of
    the longest completion times the number of batches, the steps approach

    .. math:: \Big\lceil \frac{1}{G W} \sum_{ij} |y_{ij}| \Big\rceil

    Args:
      key: Typed key, or one per prompt ``[P]`` or candidate ``[P, N]``.
      prompt: Right-padded prompt tokens; the whole queue.
      prompt_mask: True on real prompt tokens. Prompts without any fill the end of the queue up and get no completion.
      prefill: ``(prompt, prompt_mask) -> (logits, cache)`` of the first G prompts, with room for W candidates of each.
      refill: ``(cache, row, prompt, prompt_mask) -> (logits, cache)``: puts new prompts into those rows of the cache;
        a row that is out of bounds is dropped. `tiltjax.models.Transformer.refill` is one.
      step: ``(token, cache, length) -> (logits, cache)`` of the next token, where ``length`` tokens of the slot's
        completion were appended before; `tiltjax.models.Transformer.decode_step` is one.
      groups: G, prompts at a time; the cache holds each once. More than P are as many as P.
      slots: W, candidates of one prompt at a time; more than N are as many as N. The fewer, the less a group waits for
        the last of its candidates.
      num_candidates: N.
      max_tokens: T, the longest completion.
      eos_id: Token (or tokens) that end a completion; the EOS itself belongs to it.
      pad_id: Token that fills the rest.
      temperature: Softmax temperature; 0 is greedy.
      top_k: Keep the k most probable tokens.
      top_p: Keep the smallest set of tokens of this probability.

    Returns:
      `Decoded`, ``[P, N, T]``, with ``steps``.

    Raises:
      ValueError: If an option is out of range.
    """
    check_at_least("groups", groups, 1)
    check_at_least("slots", slots, 1)
    check_at_least("num_candidates", num_candidates, 1)
    check_at_least("max_tokens", max_tokens, 1)
    check_at_least("temperature", temperature, 0)
    check_at_least("top_k", top_k, 1)
    check_fraction("top_p", top_p)
    P, N = len(prompt), num_candidates
    queue = _Queue(
        prompt=prompt,
        prompt_mask=prompt_mask,
        waiting=jnp.sum(jnp.any(prompt_mask, axis=-1)),
        keys=candidate_keys(key, P, N),
        refill=refill,
        step=step,
        pick=functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p),
        stops=jnp.asarray(eos_id).reshape(-1),
        pad_id=pad_id,
        groups=min(groups, P),
        slots=min(slots, N),
        max_tokens=max_tokens,
    )
    G, W = queue.groups, queue.slots
    first, cache = prefill(prompt[:G], prompt_mask[:G])
    state = queue.next_candidates(queue.start(first, cache))
    state = queue.append(state, jnp.broadcast_to(first[:, None], (G, W, first.shape[-1])))
    state = jax.lax.while_loop(lambda s: s.left > 0, queue.advance, state)
    mask = jnp.arange(max_tokens)[None, None] < state.lengths[..., None]
    return decoded(state.out, mask, state.steps)


def grid_of(slots: int, P: int, N: int) -> tuple[int, int]:
    """Groups and slots of each for a queue: a quarter of a prompt's candidates at a time, more where prompts are few.

    A group takes its next prompt when its last candidate ends, so small groups wait less; but each group holds the keys
    and values of its prompt, and reads them at every step for its own slots only.

    Args:
      slots: Candidates that are decoded at a time.
      P: Prompts in the queue.
      N: Candidates of each.

    Returns:
      G and W, with ``G W <= slots`` where ``slots >= 1``.

    Raises:
      ValueError: If a number is below 1.

    Example:
      >>> grid_of(128, P=32, N=16), grid_of(128, P=8, N=16), grid_of(4, P=8, N=16)
      ((32, 4), (8, 16), (1, 4))
    """
    for name, value in (("slots", slots), ("P", P), ("N", N)):
        check_at_least(name, value, 1)
    W = min(N, slots, max(-(-N // 4), slots // P))
    return min(P, slots // W), W


def occupancy(decoded: Decoded, slots: int) -> Float[Array, ""]:
    """Share of the slots that drew a token, over the whole run: 1 where none ever waited.

    Args:
      decoded: Of `decode_queue` or `tiltjax.samplers.decode.decode`.
      slots: Slots of one loop: G W, or B N for plain decoding.

    Returns:
      In (0, 1]. The first token of a run needs no step, so there are ``steps + 1`` occasions to draw.
    """
    rounds = jnp.sum(jnp.asarray(decoded.steps) + 1)
    return jnp.sum(decoded.completion_mask) / (rounds * slots)
