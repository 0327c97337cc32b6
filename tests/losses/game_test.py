"""Self-play losses by enumeration: what each expects, where it stops, and which step of the game it takes."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.special import log_softmax, rel_entr, softmax

from tests.losses.tabular import minimiser, ordered_pairs
from tiltjax.losses.game import (
    dno_loss,
    geometric_mixture_logits,
    inpo_loss,
    magnetic_kl_loss,
    mpo_loss,
    nash_md_loss,
    nash_md_surrogate_loss,
    self_play_reward,
    spin_loss,
    spo_reward,
    xpo_loss,
)
from tiltjax.losses.mle import sft_loss
from tiltjax.losses.preference import dpo_loss, hinge_loss, ipo_loss

# For the contract test of every loss: the losses whose shapes are not its own, and whose contract is here.
COVERED = {magnetic_kl_loss, mpo_loss, nash_md_loss, nash_md_surrogate_loss}

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(8, 2))).astype(np.float32)
REF_LOGP, OLD_LOGP = ((LOGP + RNG.normal(size=(8, 2))).astype(np.float32) for _ in range(2))
WIN_RATE = RNG.random((8, 2), np.float32)


class PairTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_links_of_spin_are_dpo_and_hinge(self):
        run = self.variant(lambda x, ref: tuple(spin_loss(x, ref, beta=0.3, link=k) for k in ("logistic", "hinge")))
        logistic, hinge = run(LOGP, REF_LOGP)
        np.testing.assert_allclose(logistic, dpo_loss(LOGP, REF_LOGP, beta=0.3), rtol=1e-5)
        np.testing.assert_allclose(hinge, hinge_loss(LOGP, REF_LOGP, beta=0.3), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_dno_of_hard_labels_is_dpo_and_order_is_without_meaning(self):
        run = self.variant(lambda *arrays: dno_loss(*arrays, beta=0.3))
        hard = np.broadcast_to(np.float32([200, 0]), (8, 2))
        np.testing.assert_allclose(run(LOGP, REF_LOGP, hard), dpo_loss(LOGP, REF_LOGP, beta=0.3), rtol=1e-6)
        swapped = run(LOGP[:, ::-1], REF_LOGP[:, ::-1], WIN_RATE[:, ::-1])
        np.testing.assert_allclose(swapped, run(LOGP, REF_LOGP, WIN_RATE), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_inpo_is_ipo_at_both_ends(self):
        beta = np.linspace(0.05, 0.4, 8, dtype=np.float32)  # One per pair.
        run = self.variant(lambda beta, eta: inpo_loss(LOGP, REF_LOGP, OLD_LOGP, beta=beta, eta=eta))
        ipo = functools.partial(ipo_loss, length_average=False)
        np.testing.assert_allclose(run(beta, beta), ipo(LOGP, REF_LOGP, beta=beta), rtol=1e-6)
        np.testing.assert_allclose(run(0.0, beta), ipo(LOGP, OLD_LOGP, beta=beta), rtol=1e-6)
        grads = jax.jit(jax.grad(lambda *x: inpo_loss(*x, beta=0.2, eta=0.2).sum(), argnums=(0, 1, 2)))(
            LOGP, REF_LOGP, OLD_LOGP
        )
        expected = jax.jit(jax.grad(lambda x: ipo(x, REF_LOGP, beta=0.2).sum()))(LOGP)
        np.testing.assert_allclose(grads[0], expected, rtol=1e-6)
        assert all((g == 0).all() for g in grads[1:])

    @chex.variants(with_jit=True)
    def test_xpo_pushes_the_completion_of_the_reference_down(self):
        drawn = np.arange(2) == RNG.integers(2, size=(8, 1))
        slope = jax.grad(lambda x: xpo_loss(x, REF_LOGP, drawn, beta=0.3, alpha=0.125).sum())
        plain = jax.jit(jax.grad(lambda x: dpo_loss(x, REF_LOGP, beta=0.3).sum()))(LOGP)
        np.testing.assert_allclose(self.variant(slope)(LOGP), plain + 0.125 * drawn, rtol=1e-5)
        np.testing.assert_array_equal(
            xpo_loss(LOGP, REF_LOGP, drawn, beta=0.3, alpha=0), dpo_loss(LOGP, REF_LOGP, beta=0.3)
        )


def expected_spin_gradient(logits, data, opponent, link, beta=0.7):
    """Gradient in the logits of the loss expected over real and generated completions, these held fixed."""
    pairs = np.array(list(itertools.product(range(len(data)), repeat=2)))
    mass = data[pairs[:, 0]] * opponent[pairs[:, 1]]

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(mass * spin_loss(logp[pairs], np.log(opponent)[pairs], beta=beta, link=link))

    return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(logits)))


def test_linear_spin_is_sft_only_against_the_current_policy():
    rng = np.random.default_rng(1)
    logits, data, other = rng.normal(size=5), rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    current = softmax(logits)
    with jax.enable_x64(True):
        sft = lambda x: jnp.sum(data * sft_loss(jax.nn.log_softmax(x)[:, None]))
        sft = np.asarray(jax.jit(jax.grad(sft))(jnp.asarray(logits)))
        np.testing.assert_allclose(sft, current - data, atol=1e-15)
        np.testing.assert_allclose(expected_spin_gradient(logits, data, current, "linear"), 0.7 * sft, atol=1e-14)
        # The opponent stays where it was while the policy moves on: one constant slope, at the data too.
        for at in (logits, np.log(data)):
            stale = expected_spin_gradient(at, data, other, "linear")
            np.testing.assert_allclose(stale, 0.7 * (other - data), atol=1e-14)
            assert np.abs(stale - 0.7 * (softmax(at) - data)).max() > 0.05
        # Other links are not SFT even then, but each stops where the opponent is the data.
        assert np.abs(expected_spin_gradient(logits, data, current, "logistic") - 0.7 * sft).max() > 0.01
        for link in ("logistic", "linear", "hinge"):
            stop = expected_spin_gradient(np.log(data), data, data, link)
            np.testing.assert_allclose(stop, np.zeros(5), atol=1e-15)


ARMS, BETA, ETA = 5, 0.15, 0.4


def game(seed):
    """A preference matrix that no reward explains, a reference and a last policy, over `ARMS` completions."""
    rng = np.random.default_rng(seed)
    wins = rng.random((ARMS, ARMS))
    ref, old = rng.dirichlet(3 * np.ones(ARMS), size=2)
    return wins / (wins + wins.T), ref, old


def mirror_step(wins, ref, old):
    return softmax(BETA / ETA * np.log(ref) + (1 - BETA / ETA) * np.log(old) + wins @ old / ETA)


def test_dno_fits_the_tilt_of_the_last_policy_by_its_win_rate():
    wins, sampler, old = game(2)
    pairs, rate = ordered_pairs(ARMS), wins @ old
    mass = sampler[pairs].prod(-1)  # Pairs of any distribution.
    loss = lambda logp: jnp.sum(mass * dno_loss(logp[pairs], np.log(old)[pairs], rate[pairs], beta=ETA))
    np.testing.assert_allclose(minimiser(loss, old), softmax(np.log(old) + rate / ETA), atol=1e-9)


def test_inpo_takes_the_mirror_descent_step():
    wins, ref, old = game(3)
    pairs = ordered_pairs(ARMS)
    chosen = wins[pairs[:, 0], pairs[:, 1]]

    def loss(logp, sampler):
        arrays = (x[pairs] for x in (logp, np.log(ref), np.log(old)))
        return jnp.sum(sampler[pairs].prod(-1) * chosen * inpo_loss(*arrays, beta=BETA, eta=ETA))

    expected = mirror_step(wins, ref, old)
    np.testing.assert_allclose(minimiser(lambda logp: loss(logp, old), old), expected, atol=1e-9)
    assert np.abs(minimiser(lambda logp: loss(logp, ref), old) - expected).max() > 1e-3  # Not pairs of another policy.


def test_magnetic_kl_gives_the_same_step():
    # eta = beta + 1 / step_size; and the closed form of magnetic mirror descent.
    wins, magnet, old = game(3)
    s = 1 / (ETA - BETA)

    def loss(logp):
        pulls = magnetic_kl_loss(logp, jnp.log(magnet), jnp.log(old), beta=BETA, step_size=s)
        return pulls - jnp.exp(logp) @ (wins @ old)

    found = minimiser(loss, old)
    np.testing.assert_allclose(found, mirror_step(wins, magnet, old), atol=1e-9)
    closed = (np.log(old) + BETA * s * np.log(magnet) + s * wins @ old) / (1 + BETA * s)
    np.testing.assert_allclose(found, softmax(closed), atol=1e-9)


class MagneticTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_value_padding_and_gradients(self):
        rng = np.random.default_rng(4)
        arrays, mask = rng.normal(size=(3, 4, 5)).astype(np.float32), np.array([True, False, True, True])
        dirty = np.where(mask[:, None], arrays, np.nan)
        run = lambda *x: magnetic_kl_loss(*x, mask, beta=0.3, step_size=2.0)
        p, m, q = softmax(arrays.astype(np.float64), -1)
        expected = 0.3 * rel_entr(p, m).sum(-1) + rel_entr(p, q).sum(-1) / 2
        np.testing.assert_allclose(self.variant(run)(*dirty), np.where(mask, expected, 0), rtol=1e-5)
        grads = jax.jit(jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2)))(*map(jnp.asarray, dirty))
        pull = 0.3 * (np.log(p / m) - rel_entr(p, m).sum(-1, keepdims=True))
        pull = p * (pull + (np.log(p / q) - rel_entr(p, q).sum(-1, keepdims=True)) / 2)
        np.testing.assert_allclose(grads[0], np.where(mask[:, None], pull, 0), rtol=1e-4, atol=1e-6)
        assert all((g == 0).all() for g in grads[1:])


# A tree of 3 tokens and 2 steps; token 0 ends the completion.
LEAVES = np.array([[0, 0], *itertools.product([1, 2], range(3))])
MASK = np.array([[True, leaf[0] != 0] for leaf in LEAVES])


def leaf_logp(params):
    first, second = jax.nn.log_softmax(params[0]), jax.nn.log_softmax(params[1:])
    return jnp.stack([first[LEAVES[:, 0]], jnp.where(MASK[:, 1], second[LEAVES[:, 0], LEAVES[:, 1]], 0)], -1)


def test_nash_md_has_the_gradient_of_the_regularised_win_rate_and_the_surrogate_has_not():
    rng, beta = np.random.default_rng(5), 0.3
    params, ref_params, win_rate = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.random(len(LEAVES))

    def expected(loss, params, ref):
        """Over the policy's own completions, these held fixed."""
        logp = leaf_logp(params)
        drawn = jax.lax.stop_gradient(jnp.exp(logp.sum(-1)))
        return jnp.sum(drawn * loss(logp, ref, win_rate, MASK, beta=beta))

    def regularised(params, ref):
        logp = leaf_logp(params)
        return jnp.exp(logp.sum(-1)) @ (win_rate - beta * (logp - ref).sum(-1))

    def frozen(params, ref):
        """The same with the KL of the second token under prefixes that do not follow the policy."""
        logp = leaf_logp(params)
        prefix, token = jax.lax.stop_gradient(jnp.exp(logp[:, 0])), jnp.where(MASK[:, 1], jnp.exp(logp[:, 1]), 0)
        once = np.array([np.flatnonzero(LEAVES[:, 0] == v)[0] for v in range(3)])
        kl = jnp.sum((jnp.exp(logp) * (logp - ref))[once, 0]) + jnp.sum(prefix * token * (logp - ref)[:, 1])
        return jnp.exp(logp.sum(-1)) @ win_rate - beta * kl

    @jax.jit
    def gradients(params, ref):
        losses = (functools.partial(expected, loss) for loss in (nash_md_loss, nash_md_surrogate_loss))
        return [jax.grad(f)(params, ref) for f in (*losses, regularised, frozen)]

    with jax.enable_x64(True):
        exact, surrogate, full, held = map(
            np.asarray, gradients(jnp.asarray(params), leaf_logp(jnp.asarray(ref_params)))
        )
    np.testing.assert_allclose(exact, -full, atol=1e-14)
    np.testing.assert_allclose(surrogate, -held, atol=1e-14)
    assert np.abs(full - held).max() > 1e-2


