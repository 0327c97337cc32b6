"""The worlds of `experiments.diffusion_guidance`, and everything that is computed on them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.exact import bandit, chain
from tiltjax.exact import gaussian as exact
from tiltjax.exact.gaussian import Mixture
from tiltjax.ops.schedule import cosine_schedule, linear_schedule, to_clean
from tiltjax.samplers import denoise, guidance, steer
from tiltjax.samplers.resample import resample
from tiltjax.types import Array, PRNGKey

__all__ = ["NS", "SAMPLERS", "finite", "gaussian", "line", "particles", "plane"]

NS = (1, 2, 4, 8, 16, 32)
"""Candidates a step."""

SAMPLERS = (
    "p(x): no guidance",
    "guidance, flow",
    "guidance, DDPM",
    "soft best-of-2 a step",
    "soft best-of-2, exponent doubled",
    "sequential Monte Carlo",
)
"""Panels of the plane."""

SCALE, LINE_SCALE, PLANE_SCALE = 3.0, 4.0, 4.0
V, U = 2.0, 1.0
"""Variances of ``p(x)`` and ``p(x | c)``."""


def _normal(variance: float) -> Mixture:
    return exact.mixture(jnp.ones(1), jnp.zeros((1, 1)), jnp.full((1, 1, 1), variance))


def _log_odds(scale: Any) -> Any:
    """``scale log p_t(c | x)`` of the Gaussian world, up to a constant."""
    p, q = _normal(V), _normal(U)

    def log_weight(x: Array, alpha_bar: Array) -> Array:
        return scale * (exact.log_prob(exact.noised(q, alpha_bar), x) - exact.log_prob(exact.noised(p, alpha_bar), x))

    return log_weight


def _guided(scale: Any) -> denoise.Denoiser:
    return guidance.guided_denoiser(exact.denoiser(_normal(U)), exact.denoiser(_normal(V)), scale=scale)


def _limit(coarse: Any, fine: Any) -> Any:
    """Richardson's extrapolation of what converges as 1 / K, from K / 2 and K."""
    return 2 * fine - coarse


def _line_law(kernel: chain.Kernel, m: Mixture, num_steps: int, points: Array) -> Array:
    schedule = linear_schedule(num_steps, first=2.0, last=14.0)  # No kernel is narrower than the grid.
    return chain.run_chain(kernel, points, schedule, chain.law_of(exact.noised(m, schedule[-1]), points))


def gaussian(key: PRNGKey, num_steps: int, num_samples: int) -> dict[str, Any]:
    """Variances of guidance, soft best-of-infinity and tilt: closed forms, recursions, grids, samples."""
    scales = np.linspace(0, 6, 61)
    with jax.enable_x64(True):
        points = jnp.linspace(-9, 9, 180)
        p = _normal(V)

        @jax.jit
        def infinite(scale: Array) -> list[Array]:
            kernel = chain.soft_best_of_n_kernel(chain.exact_kernel(p), _log_odds(scale), n=None)
            return [chain.variance(_line_law(kernel, p, k, points), points) for k in (20, num_steps // 2, num_steps)]

        closed = exact.guided_variance(V, U, scales)
        ends = exact.guided_variance(V, U, np.array([0.0, 1.0]))
        steps = [16 * num_steps, 32 * num_steps]
        sde, ode = (
            [float(chain.linear_variance(_guided(SCALE), linear_schedule(k), eta=eta)) for k in steps] for eta in (1, 0)
        )
        recursion = float(chain.linear_variance(_guided(SCALE), cosine_schedule(4 * num_steps)))
        doob, at_three = ([float(v) for v in infinite(scale)] for scale in (1.0, SCALE))
        law = bandit.tilted(chain.law_of(p, points), _log_odds(SCALE)(points[:, None], 1.0), beta=1.0)
        tilt_grid = float(chain.variance(law, points))
        out = {name: np.asarray(getattr(closed, name)).tolist() for name in ("sde", "ode", "tilt")}
        agree = max(float(jnp.max(jnp.abs(a - b))) for a in (ends.sde, ends.ode) for b in (ends.tilt, ends.ode))
    schedule = cosine_schedule(4 * num_steps)
    few = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], np.float32)

    @jax.jit
    def sampled(key: PRNGKey, scale: Array) -> tuple[Array, Array]:
        start, noise = jax.random.split(key)
        x = jax.random.normal(start, (num_samples, 1))
        sde = denoise.ddpm(noise, _guided(scale), x, schedule)
        return jnp.var(sde), jnp.var(denoise.probability_flow(_guided(scale), x, schedule))

    drawn = [[float(v) for v in sampled(jax.random.fold_in(key, i), scale)] for i, scale in enumerate(few)]
    return {
        "scales": scales.tolist(), "closed": out, "agree": agree, "num_samples": num_samples,
        "sde_limit": _limit(*sde), "ode_limit": _limit(*ode), "sde_recursion": recursion, "tilt_grid": tilt_grid,
        "doob": doob[0], "chain_limit": _limit(*at_three[1:]),
        "sampled_scales": few.tolist(), "sde_samples": [d[0] for d in drawn], "ode_samples": [d[1] for d in drawn],
        "sde_sample": drawn[3][0], "ode_sample": drawn[3][1],
    }  # fmt: skip


