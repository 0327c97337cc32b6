import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy as scipy_entropy

from tests.compiled import compiled
from tiltjax.losses.penalties import entropy, full_vocabulary_kl, kl_k1, kl_k2, kl_k3, kl_k3_corrected

entropy, full_vocabulary_kl, kl_k1, kl_k2, kl_k3, kl_k3_corrected = map(
    compiled, (entropy, full_vocabulary_kl, kl_k1, kl_k2, kl_k3, kl_k3_corrected)
)

RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS, OLD_LOGITS = RNG.normal(size=(3, 5))
FORMULAS = {
    kl_k1: lambda lr: lr,
    kl_k2: lambda lr: lr**2 / 2,
    kl_k3: lambda lr: np.expm1(-lr) + lr,
    kl_k3_corrected: lambda lr, lo: np.exp(lo) * (np.expm1(-lr) + lr),
}


def draw(shape=(3, 4, 6), seed=1):
    rng = np.random.default_rng(seed)
    token_logp = -rng.gamma(2.0, size=shape)
    ref, old = (token_logp + rng.normal(size=shape) for _ in range(2))
    mask = rng.random(shape) < 0.6
    return *(x.astype(np.float32) for x in (token_logp, ref, old)), mask


def arguments(penalty):
    token_logp, ref, old, mask = draw()
    return ((token_logp, ref, old) if penalty is kl_k3_corrected else (token_logp, ref)), mask


class FormulaTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(*(penalty.__name__ for penalty in FORMULAS))
    def test_is_the_float64_formula(self, name):
        penalty = next(penalty for penalty in FORMULAS if penalty.__name__ == name)
        arrays, mask = arguments(penalty)
        out = self.variant(penalty)(*arrays, mask)
        wide = [x.astype(np.float64) for x in arrays]
        expected = FORMULAS[penalty](*(wide[0] - other for other in wide[1:]))
        np.testing.assert_allclose(out, np.where(mask, expected, 0), rtol=1e-5)
        assert (np.asarray(out)[~mask] == 0).all()

    @chex.variants(with_jit=True)
    def test_full_vocabulary(self):
        logits, ref = RNG.normal(size=(2, 3, 4, 7)).astype(np.float32)
        mask = RNG.random((3, 4)) < 0.6
        p, q = softmax(logits.astype(np.float64), -1), softmax(ref.astype(np.float64), -1)
        kl = self.variant(full_vocabulary_kl)(logits, ref, mask)
        np.testing.assert_allclose(kl, np.where(mask, rel_entr(p, q).sum(-1), 0), rtol=1e-5)
        out = self.variant(entropy)(logits, mask)
        np.testing.assert_allclose(out, np.where(mask, scipy_entropy(p, axis=-1), 0), rtol=1e-5)


def expected_gradient(penalty, sampler):
    """Gradient in the logits of ``sum_y sampler(y) penalty(y)``, samples held fixed: by enumeration."""

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.asarray(sampler) * penalty(logp))

    return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(LOGITS)))


def test_values_and_gradients_by_enumeration():
    logp, ref, old = (log_softmax(x) for x in (LOGITS, REF_LOGITS, OLD_LOGITS))
    p, q = np.exp(logp), np.exp(ref)
    reverse = p * (logp - ref - rel_entr(p, q).sum())  # The derivative of KL(p, q) in the logits of p, by hand.
    forward = p - q  # That of KL(q, p).
    assert np.abs(reverse - forward).max() > 0.05
    with jax.enable_x64(True):
        for k in (kl_k1, kl_k3):
            np.testing.assert_allclose(p @ np.asarray(k(logp, ref)), rel_entr(p, q).sum(), rtol=1e-13)
        assert abs(p @ np.asarray(kl_k2(logp, ref)) - rel_entr(p, q).sum()) > 1e-2
        np.testing.assert_allclose(expected_gradient(lambda x: kl_k1(x, ref), p), 0, atol=1e-14)
        np.testing.assert_allclose(expected_gradient(lambda x: kl_k2(x, ref), p), reverse, atol=1e-14)
        np.testing.assert_allclose(expected_gradient(lambda x: kl_k3(x, ref), p), forward, atol=1e-14)
        for sampler in (logp, old):
            value = np.exp(sampler) @ np.asarray(kl_k3_corrected(logp, ref, sampler))
            np.testing.assert_allclose(value, rel_entr(p, q).sum(), rtol=1e-13)
            grad = expected_gradient(lambda x, s=sampler: kl_k3_corrected(x, ref, s), np.exp(sampler))
            np.testing.assert_allclose(grad, reverse, atol=1e-14)
        # Off-policy, nothing holds without the ratio.
        assert np.abs(expected_gradient(lambda x: kl_k1(x, ref), np.exp(old))).max() > 0.05
        assert np.abs(expected_gradient(lambda x: kl_k2(x, ref), np.exp(old)) - reverse).max() > 0.05
        exact = jax.jit(jax.grad(lambda x: full_vocabulary_kl(x, REF_LOGITS)))(LOGITS)
        np.testing.assert_allclose(exact, reverse, atol=1e-14)
        # The entropy's gradient is that of minus the KL to the uniform law.
        np.testing.assert_allclose(jax.jit(jax.grad(entropy))(LOGITS), -p * (logp - p @ logp), atol=1e-14)


