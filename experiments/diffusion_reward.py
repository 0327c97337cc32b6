"""Reward-directed diffusion without reinforcement learning, and with it: one reward-KL frontier for all methods.

    python -m experiments.diffusion_reward --output=runs/diffusion_reward

The reference is the unconditional diffusion of `experiments.diffusion_digits` (taken from --denoiser, or trained there
first). It is directed to a reward of images (ink, symmetry or the log-probability of a class) by final-sample soft
best-of-N, soft best-of-N at every reverse step with plug-in and with learned soft values, sequential Monte Carlo,
importance-weighted denoising score matching, rounds of guarded resampling and fine-tuning, and DDPO: all at the same
betas, chosen so that the exact tilt of the reference's own images has the KLs of --kls. For every method the report
has the reward, a bound from above on the KL of its images to the reference's, and the diversity of the images. No
law of a given mean reward is nearer to the reference than the tilt, which is therefore the frontier.

Expected at the default settings, where the tilts of ink have reward .346 and .377 at 0.7 and 2 nats (the reference
.301): soft best-of-N of finished images and of every step (plug-in value) and SMC lie on the frontier (.339 to .344 at
about 0.6 nats, .363 to .376 at 1.5 to 1.8); a learned value lags (.332 at 0.5, .350 at 1.4); importance-weighted score
matching and guarded resampling reach the reward (.350 and .348, .367 and .368) at path KLs of 3 to 7 nats, of which the
control, fine-tuned without any reward, has 2, and with less diversity; DDPO, the slowest, gets to .319 and .332 at 0.4
and 0.8 nats. 420 s of one core: under four minutes on two, after the training of the denoiser.

Bad input ends with one line and exit status 2.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from tqdm import tqdm

from experiments import diffusion_digits, digits_world
from experiments import diffusion_stages as stages
from experiments.digits_report import image_grid
from experiments.launch import command, program
from experiments.reporting import STYLE, plt
from tiltjax.exact import bandit
from tiltjax.models.denoiser import Denoiser
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.samplers.resample import resample
from tiltjax.tilt.divergence import tilt_kl, tilted_reward
from tiltjax.tilt.temperature import beta_for_kl
from tiltjax.tilt.weights import tilt
from tiltjax.train.config import define_flags, field, from_flags, save_config, write_text
from tiltjax.types import Array

__all__ = ["METHODS", "RewardConfig", "run"]

METHODS: dict[str, tuple[str, str, str]] = {
    "tilt": ("the tilt (importance-weighted)", "#999999", "-"),
    "final": ("final-sample soft best-of-N", "#56B4E9", "o"),
    "plug_in": ("per-step soft best-of-N, plug-in value", "#0072B2", "s"),
    "learned": ("per-step soft best-of-N, learned value", "#0072B2", "^"),
    "smc": ("sequential Monte Carlo", "#009E73", "D"),
    "control": ("fine-tuned on its own images, unweighted", "#000000", "v"),
    "weighted": ("importance-weighted score matching", "#D55E00", "*"),
    "resampled": ("guarded resampling and fine-tuning", "#E69F00", "P"),
    "ddpo": ("DDPO", "#CC79A7", "x"),
}
"""Name -> words, colour (Okabe and Ito, 2008) and marker."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Everything that decides a run."""

    reward: str = field("ink", "ink, symmetry, or class:C for the log-probability of class C.")
    kls: str = field("0.7,2", "Comma-separated: KLs of the tilts that are aimed at, nats; each gives a beta.")
    methods: str = field("all", "Comma-separated names of methods, or all; the tilt is always there.")
    denoiser: str = field("runs/diffusion_digits", "Run of experiments.diffusion_digits; made if it is not there.")
    sampling_steps: int = field(20, "Steps of the reverse chain.")
    pool: int = field(2048, "Images of the reference, shared by the methods that weigh finished images.")
    num_chains: int = field(160, "Images by which each method is judged.")
    num_candidates: int = field(8, "Candidates of each soft best-of-N step, and particles of each run of SMC.")
    tuning_steps: int = field(150, "Steps of fine-tuning.")
    ddpo_iterations: int = field(20, "Iterations of DDPO, of 64 chains each.")
    learning_rate: float = field(2e-4, "Of fine-tuning.")
    seed: int = field(0, "Of everything but the denoiser.")
    output: str = field("runs/diffusion_reward", "Directory of the run.")
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
    ref, points = jnp.full(len(s.worth), 1 / len(s.worth)), []
    for n in (2, 4, 8, 16, 64):
        law = bandit.soft_best_of_n_law(ref, s.worth, n=n, beta=s.beta)
        points.append({"n": n, "reward": float(law @ s.worth), "kl": float(bandit.kl(law, ref))})
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
    directory, sizes = pathlib.Path(config.output), config.resized
    if (directory / "config.json").exists():
        raise ValueError(f"{directory}: there is a run already; pass another --output")
    began = time.process_time()
    source = diffusion_digits.DigitsConfig(output=config.denoiser, quick=config.quick)
    guided = config.reward.startswith("class")
    _, ref, guide = diffusion_digits.prepare(source, guided=guided, progress=progress)
    reward = stages.rewards(config.reward, guide)
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, directory / "config.json")
    root = jax.random.key(config.seed)
    pool, _, _ = stages.chains(jax.random.fold_in(root, 0), ref, ref, n=sizes.pool, steps=sizes.sampling_steps)
    worth = reward(pool)
    results: dict[str, Any] = {"reward": config.reward, "points": [], "reference": summary(pool, worth, None)}
    images = {"reference": np.asarray(pool[:12])}
    bar = tqdm(
        total=len(sizes.targets) * (len(sizes.names) - ("control" in sizes.names)) + ("control" in sizes.names),
        desc="methods",
        disable=not progress,
    )
    for i, kl in enumerate(sizes.targets):
        beta = float(beta_for_kl(worth, kl=kl))
        setting = Setting(sizes, ref, reward, pool, worth, beta)
        t = tilt(worth, beta=beta)
        results["points"].append({
            "method": "tilt", "beta": beta, "reward": float(tilted_reward(worth, beta=beta)), "kl": kl,
            "log_z": float(t.log_z), "ess": float(t.ess),
        })  # fmt: skip
        for name in sizes.names:
            if name == "control" and i:
                continue  # It has no beta.
            bar.set_postfix_str(f"{name}, beta {beta:.3g}")
            start, key = time.process_time(), jax.random.fold_in(root, i + 1)
            image, kl_of, *more = STAGES[name](jax.random.fold_in(key, list(STAGES).index(name)), setting)
            point: dict[str, Any] = {"method": name, "beta": beta, "seconds": time.process_time() - start}
            if name == "final":
                point |= {"curve": kl_of, **summary(image, reward(image), None), **kl_of[-1]}
            else:
                point |= summary(image, reward(image), kl_of) | ({"log": more[0]} if more else {})
            point["objective"] = point["reward"] - beta * point["kl"]
            results["points"].append(point)
            images["control" if name == "control" else f"{name}, KL {kl:g}"] = np.asarray(image[:12])
            bar.update()
    bar.close()
    grid = np.geomspace(0.02, max(5.0, 2 * max(sizes.targets)), 30)
    betas = jax.vmap(lambda kl: beta_for_kl(worth, kl=kl))(grid)
    results["frontier"] = {
        "kl": jax.vmap(lambda b: tilt_kl(worth, beta=b))(betas).tolist(),
        "reward": jax.vmap(lambda b: tilted_reward(worth, beta=b))(betas).tolist(),
    }
    results["seconds"] = time.process_time() - began
    write(directory, config, results, images)
    return results


