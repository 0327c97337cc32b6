"""Guidance and soft best-of-N on a learned diffusion of images, beside the same on Gaussians whose scores are exact.

    python -m experiments.diffusion_digits --output=runs/diffusion_digits

A diffusion transformer learns scikit-learn's 8x8 digits with their labels (15% of them dropped). Its samples are then
steered to a class in three ways: not at all, by classifier-free guidance of several scales, and by choosing one of N
candidates at every reverse step of the *unconditional* chain with odds p(c | x)^scale, with and without the finite-N
correction N / (N - 1). A support vector machine that saw other images judges the class. The same is done in the space
of the first 16 principal components, where each class is a Gaussian and every score and p(c | x) is known. It writes
`report.md` with grids of samples and plots, and `results.json`; called again with the same --output it goes on where
it was.

Expected at the default settings (share drawn as asked, learned and exact): guidance of scale 0, 1, 2: .100, .971, 1.000
and .098, 1.000, 1.000; soft best-of-N at scale 1, N = 2, 4, 16, 64: .533, .779, .908, .921 and .568, .893, .986, .998;
with the correction, N = 2, 4: .754, .904 and .872, .973. The learned model's candidates are weighed by its own two
scores. Weighed by a classifier that was trained apart from it, N = 16 reaches .637 only: what guides is p(c | x) of the
generator's own law, and a classifier's need not be that. Guidance beyond scale 1 takes variance from the learned
classes (8.8 to 6.6) and gives it to the exact ones (2.8 to 3.0). 330 s of one core: under three minutes on two.

--dataset=tfds:mnist and --dataset=tfds:fashion_mnist (prepared by TensorFlow Datasets as array_record) take larger
images; give them a larger --features and --num_steps. Bad input ends with one line and exit status 2.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import open_run, overwrite_field
from experiments.diffusion_digits import report
from experiments.diffusion_digits import world as digits_world
from experiments.diffusion_digits.world import Images, Judge
from tiltjax.exact import gaussian
from tiltjax.models.denoiser import Denoiser, DenoiserConfig
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.ops.schedule import cosine_schedule, to_score
from tiltjax.samplers.denoise import ddpm, levels, reverse_kernel
from tiltjax.samplers.guidance import (
    classifier_guidance,
    guidance_weight_for,
    guided_denoiser,
    soft_best_of_n_denoise,
    soft_best_of_n_step,
)
from tiltjax.train.config import field, load_config, output_field, seed_field
from tiltjax.train.streams import root_key
from tiltjax.types import Array

__all__ = ["DigitsConfig", "exact_world", "learned", "run"]

SCALES = (0.0, 1.0, 2.0, 4.0)
CANDIDATES = (2, 4, 16, 64)


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Everything that decides a run."""

    dataset: str = field("digits", "digits (8x8, embedded), or tfds:NAME such as tfds:mnist or tfds:fashion_mnist.")
    features: int = field(64, "Width of the transformer, a multiple of 4 times the 4 heads.")
    num_layers: int = field(4, "Blocks of the transformer.")
    prediction: str = field("velocity", "What the network predicts.", choices=("velocity", "noise", "clean"))
    num_steps: int = field(2000, "Training steps.")
    batch_size: int = field(64, "Images per training step.")
    learning_rate: float = field(2e-3, "Peak learning rate.")
    ema: float = field(0.995, "Decay of the average of the parameters.")
    sampling_steps: int = field(64, "Steps of the reverse chain of the learned model.")
    exact_steps: int = field(100, "Steps of the reverse chain of the exact one.")
    per_class: int = field(24, "Images drawn per class and method.")
    seed: int = seed_field("Of everything.")
    output: str = output_field("runs/diffusion_digits")
    overwrite: bool = overwrite_field()
    quick: bool = field(False, "Cut every size down, to see in seconds that all stages run; the figures mean nothing.")

    def __post_init__(self):
        check_choice("prediction", self.prediction, ("velocity", "noise", "clean"))
        for name in ("num_layers", "num_steps", "batch_size", "sampling_steps", "exact_steps"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("per_class", self.per_class, 2)
        check_at_least("seed", self.seed, 0)
        check_positive("learning_rate", self.learning_rate)

    @property
    def resized(self) -> "DigitsConfig":
        """With the sizes that are used."""
        if not self.quick:
            return self
        return dataclasses.replace(self, features=16, num_layers=1, num_steps=4, batch_size=16, sampling_steps=4,
                                   exact_steps=4, per_class=2)  # fmt: skip


def denoiser_config(config: DigitsConfig, images: Images) -> DenoiserConfig:
    """The network that suits the images: at most 64 patches."""
    size, _, channels = images.image.shape[1:]
    patch = next(p for p in (2, 4, 7, 8) if size % p == 0 and (size // p) ** 2 <= 64)
    return DenoiserConfig(
        image_size=size, channels=channels, patch=patch, features=config.features, num_layers=config.num_layers,
        mlp_features=4 * config.features, num_classes=images.num_classes, prediction=config.prediction,
    )  # fmt: skip


def prepare(config: DigitsConfig, *, guided: bool = True, progress: bool = True) -> tuple[Images, Denoiser, Any]:
    """Images, the trained denoiser and (if ``guided``) a classifier; goes on with what the output directory holds."""
    sizes = config.resized
    images = digits_world.load_images(config.dataset, limit=256 if config.quick else None)
    network, options = denoiser_config(sizes, images), _training(sizes)
    model = digits_world.fit_denoiser(
        pathlib.Path(config.output), images, network, batch_size=sizes.batch_size, seed=sizes.seed, progress=progress,
        **options,
    )  # fmt: skip
    return images, model, _guide(config, images) if guided else None


def load(directory: str, *, guided: bool) -> tuple[Images, Denoiser, Any]:
    """What `prepare` returns, of the finished run of a directory, in which nothing is written.

    Raises:
      ValueError: If the directory holds no run, or one that is not finished.
    """
    saved = pathlib.Path(directory) / "config.json"
    if not saved.exists():
        raise ValueError(f"{saved}: not there; a denoiser is the --output of experiments.diffusion_digits")
    config = load_config(DigitsConfig, saved)
    sizes = config.resized
    images = digits_world.load_images(config.dataset, limit=256 if config.quick else None)
    model = digits_world.load_denoiser(saved.parent, denoiser_config(sizes, images), **_training(sizes))
    return images, model, _guide(config, images) if guided else None


def _training(sizes: DigitsConfig) -> dict[str, Any]:
    return {"num_steps": sizes.num_steps, "learning_rate": sizes.learning_rate, "decay": sizes.ema}


def _guide(config: DigitsConfig, images: Images) -> Any:
    key = jax.random.fold_in(root_key(config.seed), 2)
    return digits_world.fit_classifier(key, images, num_steps=20 if config.quick else 3000)


def methods(config: DigitsConfig) -> dict[str, dict[str, Any]]:
    """What is compared: name -> options of a sampler; "scale" is 1 + w everywhere."""
    scales, candidates = (SCALES[:2], CANDIDATES[:1]) if config.quick else (SCALES, CANDIDATES)
    out: dict[str, dict[str, Any]] = {f"guidance, scale {s:g}": {"scale": s} for s in scales}
    for n in candidates:
        out[f"soft best-of-{n}, scale 1"] = {"scale": 1.0, "n": n}
        out[f"soft best-of-{n}, scale N / (N - 1)"] = {"scale": guidance_weight_for(1.0, n), "n": n}
    if not config.quick:
        out["soft best-of-16 by the classifier"] = {"scale": 1.0, "n": 16, "own": False}
    return out


def learned(
    key: Array,
    model: Denoiser,
    guide: Any,
    label: Array,
    *,
    scale: Array,
    steps: int,
    n: int | None = None,
    own: bool = True,
) -> Array:
    """Images of the learned model, one per label.

    Args:
      key: Consumed.
      model: The denoiser.
      guide: Parameters of the noise-aware classifier.
      label: ``[B]``.
      scale: Exponent of ``p(c | x)`` over the unconditional law: 1 + w.
      steps: Of the reverse chain.
      n: Candidates per step of soft best-of-N; None is classifier-free guidance.
      own: Whether candidates are weighed by the model itself: to first order about the mean of the step, log p(c | x)
        grows along the difference of its conditional and its unconditional score. Otherwise by the classifier.
    """
    keys, schedule = jax.random.split(key), cosine_schedule(steps)
    x = jax.random.normal(keys[0], (*label.shape, *model.config.shape))
    conditional = functools.partial(model, label=label)
    if n is None:
        return ddpm(keys[1], guided_denoiser(conditional, model, scale=scale), x, schedule)

    def log_p(x: Array, alpha_bar: Array) -> Array:
        logp = jax.nn.log_softmax(digits_world.network(guide, x, alpha_bar))
        return scale * jnp.take_along_axis(logp, label[:, None], axis=-1)[:, 0]

    if not own:
        return soft_best_of_n_denoise(keys[1], model, x, schedule, log_p, num_candidates=n)

    def step(x: Array, level: tuple) -> tuple[Array, None]:
        k, before, after = level
        noise = model(x, before)
        slope = to_score(conditional(x, before) - noise, before)
        mean, std = reverse_kernel(x, noise, before, after)

        def log_weight(y: Array) -> Array:
            return scale * jnp.sum((y - mean) * slope, axis=(-3, -2, -1))

        return soft_best_of_n_step(jax.random.fold_in(keys[1], k), mean, std, log_weight, num_candidates=n), None

    return jax.lax.scan(step, x, levels(schedule))[0]


def exact_world(
    key: Array, law: gaussian.Mixture, label: Array, *, scale: Array, steps: int, n: int | None = None
) -> Array:
    """The same as `learned` for Gaussians, where component c is class c: points ``[B, F]``."""
    keys, schedule = jax.random.split(key), cosine_schedule(steps)
    x = jax.random.normal(keys[0], (*label.shape, law.mean.shape[-1]))

    def log_weight(x: Array, alpha_bar: Array) -> Array:
        noised = gaussian.noised(law, alpha_bar)
        return scale * jax.vmap(lambda x, c: gaussian.log_class(noised, x, c))(x, label)

    if n is None:  # grad log p(c | x) is the difference of the two scores.

        def denoiser(x: Array, alpha_bar: Array) -> Array:
            slope = jax.grad(lambda x: jnp.sum(log_weight(x, alpha_bar)))(x)
            return classifier_guidance(gaussian.denoiser(law)(x, alpha_bar), slope, alpha_bar, strength=1.0)

        return ddpm(keys[1], denoiser, x, schedule)
    return soft_best_of_n_denoise(keys[1], gaussian.denoiser(law), x, schedule, log_weight, num_candidates=n)


def run(config: DigitsConfig, *, progress: bool = True) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    with open_run(config, resume=not config.overwrite) as held:
        digits_world.load_images(config.dataset, limit=2)  # Before anything is written.
        held.begin()
        return _run(config, held.directory, progress=progress)


def _run(config: DigitsConfig, directory: pathlib.Path, *, progress: bool) -> dict[str, Any]:
    began, sizes = time.process_time(), config.resized
    images, model, guide = prepare(config, guided=not config.quick, progress=progress)
    judge, seconds = Judge(images), {"training": time.process_time() - began}
    world = digits_world.pca_world(images)
    root = jax.random.fold_in(root_key(config.seed), 3)
    label = np.repeat(np.arange(images.num_classes), sizes.per_class)
    many = np.repeat(np.arange(images.num_classes), 2 if config.quick else 100)
    rows: dict[str, dict[str, float]] = {}
    drawn: dict[str, np.ndarray] = {}
    programs: dict[Any, Any] = {}
    bar = tqdm(methods(config).items(), desc="sampling", disable=not progress)
    for i, (name, options) in enumerate(bar):
        bar.set_postfix_str(name)
        n, own, scale = options.get("n"), options.get("own", True), jnp.float32(options["scale"])
        if (n, own) not in programs:
            programs[n, own] = jax.jit(functools.partial(learned, steps=sizes.sampling_steps, n=n, own=own))
            if n not in programs:
                programs[n] = jax.jit(functools.partial(exact_world, steps=sizes.exact_steps, n=n))
        key = jax.random.fold_in(root, i)
        image = np.asarray(programs[n, own](key, model, guide, label, scale=scale)).clip(-1, 1)
        point = np.asarray(programs[n](key, world.law, many, scale=scale))
        drawn[name] = image
        found, seen = judge(image) == label, np.asarray(world.bayes(point)) == many
        outside = judge(world.pixels(point)) == many
        rows[name] = {
            "accuracy": float(found.mean()), **digits_world.diversity(image, label),
            "exact_accuracy": float(outside.mean()), "exact_bayes_accuracy": float(seen.mean()),
            "exact_accuracy_8": float(seen[many == 8].mean()) if images.num_classes > 8 else float("nan"),
            **{f"exact_{k}": v for k, v in digits_world.diversity(point, many).items()},
        }  # fmt: skip
    seconds["sampling"] = time.process_time() - began - seconds["training"]
    results = {
        "dataset": config.dataset, "judge_accuracy": judge.accuracy, "data": digits_world.diversity(
            images.image, images.label), "rows": rows, "seconds": seconds,
        "parameters": sum(int(x.size) for x in jax.tree.leaves(model)),
    }  # fmt: skip
    report.write(directory, config, results, drawn, label, images)
    return results


@program
def main() -> None:
    """Reads the flags and runs."""
    run(from_flags(DigitsConfig))


if __name__ == "__main__":
    run_program(main, DigitsConfig)
