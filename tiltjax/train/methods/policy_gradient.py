"""Methods that climb: policy gradients with their baselines, clips and critics."""

import functools

import jax
import jax.numpy as jnp
import optax

from tiltjax.advantages import batch_whitened, prime_advantage
from tiltjax.losses import policy_gradient as pg
from tiltjax.losses.constrained import (
    Multiplier,
    combined_advantage,
    init_multiplier,
    ptx_loss,
    update_multiplier,
)
from tiltjax.losses.penalties import kl_k3
from tiltjax.losses.process import implicit_prm_ce_loss, implicit_process_reward
from tiltjax.ops.masked import Average, average, masked_mean
from tiltjax.train.method import Batch, Memory, Method, ReferenceUpdate, Round, View
from tiltjax.train.methods.labels import (
    actor_critic,
    centred,
    chain,
    first_source,
    greedy_centred,
    group_scaled,
    informative,
    left_out,
    logp_of,
    overlong,
    regularised,
    surrogate,
    whitened_to_go,
)
from tiltjax.types import Array, Numeric, Params, PyTree

__all__ = ["POLICY_GRADIENT", "process_reward_memory"]

SHAO = "Shao et al., 2024, arXiv:2402.03300"
VALUE_WEIGHT = 0.1
PROCESS_BETA = 0.05
PROCESS_RATE = 1e-3
PTX_WEIGHT = 0.1
DAPO_DRAWS = 9


def _reinforce(token_logp, old_token_logp, advantage, mask):
    return pg.reinforce_loss(token_logp, advantage, mask)


_clip = pg.ppo_clip_loss
_wide = functools.partial(pg.ppo_clip_loss, clip_high=0.28)


def _critics(view: View, batch: Batch) -> Average:
    """The value loss of every critic that has targets."""
    if view.value is None or batch.old.value is None or batch.returns is None:
        raise ValueError("view must give values for an actor-critic method, got None")
    triples = zip(*(jnp.moveaxis(x, -1, 0) for x in (view.value, batch.old.value, batch.returns)), strict=False)
    values = sum(pg.value_loss(*triple, batch.mask) for triple in triples)
    return pg.aggregate(values, batch.mask, mode="token_mean", where=batch.where)


def _with_critics(actor: Average, view: View, batch: Batch) -> Average:
    critic = _critics(view, batch)
    return Average(total=actor.total + VALUE_WEIGHT * critic.total, count=actor.count)


def _ppo_loss(view: View, batch: Batch, beta: Numeric) -> Average:
    return _with_critics(surrogate(_clip, mode="token_mean")(view, batch, beta), view, batch)


def _ppo(now: Round, batch: Batch) -> Batch:
    advantage, returns = actor_critic(batch.reward, batch, beta=now.beta)
    return batch.change(advantage=batch_whitened(advantage, batch.mask), returns=returns[..., None])


def _ptx_ppo_loss(view: View, batch: Batch, beta: Numeric) -> Average:
    policy = _ppo_loss(view, batch, beta)
    mask = batch.candidates.completion_mask & (batch.source == 1)[..., None]
    mask = mask if batch.candidates.loss_mask is None else mask & batch.candidates.loss_mask
    data = pg.aggregate(ptx_loss(view.token_logp, mask, coefficient=PTX_WEIGHT), mask, mode="token_mean")
    share = data.mean * policy.count
    return Average(total=policy.total + share, count=policy.count)


def _cost_update(now: Round, batch: Batch, memory: PyTree) -> PyTree:
    if now.feedback.cost is None:
        raise ValueError("feedback must have a cost for a constrained method, got None")
    return update_multiplier(memory, now.feedback.cost, batch.where)


def _multiplier(memory: Multiplier) -> dict[str, Array]:
    return {"multiplier": jnp.exp(memory.log_multiplier), "cost": masked_mean(memory.cost, memory.seen)}


