"""Where the answer is known the stages give it, with the bound on the KL; the whole job runs once, tiny."""

import dataclasses
import json
import pathlib
import shutil
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.run_directory import open_run
from experiments.diffusion_digits import __main__ as diffusion_digits
from experiments.diffusion_reward import __main__ as experiment
from experiments.diffusion_reward import report as diffusion_reward_report
from experiments.diffusion_reward import stages
from tiltjax.ops import schedule
from tiltjax.samplers import denoise

SPREAD, BETA = 0.2, 0.2


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Gaussian:
    """A denoiser of images of one pixel, N(mean, SPREAD^2), which clipping to [-1, 1] leaves alone."""

    mean: Any

    @property
    def config(self):
        return types.SimpleNamespace(shape=(1, 1, 1), prediction="noise")

    def clean(self, x, a):
        a = schedule.expand(a, x)
        return self.mean + jnp.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a) * (x - jnp.sqrt(a) * self.mean)

    def __call__(self, x, a):
        b = schedule.expand(a, x)
        return (x - jnp.sqrt(b) * self.clean(x, a)) / jnp.sqrt(1 - b)

    output = __call__


REF = Gaussian(mean=jnp.float32(0))


@jax.jit
def kernel(x, mean, before, after):
    """Mean and width of a reverse step of `Gaussian`."""
    return denoise.reverse_kernel(x, Gaussian(mean=mean)(x, before), before, after)


def kernels(x, mean, steps):
    """`kernel` of every step, the first of the chain first."""
    a = np.asarray(jax.jit(schedule.cosine_schedule, static_argnums=0)(steps))
    return [map(float, kernel(np.float32(x), np.float32(mean), a[k], a[k - 1])) for k in range(steps, 0, -1)]


def reference_variance(steps):
    """Of what the chain of so many steps ends in: less than SPREAD^2."""
    variance = 1.0
    for (zero, std), (one, _) in zip(kernels(0, 0, steps), kernels(1, 0, steps), strict=True):
        variance = (one - zero) ** 2 * variance + std**2
    return variance


def pixel(x):
    return x[..., 0, 0, 0]


def soft_value(x, a):
    """Of the reward x: its conditional mean, and half its conditional variance over beta."""
    variance = SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a)
    return pixel(REF.clean(x, a)) + variance / (2 * BETA)


def test_soft_best_of_n_steps_with_the_exact_value_draw_the_tilt(key):
    """The tilt of N(0, v) by x is N(v / beta, v), at a KL of v / (2 beta^2)."""
    steps, v = 30, reference_variance(30)
    image, kl = jax.jit(
        lambda key: stages.soft_steps(key, REF, soft_value, beta=BETA, n=2000, num_candidates=24, steps=steps)
    )(key)
    mean = float(pixel(image).mean())
    assert mean == pytest.approx(v / BETA, rel=0.1)
    assert float(pixel(image).var()) == pytest.approx(v, rel=0.1)
    # A bound from above on the KL of a law of that mean, and not a loose one.
    assert mean**2 / (2 * v) < float(kl.mean()) < 1.2 * v / (2 * BETA**2)


def test_steering_reaches_the_tilt_and_bounds_its_kl(key):
    v = reference_variance(20)
    image, bound = stages.steer(key, REF, soft_value, pixel, beta=BETA, runs=600, particles=16, steps=20)
    mean = float(pixel(image).mean())
    assert mean == pytest.approx(v / BETA, rel=0.2)
    assert mean**2 / (2 * v) - 0.1 < float(bound.mean()) < 1.2 * v / (2 * BETA**2)


def test_chains_of_another_mean_have_their_path_kl(key):
    steps, shift = 20, 0.1
    image, kl, path = stages.chains(key, Gaussian(mean=jnp.float32(shift)), REF, n=500, steps=steps)
    assert path.shape == (steps, 500, 1, 1, 1)
    # In steps the two kernels differ by a constant; and the images' KL is no larger.
    expected = 0.0
    for (one, std), (ref, _) in list(zip(kernels(0.3, shift, steps), kernels(0.3, 0, steps), strict=True))[:-1]:
        expected += (one - ref) ** 2 / (2 * std**2)
    np.testing.assert_allclose(kl, expected, rtol=1e-3)
    assert float(pixel(image).mean()) ** 2 / (2 * reference_variance(steps)) < expected + 0.02


