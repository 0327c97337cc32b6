"""What a method of alignment is: a record, and the containers that its parts hand to each other.

A `Method` says whose candidates, how they are labelled, what loss, which reference update. It knows a policy through
two callables only,

* ``sample(key, players, source, prompts, num) -> Candidates``, `Sample`, and
* ``view(params, candidates) -> View``, `ViewFn`,

so the same record trains a language model and a table of logits. The loop that runs every record is in
`tiltjax.train.rounds`, the records are in `tiltjax.train.methods`, the two callables for a `Transformer` in
`tiltjax.train.policy`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex

from tiltjax.data.candidates import Candidates, token_mask
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.ops.masked import Average
from tiltjax.train.state import TrainState
from tiltjax.types import Array, Bool, Float, Int, Numeric, Params, PRNGKey, PyTree

__all__ = [
    "FEEDBACK",
    "SOURCES",
    "Batch",
    "Feedback",
    "Loss",
    "Measures",
    "Memory",
    "Method",
    "Players",
    "Prepare",
    "ReferenceUpdate",
    "Round",
    "Sample",
    "View",
    "ViewFn",
]

SOURCES = ("current", "previous", "reference", "initial", "mixture", "greedy", "data", "corpus")
"""Who may write a candidate: the policy as it is at the start of the round, as it was a round ago, the reference (which
may move), the policy that training began with, the geometric mixture of policy and reference, the policy's greedy
completion, demonstrations, or text that must not be forgotten."""

FEEDBACK = ("demonstrations", "reward", "preference", "binary", "vote", "internal")
"""What a method learns from."""

_UNITS_OF_REWARD = {"reward": 1, "preference": 4}
"""Unit of a beta -> how many units of reward it is, at a tie."""


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
      candidates: Prompts, completions and masks; ``where`` is always there, ``reward`` is what the method climbs, or
        None of demonstrations, which nobody rewarded.
      source: Which entry of `Method.draw` wrote each, ``[B, N]``.
      old_view: The policy's view at the start of the round; None where the method does not read it. Who does says
        `old`.
      ref_view: The reference's; None where the method does not read it. Who does says `ref`.
      advantage: ``[B, N]`` or ``[B, N, T]``; None where the loss needs none.
      returns: Targets of the critics, ``[B, N, T, H]``.
      fresh: True on rows of the first step of a round, where the policy still is the old one, ``[B]``.
    """

    candidates: Candidates
    source: Int[Array, "B N"]
    old_view: View | None = None
    ref_view: View | None = None
    advantage: Float[Array, "..."] | None = None
    returns: Float[Array, "B N T H"] | None = None
    fresh: Bool[Array, " B"] | None = None

    @property
    def old(self) -> View:
        """The policy's view at the start of the round, for who reads it.

        Raises:
          ValueError: If there is none: the record says that nobody does.
        """
        if self.old_view is None:
            raise ValueError("reads_old must be True for a method that reads the policy's old view, got False")
        return self.old_view

    @property
    def ref(self) -> View:
        """The outputs of the reference.

        Raises:
          ValueError: If the method declares ``reads_reference=False``.
        """
        if self.ref_view is None:
            raise ValueError("reads_reference must be True for a method that reads the reference's view, got False")
        return self.ref_view

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
        """True on the tokens that are learned from, of the candidates that count; see `token_mask`."""
        assert self.candidates.where is not None
        return token_mask(self.candidates) & self.candidates.where[..., None]

    def change(self, **changes) -> "Batch":
        """The same batch with other fields; ``where``, ``reward`` and the two masks are those of the candidates.

        Args:
          **changes: New values.

        Returns:
          A new batch.
        """
        names = ("where", "reward", "completion_mask", "loss_mask")
        inner = {name: changes.pop(name) for name in names if name in changes}
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
      beta: Strength of the KL term, as of `Method.own_beta`; may be traced.
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