def summary(image: Array, worth: Array, kl: Array | None) -> dict[str, float]:
    """Reward, KL and diversity of images, with standard errors."""
    n, worth = len(image), np.asarray(worth)
    out = {"reward": float(worth.mean()), "reward_se": float(worth.std(ddof=1) / n**0.5)}
    if kl is not None:
        kl = np.asarray(kl)
        out |= {"kl": float(kl.mean()), "kl_se": float(kl.std(ddof=1) / n**0.5)}
    return out | digits_world.diversity(np.asarray(image), np.zeros(n, int))


def write(directory: pathlib.Path, config: RewardConfig, results: dict[str, Any], images: dict[str, Any]) -> None:
    """Writes ``results.json``, the plots and ``report.md``, and prints the table."""
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    frontier_plot(directory / "frontier.png", config, results)
    last = f"KL {config.resized.targets[-1]:g}"
    rows = {k.split(",")[0]: x for k, x in images.items() if "," not in k or k.endswith(last)}
    image_grid(directory / "samples.png", rows, title=f"reward: {config.reward}; beta of the tilt at {last}")
    table = _table(results)
    parts = [
        f"# Reward-directed diffusion: {config.reward}",
        f"The reference's images have reward {results['reference']['reward']:.4f}; total variance "
        f"{results['reference']['total_variance']:.2f}, mean distance "
        f"{results['reference']['pairwise_distance']:.2f}. {results['seconds']:.0f} s of one core in all.",
        "![frontier](frontier.png)",
        table,
        "J = reward - beta KL is computed from the bound, and so is a bound from below; the tilt's, beta log Z, is the "
        "largest that any law can reach.",
        "What the KL column is: exact for the tilt and for final-sample soft best-of-N (laws on the pool of the "
        "reference's images); for soft best-of-N steps the sum over steps of E log(N weight of the one chosen); for "
        "SMC E[r / beta - log Z^] with the run's own estimate Z^; for the fine-tuned models the path KL of the reverse "
        "chain, a sum of KLs of Gaussians (in the control, all that fine-tuning costs where there "
        "is nothing to gain: what the average of the weights still carries of single batches, and what a network loses "
        "by learning from its own images). The last three bound the KL of the images from above. The last, noiseless "
        "step of every chain is the reference's.",
        "![samples](samples.png)",
        "## Command",
        f"```\n{command('diffusion_reward', config)}\n```",
    ]
    write_text(directory / "report.md", "\n\n".join(parts) + "\n")
    print(f"\n{table}\n\nreport: {directory / 'report.md'}")