def test_weighted_score_matching_learns_the_tilt(key):
    """The minimum is N(v / beta, v), whatever the noise."""
    keys = jax.random.split(key)
    image = SPREAD * jax.random.normal(keys[0], (4000, 1, 1, 1))
    options = {"num_steps": 300, "batch_size": 256, "learning_rate": 0.01}
    model = stages.tune(keys[1], REF, image, pixel(image), beta=2 * BETA, **options)
    assert float(model.mean) == pytest.approx(SPREAD**2 / (2 * BETA), abs=0.03)


def test_resampling_and_ddpo_climb_towards_it(key):
    options, goal = {"beta": BETA, "steps": 12}, reference_variance(12) / BETA
    tuning = {"num_steps": 100, "batch_size": 128, "learning_rate": 0.03}
    model, log = stages.resample_and_tune(key, REF, pixel, rounds=2, pool=256, **options, **tuning)
    assert 0.4 * goal < float(model.mean) < 1.4 * goal
    assert [figures["most_copies"] <= 8 for figures in log] == [True, True]
    model, seen = stages.ddpo(key, REF, pixel, n=128, num_iterations=25, learning_rate=0.02, clip=0.2, **options)
    assert 0.4 * SPREAD**2 / BETA < float(model.mean) < 1.6 * SPREAD**2 / BETA
    assert seen[0][1] == pytest.approx(0, abs=1e-6)
    assert seen[-1][0] > seen[0][0] + 0.05


def test_plug_in_value_is_low_by_the_variance():
    x = jnp.linspace(-0.5, 0.5, 5).reshape(5, 1, 1, 1)
    value = stages.plug_in(REF, pixel)
    a = jnp.float32(0.7)
    gap = soft_value(x, a) - value(x, a)
    np.testing.assert_allclose(gap, SPREAD**2 * 0.3 / (0.7 * SPREAD**2 + 0.3) / (2 * BETA), rtol=1e-4)


def test_learned_value_is_the_soft_value(key):
    keys = jax.random.split(key, 3)
    image = SPREAD * jax.random.normal(keys[0], (4000, 1, 1, 1))
    value = stages.fit_value(keys[1], image, pixel(image), beta=BETA, num_steps=600, width=16)
    a = jnp.float32(0.9)
    x = jnp.sqrt(a) * image[:500] + jnp.sqrt(1 - a) * jax.random.normal(keys[2], (500, 1, 1, 1))
    learned, exact = np.asarray(value(x, a)), np.asarray(soft_value(x, a))
    assert np.abs(learned - exact).mean() < 0.3 * exact.std()


def test_guarded_draw_spreads_what_the_tilt_would_waste(key):
    reward = jnp.concatenate([jnp.zeros(90), jnp.linspace(5.0, 6.0, 10)])
    picked, figures = stages.guarded_draw(key, reward, beta=1e-3, min_ess=0.2, max_copies=8)
    assert picked.shape == (100,)
    assert figures["beta"] > 1e-3
    assert figures["most_copies"] <= 8
    assert figures["survivors"] >= 13
    assert float(reward[picked].mean()) > 2 * float(reward.mean())


def test_rewards_say_what_they_say():
    x = jnp.zeros((2, 4, 4, 1)).at[0, :, :2].set(1.0).at[1].set(-1.0)
    np.testing.assert_allclose(stages.rewards("ink", None)(x), [0.75, 0.0])
    np.testing.assert_allclose(stages.rewards("symmetry", None)(x), [-1.0, 0.0])


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Square(Gaussian):
    """Of four pixels that know nothing of each other."""

    @property
    def config(self):
        return types.SimpleNamespace(shape=(2, 2, 1), prediction="noise")