def test_tokens_and_whole_completions_differ():
    """On all completions of two tokens: token penalties leave out the prefix, whole-completion ones do not."""
    first, second = (RNG.normal(size=shape) for shape in ((2, 3), (2, 3, 3)))  # [policy or reference, ...]
    pairs = np.array(list(itertools.product(range(3), repeat=2)))
    with jax.enable_x64(True):

        def token_logp(first, second):
            one = jax.nn.log_softmax(first)[pairs[:, 0]]
            two = jax.nn.log_softmax(second)[pairs[:, 0], pairs[:, 1]]
            return jnp.stack([one, two], -1)

        def kl(params):
            logp = token_logp(*params).sum(-1)
            return jnp.sum(jnp.exp(logp) * (logp - ref.sum(-1)))

        params = (jnp.asarray(first[0]), jnp.asarray(second[0]))
        ref = token_logp(jnp.asarray(first[1]), jnp.asarray(second[1]))
        fixed = token_logp(*params)
        chance = jnp.exp(fixed.sum(-1))

        def gradient(penalty):
            return jax.jit(jax.grad(lambda params: jnp.sum(chance * penalty(token_logp(*params)))))(params)

        truth = jax.jit(jax.grad(kl))(params)
        whole = gradient(lambda x: kl_k2(x.sum(-1), ref.sum(-1)))
        chex.assert_trees_all_close(whole, truth, atol=1e-13)
        to_go = jnp.cumsum(kl_k1(fixed, ref)[:, ::-1], -1)[:, ::-1]
        as_reward = gradient(lambda x: jnp.sum(to_go * x, -1))
        chex.assert_trees_all_close(as_reward, truth, atol=1e-13)
        tokens = gradient(lambda x: kl_k2(x, ref).sum(-1))
        chex.assert_trees_all_close(tokens[1], truth[1], atol=1e-13)
        assert np.abs(tokens[0] - truth[0]).max() > 1e-2


@pytest.mark.parametrize("penalty", FORMULAS)
def test_only_the_policy_receives_gradient(penalty):
    arrays, mask = arguments(penalty)

    def total(*arrays):
        return penalty(*arrays, mask).sum()

    grads = jax.jit(jax.grad(total, argnums=tuple(range(len(arrays)))))(*map(jnp.asarray, arrays))
    assert (np.asarray(grads[0])[mask] != 0).all()
    assert (np.asarray(grads[0])[~mask] == 0).all()
    assert all((np.asarray(g) == 0).all() for g in grads[1:])
    with jax.enable_x64(True):
        rest = [np.float64(x) for x in arrays[1:]]
        check_grads(
            jax.jit(lambda x: penalty(x, *rest, mask)), (jnp.float64(arrays[0]),), order=1, modes=("rev",), rtol=1e-6
        )


@pytest.mark.parametrize("penalty", FORMULAS)
def test_padding_may_be_nan_and_extremes_are_finite(penalty):
    arrays, mask = arguments(penalty)
    grad = jax.jit(jax.grad(lambda x, *rest: penalty(x, *rest, mask).sum()))
    dirty = [np.where(mask, x, np.nan) for x in arrays]
    np.testing.assert_array_equal(penalty(*dirty, mask), penalty(*arrays, mask))
    np.testing.assert_array_equal(grad(*dirty), grad(*arrays))
    extreme = [np.float32(x) for x in zip(*itertools.product([0.0, -1e4], repeat=len(arrays)), strict=True)]
    out = penalty(*extreme)
    assert np.isfinite(out).all()
    grad = jax.jit(jax.grad(lambda x: penalty(x, *extreme[1:]).sum()))
    assert np.isfinite(grad(jnp.asarray(extreme[0]))).all()


def test_small_log_ratios_keep_their_digits():
    ref = np.float32([-1.0, -1.0])
    token_logp = ref + np.float32([2.0**-14, -(2.0**-14)])
    lr = token_logp.astype(np.float64) - ref
    np.testing.assert_allclose(kl_k3(token_logp, ref), lr**2 / 2 - lr**3 / 6, rtol=1e-6)


def test_impossible_tokens_take_no_part():
    logits = np.float32([[0.3, -np.inf, 1.0, -0.5], [np.nan] * 4])
    ref = np.float32([[0.1, -np.inf, 0.0, 0.7], [np.nan] * 4])
    mask, real = np.array([True, False]), [0, 2, 3]
    for f, few in (
        (lambda x: full_vocabulary_kl(x, ref, mask), lambda x: full_vocabulary_kl(x, ref[0, real])),
        (lambda x: entropy(x, mask), entropy),
    ):
        found, grad = jax.jit(lambda x, f=f: (f(x), jax.grad(lambda x: f(x).sum())(x)))(logits)
        value, expected = jax.jit(jax.value_and_grad(few))(logits[0, real])
        np.testing.assert_allclose(found, [value, 0], rtol=1e-6)
        np.testing.assert_allclose(grad[0, np.array(real)], expected, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(grad)[[0, 1, 1, 1, 1], [1, 0, 1, 2, 3]], 0)
    grad = jax.jit(jax.grad(lambda r: full_vocabulary_kl(logits[:1], r).sum()))(ref[:1])
    np.testing.assert_array_equal(grad, np.zeros((1, 4)))
    assert full_vocabulary_kl(np.zeros(3, np.float32), np.float32([0, 0, -np.inf])) == np.inf
