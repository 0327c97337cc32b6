"""What a method of alignment is, and the one loop that runs them all.

A `Method` is a record: whose candidates, how they are labelled, what loss, which reference update. The loop has three
functions: `collect` draws, a ``score`` of the user's rewards, `fit` labels the candidates and takes the gradient steps.
`play` is one round of the three. Everything is pure and knows a policy through two callables only,

* ``sample(key, players, source, prompts, num) -> Candidates``, `Sample`, and
* ``view(params, candidates) -> View``, `ViewFn`,

so the same record trains a language model, with rewards from the host between two compiled functions, and runs inside
one `jax.jit`, scanned over rounds and mapped over ``beta`` and seeds. Offline is one round. The records are in
`tiltjax.train.methods`, the two callables for a `Transformer` in `tiltjax.train.policy`.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from tiltjax.data.candidates import Candidates
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.ops.masked import Average, average
from tiltjax.train.reference import soft_update
from tiltjax.train.state import TrainState, init_state
from tiltjax.train.step import train_step
from tiltjax.types import Array, Bool, Float, Int, Numeric, Params, PRNGKey, PyTree

__all__ = [
    "FEEDBACK",
    "SOURCES",
    "Batch",
    "Feedback",
    "Loss",
    "Memory",
    "Method",
    "Players",
    "Prepare",
    "ReferenceUpdate",
    "Round",
    "Sample",
    "View",
    "ViewFn",
    "collect",
    "fit",
    "init_players",
    "measures",
    "objective",
    "play",
    "prepare",
]

SOURCES = ("current", "previous", "reference", "initial", "mixture", "greedy", "data", "corpus")
"""Who may write a candidate: the policy as it is at the start of the round, as it was a round ago, the reference (which
may move), the policy that training began with, the geometric mixture of policy and reference, the policy's greedy
completion, demonstrations, or text that must not be forgotten."""

FEEDBACK = ("demonstrations", "reward", "preference", "binary", "vote", "internal")
"""What a method learns from."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class View:
    """What a policy says about candidates. Only the entries of real tokens mean anything.

    Attributes:
      token_logp: Log-probability of every token, nats, ``[B, N, T]``.
      entropy: Of the next token, nats, ``[B, N, T]``.
      self_certainty: ``KL(uniform || policy)`` of the next token, nats, ``[B, N, T]``.
      value: Critics' estimates before every token, ``[B, N, T, H]``; None without a critic.
    """

    token_logp: Float[Array, "B N T"]
    entropy: Float[Array, "B N T"]
    self_certainty: Float[Array, "B N T"]
    value: Float[Array, "B N T H"] | None = None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Feedback:
    """What was found out about candidates.

    Attributes:
      reward: Higher is better, reward units, ``[B, N]``.
      cost: Above 0 means harm, ``[B, N]``; for constrained methods.
      correct: Whether the candidate is right, or desirable, ``[B, N]``; for binary feedback.
      answer: Id of the candidate's answer, negative where it has none, ``[B, N]``; for votes.
    """

    reward: Float[Array, "B N"]
    cost: Float[Array, "B N"] | None = None
    correct: Bool[Array, "B N"] | None = None
    answer: Int[Array, "B N"] | None = None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Batch:
    """Labelled candidates, ready for gradient steps. Every array has a leading axis of prompts; none has a gradient.

    Attributes:
      candidates: Prompts, completions and masks; ``where`` is always there, ``reward`` is what the method climbs.
      source: Which entry of `Method.draw` wrote each, ``[B, N]``.
      old: The policy's view at the start of the round.
      ref: The reference's view.
      advantage: ``[B, N]`` or ``[B, N, T]``; None where the loss needs none.
      returns: Targets of the critics, ``[B, N, T, H]``.
      fresh: True on rows of the first step of a round, where the policy still is the old one, ``[B]``.
    """

    candidates: Candidates
    source: Int[Array, "B N"]
    old: View
    ref: View
    advantage: Float[Array, "..."] | None = None
    returns: Float[Array, "B N T H"] | None = None
    fresh: Bool[Array, "B"] | None = None

    @property
    def where(self) -> Bool[Array, "B N"]:
        """True for the candidates that count."""
        return self.candidates.where

    @property
    def reward(self) -> Float[Array, "B N"]:
        """What the method climbs."""
        return self.candidates.reward

    @property
    def mask(self) -> Bool[Array, "B N T"]:
        """True on the real tokens of the candidates that count."""
        assert self.candidates.where is not None
        return self.candidates.completion_mask & self.candidates.where[..., None]

    def change(self, **changes) -> "Batch":
        """The same batch with other fields; ``where``, ``reward`` and ``completion_mask`` are those of the candidates.

        Args:
          **changes: New values.

        Returns:
          A new batch.
        """
        inner = {name: changes.pop(name) for name in ("where", "reward", "completion_mask") if name in changes}
        if inner:
            changes["candidates"] = dataclasses.replace(changes.get("candidates", self.candidates), **inner)
        return dataclasses.replace(self, **changes)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Players:
    """Everything that a run changes: a pytree, so a checkpoint of it is the run.

    Attributes:
      state: The policy in training, with its optimizer.
      reference: What the policy is held to; moves by `Method.reference` only.
      initial: The policy that training began with; never changes.
      previous: The policy at the start of the last round.
      memory: The method's own state (a multiplier, a process reward model), or None.
      round: How many rounds were played, scalar.
    """

    state: TrainState
    reference: Params
    initial: Params
    previous: Params
    memory: PyTree
    round: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class ReferenceUpdate:
    """When the reference follows the policy.

    Attributes:
      every: Rounds between updates; None leaves it where it is.
      alpha: Share of the policy in the mix, in (0, 1]; 1 is a hard update.
      reset_optimizer: Whether the optimizer forgets at an update.
    """

    every: int | None = None
    alpha: float = 1.0
    reset_optimizer: bool = False