def test_mpo_has_the_gradient_of_the_game_on_every_inner_step():
    # Completions of one token: whole completions. The policy has moved away from the one that drew them.
    wins, magnet, old = game(7)
    logits = np.random.default_rng(8).normal(size=ARMS)
    advantage, s = wins @ old - 0.5, 2.5

    def truth(logits):
        pulls = magnetic_kl_loss(logits, np.log(magnet), np.log(old), beta=BETA, step_size=s)
        return pulls - jax.nn.softmax(logits) @ advantage

    def expected(logits, **kl):
        arrays = (x[:, None] for x in (jax.nn.log_softmax(logits), np.log(magnet), np.log(old)))
        return old @ mpo_loss(*arrays, advantage, np.full((ARMS, 1), True), beta=BETA, step_size=s, **kl)[:, 0]

    def exact(logits):
        pulls = magnetic_kl_loss(logits, np.log(magnet), np.log(old), beta=BETA, step_size=s)
        return expected(logits, token_kl=jnp.broadcast_to(pulls, (ARMS, 1)))

    with jax.enable_x64(True):
        run = jax.jit(lambda x: [jax.value_and_grad(f)(x) for f in (truth, expected, exact)])
        (value, slope), *rest = run(jnp.asarray(logits))
        for ours, gradient in rest:
            np.testing.assert_allclose(ours, value, rtol=1e-13)
            np.testing.assert_allclose(gradient, slope, atol=1e-14)


