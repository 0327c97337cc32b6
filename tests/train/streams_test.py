import ast
import pathlib

import jax
import numpy as np
import pytest

import experiments
from tiltjax.train import streams
from tiltjax.train.streams import generator, root_key, stream

LIBRARY = pathlib.Path(streams.__file__).parents[1]
FOLDERS = [pathlib.Path(path) for path in (*experiments.__path__, LIBRARY / "train", LIBRARY / "align")]


def data(key):
    return tuple(jax.random.key_data(key).tolist())


@pytest.mark.robustness(
    "Flags",
    given="seeds that differ above their lowest 32 bits",
    outcome="streams that differ (jax.random.key drops them)",
)
def test_every_seed_and_name_has_a_stream_of_its_own():
    seeds = [0, 1, 5, 6, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63, 2**64 - 1]
    keys = {data(root_key(seed)) for seed in seeds}
    keys |= {data(stream(seed, name)) for seed in seeds for name in ("fit", "adapters", "sample train")}
    assert len(keys) == 4 * len(seeds)
    assert data(root_key(7)) == data(jax.random.key(7))
    drawn = {
        tuple(generator(seed, name, *numbers).integers(2**62, size=2))
        for seed in seeds
        for name in ("fit", "labels")
        for numbers in ((), (1,), (1, 2), (2, 1))
    }
    assert len(drawn) == 8 * len(seeds)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\*\*64\), got {seed}"):
            root_key(seed)


def test_a_name_means_the_same_key_in_every_process():
    assert data(stream(0, "fit")) == (48006118, 2771959670)
    np.testing.assert_array_equal(
        generator(3, "a", 1).integers(100, size=3), generator(3, "a", 1).integers(100, size=3)
    )


def calls():
    for folder in FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            if path.name == "streams.py" or "theory" in path.parts:  # Theory draws from fixed keys.
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path.name, ast.unparse(node.func), node


MAKERS = ("jax.random.key", "jax.random.PRNGKey", "np.random.default_rng", "root_key", "stream", "generator")


def test_no_two_uses_share_a_name_and_no_key_is_made_of_a_seed_elsewhere():
    """What is added to a seed is the seed of another run."""
    made = [(file, function, node) for file, function, node in calls() if function in MAKERS]
    named = [node for _, function, node in made if function in ("stream", "generator")]
    names = [ast.unparse(node.args[1]) for node in named]
    assert len(names) > 8
    assert len(names) == len(set(names))
    bad = [
        f"{file}: {ast.unparse(node)}"
        for file, function, node in made
        for argument in map(ast.unparse, node.args)
        if "seed" in argument and (function.startswith("jax") or "+" in argument)
    ]
    assert bad == []