def _safe(now: Round, batch: Batch) -> Batch:
    # The KL stands in both streams, with opposite signs: the combined strength stays beta.
    advantage, returns = actor_critic(batch.reward, batch, beta=now.beta)
    assert now.feedback.cost is not None
    harm, cost_returns = actor_critic(now.feedback.cost, batch, beta=-now.beta, critic=1)
    both = combined_advantage(advantage, harm, log_multiplier=now.memory.log_multiplier)
    stacked = jnp.stack([returns, cost_returns], axis=-1)
    return batch.change(advantage=batch_whitened(both, batch.mask), returns=stacked)


def process_reward_memory(*, beta: float = PROCESS_BETA, learning_rate: float = PROCESS_RATE) -> Memory:
    """PRIME's implicit process reward model: a second policy, trained on the outcomes of every round by cross-entropy.

    Args:
      beta: Scale of the implicit reward, reward units per nat.
      learning_rate: Of its own Adam.

    Returns:
      `Memory` whose state is ``(params, opt_state)``.
    """
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(learning_rate))

    def init(params: Params) -> PyTree:
        copy = jax.tree.map(jnp.copy, params)
        return copy, tx.init(copy)

    def update(now: Round, batch: Batch, memory: PyTree) -> PyTree:
        params, opt_state = memory
        correct = now.feedback.correct
        if correct is None:
            correct = batch.reward > 0
        ref_logp = logp_of(batch.ref, batch)

        def loss(params: Params) -> Array:
            logp = logp_of(now.view(params, batch.candidates), batch)
            values = implicit_prm_ce_loss(logp, ref_logp, correct, beta=beta, where=batch.where)
            return average(values, batch.where).mean

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Memory(init=init, update=update)


def _prime(now: Round, batch: Batch) -> Batch:
    said = now.view(now.memory[0], batch.candidates).token_logp
    process = implicit_process_reward(said, batch.ref.token_logp, beta=PROCESS_BETA, where=batch.mask)
    return batch.change(advantage=prime_advantage(process, batch.reward, batch.mask))


def _mdpo(now: Round, batch: Batch) -> Batch:
    # Not whitened: the advantages are divided by beta, which is in reward units.
    advantage, returns = actor_critic(batch.reward, batch, beta=now.beta)
    return batch.change(advantage=advantage, returns=returns[..., None])


def _mdpo_loss(view: View, batch: Batch, beta: Numeric) -> Average:
    values = pg.mdpo_loss(view.token_logp, batch.old.token_logp, batch.advantage, batch.mask, beta=beta)
    return _with_critics(pg.aggregate(values, batch.mask, mode="token_mean", where=batch.where), view, batch)


def _mdloo_loss(view: View, batch: Batch, beta: Numeric) -> Average:
    arrays = (view.token_logp, batch.old.token_logp, batch.advantage, batch.mask)
    values = pg.mdloo_loss(*arrays, beta=beta)
    return pg.aggregate(values, batch.mask, mode="seq_mean_token_sum", where=batch.where)


_rloo_loss = surrogate(_reinforce, mode="seq_mean_token_sum")
_grpo_loss = surrogate(_clip, mode="seq_mean_token_mean", kl=kl_k3)

