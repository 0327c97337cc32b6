import dataclasses
import re

import pytest
from absl import flags

from experiments.common.flags import define_flags, from_flags
from tiltjax.ops.checks import check_choice
from tiltjax.train.config import field, load_config, output_field, save_config, seed_field


@dataclasses.dataclass(frozen=True)
class Config:
    test_method: str = field("tilt", "How.", choices=("tilt", "invert"))
    test_beta: float = field(0.1, "Strength, reward units.")
    test_steps: int = field(3, "Updates.")
    test_fast: bool = field(False, "Hurry.")
    test_limit: float | None = field(None, "Optional.")


def test_flags_become_one_frozen_record(tmp_path):
    define_flags(Config)
    flags.FLAGS(["x", "--test_method=invert", "--test_beta=0.5", "--test_fast", "--test_limit=2"])
    config = from_flags(Config)
    assert config == Config("invert", 0.5, 3, True, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.test_steps = 4
    save_config(config, tmp_path / "config.json")
    assert load_config(Config, tmp_path / "config.json") == config
    assert "Strength, reward units." in flags.FLAGS.get_help()


@dataclasses.dataclass(frozen=True)
class Run:
    method: str = field("tilt", "How.", choices=("tilt", "invert"))
    beta: float = field(0.1, "Strength.")
    limit: float | None = field(None, "Optional.")
    steps: int = field(3, "Updates.")
    fast: bool = field(False, "Hurry.")
    seed: int = seed_field()
    output: str = output_field("runs/x")


@pytest.mark.robustness(
    "Flags",
    given="a run's config.json: other fields or types, nulls, no object",
    outcome="one line with path and field",
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"other": 1}', "unknown fields 'other'"),
        ("{", "Expecting property name"),
        ("[]", "its root must be an object, got list"),
        ("null", "its root must be an object, got NoneType"),
        ("[" * 100_000, "recursion"),
        ('{"beta": null}', "beta must be a finite number, got None"),
        ('{"beta": "a"}', "beta must be a finite number, got 'a'"),
        ('{"beta": NaN}', "beta must be a finite number, got nan"),
        ('{"limit": 1e999}', "limit must be a finite number, got inf"),
        ('{"limit": ' + "9" * 400 + "}", "limit must be a finite number, got 999"),
        ('{"steps": 3.0}', "steps must be an integer, got 3.0"),
        ('{"steps": true}', "steps must be an integer, got True"),
        ('{"steps": 18446744073709551616}', "steps must fit in 64 bits"),
        ('{"fast": 1}', "fast must be true or false, got 1"),
        ('{"method": ["tilt"]}', "method must be a string, got"),
        ('{"method": "tlit"}', "method must be one of invert, tilt; got 'tlit'; did you mean 'tilt'?"),
        ('{"seed": -1}', r"seed must lie in [0, 2**64), got -1"),
        ('{"seed": 18446744073709551616}', r"seed must"),
        ('{"output": ""}', "output must name a path, got ''"),
        ('{"output": "a\\u0000b"}', "output must not hold the character NUL"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    whole = rf"a.json: not a configuration of this experiment \(.*{re.escape(message)}"
    with pytest.raises(ValueError, match=whole) as error:
        load_config(Run, tmp_path / "a.json")
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 300 + len(str(tmp_path))


def test_of_many_choices_the_near_ones_are_named():
    names = [f"method_{i}" for i in range(90)] + ["rloo", "grpo"]
    line = r"^m must be one of 92 names \(.*, \.\.\.\); got 'rlo'; did you mean 'rloo'\?$"
    with pytest.raises(ValueError, match=line):
        check_choice("m", "rlo", names)


@pytest.mark.robustness("Flags", given="a seed below 0 or beyond 64 bits, no --output", outcome="refused in one line")
@pytest.mark.parametrize("word", ["--seed=-1", f"--seed={2**64}", f"--seed={'9' * 5000}", "--output=", "--output= "])
def test_seeds_and_outputs_of_the_command_line(word):
    own = flags.FlagValues()
    define_flags(Run, own)

    def read(*words):
        own(["x", *words])
        return from_flags(Run, own)

    for seed in (0, 2**64 - 1):
        assert read(f"--seed={seed}", "--output=.").seed == seed
    with pytest.raises((ValueError, flags.Error), match=word[2:6]):
        read(word)


def test_a_whole_number_of_a_file_is_a_number(tmp_path):
    (tmp_path / "a.json").write_text('{"beta": 1, "limit": null}')
    config = load_config(Run, tmp_path / "a.json")
    assert (type(config.beta), config.limit) == (float, None)
