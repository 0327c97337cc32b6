"""Reward-directed diffusion without reinforcement learning, and with it: one reward-KL frontier for all methods.

    python -m experiments.diffusion_reward --output=runs/diffusion_reward

The reference is the unconditional diffusion of `experiments.diffusion_digits` (trained inside --output first, or taken
from --denoiser, the output of a finished run). It is directed to a reward of images (ink, symmetry or the
log-probability of a class) by final-sample soft best-of-N, soft best-of-N at every reverse step with plug-in and with
learned soft values, sequential Monte Carlo, importance-weighted denoising score matching, rounds of guarded resampling
and fine-tuning, and DDPO: all at the same betas, chosen so that the exact tilt of the reference's own images has the
KLs of --kls. For every method the report has the reward, a bound from above on the KL of its images to the reference's,
and the diversity of the images. No law of a given mean reward is nearer to the reference than the tilt, which is
therefore the frontier.

Expected at the default settings, where the tilts of ink have reward .346 and .377 at 0.7 and 2 nats (the reference
.301): soft best-of-N of finished images and of every step (plug-in value) and SMC lie on the frontier (.339 to .344 at
about 0.6 nats, .363 to .376 at 1.5 to 1.8); a learned value lags (.332 at 0.5, .350 at 1.4); importance-weighted score
matching and guarded resampling reach the reward (.350 and .348, .367 and .368) at path KLs of 3 to 7 nats, of which the
control, fine-tuned without any reward, has 2, and with less diversity; DDPO, the slowest, gets to .319 and .332 at 0.4
and 0.8 nats. 420 s of one core: under four minutes on two, after the training of the denoiser.

Every stage is kept when it is done: a run that was killed goes on with --resume and ends with the same figures. Bad
input ends with one line and exit status 2.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import Run, open_run, overwrite_field
from experiments.diffusion_digits import __main__ as diffusion_digits
from experiments.diffusion_digits import world as digits_world
from experiments.diffusion_reward import report, stages
from tiltjax.exact import bandit
from tiltjax.models.denoiser import Denoiser
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.samplers.resample import resample
from tiltjax.tilt.divergence import tilt_kl, tilted_reward
from tiltjax.tilt.temperature import beta_for_kl
from tiltjax.tilt.weights import tilt
from tiltjax.train.config import field, output_field, seed_field
from tiltjax.train.streams import root_key
from tiltjax.types import Array

__all__ = ["RewardConfig", "run"]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Everything that decides a run."""

    reward: str = field("ink", "ink, symmetry, or class:C for the log-probability of class C.")
    kls: str = field("0.7,2", "Comma-separated: KLs of the tilts that are aimed at, nats; each gives a beta.")
    methods: str = field("all", "Comma-separated names of methods, or all; the tilt is always there.")
    denoiser: str = field(
        "", "Output of a finished run of experiments.diffusion_digits, only read; empty trains one inside --output."
    )
    sampling_steps: int = field(20, "Steps of the reverse chain.")
    pool: int = field(2048, "Images of the reference, shared by the methods that weigh finished images.")
    num_chains: int = field(160, "Images by which each method is judged.")
    num_candidates: int = field(8, "Candidates of each soft best-of-N step, and particles of each run of SMC.")
    tuning_steps: int = field(150, "Steps of fine-tuning.")
    ddpo_iterations: int = field(20, "Iterations of DDPO, of 64 chains each.")
    learning_rate: float = field(2e-4, "Of fine-tuning.")
    seed: int = seed_field("Of everything but the denoiser.")
    output: str = output_field("runs/diffusion_reward", "Directory of the run.")
    resume: bool = field(False, "Go on with the run in --output; the figures are those of a run that never stopped.")
    overwrite: bool = overwrite_field()
    quick: bool = field(False, "Cut every size down, to see in seconds that all stages run; the figures mean nothing.")

    def __post_init__(self):
        for name in ("pool", "num_chains", "num_candidates"):
            check_at_least(name, getattr(self, name), 2)
        check_at_least("sampling_steps", self.sampling_steps, 3)
        for name in ("tuning_steps", "ddpo_iterations"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        check_positive("learning_rate", self.learning_rate)
        stages.rewards(self.reward, None)
        for name in self.names:
            check_choice("methods", name, tuple(STAGES))
        for kl in self.targets:
            check_positive("kls", kl)

    @property
    def names(self) -> tuple[str, ...]:
        """The methods."""
        return tuple(STAGES) if self.methods == "all" else tuple(self.methods.split(","))

    @property
    def targets(self) -> tuple[float, ...]:
        """The wanted KLs."""
        try:
            return tuple(float(word) for word in self.kls.split(","))
        except ValueError:
            raise ValueError(f"kls must be comma-separated numbers, got {self.kls!r}") from None

    @property
    def resized(self) -> "RewardConfig":
        """With the sizes that are used."""
        if not self.quick:
            return self
        return dataclasses.replace(self, kls=self.kls.split(",")[0], sampling_steps=4, pool=16, num_chains=16,
                                   num_candidates=3, tuning_steps=2, ddpo_iterations=2)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every method is given."""

    config: RewardConfig
    ref: Denoiser
    reward: Callable[[Array], Array]
    pool: Array
    worth: Array
    beta: float


def final(key: Array, s: Setting) -> tuple[Array, Any]:
    """Soft best-of-N of finished images, N = 2, 4, ... 64, by its exact law on the pool."""

    @jax.jit
    def law_of(n: Array, beta: Array) -> tuple[Array, Array, Array]:
        ref = jnp.full(len(s.worth), 1 / len(s.worth))
        law = bandit.soft_best_of_n_law(ref, s.worth, n=n, beta=beta)
        return law, law @ s.worth, bandit.kl(law, ref)

    points = []
    for n in (2, 64) if s.config.quick else (2, 4, 8, 16, 64):
        law, worth, divergence = law_of(n, s.beta)
        points.append({"n": n, "reward": float(worth), "kl": float(divergence)})
    draws = resample(key, law, num=s.config.num_chains, method="multinomial")
    return s.pool[draws], points


def per_step(key: Array, s: Setting, *, learn: bool) -> tuple[Array, Any]:
    """Soft best-of-N at every reverse step."""
    keys, c = jax.random.split(key), s.config
    value = stages.plug_in(s.ref, s.reward)
    if learn:
        value = stages.fit_value(keys[0], s.pool, s.worth, beta=s.beta, num_steps=20 if c.quick else 2000)
    run = jax.jit(
        lambda key: stages.soft_steps(
            key, s.ref, value, beta=s.beta, n=c.num_chains, num_candidates=c.num_candidates, steps=c.sampling_steps
        )
    )
    return run(keys[1])


def smc(key: Array, s: Setting) -> tuple[Array, Any]:
    """Sequential Monte Carlo with plug-in values."""
    c = s.config
    return stages.steer(
        key, s.ref, stages.plug_in(s.ref, s.reward), s.reward, beta=s.beta, runs=c.num_chains,
        particles=c.num_candidates, steps=c.sampling_steps,
    )  # fmt: skip


def tuned(key: Array, s: Setting, model: Denoiser) -> tuple[Array, Any]:
    """Images of a fine-tuned model, and their path KL."""
    return stages.chains(key, model, s.ref, n=s.config.num_chains, steps=s.config.sampling_steps)[:2]


def _tuning(s: Setting) -> dict[str, Any]:
    return {"batch_size": min(128, s.config.pool), "learning_rate": s.config.learning_rate}


def weighted(key: Array, s: Setting, *, control: bool = False) -> tuple[Array, Any]:
    """Importance-weighted denoising score matching on the pool; as a control without weights."""
    keys, worth = jax.random.split(key), None if control else s.worth
    model = stages.tune(keys[0], s.ref, s.pool, worth, beta=s.beta, num_steps=s.config.tuning_steps, **_tuning(s))
    return tuned(keys[1], s, model)


def resampled(key: Array, s: Setting) -> tuple[Array, Any, list]:
    """Two rounds of guarded resampling and fine-tuning."""
    keys, c = jax.random.split(key), s.config
    model, log = stages.resample_and_tune(
        keys[0], s.ref, s.reward, beta=s.beta, rounds=2, pool=c.pool // 4, steps=c.sampling_steps,
        num_steps=max(1, c.tuning_steps // 2), **_tuning(s),
    )  # fmt: skip
    return (*tuned(keys[1], s, model), log)


def ddpo(key: Array, s: Setting) -> tuple[Array, Any, list]:
    """Policy gradient with the path KL in the reward."""
    keys, c = jax.random.split(key), s.config
    model, seen = stages.ddpo(
        keys[0], s.ref, s.reward, beta=s.beta, n=min(64, c.num_chains), steps=c.sampling_steps,
        num_iterations=c.ddpo_iterations, learning_rate=c.learning_rate,
    )  # fmt: skip
    return (*tuned(keys[1], s, model), seen)


STAGES: dict[str, Callable[..., tuple]] = {
    "final": final,
    "plug_in": functools.partial(per_step, learn=False),
    "learned": functools.partial(per_step, learn=True),
    "smc": smc,
    "control": functools.partial(weighted, control=True),
    "weighted": weighted,
    "resampled": resampled,
    "ddpo": ddpo,
}


def run(config: RewardConfig, *, progress: bool = True) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    with open_run(config, writes=("stages", "denoiser")) as held:
        return _run(config, held, progress=progress)


@jax.jit
def _tilts(worth: Array, kl: Array) -> dict[str, Array]:
    """Of the tilts of a pool at these KLs, ``[G]``: beta, reward, log Z and effective sample size."""

    def at(kl: Array) -> dict[str, Array]:
        beta = beta_for_kl(worth, kl=kl)
        found = tilt(worth, beta=beta)
        return {"beta": beta, "reward": tilted_reward(worth, beta=beta), "kl": tilt_kl(worth, beta=beta),
                "log_z": found.log_z, "ess": found.ess}  # fmt: skip

    return jax.vmap(at)(kl)


def _run(config: RewardConfig, held: Run, *, progress: bool) -> dict[str, Any]:
    directory, sizes = held.directory, config.resized
    began, guided = time.process_time(), config.reward.startswith("class")
    if config.denoiser:
        _, ref, guide = diffusion_digits.load(config.denoiser, guided=guided)
    held.begin()
    (directory / "stages").mkdir(exist_ok=True)
    if not config.denoiser:
        source = diffusion_digits.DigitsConfig(output=str(directory / "denoiser"), quick=config.quick)
        _, ref, guide = diffusion_digits.prepare(source, guided=guided, progress=progress)
    reward = stages.rewards(config.reward, guide)
    root = root_key(config.seed)
    pool, _, _ = stages.chains(jax.random.fold_in(root, 0), ref, ref, n=sizes.pool, steps=sizes.sampling_steps)
    worth = reward(pool)
    results: dict[str, Any] = {"reward": config.reward, "points": [], "reference": summary(pool, worth, None)}
    images = {"reference": np.asarray(pool[:12])}
    bar = tqdm(
        total=len(sizes.targets) * (len(sizes.names) - ("control" in sizes.names)) + ("control" in sizes.names),
        desc="methods",
        disable=not progress,
    )
    grid = np.geomspace(0.02, max(5.0, 2 * max(sizes.targets)), 30)
    tilts = {name: x.tolist() for name, x in _tilts(worth, np.array([*sizes.targets, *grid], np.float32)).items()}
    for i, kl in enumerate(sizes.targets):
        beta = tilts["beta"][i]
        setting = Setting(sizes, ref, reward, pool, worth, beta)
        figures = {name: tilts[name][i] for name in ("beta", "reward", "log_z", "ess")}
        results["points"].append({"method": "tilt", **figures, "kl": kl})
        for name in sizes.names:
            if name == "control" and i:
                continue  # It has no beta.
            bar.set_postfix_str(f"{name}, beta {beta:.3g}")
            path = directory / "stages" / f"{i}-{name}.npz"
            key = jax.random.fold_in(jax.random.fold_in(root, i + 1), list(STAGES).index(name))
            if not path.exists():
                save_stage(path, *measured(key, name, setting))
            point, shown = load_stage(path)
            results["points"].append(point)
            images["control" if name == "control" else f"{name}, KL {kl:g}"] = shown
            bar.update()
    bar.close()
    results["frontier"] = {name: tilts[name][len(sizes.targets) :] for name in ("kl", "reward")}
    earlier = sum(point.get("seconds", 0) for point in results["points"]) if held.resumed else 0
    results["seconds"] = time.process_time() - began + earlier
    report.write(directory, config, results, images)
    return results


def measured(key: Array, name: str, s: Setting) -> tuple[dict[str, Any], Array]:
    """One method at one beta: its figures, and the first of its images."""
    start = time.process_time()
    image, kl, *more = STAGES[name](key, s)
    point: dict[str, Any] = {"method": name, "beta": s.beta, "seconds": time.process_time() - start}
    if name == "final":
        point |= {"curve": kl, **summary(image, s.reward(image), None), **kl[-1]}
    else:
        point |= summary(image, s.reward(image), kl) | ({"log": more[0]} if more else {})
    point["objective"] = point["reward"] - s.beta * point["kl"]
    return point, image[:12]


def save_stage(path: pathlib.Path, point: dict[str, Any], image: Array) -> None:
    """Keeps the figures and images of a method, whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, point=json.dumps(point), image=np.asarray(image), reward=point["reward"])
    os.replace(part, path)


def load_stage(path: pathlib.Path) -> tuple[dict[str, Any], np.ndarray]:
    """Reads what `save_stage` kept.

    Raises:
      ValueError: If the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            return json.loads(str(kept["point"])), kept["image"]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged, delete it to compute it again ({error})") from None


def summary(image: Array, worth: Array, kl: Array | None) -> dict[str, float]:
    """Reward, KL and diversity of images, with standard errors."""
    n, worth = len(image), np.asarray(worth)
    out = {"reward": float(worth.mean()), "reward_se": float(worth.std(ddof=1) / n**0.5)}
    if kl is not None:
        kl = np.asarray(kl)
        out |= {"kl": float(kl.mean()), "kl_se": float(kl.std(ddof=1) / n**0.5)}
    return out | digits_world.diversity(np.asarray(image), np.zeros(n, int))


@program
def main() -> None:
    """Reads the flags and runs."""
    run(from_flags(RewardConfig))


if __name__ == "__main__":
    run_program(main, RewardConfig)