B, N, T = 8, 3, 4


def togo(x):
    return x[::-1].cumsum()[::-1]


def mpo_formula(logp, magnet, old, advantage):
    lm, lo = logp - magnet, logp - old
    return np.exp(lo) * (-advantage + 0.3 * (np.expm1(-lm) + lm) + (np.expm1(-lo) + lo) / 0.7)


TOKEN_LOSSES = {
    "nash_md": (
        functools.partial(nash_md_loss, beta=0.3),
        lambda logp, ref, p: -((p - 0.5 - 0.3 * togo(logp - ref)) * logp).sum(),
        2,
    ),
    "nash_md_surrogate": (
        functools.partial(nash_md_surrogate_loss, beta=0.3),
        lambda logp, ref, p: -((p - 0.5 - 0.3 * (logp - ref)) * logp).sum(),
        2,
    ),
    "mpo": (functools.partial(mpo_loss, beta=0.3, step_size=0.7), mpo_formula, 3),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses(name):
    """The float64 formula of the real tokens; NaN in padding changes nothing; one answer on every arrangement."""
    loss, formula, n = TOKEN_LOSSES[name]
    rng = np.random.default_rng(9)
    logp = -rng.gamma(2.0, size=(B, N, T))
    tokens = [logp, *(logp + 0.4 * rng.normal(size=logp.shape) for _ in range(n - 1))]
    arrays = [x.astype(np.float32) for x in (*tokens, rng.random((B, N)))]
    mask = rng.random((B, N, T)) < 0.6
    mask[0], mask[1, 1] = False, False
    dirty = [np.where(mask if x.ndim == 3 else mask.any(-1), x, np.nan).astype(np.float32) for x in arrays]

    def total(*arrays):
        value = loss(*arrays, mask)
        return value.sum(), value

    run = jax.jit(jax.value_and_grad(total, argnums=tuple(range(n + 1)), has_aux=True))
    for dtype in (jnp.float32, jnp.bfloat16):
        low = [jnp.asarray(x, dtype) for x in dirty]
        (_, value), _ = run(*low)
        assert value.dtype == jnp.float32
        expected = np.zeros(value.shape)
        for i in np.ndindex(B, N):
            few = [np.asarray(x, np.float64)[i] for x in low]
            few = [x[mask[i]] if x.ndim else x for x in few]
            if value.ndim == 3:
                expected[i][mask[i]] = formula(*few)
            elif mask[i].any():
                expected[i] = formula(*few)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    clean, changed = run(*map(jnp.asarray, arrays)), run(*map(jnp.asarray, dirty))
    chex.assert_trees_all_equal(changed, clean)
    assert (np.asarray(clean[1][0])[mask] != 0).any()
    assert (np.asarray(clean[1][0])[~mask] == 0).all()
    assert all((g == 0).all() for g in clean[1][1:])
    extremes = [np.float32([-1e4, 0])] * n + [np.float32([0, 1])]
    wild = [rng.choice(values, x.shape) for values, x in zip(extremes, arrays, strict=True)]
    chex.assert_tree_all_finite(run(*map(jnp.asarray, wild)))

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    expected, rows = clean[0][1], PartitionSpec("data")
    close(jax.jit(jax.vmap(loss))(*arrays, mask), expected)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    close(jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=rows, out_specs=rows))(*arrays, mask), expected)
    close(jax.pmap(loss)(*arrays, mask), expected)


class MixtureTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_token_mixture_is_that_of_completions_of_one_token_only(self):
        logits, ref = np.random.default_rng(10).normal(size=(2, 4, 3)).astype(np.float32)
        mix = self.variant(lambda x, y: geometric_mixture_logits(x, y, mixture=0.25))(logits, ref)
        ours, theirs = log_softmax(logits.astype(np.float64), -1), log_softmax(ref.astype(np.float64), -1)
        np.testing.assert_allclose(mix[0], log_softmax(0.75 * ours[0] + 0.25 * theirs[0]), rtol=1e-5)
        # Two tokens: row 0 draws the first, row 1 + v the one after v.
        both = lambda x: (x[0][:, None] + x[1:]).reshape(-1)
        token_wise, whole = np.exp(both(np.asarray(mix))), softmax(0.75 * both(ours) + 0.25 * both(theirs))
        np.testing.assert_allclose([token_wise.sum(), whole.sum()], [1, 1], rtol=1e-6)
        assert np.abs(token_wise - whole).max() > 5e-3
        # They differ by what the second token's normaliser makes of each prefix, and by nothing else.
        z = np.exp(0.75 * ours[1:] + 0.25 * theirs[1:]).sum(-1)
        undone = token_wise.reshape(3, 3) * z[:, None]
        np.testing.assert_allclose(undone / undone.sum(), whole.reshape(3, 3), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_ends_and_impossible_tokens(self):
        logits, ref = np.float32([0.3, -np.inf, 1.0, 0.5]), np.float32([-np.inf, 0.2, 0.1, -0.4])
        run = self.variant(lambda b: geometric_mixture_logits(logits, ref, mixture=b))
        np.testing.assert_allclose(run(0.0), log_softmax(logits), rtol=1e-6)
        np.testing.assert_allclose(run(1.0), log_softmax(ref), rtol=1e-6)
        expected = [-np.inf, -np.inf, *log_softmax((0.4 * logits + 0.6 * ref)[2:].astype(np.float64))]
        np.testing.assert_allclose(run(0.6), expected, rtol=1e-5)


class RewardTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_mean_over_the_queue_and_over_the_others(self):
        rng = np.random.default_rng(11)
        queue = rng.random((2, 4, 6), np.float32)
        met = rng.random((2, 4, 6)) < 0.6
        met[0, 1] = False
        run = self.variant(lambda p, w: (spo_reward(p, where=w), spo_reward(p, centred=True, where=w)))
        plain, centred = run(np.where(met, queue, np.nan), met)
        for i in np.ndindex(2, 4):
            expected = queue[i][met[i]].mean(dtype=np.float64) if met[i].any() else np.nan
            np.testing.assert_allclose(plain[i], np.nan_to_num(expected), rtol=1e-5)
            np.testing.assert_allclose(centred[i], np.nan_to_num(expected - 0.5), rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True)
    def test_the_candidate_itself_and_masked_ones_take_no_part(self):
        rng = np.random.default_rng(12)
        wins = rng.random((3, 4, 4))
        wins = (wins / (wins + wins.swapaxes(-1, -2))).astype(np.float32)
        where = np.array([[True] * 4, [True, False, True, True], [False, False, True, False]])
        dirty = np.where(np.eye(4, dtype=bool) | ~where[:, None, :] | ~where[:, :, None], np.nan, wins)
        out = self.variant(lambda p, w: self_play_reward(p, centred=True, where=w))(dirty, where)
        for b, i in np.ndindex(3, 4):
            others = [wins[b, i, j] - 0.5 for j in range(4) if j != i and where[b, j]] if where[b, i] else []
            np.testing.assert_allclose(out[b, i], np.mean(others) if others else 0, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.sum(out, -1), np.zeros(3), atol=1e-6)  # One wins what another loses.
        np.testing.assert_allclose(self_play_reward(wins[:1]), out[:1] + 0.5, rtol=1e-5)
        assert (jax.grad(lambda p: self_play_reward(p).sum())(wins) == 0).all()


PAIR = (LOGP, REF_LOGP)
TOKENS = (np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spin_loss(*PAIR, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda: spin_loss(*PAIR, beta=1, link="square"), "link must be one of hinge, linear, logistic; got 'square'"),
        (lambda: dno_loss(*PAIR, WIN_RATE, beta=-1.0), "beta must be a finite number above 0, got -1.0"),
        (lambda: inpo_loss(*PAIR, OLD_LOGP, beta=0.3, eta=0.2), "eta must be at least beta, got 0.2 with beta 0.3"),
        (lambda: inpo_loss(*PAIR, OLD_LOGP, beta=0, eta=0.0), "eta must be a finite number above 0, got 0.0"),
        (lambda: inpo_loss(*PAIR, OLD_LOGP, beta=-0.1, eta=1.0), "beta must be at least 0, got -0.1"),
        (lambda: xpo_loss(*PAIR, LOGP > 0, beta=0.1, alpha=-1.0), "alpha must be at least 0, got -1.0"),
        (
            lambda: nash_md_loss(*TOKENS, np.zeros(1, np.float32), np.full((1, 2), True), beta=-1.0),
            "beta must be at least 0, got -1.0",
        ),
        (
            lambda: nash_md_surrogate_loss(*TOKENS, np.zeros(1, np.float32), np.full((1, 2), True), beta=-1.0),
            "beta must be at least 0, got -1.0",
        ),
        (lambda: geometric_mixture_logits(*PAIR, mixture=1.5), r"mixture must lie in \[0, 1\], got 1.5"),
        (
            lambda: magnetic_kl_loss(*PAIR, OLD_LOGP, beta=0.1, step_size=0.0),
            "step_size must be a finite number above 0, got 0.0",
        ),
        (
            lambda: mpo_loss(LOGP, LOGP, LOGP, LOGP, LOGP < 0, beta=-0.1, step_size=1.0),
            "beta must be at least 0, got -0.1",
        ),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
