"""Images with labels, a diffusion transformer that draws them, a classifier that guides it and a judge that does not.

The generator and its guide learn from one part of the images, the judge (a support vector machine) from the other, so
that what the judge says of drawn images is no echo of the guide.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tiltjax.data.pipeline import epoch_batches
from tiltjax.exact import gaussian
from tiltjax.losses.denoising import denoising_loss
from tiltjax.models.denoiser import Denoiser, DenoiserConfig, drop_label
from tiltjax.ops.masked import average
from tiltjax.ops.schedule import add_noise, cosine_schedule, expand, log_snr
from tiltjax.train import checkpoint
from tiltjax.train.average import averaged
from tiltjax.train.finite import check_tree
from tiltjax.train.loop import fit
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step
from tiltjax.train.streams import root_key
from tiltjax.types import Array

__all__ = [
    "Images",
    "Judge",
    "PcaWorld",
    "diversity",
    "fit_denoiser",
    "fit_network",
    "load_images",
    "network",
    "noisy",
    "pca_world",
    "train_levels",
]

SOURCES = ("digits", "tfds:mnist", "tfds:fashion_mnist")
LEVELS = 1000
LABEL_DROPOUT = 0.15


@dataclasses.dataclass(frozen=True)
class Images:
    """Pixels in [-1, 1], ``[n, H, W, C]``, and labels ``[n]``: to learn from, and held out for the judge."""

    image: np.ndarray
    label: np.ndarray
    held_image: np.ndarray
    held_label: np.ndarray

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return int(self.label.max()) + 1


def load_images(source: str = "digits", *, limit: int | None = None) -> Images:
    """Reads labelled square images.

    Args:
      source: "digits" (1,797 of 8x8, inside scikit-learn: no network), or ``tfds:NAME`` or ``tfds:FOLDER`` for a
        prepared TensorFlow dataset with the features "image" and "label" and splits "train" and "test", such as
        ``tfds:mnist`` and ``tfds:fashion_mnist``.
      limit: Keep so many of each part; None keeps all.

    Raises:
      ValueError: If the source is none of these, or the dataset is not there or not of this kind.
    """
    if source == "digits":
        from sklearn.datasets import load_digits

        images, label = load_digits(return_X_y=True)
        pixels = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
        order = np.random.default_rng(0).permutation(len(label))
        held = np.arange(len(label)) % 3 == 0
        parts = [(pixels[order[mask]], label[order[mask]]) for mask in (~held, held)]
    elif source.startswith("tfds:"):
        parts = [_read_tfds(source.removeprefix("tfds:"), split) for split in ("train", "test")]
    else:
        raise ValueError(f"dataset must be digits or tfds:NAME, such as {', '.join(SOURCES[1:])}; got {source!r}")
    (image, label), (held_image, held_label) = ((x[:limit], y[:limit]) for x, y in parts)
    return Images(image=image, label=label, held_image=held_image, held_label=held_label)


def _read_tfds(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds

    folder = pathlib.Path(name).expanduser()
    try:
        builder = tfds.builder_from_directory(str(folder)) if folder.is_dir() else tfds.builder(name)
        examples = builder.as_data_source(split=split)
        rows = [examples[i] for i in range(len(examples))]
        pixels = np.stack([row["image"] for row in rows]).astype(np.float32) / 127.5 - 1
        return pixels, np.array([row["label"] for row in rows])
    except (NotImplementedError, KeyError, ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"tfds:{name}: no {split} images ({reason})") from None


def train_levels() -> Array:
    """The noise schedule that everything is trained on, ``[LEVELS + 1]``; samplers take fewer steps of it."""
    return cosine_schedule(LEVELS)


def noisy(key: Array, clean: Array) -> tuple[Array, Array, Array]:
    """Draws a noise level for each image, spread evenly over the schedule: noisy image, noise and ``alpha_bar``."""
    first, second = jax.random.split(key)
    n = clean.shape[0]
    places = (jnp.arange(n) + jax.random.uniform(first)) / n
    alpha_bar = train_levels()[1 + (places * LEVELS).astype(int)]
    alpha_bar = jax.random.permutation(jax.random.fold_in(first, 1), alpha_bar)
    noise = jax.random.normal(second, clean.shape)
    return add_noise(clean, noise, alpha_bar), noise, alpha_bar


def denoiser_loss(model: Denoiser, _: Any, batch: dict[str, Array], key: Array) -> tuple[Any, dict]:
    """`tiltjax.train.step.LossFn` of a conditional denoiser."""
    keys = jax.random.split(key)
    clean, config = batch["image"], model.config
    x, noise, alpha_bar = noisy(keys[0], clean)
    label = drop_label(keys[1], batch["label"], rate=LABEL_DROPOUT, num_classes=config.num_classes)
    output = model.output(x, alpha_bar, label=label)
    flat = [y.reshape(len(clean), -1) for y in (output, clean, noise)]
    return average(denoising_loss(*flat, alpha_bar, kind=config.prediction)), {}


def fit_denoiser(
    directory: pathlib.Path,
    images: Images,
    config: DenoiserConfig,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    decay: float,
    seed: int,
    progress: bool = True,
) -> Denoiser:
    """Trains a denoiser, or goes on with what the directory holds; returns the average of its parameters."""
    tx = _optimizer(num_steps, learning_rate, decay)
    root = root_key(seed)
    state = jax.jit(lambda key: init_state(Denoiser(key, config), tx))(jax.random.fold_in(root, 0))
    order = epoch_batches(len(images.label), min(batch_size, len(images.label)), seed=seed)

    def batches(step: int) -> dict[str, np.ndarray]:
        rows = order(step)
        return {"image": images.image[rows], "label": images.label[rows].astype(np.int32)}

    step_fn = jax.jit(functools.partial(train_step, loss_fn=denoiser_loss, tx=tx), donate_argnums=0)
    # Resuming is exact with the schedule, the images and the network that it was begun with, and only then.
    made_of = repr((config, num_steps, batch_size, learning_rate, decay, seed)).encode()
    fingerprint = hashlib.sha256(made_of + images.image.tobytes() + images.label.tobytes()).hexdigest()[:16]
    state = fit(state, batches, step_fn=step_fn, key=jax.random.fold_in(root, 1), num_steps=num_steps,
                directory=directory, resume=True, checkpoint_every=250, fingerprint=fingerprint,
                progress=progress)  # fmt: skip
    return state.opt_state.average


def load_denoiser(
    directory: pathlib.Path, config: DenoiserConfig, *, num_steps: int, learning_rate: float, decay: float
) -> Denoiser:
    """What `fit_denoiser` of the same arguments left in a directory, in which nothing is written.

    Raises:
      ValueError: If its training is not finished.
    """
    folder = directory / "checkpoints"
    found = checkpoint.latest(folder)
    if found != num_steps:
        raise ValueError(f"{folder}: training ended at step {found}, not at {num_steps}; finish it first")
    tx = _optimizer(num_steps, learning_rate, decay)
    like = jax.eval_shape(lambda: init_state(Denoiser(jax.random.key(0), config), tx))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_here()), like)
    return checkpoint.restore(folder, num_steps, like).opt_state.average


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _optimizer(num_steps: int, learning_rate: float, decay: float) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, num_steps), num_steps + 1)
    return averaged(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), decay=decay)


def fit_network(
    key: Array,
    loss: Callable[[Any, Array], Array],
    *,
    sizes: tuple[int, ...],
    num_steps: int,
    learning_rate: float = 2e-3,
) -> Any:
    """A small `network` that minimises ``loss(net, key)``."""
    keys = jax.random.split(key, len(sizes))
    net = [
        (jax.random.normal(k, (i, o)) * (2 / i) ** 0.5 * (1.0 if n + 2 < len(sizes) else 0.1), jnp.zeros(o))
        for n, (k, i, o) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=False))
    ]
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        net, state = carry
        updates, state = tx.update(jax.grad(loss)(net, key), state)
        return (optax.apply_updates(net, updates), state), None

    run = jax.jit(lambda net: jax.lax.scan(step, (net, tx.init(net)), jax.random.split(keys[-1], num_steps))[0][0])
    net = run(net)
    check_tree(f"step {num_steps} of a network", net)
    return net


def network(net: Any, x: Array, alpha_bar: Array) -> Array:
    """A multilayer perceptron on noisy images ``[*batch, H, W, C]`` and their level: ``[*batch, outputs]``."""
    a = jnp.broadcast_to(expand(alpha_bar, x[..., 0, 0, 0]), x.shape[:-3])[..., None]
    level = jnp.clip(log_snr(jnp.clip(a, 1e-6, 1 - 1e-6)), -12.0, 12.0) / 4
    waves = [jnp.sin(level), jnp.cos(level), jnp.sin(3 * level), jnp.cos(3 * level)]
    h = jnp.concatenate([x.reshape(*x.shape[:-3], -1), level, *waves, jnp.sqrt(a)], axis=-1)
    for n, (weight, bias) in enumerate(net):
        h = h @ weight + bias.reshape((1,) * (h.ndim - 1) + (-1,))
        h = jax.nn.silu(h) if n + 1 < len(net) else h
    return h


def network_inputs(images: Images) -> int:
    """How many numbers the first layer of a `network` reads."""
    return int(np.prod(images.image.shape[1:])) + 6


def fit_classifier(key: Array, images: Images, *, num_steps: int, width: int = 192, batch_size: int = 256) -> Any:
    """A `network` for ``log p(c | x, alpha_bar)`` up to a constant, from the images that the generator learns from."""
    data, label = jnp.asarray(images.image), jnp.asarray(images.label)

    def loss(net: Any, key: Array) -> Array:
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (batch_size,), 0, len(label))
        x, _, alpha_bar = noisy(keys[1], data[rows])
        logits = network(net, x, alpha_bar)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[rows]).mean()

    sizes = (network_inputs(images), width, width, images.num_classes)
    return fit_network(key, loss, sizes=sizes, num_steps=num_steps)


class Judge:
    """An independent classifier: a support vector machine that learned from the held-out images only."""

    def __init__(self, images: Images, *, limit: int = 5000):
        from sklearn.svm import SVC

        held = images.held_image[:limit]
        self._machine = SVC(C=10.0).fit(held.reshape(len(held), -1), images.held_label[:limit])
        self.accuracy = float(np.mean(self(images.image[:limit]) == images.label[:limit]))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Labels of images ``[n, H, W, C]``."""
        image = np.asarray(image)
        return self._machine.predict(image.reshape(len(image), -1))


