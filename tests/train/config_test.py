import dataclasses

import pytest
from absl import flags

from tiltjax.train.config import define_flags, field, from_flags, load_config, save_config


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


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"other": 1}')
    (tmp_path / "b.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match=f"{name}: not a configuration of this experiment") as error:
            load_config(Config, tmp_path / name)
        assert "\n" not in str(error.value)