def finite(key: PRNGKey, num_steps: int, num_samples: int) -> dict[str, Any]:
    """Soft best-of-N of N candidates a step, with and without the correction, as laws and as samples."""
    # Float32: the quadrature over N candidates is six times cheaper, at 1e-5. Kernels of few steps are wider.
    points = jnp.linspace(-8, 8, 128 if num_steps > 50 else 64)
    p, q = _normal(V), _normal(U)

    @functools.partial(jax.jit, static_argnames=("steps", "base"))
    def law(exponent: Array, n: Array, steps: int, base: str = "p") -> Array:
        start = {"p": p, "q": q}[base]
        kernel = chain.soft_best_of_n_kernel(chain.exact_kernel(start), _log_odds(exponent), n=n)
        return chain.variance(_line_law(kernel, start, steps, points), points)

    def end(exponent: float, n: int, steps: int, base: str = "p") -> float:
        return float(law(exponent, jnp.int32(n), steps, base))

    def limit(fine: float, exponent: float, n: int, base: str = "p") -> float:
        return _limit(end(exponent, n, num_steps // 2, base), fine)

    twice = guidance.guidance_weight_for(SCALE, 2)
    laws = {"plain": [end(SCALE, n, num_steps) for n in NS], "corrected": [float("nan")]}
    laws["corrected"] += [end(guidance.guidance_weight_for(SCALE, n), n, num_steps) for n in NS[1:]]
    drawn = _finite_samples(key, num_steps, num_samples)
    # The sampler steps with DDPM's smaller variance, the laws with the exact kernel: both are O(1/K) from the limit.
    worst = max(abs(v / laws[name][NS.index(int(n))] - 1) for name, at in drawn.items() for n, v in at.items())
    with jax.enable_x64(True):
        displacement = {str(n): float(_displacement(n)) for n in (2, 4, 8)}
    return {
        "ns": list(NS), "laws": laws, "sampled": drawn, "worst": worst,
        "tolerance": 4.5 * np.sqrt(2 / num_samples) + 6 / num_steps, "displacement": displacement,
        "limit": {str(n): limit(laws["plain"][NS.index(n)], SCALE, n) for n in (2, 4, 8)},
        "law": {str(n): float(exact.guided_variance(V, U, (1 - 1 / n) * SCALE).sde) for n in (2, 4, 8)},
        "corrected_limit": {"2": limit(laws["corrected"][1], twice, 2)},
        "conditional_limit": limit(end(SCALE - 1, 2, num_steps, "q"), SCALE - 1, 2, "q"),
        "conditional_law": float(exact.guided_variance(V, U, 1 + (SCALE - 1) / 2).sde),
        "guided": float(exact.guided_variance(V, U, SCALE).sde),
    }  # fmt: skip


def _finite_samples(key: PRNGKey, num_steps: int, num_samples: int) -> dict[str, dict[str, float]]:
    schedule = cosine_schedule(num_steps)

    @functools.partial(jax.jit, static_argnames="n")
    def sampled(key: PRNGKey, exponent: float, n: int) -> Array:
        start, noise = jax.random.split(key)
        x = jax.random.normal(start, (num_samples, 1))
        denoiser = exact.denoiser(_normal(V))
        return jnp.var(
            guidance.soft_best_of_n_denoise(noise, denoiser, x, schedule, _log_odds(exponent), num_candidates=n)
        )

    out: dict[str, dict[str, float]] = {"plain": {}, "corrected": {}}
    for i, n in enumerate(NS):
        out["plain"][str(n)] = float(sampled(jax.random.fold_in(key, i), SCALE, n))
        if n > 1:
            exponent = guidance.guidance_weight_for(SCALE, n)
            out["corrected"][str(n)] = float(sampled(jax.random.fold_in(key, 100 + i), exponent, n))
    return out


def _displacement(n: int, slope: float = 1.0, std: float = 0.02) -> Array:
    """How far soft best-of-n moves a small step, over ``std^2`` times the slope of the log weight."""
    z = jnp.linspace(-8, 8, 401)
    ref = jax.nn.softmax(-jnp.square(z) / 2)
    law = bandit.soft_best_of_n_law(ref, slope * std * z, n=n, beta=1.0)
    return jnp.sum(law * z) * std / (std**2 * slope)


def _line() -> Mixture:
    """Three components on the line; the class is the right-hand two, of probability 0.6."""
    weight, mean = jnp.array([0.4, 0.35, 0.25]), jnp.array([-1.0, 0.8, 2.5])
    return exact.mixture(weight, mean[:, None], jnp.full((3, 1, 1), 0.49), jnp.array([0, 1, 1]))


def line(num_steps: int) -> dict[str, Any]:
    """Laws on the line: total variations to the tilt, densities, and E[1 / p(c | x)]."""
    with jax.enable_x64(True):
        points, m = jnp.linspace(-6, 6, 480 if num_steps > 50 else 240), _line()
        schedule = linear_schedule(num_steps)
        few = linear_schedule(20)

        def log_weight(scale: Any) -> Any:
            return lambda x, a: scale * exact.log_class(exact.noised(m, a), x, 1)

        def soft(x: Array, a: Array) -> Array:
            return exact.soft_value(m, x, a, lambda y: LINE_SCALE * exact.log_class(m, y, 1), beta=1.0)

        def infinite(weight: Any) -> Any:
            return chain.soft_best_of_n_kernel(chain.exact_kernel(m), weight, n=None)

        @jax.jit
        def laws() -> dict[str, Array]:
            base = chain.law_of(m, points)
            start, start_few = (chain.law_of(exact.noised(m, s[-1]), points) for s in (schedule, few))
            guided = guidance.guided_denoiser(exact.class_denoiser(m, 1), exact.denoiser(m), scale=LINE_SCALE)
            twisted = bandit.tilted(start_few, soft(points[:, None], few[-1]), beta=1.0)
            return {
                "data": base,
                "conditional": chain.law_of(exact.conditioned(m, 1), points),
                "tilt": bandit.tilted(base, log_weight(LINE_SCALE)(points[:, None], 1.0), beta=1.0),
                "sde": chain.run_chain(chain.guided_kernel(guided), points, schedule, start),
                "ode": chain.flow_law(guided, points, schedule),
                "chain": chain.run_chain(infinite(log_weight(LINE_SCALE)), points, schedule, start),
                "soft_value": chain.run_chain(infinite(soft), points, few, twisted),
            }

        @jax.jit
        def weak(scale: Array) -> tuple[Array, Array]:
            # The law at the last level is tilted as well, by what little it knows of the class.
            start = bandit.tilted(
                chain.law_of(exact.noised(m, few[-1]), points), log_weight(scale)(points[:, None], few[-1]), beta=1.0
            )
            law = chain.run_chain(infinite(log_weight(scale)), points, few, start)
            return law, law @ jnp.exp(-exact.log_class(m, points[:, None], 1))

        found = laws()
        tv = {
            name: bandit.total_variation(found[name], found["tilt"]) for name in ("sde", "ode", "chain", "soft_value")
        }
        tv["chain_sde"] = bandit.total_variation(found["chain"], found["sde"])
        at = {scale: weak(scale) for scale in (1.0, 1.5, 2.0, 3.0)}
        tv["scale_one"] = bandit.total_variation(at[1.0][0], found["conditional"])
        width = float(points[1] - points[0])
        return {
            "tv": {name: float(value) for name, value in tv.items()},
            "inverse": {str(scale): float(value) for scale, (_, value) in at.items()},
            "class_probability": 0.6,
            "points": np.round(points, 6).tolist(),
            "density": {name: np.round(law / width, 6).tolist() for name, law in found.items()},
        }


def particles(key: PRNGKey, num_steps: int, num_runs: int, count: int = 128) -> dict[str, Any]:
    """Sequential Monte Carlo on the line: every potential and proposal estimates the same Z."""
    m, schedule = _line(), linear_schedule(num_steps)
    predict = exact.denoiser(m)

    def reward(x: Array) -> Array:
        return LINE_SCALE * exact.log_class(m, x, 1)

    def clean_law(x: Array, a: Array) -> Array:
        return exact.soft_value(m, x, a, reward, beta=1.0, nodes=16)

    def soft(x: Array, a: Array) -> Array:
        # The posterior of a clean x is that x.
        return jnp.where(a < 1, clean_law(x, jnp.where(a < 1, a, 0.5)), reward(x))

    def plug_in(x: Array, a: Array) -> Array:
        inside = jnp.where(a < 1, a, 0.5)
        return jnp.where(a < 1, reward(to_clean(x, predict(x, inside), inside)), reward(x))

    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "importance sampling": (plug_in, {"ess_threshold": 0.0, "every": num_steps}),
        "plug-in value": (plug_in, {}),
        "class of the noisy x": (lambda x, a: LINE_SCALE * exact.log_class(exact.noised(m, a), x, 1), {}),
        "soft value": (soft, {}),
        "soft value, twisted proposals": (soft, {"proposal": "twisted"}),
        "potential max, every tenth of the way": (plug_in, {"potential": "max", "every": num_steps // 10}),
        "potential sum, once halfway": (plug_in, {"potential": "sum", "every": num_steps // 2}),
    }
    truth = float(np.log(_partition(m)))
    estimates = {}
    for i, (name, (value, options)) in enumerate(ways.items()):

        @jax.jit
        @jax.vmap
        def once(key: PRNGKey, value: Any = value, options: Any = options) -> tuple[Array, Array]:
            start, walk = jax.random.split(key)
            x = jax.random.normal(start, (count, 1))
            out = steer.steered_denoise(walk, predict, x, schedule, value, beta=1.0, **options)
            return out.log_z, jnp.sum(out.resampled)

        log_z, resampled = once(jax.random.split(jax.random.fold_in(key, i), num_runs))
        ratio = np.exp(np.asarray(log_z, np.float64) - truth)
        estimates[name] = {
            "mean": float(ratio.mean()), "deviation": float(ratio.std(ddof=1)),
            "error": float(ratio.std(ddof=1) / np.sqrt(num_runs)), "resampled": float(np.mean(resampled)),
        }  # fmt: skip
    return {"log_z": truth, "count": count, "runs": num_runs, "estimates": estimates}


def _partition(m: Mixture) -> float:
    points = jnp.linspace(-8, 8, 2001)
    weight = jnp.exp(exact.log_prob(m, points[:, None]) + LINE_SCALE * exact.log_class(m, points[:, None], 1))
    return float(jnp.sum(weight) * (points[1] - points[0]))


def _plane() -> Mixture:
    """Four components in the plane; the class is an arc of three of them."""
    angle = np.array([0.15, 0.5, 0.85]) * np.pi
    mean = np.concatenate([[[0.0, -0.4]], 2.1 * np.stack([np.cos(angle), np.sin(angle) - 0.3], -1)])
    turn = [np.array([[np.sin(a), np.cos(a)], [-np.cos(a), np.sin(a)]]) for a in angle]
    covariance = [0.55 * np.eye(2), *(t @ np.diag([0.5, 0.12]) @ t.T for t in turn)]
    weight, label = np.array([0.4, 0.2, 0.2, 0.2]), np.array([0, 1, 1, 1])
    return exact.mixture(weight, jnp.asarray(mean, jnp.float32), jnp.asarray(np.array(covariance), jnp.float32), label)


def plane(key: PRNGKey, num_steps: int, num_samples: int) -> dict[str, Any]:
    """Samples in the plane by every sampler, with the density of the tilt."""
    m, schedule = _plane(), linear_schedule(num_steps)
    base, given = exact.denoiser(m), exact.class_denoiser(m, 1)
    guided = guidance.guided_denoiser(given, base, scale=PLANE_SCALE)

    def log_weight(strength: float) -> Any:
        return lambda x, a: strength * exact.log_class(exact.noised(m, a), x, 1)

    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (num_samples, 2))

    @jax.jit
    def samples() -> list[Array]:
        steered = steer.steered_denoise(keys[1], base, x, schedule, log_weight(PLANE_SCALE), beta=1.0)
        kept = resample(keys[2], jax.nn.softmax(steered.log_weights), num=num_samples)

        def best_of_two(strength: float) -> Array:
            return guidance.soft_best_of_n_denoise(keys[1], base, x, schedule, log_weight(strength), num_candidates=2)

        return [
            denoise.ddpm(keys[1], base, x, schedule),
            denoise.probability_flow(guided, x, schedule),
            denoise.ddpm(keys[1], guided, x, schedule),
            best_of_two(PLANE_SCALE),
            best_of_two(guidance.guidance_weight_for(PLANE_SCALE, 2)),
            steered.state[kept],
        ]

    grid = np.linspace(-4.2, 4.2, 141, dtype=np.float32)
    at = np.stack(np.meshgrid(grid, grid), -1)
    log_tilt = exact.log_prob(m, at) + PLANE_SCALE * exact.log_class(m, at, 1)
    density = np.exp(np.asarray(log_tilt, np.float64))
    drawn = dict(zip(SAMPLERS, map(np.asarray, samples()), strict=True))
    return {"samples": drawn, "grid": grid, "tilt": density / density.sum(), "p": np.exp(exact.log_prob(m, at))}
