"""How a record learns in rounds: fresh candidates, rewards from the host, and a fit in each."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from tiltjax.align.feedback import feedback
from tiltjax.align.fit import adapters, fingerprint_of, merge_policy, optimizer, schedule_of
from tiltjax.align.inputs import load_inputs
from tiltjax.align.law import share_cut
from tiltjax.align.session import Session
from tiltjax.align.settings import NEEDS, Settings
from tiltjax.data import text
from tiltjax.data.candidates import Candidates, concatenate, pad, take, without_truncated
from tiltjax.data.pipeline import epoch_batches
from tiltjax.models.transformer import Transformer
from tiltjax.train import checkpoint, distributed, rounds
from tiltjax.train.finite import check_candidates
from tiltjax.train.method import Feedback, Method, Players
from tiltjax.train.metrics import Journal
from tiltjax.train.policy import at_work, model_sample, model_view, with_critics
from tiltjax.train.rollout import overlapped, whole_on_every_host
from tiltjax.train.sharding import batch_sharding, shard, shardings
from tiltjax.train.streams import generator, stream
from tiltjax.types import Array, Bool, Int, Params, PRNGKey

__all__ = ["improve"]


def improve(session: Session, *, watch: Callable[[int, Transformer], None] | None = None) -> Transformer:
    """Plays all rounds; returns the policy with adapters merged and without critics.

    A round is a function of its number and of the players before it, which are the checkpoint: a run that is killed and
    resumed ends with the same bits. With several hosts all of them call this.

    Args:
      session: Of the run.
      watch: Called with the number of rounds played and the policy, before each checkpoint is written: once more for
        the same round if the run is killed in between.

    Returns:
      The policy after the last round.
    """
    settings, mesh = session.settings, session.mesh
    record = settings.record
    assert record is not None
    if any(needs(record) and getattr(session.inputs, name) is None for name, needs in NEEDS.items()):
        inputs = load_inputs(settings, record, session.rows["train"], session.tokenizer)
        session = dataclasses.replace(session, inputs=inputs)
    count = record.rounds or settings.steps
    tx = optimizer(**schedule_of(settings), epochs=record.epochs)
    (players, frozen), first = _players(session, record, tx), 0
    folder, fingerprint = session.directory and session.directory / "checkpoints", fingerprint_of(session)
    if folder and session.resume and (first := checkpoint.latest(folder, fingerprint=fingerprint) or 0):
        players = checkpoint.restore(folder, first, players)
    draw = _drawing(session, record, minibatches=settings.steps // count)
    fit = _fitting(session, record, players, frozen, tx, minibatches=settings.steps // count)

    def policy() -> Transformer:
        params = distributed.replicate(players.state.params, mesh)
        return merge_policy(params["model"] if isinstance(params, dict) else params, frozen)

    silent, ends = not distributed.is_main(), text.end_ids(session.tokenizer)
    with (
        Journal(session.directory, resume_step=first if first else None) as journal,
        checkpoint.Saver(folder, fingerprint=fingerprint) as saver,
        tqdm(total=count, initial=first, desc=settings.method, unit="round", disable=silent) as bar,
    ):
        for r in range(first, count):
            key, learn = jax.random.split(jax.random.fold_in(stream(settings.seed, "rounds"), r))
            drawn, told, draws = draw(at_work(players, record.sources, frozen=frozen), key, r)
            players, scalars = fit(players, drawn, told, learn)
            more = {"drawn_reward": _drawn_reward(told, drawn), "truncated": share_cut(drawn, ends, record)}
            more |= {"draws": draws} if record.resample else {}
            line = journal.write(r, {**scalars, **more})
            values = line.values()
            bar.set_postfix_str(json.dumps({k: round(values[k], 3) for k in ("reward", "kl_k1") if k in values}))
            bar.update()
            if (r + 1) % settings.checkpoint_every == 0 or r + 1 == count:
                if watch is not None:
                    watch(r + 1, policy())
                saver.save(r + 1, players, after=line.written)
    return policy()


def _players(session: Session, record: Method, tx: optax.GradientTransformation) -> tuple[Players, Params]:
    """The players before the first round, with the critics they need, and what they have in common."""
    trained, frozen = adapters(session)
    if record.critics:
        trained = with_critics(trained, features=session.model.config.features, num=record.critics)
    return shard(rounds.init_players(record, trained, tx), session.mesh), frozen


def _fitting(
    session: Session,
    record: Method,
    players: Players,
    frozen: Params,
    tx: optax.GradientTransformation,
    *,
    minibatches: int,
) -> Callable[[Players, Candidates, Feedback, PRNGKey], tuple[Players, dict[str, Array]]]:
    """The compiled `tiltjax.train.rounds.fit`, on the mesh; what all hosts hold in NumPy goes in."""
    settings, mesh, place = session.settings, session.mesh, batch_sharding(session.mesh)
    size = _rows(settings, record)
    options: dict[str, Any] = {"tx": tx, "beta": record.own_beta(settings.beta), "minibatches": minibatches}

    def run(frozen, players, drawn, told, key):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            view = model_view(frozen=frozen, temperature=record.temperature, rows=size // settings.microbatches)
            return rounds.fit(
                record, players, drawn, told, key, view=view, microbatches=settings.microbatches, **options
            )

    places, whole = shardings(players, mesh), NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(
        run,
        in_shardings=(shardings(frozen, mesh), places, place, place, whole),
        out_shardings=(places, whole),
        donate_argnums=1,
    )
    mine = distributed.host_rows(place, size * minibatches)

    def fit(players: Players, drawn: Candidates, told: Feedback, key: PRNGKey):
        here = jax.tree.map(lambda x: x[mine], (drawn, told))
        return compiled(frozen, players, *distributed.global_batch(here, place, size * minibatches), key)

    return fit


def _rows(settings: Settings, record: Method) -> int:
    """Rows of a mini-batch: its prompts, and as many again where each brings a text of the corpus."""
    return settings.batch_size * (2 if "corpus" in record.sources else 1)


def _drawing(
    session: Session, record: Method, *, minibatches: int
) -> Callable[[Players, PRNGKey, int], tuple[Candidates, Feedback, float]]:
    """``(players at work, key, round) -> candidates, feedback, draws per mini-batch``, all in NumPy, on every host.

    Within a round the next mini-batch is being drawn while the host rewards one; an online record has one a round.
    """
    settings, inputs, B = session.settings, session.inputs, session.settings.batch_size
    place = batch_sharding(session.mesh)
    mine = distributed.host_rows(place, B)
    asked, order = _prompts(session), epoch_batches(settings.num_prompts, B, seed=settings.seed)
    ends = text.end_ids(session.tokenizer)
    corpus = np.array([source == "corpus" for source, num in record.draw for _ in range(num)])
    write = model_sample(
        max_tokens=settings.max_tokens,
        eos_id=ends,
        pad_id=text.pad_id(session.tokenizer),
        **settings.law(),
        mixture=record.mixture,
        slots=None if settings.sample_batch >= B else settings.sample_batch * record.num_candidates,
        mesh=session.mesh,
    )

    def sample(rows, key, players, source, prompts, num):
        if source == "data":
            return inputs.demonstrated(key, rows, prompts, num)
        if source == "corpus":  # Its texts have prompts of their own: they come in by `mixed_in`.
            shape = (B, num, settings.max_tokens)
            empty = np.zeros(shape, np.int32)
            return dataclasses.replace(
                prompts, completion=empty, completion_mask=empty > 0, old_token_logp=np.zeros(shape, np.float32)
            )
        here = distributed.global_batch(take(prompts, mine), place, B)
        return whole_on_every_host(write(key, players, source, here, num), place)

    def begin(players: Players, key: PRNGKey, rows: Int[Array, " B"]) -> list[Candidates]:
        """What the devices are going to fill."""
        return rounds.draw(record, players, take(asked, rows), key, sample=functools.partial(sample, rows))

    def end(rows: Int[Array, " B"], begun: list[Candidates]) -> tuple[Candidates, Feedback]:
        drawn = jax.device_get(rounds.join(record, take(asked, rows), distributed.fetch(begun)))
        if drawn.old_token_logp is not None:
            check_candidates("sample", "the log-probability", drawn.old_token_logp, rows)
        return drawn, feedback(session, record, rows, drawn)

    def minibatch(players: Players, key: PRNGKey, step: int, begun: list) -> tuple[Candidates, Feedback, int]:
        rows = order(step)
        drawn, told = end(rows, begun)
        good, seen, draws = _informative(told), set(rows.tolist()), 1
        while draws <= record.resample and not good.all() and len(seen) < settings.num_prompts:
            left = np.setdiff1d(np.arange(settings.num_prompts), list(seen))
            left = generator(settings.seed, "redraw", step, draws).permutation(left)[:B]
            again = np.resize(left, B)
            more = end(again, begin(players, jax.random.fold_in(key, draws), again))
            drawn, told = _replaced((drawn, told), good, more, _informative(more[1]) & (np.arange(B) < len(left)))
            good, seen, draws = _informative(told), seen | set(left.tolist()), draws + 1
        if corpus.any():
            drawn, told = inputs.mixed_in(jax.random.fold_in(key, 1 + record.resample), corpus, drawn, told)
        return without_truncated(drawn, ends) if settings.mask_truncated else drawn, told, draws

    def draw(players: Players, key: PRNGKey, r: int) -> tuple[Candidates, Feedback, float]:
        def start(m: int) -> list[Candidates]:
            first = jax.random.fold_in(jax.random.fold_in(key, m), 0)
            return begin(players, first, order(r * minibatches + m))

        def finish(m: int, begun: list[Candidates]) -> tuple[Candidates, Feedback, int]:
            return minibatch(players, jax.random.fold_in(key, m), r * minibatches + m, begun)

        parts = (part for _, part in overlapped(range(minibatches), start, finish))
        drawn, told, draws = zip(*parts, strict=True)
        return concatenate(drawn), jax.tree.map(lambda *x: np.concatenate(x), *told), float(np.mean(draws))

    return draw


def _informative(told: Feedback) -> Bool[Array, " B"]:
    """Whether the candidates of a prompt differ in reward: if none does, no group method learns anything from it."""
    return np.ptp(np.asarray(told.reward), axis=1) > 0


def _drawn_reward(told: Feedback, drawn: Candidates) -> float:
    """The mean reward as it was told, whatever the method makes of it."""
    return float(np.mean(told.reward, where=True if drawn.where is None else drawn.where))


def _replaced(batch: tuple, good: Bool[Array, " B"], more: tuple, better: Bool[Array, " B"]) -> tuple:
    """The batch with its uninformative rows replaced, as far as they go, by the informative ones of another."""
    into, of = np.flatnonzero(~good), np.flatnonzero(better)
    into, of = into[: len(of)], of[: len(into)]

    def put(x, y):
        x = np.array(x)
        x[into] = y[of]
        return x

    return jax.tree.map(put, batch, more)


def _prompts(session: Session) -> Candidates:
    tokens = session.encode(session.rows["train"])
    prompt, mask = pad(tokens, pad_id=text.pad_id(session.tokenizer))
    empty = np.zeros((len(prompt), 0, session.settings.max_tokens), np.int32)
    return Candidates(prompt=prompt, prompt_mask=mask, completion=empty, completion_mask=empty > 0)