Measures = Callable[[View, Batch, Numeric], dict[str, Average]]
"""``(the policy's view, batch, beta) -> metrics`` of a gradient step, beside those that every method has."""

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
      measures: ``state -> metrics`` that are logged after every round, or None.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[Round, Batch, PyTree], PyTree]
    measures: Callable[[PyTree], dict[str, Float[Array, ""]]] | None = None


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
      reads_reference: Whether loss, label, advantage or memory read `Batch.ref`. Where none does, the reference is
        asked nothing, and the KL to it is not measured.
      reads_old: Whether they read `Batch.old`. Where none does, the policy is not asked before the gradient steps, and
        how far it has moved is not measured.
      linear: Whether the loss is a sum of log-probabilities of completions, each with a weight that does not depend on
        the policy: what `tiltjax.train.objectives.candidate_weights` and sequence packing need.
      couples_prompts: Whether the loss of a prompt depends on the others of its mini-batch. It is then another one
        where a mini-batch is cut into parts or divided by `jax.pmap`.
      measures: What else is logged of a gradient step, or None.
      critics: How many critics read the policy's hidden state (`tiltjax.train.policy.with_critics`).
      resample: Most times that a round draws further prompts in place of those whose candidates all have one reward.
        Only a loop on the host can; inside one `jax.jit` the label masks them.
      mixture: Share of the reference in the source "mixture".
      temperature: Softmax temperature at which candidates are drawn, > 0. Every view takes its log-probabilities there
        too, so that policy, reference and sampler are laws of one kind.
      beta: The paper's strength of the KL term, in ``units``; 0 where it has none.
      zero_beta: Whether ``beta`` may be 0: nothing divides by it, and at 0 the method has no KL term.
      learning_rate: The paper's, for fine-tuning a language model; None where it gives none.
      units: Of ``beta`` as labels and loss take it: "reward", or "preference", a probability, where what is climbed is
        a win rate. Programs count in reward units; `own_beta` and `reward_beta` convert.
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
    reads_reference: bool = True
    reads_old: bool = True
    linear: bool = False
    couples_prompts: bool = False
    measures: Measures | None = None
    critics: int = 0
    resample: int = 0
    mixture: float = 0.5
    temperature: float = 1.0
    beta: float = 0.1
    zero_beta: bool = False
    learning_rate: float | None = None
    units: str = "reward"
    optimum: str = "tilt"

    def __post_init__(self):
        for source, num in self.draw:
            check_choice("draw", source, SOURCES)
            check_at_least("draw", num, 1)
        check_choice("feedback", self.feedback, FEEDBACK)
        check_choice("optimum", self.optimum, ("tilt", "constrained", "equilibrium", "none"))
        check_choice("units", self.units, _UNITS_OF_REWARD)
        for field in ("epochs", "cross"):
            check_at_least(field, getattr(self, field), 1)
        for field in ("critics", "resample"):
            check_at_least(field, getattr(self, field), 0)
        check_positive("temperature", self.temperature)
        check_at_least("rounds", self.rounds, 1)
        check_at_least("reference.every", self.reference.every, 1)
        self.check_beta(self.beta)
        if self.cross > 1 and self.num_candidates != 1:
            raise ValueError(f"cross must be 1 where a prompt has several candidates, got {self.cross!r}")

    def check_beta(self, beta: Any) -> None:
        """Raises ValueError, naming the method, unless ``beta`` may be the strength of its KL term, or is traced."""
        if not isinstance(beta, int | float) or 0 < beta < float("inf") or (beta == 0 and self.zero_beta):
            return
        allowed = "at least 0" if self.zero_beta else "above 0 (its loss or its labels divide by it)"
        raise ValueError(f"beta must be a finite number {allowed} for method {self.name}, got {beta!r}")

    def own_beta(self, beta: float) -> float:
        """A strength in reward units as the method takes it.

        In units of preference it is a quarter of that: a win rate under Bradley and Terry rises by 1/4 per unit of
        reward at a tie, so that ``win rate / (beta / 4)`` and ``reward / beta`` tilt alike there.

        Args:
          beta: Reward units.

        Returns:
          In ``units``.
        """
        return beta / _UNITS_OF_REWARD[self.units]

    @property
    def reward_beta(self) -> float:
        """The paper's ``beta`` in reward units."""
        return self.beta * _UNITS_OF_REWARD[self.units]

    @property
    def sources(self) -> tuple[str, ...]:
        """Who writes."""
        return tuple(source for source, _ in self.draw)

    @property
    def constrained(self) -> bool:
        """Whether it needs `Feedback.cost`."""
        return self.optimum == "constrained"

    @property
    def num_candidates(self) -> int:
        """How many completions are drawn per prompt."""
        return sum(num for _, num in self.draw)

    @property
    def learns_once(self) -> bool:
        """Whether all that it learns from is there before its first gradient step, and fixed.

        Those are the records of one round of one source: demonstrations, or candidates of the policy that training
        begins with, which then is every player there is. They need no critic, memory or further epoch.
        """
        fixed = ("current", "previous", "reference", "initial", "data")
        alone = len(self.draw) == 1 and self.draw[0][0] in fixed
        return self.rounds == 1 and alone and self.epochs == 1 and not (self.critics or self.memory or self.resample)

    @property
    def schedule(self) -> str:
        """Offline, iterated or online: how often candidates are drawn."""
        return {None: "online", 1: "offline"}.get(self.rounds, "iterated")