def diversity(image: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Total variance and mean pairwise distance within a class, averaged over classes.

    Args:
      image: ``[n, ...]``.
      label: What each was meant to be, ``[n]``; classes with one image are left out.
    """
    variance, distance = [], []
    for c in np.unique(label):
        x = np.asarray(image, np.float64)[label == c].reshape(np.sum(label == c), -1)
        if len(x) > 1:
            variance.append(x.var(axis=0, ddof=1).sum())
            square = np.square(x).sum(-1)
            gaps = np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0)
            distance.append(np.sqrt(gaps)[np.triu_indices(len(x), 1)].mean())
    return {"total_variance": float(np.mean(variance)), "pairwise_distance": float(np.mean(distance))}


@dataclasses.dataclass(frozen=True)
class PcaWorld:
    """Gaussians, one per class, in the space of the first principal components: every noisy law is known.

    Attributes:
      law: Of the points ``[F]``; component c is class c.
      components: ``[F, pixels]``: what a point adds to the pixels.
      centre: ``[pixels]``.
    """

    law: gaussian.Mixture
    components: np.ndarray
    centre: np.ndarray

    def bayes(self, point: Array) -> Array:
        """The likeliest class of clean points ``[n, F]``."""
        classes = jnp.arange(len(self.law.mean))
        return jnp.argmax(jax.vmap(lambda c: gaussian.log_class(self.law, point, c))(classes), axis=0)

    def pixels(self, point: np.ndarray) -> np.ndarray:
        """The images of points, ``[n, pixels]``."""
        return self.centre + np.asarray(point) @ self.components


def pca_world(images: Images, *, features: int = 16) -> PcaWorld:
    """Fits a `PcaWorld` to images, in units in which the largest principal deviation is 1."""
    flat = images.image.reshape(len(images.image), -1).astype(np.float64)
    centre = flat.mean(axis=0)
    _, _, rows = np.linalg.svd(flat - centre, full_matrices=False)
    features = min(features, len(rows))
    points = (flat - centre) @ rows[:features].T
    scale = points.std(axis=0).max()
    groups = [points[images.label == c] / scale for c in range(images.num_classes)]
    ridge = 1e-3 * np.eye(features)
    law = gaussian.mixture(
        np.array([len(g) / len(points) for g in groups], np.float32),
        np.stack([g.mean(axis=0) for g in groups]).astype(np.float32),
        np.stack([np.cov(g.T) + ridge for g in groups]).astype(np.float32),
        np.arange(images.num_classes),
    )
    return PcaWorld(law=law, components=(rows[:features] * scale).astype(np.float32), centre=centre.astype(np.float32))