POLICY_GRADIENT = (
    Method("rloo", "Ahmadian et al., 2024, arXiv:2402.14740", _rloo_loss, (("current", 4),), label=regularised,
           advantage=left_out, beta=0.05, zero_beta=True, learning_rate=1e-6),
    Method("rloo_stale", "Ahmadian et al., 2024, arXiv:2402.14740", _rloo_loss, (("previous", 4),),
           label=regularised, advantage=left_out, beta=0.05, zero_beta=True, learning_rate=1e-6),
    Method("remax", "Li et al., 2023, arXiv:2310.10505", _rloo_loss, (("current", 1), ("greedy", 1)),
           label=regularised, advantage=greedy_centred, beta=0.05, zero_beta=True, learning_rate=1e-6),
    Method("reinforce_pp", "Hu et al., 2025, arXiv:2501.03262", surrogate(_clip, mode="token_mean"),
           (("current", 4),), advantage=whitened_to_go, beta=0.01, zero_beta=True, learning_rate=5e-7),
    Method("grpo", SHAO, _grpo_loss, (("current", 64),), advantage=group_scaled, beta=0.04, zero_beta=True,
           learning_rate=1e-6),
    Method("grpo_4_epochs", SHAO, _grpo_loss, (("current", 64),), advantage=group_scaled, epochs=4, beta=0.04,
           zero_beta=True, learning_rate=1e-6),
    Method("grpo_prorl", "Liu et al., 2025, arXiv:2505.24864", _grpo_loss, (("current", 16),),
           advantage=group_scaled, beta=0.001, zero_beta=True, learning_rate=2e-6, optimum="none",
           reference=ReferenceUpdate(every=16, reset_optimizer=True)),
    Method("dr_grpo", "Liu et al., 2025, arXiv:2503.20783", surrogate(_clip, mode="dr_grpo", kl=kl_k3),
           (("current", 8),), advantage=centred, beta=0.0, zero_beta=True, learning_rate=1e-6),
    Method("dapo", "Yu et al., 2025, arXiv:2503.14476", surrogate(_wide, mode="token_mean", kl=kl_k3),
           (("current", 16),), label=chain(informative, overlong), advantage=group_scaled, beta=0.0, zero_beta=True,
           resample=DAPO_DRAWS, learning_rate=1e-6),
    Method("dapo_4_epochs", "Yu et al., 2025, arXiv:2503.14476", surrogate(_wide, mode="token_mean", kl=kl_k3),
           (("current", 16),), label=chain(informative, overlong), advantage=group_scaled, epochs=4, beta=0.0,
           zero_beta=True, resample=DAPO_DRAWS, learning_rate=1e-6),
    Method("gspo", "Zheng et al., 2025, arXiv:2507.18071",
           surrogate(pg.gspo_loss, mode="seq_mean_token_mean", kl=kl_k3), (("current", 16),),
           advantage=group_scaled, epochs=4, beta=0.0, zero_beta=True, learning_rate=1e-6),
    Method("cispo", "MiniMax, 2025, arXiv:2506.13585",
           surrogate(functools.partial(pg.cispo_loss, max_ratio=5.0), mode="token_mean", kl=kl_k3),
           (("current", 16),), advantage=group_scaled, epochs=4, beta=0.0, zero_beta=True, learning_rate=1e-6),
    Method("ppo", "Schulman et al., 2017, arXiv:1707.06347", _ppo_loss, (("current", 1),), advantage=_ppo, epochs=4,
           critics=1, beta=0.05, zero_beta=True, learning_rate=3e-6),
    Method("ppo_ptx", "Ouyang et al., 2022, arXiv:2203.02155", _ptx_ppo_loss, (("current", 3), ("corpus", 1)),
           label=first_source, advantage=_ppo, epochs=4, critics=1, beta=0.02, zero_beta=True, learning_rate=9e-6),
    # The paper's step size 1 / beta falls linearly from 1; here it is the strength of the KL in the reward throughout.
    Method("mdpo", "Tomar et al., 2020, arXiv:2005.09814", _mdpo_loss, (("current", 1),), advantage=_mdpo, epochs=10,
           critics=1, beta=0.05),
    Method("mdloo", "Gunter et al., 2024, arXiv:2407.21075", _mdloo_loss, (("current", 8),), label=regularised,
           advantage=left_out, epochs=4, beta=0.05),
    Method("safe_rlhf", "Dai et al., 2023, arXiv:2310.12773", _ppo_loss, (("current", 1),), advantage=_safe,
           epochs=4, critics=2, beta=0.02, zero_beta=True, learning_rate=1e-5, optimum="constrained",
           memory=Memory(init=lambda params: init_multiplier(1.0), update=_cost_update, measures=_multiplier)),
    Method("prime", "Cui et al., 2025, arXiv:2502.01456", surrogate(_clip, mode="token_mean"), (("current", 4),),
           label=regularised, advantage=_prime, memory=process_reward_memory(), beta=0.0, zero_beta=True,
           learning_rate=5e-7),
)  # fmt: skip
"""RLOO, ReMax, REINFORCE++, GRPO and its kin, PPO, mirror descent, Safe RLHF, PRIME."""
