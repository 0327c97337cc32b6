"""The exact Gaussians obey the facts about guidance and soft best-of-N; the whole job runs once, tiny, and resumes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.diffusion_digits import __main__ as experiment
from experiments.diffusion_digits import world as digits_world


@pytest.fixture(scope="module")
def images():
    return digits_world.load_images()


@pytest.fixture(scope="module")
def world(images):
    return digits_world.pca_world(images)


def test_parts_are_disjoint_and_balanced(images):
    assert images.image.shape == (1198, 8, 8, 1)
    assert images.held_image.shape == (599, 8, 8, 1)
    assert images.num_classes == 10
    assert (images.image.min(), images.image.max()) == (-1, 1)
    for label in (images.label, images.held_label):
        assert np.bincount(label).min() > 0.08 * len(label)


def test_judge_is_good_and_saw_none_of_it(images):
    assert digits_world.Judge(images).accuracy > 0.96


def test_diversity_is_the_variance_and_the_mean_distance():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(7, 2, 2, 1)), np.array([0, 0, 0, 1, 1, 1, 2])
    groups = [x[:3].reshape(3, 4), x[3:6].reshape(3, 4)]
    gaps = [[np.linalg.norm(g[i] - g[j]) for i in range(3) for j in range(i)] for g in groups]
    figures = digits_world.diversity(x, label)
    assert figures["total_variance"] == pytest.approx(np.mean([g.var(0, ddof=1).sum() for g in groups]))
    assert figures["pairwise_distance"] == pytest.approx(np.mean(gaps))


def test_principal_components_give_the_images_back(images, world):
    flat = images.image.reshape(len(images.image), -1)
    scale = np.linalg.norm(world.components, axis=1)[0]
    points = (flat - world.centre) @ world.components.T / scale**2
    assert np.square(world.pixels(points) - flat).mean() < 0.25 * flat.var(0).mean()
    assert (np.asarray(world.bayes(points)) == images.label).mean() > 0.95


# What is known of class 8: accuracy .087 unconditional, .993 at scale 1 and 1.0 at scale 3; .865 with soft best-of-4
# and .968 with best-of-16 at scale 1, which guide as 1 - 1/N times the scale.
FACTS = [(None, 0.0, 0.087, 0.06), (None, 1.0, 0.993, 0.02), (None, 3.0, 1.0, 0.01), (4, 1.0, 0.865, 0.07),
         (16, 1.0, 0.968, 0.04)]  # fmt: skip


@pytest.fixture(scope="module")
def chains():
    return functools.cache(lambda n: jax.jit(functools.partial(experiment.exact_world, steps=100, n=n)))


@pytest.mark.parametrize(("n", "scale", "accuracy", "tolerance"), FACTS)
def test_facts_about_the_exact_world(world, chains, n, scale, accuracy, tolerance):
    point = chains(n)(jax.random.key(0), world.law, np.full(300, 8), scale=jnp.float32(scale))
    assert abs((np.asarray(world.bayes(point)) == 8).mean() - accuracy) < tolerance


def test_guidance_moves_the_mean_and_keeps_the_variance(world, chains):
    one, three = (
        np.asarray(chains(None)(jax.random.key(1), world.law, np.full(300, 8), scale=jnp.float32(s))) for s in (1, 3)
    )
    away = [np.linalg.norm(x.mean(0) - np.asarray(world.law.mean[8])) for x in (one, three)]
    assert away[1] > 2 * away[0]
    assert three.var(0).sum() > 0.9 * one.var(0).sum()


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Configuration and results of a tiny run; its figures mean nothing."""
    config = experiment.DigitsConfig(output=str(tmp_path_factory.mktemp("digits")), quick=True)
    return config, experiment.run(config, progress=False)


def test_run_leaves_its_report(digits_run):
    config, results = digits_run
    with open(f"{config.output}/results.json") as file:
        assert json.load(file)["rows"].keys() == results["rows"].keys() == experiment.methods(config).keys()
    with open(f"{config.output}/report.md") as file:
        assert "soft best-of-2, scale N / (N - 1)" in file.read()
    for name in ("guidance", "candidates", "figures"):
        with open(f"{config.output}/{name}.png", "rb") as file:
            assert file.read(4) == b"\x89PNG"
    assert all(0 <= row["accuracy"] <= 1 for row in results["rows"].values())


def test_a_finished_run_is_not_trained_again(digits_run):
    config, _ = digits_run
    with open(f"{config.output}/metrics.jsonl") as file:
        before = file.read()
    assert before.count("\n") == config.resized.num_steps
    experiment.prepare(config, guided=False, progress=False)
    with open(f"{config.output}/metrics.jsonl") as file:
        assert file.read() == before


def test_another_configuration_is_refused(digits_run):
    config, _ = digits_run
    with pytest.raises(ValueError, match=r"a run with other settings: quick .* pass --overwrite to remove it"):
        experiment.run(experiment.DigitsConfig(output=config.output))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 1}, "per_class must be at least 2, got 1"),
        ({"prediction": "x0"}, "prediction must be one of clean, noise, velocity; got 'x0'"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        experiment.DigitsConfig(**options)


def test_bad_flags_end_in_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    output = str(tmp_path / "run")
    monkeypatch.setattr(experiment, "from_flags", lambda config: config(dataset="cifar", output=output))
    with pytest.raises(SystemExit) as stop:
        experiment.main(["digits"])
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no train images"):
        digits_world.load_images(f"tfds:{tmp_path}")