@dataclasses.dataclass(frozen=True)
class Round:
    """What a label or an advantage may read beside the batch.

    Attributes:
      feedback: Of the candidates, before any of them was picked.
      beta: Strength of the KL term, reward units; may be traced.
      key: Of this round's labels, consumed.
      round: How many rounds were played before.
      memory: The method's own state.
      view: To ask another model, such as one in the memory.
    """

    feedback: Feedback
    beta: Numeric
    key: PRNGKey
    round: Int[Array, ""]
    memory: PyTree
    view: "ViewFn"


Loss = Callable[[View, Batch, Numeric], Average]
"""``(the policy's view, batch, beta) -> Average``, the loss of a gradient step."""

Prepare = Callable[[Round, Batch], Batch]
"""A label or an advantage: fills in what the loss needs, or picks candidates."""

ViewFn = Callable[[Params, Candidates], View]
"""``(params, candidates) -> View``, differentiable in the parameters."""

Sample = Callable[[PRNGKey, Players, str, Candidates, int], Candidates]
"""``(key, players, source, prompts, num) -> Candidates``: num candidates of every prompt, with ``old_token_logp`` the
log-probabilities of the distribution that was drawn from. Of ``prompts`` only prompt and mask are read."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """State that a method keeps between rounds, besides policy and reference.

    Attributes:
      init: ``params -> state``.
      update: ``(round, batch, state) -> state``, before the advantages of the round are computed.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[Round, Batch, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of alignment, as a record.

    Attributes:
      name: As on a command line.
      paper: Authors, year, arXiv number.
      loss: Of a gradient step.
      draw: ``(source, number)`` pairs: who writes a prompt's candidates. Losses tell them apart by `Batch.source`.
      feedback: One of `FEEDBACK`.
      label: From the raw feedback to what the method learns from; may pick candidates.
      advantage: Baselines and credit, after the label.
      rounds: How often candidates are drawn: 1 is offline, None once per mini-batch of the budget (online), any other
        number is iterated.
      epochs: Gradient steps that every mini-batch is used for.
      reference: When the reference moves.
      memory: What else the method keeps.
      cross: If above 1, every prompt with a single candidate also gets those of the next ``cross - 1`` prompts, for
        losses that compare completions across prompts; the prompt's own stays first.
      mixture: Share of the reference in the source "mixture".
      beta: The paper's strength of the KL term.
      learning_rate: The paper's, for fine-tuning a language model; None where it gives none.
      units: Of ``beta``: "reward", or "preference", a probability, where what is climbed is a win rate.
      optimum: What the method tends to: "tilt", "constrained" (the tilt that keeps the cost), "equilibrium" (of the
        game regularised by beta) or "none" (something else, or nothing holds it).

    Raises:
      ValueError: If a source, the feedback or a number is out of its range.
    """

    name: str
    paper: str
    loss: Loss
    draw: tuple[tuple[str, int], ...] = (("current", 8),)
    feedback: str = "reward"
    label: Prepare | None = None
    advantage: Prepare | None = None
    rounds: int | None = None
    epochs: int = 1
    reference: ReferenceUpdate = ReferenceUpdate()
    memory: Memory | None = None
    cross: int = 1
    mixture: float = 0.5
    beta: float = 0.1
    learning_rate: float | None = None
    units: str = "reward"
    optimum: str = "tilt"

    def __post_init__(self):
        for source, num in self.draw:
            check_choice("draw", source, SOURCES)
            check_at_least("draw", num, 1)
        check_choice("feedback", self.feedback, FEEDBACK)
        check_choice("optimum", self.optimum, ("tilt", "constrained", "equilibrium", "none"))
        check_choice("units", self.units, ("reward", "preference"))
        for field in ("epochs", "cross"):
            check_at_least(field, getattr(self, field), 1)
        check_at_least("rounds", self.rounds, 1)
        check_at_least("reference.every", self.reference.every, 1)
        if self.cross > 1 and self.num_candidates != 1:
            raise ValueError(f"cross must be 1 where a prompt has several candidates, got {self.cross!r}")

    @property
    def num_candidates(self) -> int:
        """How many completions are drawn per prompt."""
        return sum(num for _, num in self.draw)

    @property
    def schedule(self) -> str:
        """Offline, iterated or online: how often candidates are drawn."""
        return {None: "online", 1: "offline"}.get(self.rounds, "iterated")


def init_players(method: Method, params: Params, tx: optax.GradientTransformation) -> Players:
    """The players before the first round, all of them the same policy.

    Args:
      method: The record.
      params: What is trained.
      tx: Optimizer.

    Returns:
      `Players`; the frozen ones are copies, so the policy's buffers may be donated.
    """
    copies = [jax.tree.map(functools.partial(jnp.array, copy=True), params) for _ in range(3)]
    memory = None if method.memory is None else method.memory.init(params)
    return Players(
        state=init_state(params, tx),
        reference=copies[0],
        initial=copies[1],
        previous=copies[2],
        memory=memory,
        round=jnp.int32(0),
    )


def collect(method: Method, players: Players, prompts: Candidates, key: PRNGKey, *, sample: Sample) -> Candidates:
    """Draws a round's candidates, from whom the record says.

    Args:
      method: The record.
      players: Policies.
      prompts: ``prompt`` and ``prompt_mask``; the rest is not read.
      key: Consumed.
      sample: `Sample`.

    Returns:
      `Candidates` with ``old_token_logp``, in the order of `Method.draw`; with `Method.cross`, the prompt's own one
      first and without ``old_token_logp``.
    """
    keys = jax.random.split(key, len(method.draw))
    parts = [sample(k, players, source, prompts, num) for k, (source, num) in zip(keys, method.draw, strict=True)]
    names = ("completion", "completion_mask", "old_token_logp")
    joined = {name: jnp.concatenate([getattr(part, name) for part in parts], axis=1) for name in names}
    if method.cross > 1:
        rolled = [jax.tree.map(lambda x: jnp.roll(x, -j, axis=0), joined) for j in range(method.cross)]  # noqa: B023
        joined = {name: jnp.concatenate([part[name] for part in rolled], axis=1) for name in names[:2]}
    return Candidates(prompt=prompts.prompt, prompt_mask=prompts.prompt_mask, **joined)


def prepare(
    method: Method,
    players: Players,
    candidates: Candidates,
    feedback: Feedback,
    key: PRNGKey,
    *,
    view: ViewFn,
    beta: Numeric,
) -> tuple[PyTree, Batch]:
    """Views, labels and advantages of a round: all that is constant during its gradient steps.

    Args:
      method: The record.
      players: Policies, as they were when the candidates were drawn.
      candidates: From `collect`.
      feedback: Of the candidates.
      key: Of the labels, consumed.
      view: `ViewFn`.
      beta: Strength of the KL term, reward units; may be traced.

    Returns:
      The method's memory after the round, and the `Batch`.
    """
    N = candidates.completion.shape[1]
    counts = [num for _, num in method.draw] if method.cross == 1 else [N]
    sources = [i for i, num in enumerate(counts) for _ in range(num)]
    where = jnp.ones(candidates.completion.shape[:2], bool) if candidates.where is None else candidates.where
    batch = Batch(
        candidates=dataclasses.replace(candidates, where=where, reward=feedback.reward),
        source=jnp.broadcast_to(jnp.array(sources)[None], where.shape),
        old=view(players.state.params, candidates),
        ref=view(players.reference, candidates),
    )
    now = Round(feedback=feedback, beta=beta, key=key, round=players.round, memory=players.memory, view=view)
    if method.memory is not None:
        now = dataclasses.replace(now, memory=method.memory.update(now, batch, players.memory))
    for step in (method.label, method.advantage):
        batch = batch if step is None else step(now, batch)
    return now.memory, jax.lax.stop_gradient(batch)


def objective(method: Method, *, view: ViewFn, beta: Numeric) -> Callable:
    """The loss function of a train step on a `Batch`.

    On the rows of a round's first step the policy *is* the old one, so its own log-probabilities stand for the old
    ones: every ratio is exactly 1 there, whatever two compilations of one model differ by.

    Args:
      method: The record.
      view: `ViewFn`.
      beta: Strength of the KL term; may be traced.

    Returns:
      A `tiltjax.train.step.LossFn`; logs the ratio's distance from 1, two estimates of the KL to the reference, the
      entropy (nats per token), and reward and length of the candidates that count.
    """

    def loss_fn(params: Params, frozen: Params, batch: Batch, key: PRNGKey):
        now = view(params, batch.candidates)
        if batch.fresh is not None:
            same = jax.lax.stop_gradient(now.token_logp)
            logp = jnp.where(batch.fresh[:, None, None], same, batch.old.token_logp)
            batch = batch.change(old=dataclasses.replace(batch.old, token_logp=logp))
        return method.loss(now, batch, beta), measures(now, batch)

    return loss_fn


def measures(now: View, batch: Batch) -> dict[str, Average]:
    """Metrics over real tokens and candidates only."""
    now, mask = jax.lax.stop_gradient(now), batch.mask
    real = batch.where & jnp.any(batch.candidates.completion_mask, axis=-1)
    to_old, to_ref = (
        jnp.sum(jnp.where(mask, now.token_logp - other.token_logp, 0), axis=-1) for other in (batch.old, batch.ref)
    )
    return {
        "off_policy": average(jnp.abs(jnp.expm1(jnp.minimum(to_old, 20.0))), real),
        "kl_k1": average(to_ref, real),
        "kl_k3": average(jnp.expm1(jnp.minimum(-to_ref, 20.0)) + to_ref, real),
        "entropy": average(now.entropy, mask),
        "reward": average(batch.reward, real),
        "length": average(jnp.sum(mask, axis=-1).astype(jnp.float32), real),
    }


def fit(
    method: Method,
    players: Players,
    candidates: Candidates,
    feedback: Feedback,
    key: PRNGKey,
    *,
    view: ViewFn,
    tx: optax.GradientTransformation,
    beta: Numeric,
    minibatches: int = 1,
    probe: Callable[[Params], PyTree] | None = None,
    probes: int = 1,
) -> tuple[Players, PyTree]:
    """A round's gradient steps, and what follows them: the reference, the previous policy, the memory.

    Args:
      method: The record.
      players: Policies, as they were when the candidates were drawn.
      candidates: From `collect`.
      feedback: Of the candidates.
      key: Consumed.
      view: `ViewFn`.
      tx: Optimizer.
      beta: Strength of the KL term, reward units; may be traced.
      minibatches: Into how many parts the prompts are cut, one gradient step each. From the second epoch on, the parts
        are new ones. Divides the number of prompts.
      probe: Measured on the parameters ``probes`` times during the steps.
      probes: Divides the number of steps.

    Returns:
      The players after the round; and the mean of every metric over the steps, or, with ``probe``, what it measured,
      stacked.

    Raises:
      ValueError: If a number is below 1.
      AssertionError: If one does not divide what it has to.
    """
    check_at_least("minibatches", minibatches, 1)
    check_at_least("probes", probes, 1)
    memory, batch = prepare(method, players, candidates, feedback, jax.random.fold_in(key, 0), view=view, beta=beta)
    B, steps = batch.source.shape[0], method.epochs * minibatches
    chex.assert_is_divisible(B, minibatches)
    chex.assert_is_divisible(steps, probes)
    later = [jax.random.permutation(jax.random.fold_in(key, 2 + e), B) for e in range(method.epochs - 1)]
    rows = jnp.stack([jnp.arange(B), *later]).reshape(probes, steps // probes, B // minibatches)
    loss_fn = objective(method, view=view, beta=beta)

    def step(state: TrainState, inputs: tuple[Array, Array]):
        part = jax.tree.map(lambda x: x[inputs[0]], batch)
        part = part.change(fresh=jnp.full(inputs[0].shape, inputs[1] == 0))
        return train_step(state, part, jax.random.fold_in(key, 1), loss_fn=loss_fn, tx=tx)

    def stretch(state: TrainState, inputs: tuple[Array, Array]):
        state, scalars = jax.lax.scan(step, state, inputs)
        return state, jax.tree.map(jnp.mean, scalars) if probe is None else probe(state.params)

    number = jnp.arange(steps).reshape(probes, -1)
    state, seen = jax.lax.scan(stretch, players.state, (rows, number))
    seen = jax.tree.map(jnp.mean, seen) if probe is None else seen
    return _advance(method, players, state, memory, tx), seen


def _advance(method: Method, players: Players, state: TrainState, memory: PyTree, tx) -> Players:
    reference, update, count = players.reference, method.reference, players.round + 1
    if update.every is not None:
        due = count % update.every == 0
        moved = soft_update(reference, state.params, alpha=update.alpha)
        reference = jax.tree.map(lambda new, old: jnp.where(due, new, old), moved, reference)
        if update.reset_optimizer:
            begun = tx.init(state.params)
            opt_state = jax.tree.map(lambda new, old: jnp.where(due, new, old), begun, state.opt_state)
            state = dataclasses.replace(state, opt_state=opt_state)
    previous = jax.tree.map(jnp.copy, players.state.params)
    return dataclasses.replace(players, state=state, reference=reference, previous=previous, memory=memory, round=count)


def play(
    method: Method,
    players: Players,
    prompts: Candidates,
    key: PRNGKey,
    *,
    sample: Sample,
    score: Callable[[Candidates], Feedback],
    **options,
) -> tuple[Players, PyTree]:
    """One round: collect, score, fit. Traceable where ``sample`` and ``score`` are; else call the three in turn.

    Args:
      method: The record.
      players: Policies.
      prompts: As for `collect`.
      key: Consumed.
      sample: `Sample`.
      score: ``candidates -> Feedback``.
      **options: Of `fit`.

    Returns:
      As `fit`.
    """
    draw, learn = jax.random.split(key)
    candidates = collect(method, players, prompts, draw, sample=sample)
    return fit(method, players, candidates, score(candidates), learn, **options)