def frontier_plot(path: pathlib.Path, config: RewardConfig, results: dict[str, Any]) -> None:
    """Reward against the bound on the KL, and diversity against reward."""
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.6), width_ratios=(1.35, 1))
        frontier = results["frontier"]
        words, colour, _ = METHODS["tilt"]
        left.plot(frontier["kl"], frontier["reward"], color=colour, lw=2.5, label=words, zorder=1)
        ref = results["reference"]
        left.plot([0], [ref["reward"]], "k*", ms=9, label="reference")
        right.plot([ref["reward"]], [ref["pairwise_distance"]], "k*", ms=9)
        for name, (words, colour, marker) in METHODS.items():
            points = [p for p in results["points"] if p["method"] == name]
            if name == "tilt":
                left.plot([p["kl"] for p in points], [p["reward"] for p in points], "d", color=colour, mec="k", ms=8)
                continue
            for p in points:
                label = words if p is points[0] else None
                if "curve" in p:
                    left.plot([q["kl"] for q in p["curve"]], [q["reward"] for q in p["curve"]], "-", marker=marker,
                              color=colour, ms=4, label=label)  # fmt: skip
                else:
                    left.errorbar(p["kl"], p["reward"], xerr=p["kl_se"], yerr=p["reward_se"], fmt=marker, color=colour,
                                  ms=11 if marker == "*" else 8, capsize=2, label=label)  # fmt: skip
                if name == "ddpo":
                    left.plot([k for _, k in p["log"]], [r for r, _ in p["log"]], ":", color=colour, lw=1)
                right.plot(p["reward"], p["pairwise_distance"], marker, color=colour, ms=11 if marker == "*" else 8)
        # Near the reference the frontier is a square root: on this axis, a line.
        left.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        left.set_xlim(0, 1.1 * max(q["kl"] for p in results["points"] for q in (p, *p.get("curve", ()))))
        left.set_xticks(ticks := [t for t in (0, 0.1, 0.5, 1, 2, 3, 5, 7, 10, 20) if t < left.get_xlim()[1]], ticks)
        left.set_xlabel("KL to the reference, nats (bound from above where not exact)")
        left.set_ylabel(f"reward ({config.reward})")
        left.legend(fontsize=7)
        right.set_xlabel(f"reward ({config.reward})")
        right.set_ylabel("mean distance between images")
        fig.savefig(path)
        plt.close(fig)


def _table(results: dict[str, Any]) -> str:
    rows = [
        "| method | beta | reward | KL <= | J >= | total variance | distance | s of one core |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in results["points"]:
        if p["method"] == "tilt":
            rows.append(f"| **{METHODS['tilt'][0]}** | {p['beta']:.4f} | {p['reward']:.4f} | {p['kl']:.2f} | "
                        f"{p['beta'] * p['log_z']:.4f} | | | |")  # fmt: skip
            continue
        name = METHODS[p["method"]][0] + (f", N = {p['n']}" if "n" in p else "")
        rows.append(f"| {name} | {p['beta']:.4f} | {p['reward']:.4f} | {p['kl']:.2f} | {p['objective']:.4f} | "
                    f"{p['total_variance']:.2f} | {p['pairwise_distance']:.2f} | {p['seconds']:.0f} |")  # fmt: skip
    return "\n".join(rows)


@program
def main() -> None:
    """Reads the flags and runs."""
    run(from_flags(RewardConfig))


if __name__ == "__main__":
    define_flags(RewardConfig)
    app.run(main)
