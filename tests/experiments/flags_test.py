"""Command lines that nobody planned: each is accepted by the configuration or ends in one line, and nothing is left."""

import dataclasses
import os

import numpy as np
import pytest
from absl import flags

from experiments.align.config import AlignConfig
from experiments.arena.__main__ import ArenaConfig
from experiments.common import launch
from experiments.common.flags import define_flags, from_flags
from experiments.diffusion_digits.__main__ import DigitsConfig
from experiments.online.__main__ import OnlineConfig
from experiments.plan.__main__ import PlanConfig
from experiments.reward_model.__main__ import RewardConfig
from tiltjax.train.config import load_config, save_config
from tiltjax.train.distributed import Hosts

PROGRAMS = (AlignConfig, ArenaConfig, DigitsConfig, Hosts, OnlineConfig, PlanConfig, RewardConfig)
VALUES = ("", " ", "0", "-1", "1", "7", "3.5", "-0.0", "nan", "inf", "-inf", "1e999", "1e-320", str(2**63), str(2**64),
          "9" * 5000, "true", "None", "null", "[]", "{}", "a,b", ",", ",,", ":", "data:0", "data:2,data:4",
          "data:-1,fsdp:-1", "os:system", "../..", "/dev/null", "~", "\0", "a\nb", "\u0662", "\ud800", "%s", "x" * 5000,
          "--", "=", "rloo", "grpoo", "gspo,rloo", "host", "host:1")  # fmt: skip


def cases(number):
    """Words of command lines: values of every kind for one to three flags, flags misspelt, cut, doubled."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        config_class = PROGRAMS[rng.integers(len(PROGRAMS))]
        names = [item.name for item in dataclasses.fields(config_class)]
        words = []
        for _ in range(rng.integers(1, 4)):
            name, value = names[rng.integers(len(names))], VALUES[rng.integers(len(VALUES))]
            if rng.random() < 0.1:
                place = rng.integers(len(name))
                name = name[:place] + name[place + 1 :]
            words.append(
                [f"--{name}={value}", f"--{name}", f"--no{name}", value][rng.choice(4, p=[0.85, 0.05, 0.05, 0.05])]
            )
        yield config_class, words


def made_or_refused(config_class, words):
    own = flags.FlagValues()
    define_flags(config_class, own)
    try:
        launch.parse(["x", *words], own)
        return from_flags(config_class, own), ""
    except ValueError as error:
        return None, launch.one_line(error)


@pytest.mark.robustness(
    "Flags", given="any values at all for any flags of a program", outcome="accepted, or one line; nothing is written"
)
def test_any_command_line_is_accepted_or_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accepted = refused = 0
    for config_class, words in cases(400):
        config, line = made_or_refused(config_class, words)
        if config is None:
            assert 0 < len(line) < 800, words
            refused += 1
            continue
        accepted += 1
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            assert not isinstance(value, float) or np.isfinite(value), words
        if config_class is not Hosts:
            assert config.output.strip(), words
    assert accepted > 20
    assert refused > 200
    assert os.listdir(tmp_path) == []


@pytest.mark.robustness("Flags", given="a config.json with any value in any field", outcome="read, or one line")
def test_any_file_of_settings_is_read_or_ends_in_one_line(tmp_path):
    rng, config, path = np.random.default_rng(1), AlignConfig(method="rloo"), tmp_path / "config.json"
    save_config(config, path)
    whole = path.read_text().splitlines()
    strange = (
        "null",
        "[]",
        "{}",
        "true",
        "-1",
        "1e999",
        "NaN",
        '"x"',
        '""',
        str(2**64),
        "9" * 5000,
        "[[[",
        "",
        '"\\u0000"',
    )
    read = 0
    for _ in range(200):
        lines = list(whole)
        place = int(rng.integers(1, len(lines) - 1))
        key, _, value = lines[place].partition(": ")
        lines[place] = f"{key}: {strange[rng.integers(len(strange))]}{',' if value.endswith(',') else ''}"
        if rng.random() < 0.2:
            del lines[int(rng.integers(len(lines)))]
        path.write_text("\n".join(lines))
        error = read_or_refused(path)
        read += error is None
        if error is not None:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
    assert 0 < read < 100


def read_or_refused(path):
    try:
        load_config(AlignConfig, path)
    except ValueError as error:
        return error