def run_from_square(config):
    """The whole job, from a reference that compiles in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion_digits, "prepare", lambda *_, **__: (None, Square(mean=jnp.float32(0)), None))
        return experiment.run(config, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = experiment.RewardConfig(output=str(tmp_path_factory.mktemp("reward") / "run"), quick=True)
    return config, run_from_square(config)


def finite(value):
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or np.isfinite(value)


@pytest.mark.robustness("Runs", given="diffusion_reward --quick", outcome="all eight methods, with finite figures")
def test_a_quick_run_has_every_method_and_its_figures(finished):
    config, results = finished
    with open(f"{config.output}/results.json") as file:
        assert json.load(file) == results
    assert [p["method"] for p in results["points"]] == ["tilt", *experiment.STAGES]
    assert finite(results)
    for point in results["points"][1:]:
        assert point["kl"] >= 0, point
        assert point["objective"] == pytest.approx(point["reward"] - point["beta"] * point["kl"])
        assert point["pairwise_distance"] > 0
    with open(f"{config.output}/report.md") as file:
        report = file.read()
    for words, *_ in diffusion_reward_report.METHODS.values():
        assert words in report
    # Soft best-of-N climbs the frontier of the same pool, and never above it.
    curve = next(p["curve"] for p in results["points"] if p["method"] == "final")
    assert np.all(np.diff([q["kl"] for q in curve]) > 0)
    best = np.interp([q["kl"] for q in curve], results["frontier"]["kl"], results["frontier"]["reward"])
    assert all(q["reward"] <= b + 1e-4 for q, b in zip(curve, best, strict=True))


def timeless(point):
    return {name: value for name, value in point.items() if name != "seconds"}


@pytest.mark.robustness(
    "Runs", given="diffusion_reward killed within a method, then --resume", outcome="ends with the same bits"
)
def test_a_killed_run_goes_on_with_the_same_bits(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished[0], output=str(tmp_path / "run"), methods="final,weighted")

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setitem(experiment.STAGES, "weighted", killed)
        with pytest.raises(SystemExit):
            run_from_square(config)
    with pytest.raises(ValueError, match="there is a run already; pass --resume to go on with it"):
        run_from_square(config)
    other = dataclasses.replace(config, resume=True, seed=1)
    with pytest.raises(ValueError, match=r"--resume with other settings: seed \(0 -> 1\)"):
        run_from_square(other)
    monkeypatch.setitem(experiment.STAGES, "final", killed)  # It is kept.
    results = run_from_square(dataclasses.replace(config, resume=True))
    whole = {p["method"]: timeless(p) for p in finished[1]["points"]}
    assert [timeless(p) for p in results["points"]] == [whole[name] for name in ("tilt", "final", "weighted")]
    for name in ("0-final.npz", "0-weighted.npz"):
        one, other = (experiment.load_stage(pathlib.Path(c.output) / "stages" / name)[1] for c in (config, finished[0]))
        np.testing.assert_array_equal(one, other)


def test_a_damaged_stage_is_named(tmp_path):
    path = tmp_path / "0-final.npz"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"0-final.npz: damaged, delete it to compute it again"):
        experiment.load_stage(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A denoiser of digits that was trained to its end, for a few steps."""
    config = diffusion_digits.DigitsConfig(output=str(tmp_path_factory.mktemp("digits")), quick=True)
    with open_run(config, resume=True) as held:
        held.begin()
        _, model, _ = diffusion_digits.prepare(config, guided=False, progress=False)
    return config, model


@pytest.mark.robustness(
    "Runs",
    given="diffusion_reward --denoiser of a finished run",
    outcome="only read: nothing is written outside --output",
)
def test_a_given_denoiser_is_only_read(trained):
    config, finished = trained
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(config.output).rglob("*")}
    images, model, guide = diffusion_digits.load(config.output, guided=False)
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(config.output).rglob("*")} == before
    assert guide is None
    chex.assert_trees_all_equal(model, finished)


@pytest.mark.robustness(
    "Runs", given="diffusion_reward --denoiser that is no finished run", outcome="one line, and nothing is written"
)
def test_a_denoiser_that_is_not_there_leaves_nothing(tmp_path, trained):
    config = experiment.RewardConfig(output=str(tmp_path / "run"), denoiser=str(tmp_path / "none"), quick=True)
    with pytest.raises(ValueError, match=r"config.json: not there; a denoiser is the --output of"):
        experiment.run(config, progress=False)
    shutil.copytree(trained[0].output, tmp_path / "none")
    shutil.rmtree(tmp_path / "none" / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoints: training ended at step None, not at 4; finish it first"):
        experiment.run(config, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "beauty"}, "reward must be ink, symmetry or class:C, got 'beauty'"),
        ({"kls": "1,x"}, "kls must be comma-separated numbers, got '1,x'"),
        ({"methods": "final,ppo"}, "methods must be one of control, ddpo, final, learned,"),
        ({"kls": "0"}, "kls must be a finite number above 0, got 0.0"),
        ({"sampling_steps": 2}, "sampling_steps must be at least 3, got 2"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        experiment.RewardConfig(**options)
