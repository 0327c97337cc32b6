"""What the flags of a method mean where they say nothing."""

import dataclasses

import pytest

from experiments.align.config import AlignConfig
from experiments.common import launch
from experiments.online.__main__ import OnlineConfig
from tiltjax.align.settings import UNTRAINED
from tiltjax.train import methods
from tiltjax.train.config import load_config, save_config

NAMES = (UNTRAINED, *methods.METHODS)
NEEDED = {"demonstrations": "answer", "corpus": "corpus.jsonl", "cost": "length"}


def of(method, **changes):
    return AlignConfig(method=method, steps=96, **(NEEDED | changes))


@pytest.mark.parametrize("method", NAMES)
def test_flags_of_a_record_are_its_own_where_nothing_is_said(method, tmp_path):
    adapted, full = of(method), of(method, lora_rank=0)
    record = methods.METHODS.get(method)
    assert adapted.beta == full.beta == (0.1 if record is None else record.own_beta(1.0) ** -1 * record.beta)
    assert adapted.learning_rate == 5e-4  # A record's own, of all parameters, would move no adapter.
    assert full.learning_rate == ((record and record.learning_rate) or 5e-5)
    assert adapted.report_beta == (adapted.beta or 0.1)
    save_config(adapted, tmp_path / "config.json")
    assert f'"beta": {adapted.beta}' in (tmp_path / "config.json").read_text()
    assert load_config(AlignConfig, tmp_path / "config.json") == adapted
    assert "beta" not in launch.command("align", adapted)
    assert "learning_rate" not in launch.command("align", full)


@pytest.mark.parametrize("method", NAMES)
def test_beta_0_is_legal_where_the_method_allows_it(method):
    record = methods.METHODS.get(method)
    name = method if record is None else record.name
    if record is not None and record.zero_beta:
        config = of(method, beta=0)
        assert (config.beta, config.report_beta) == (0, 0.1)
    else:
        with pytest.raises(ValueError, match=rf"beta .*{name}.*got 0"):
            of(method, beta=0)


def test_what_is_said_counts_and_is_printed():
    config = of("sppo", beta=0.4, learning_rate=1e-3, report_beta=0.2)
    assert (config.beta, config.learning_rate, config.report_beta) == (0.4, 1e-3, 0.2)
    assert config.describe() == (
        "sppo: beta 0.4 (published 0.004; 0.1 in win rates), learning rate 0.001 (published 5e-07 for all parameters), "
        "adapters of rank 16; the report counts at beta 0.2"
    )
    assert "--beta=0.4 --report_beta=0.2" in launch.command("align", config)
    assert of("tilted_mle", lora_rank=0).describe() == (
        "tilted_mle: beta 0.1 (published 0.1), learning rate 5e-05, all parameters; the report counts at beta 0.1"
    )
    with pytest.raises(ValueError, match="report_beta must be a finite number above 0, got 0"):
        of("rloo", report_beta=0.0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got 0"):
        of("rloo", learning_rate=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "var", "num_prompts": 7, "batch_size": 7}, "num_prompts must be at least 8 for var, got 7"),
        (
            {"method": "rwr", "microbatches": 2},
            "must not be cut for a loss that couples .*method=rwr, mapping='sharded'",
        ),
        ({"method": "rwr", "mapping": "pmap"}, "must not be cut for a loss that couples .* microbatches=1"),
        ({"method": "simpo", "pack": True}, r"pack is for methods that learn once, by weights .*; got method=simpo"),
    ],
)
def test_a_record_says_what_it_cannot_have(settings, message):
    with pytest.raises(ValueError, match=message):
        AlignConfig(**settings)


def test_every_method_of_an_online_run_has_its_own():
    config = OnlineConfig(methods="grpo,dr_grpo,rloo")
    assert [config.align("puzzles", name).beta for name in ("grpo", "dr_grpo", "rloo", "")] == [0.04, 0.0, 0.05, 0.1]
    assert config.report_beta == config.align("puzzles", "dr_grpo").report_beta == 0.1
    told = dataclasses.replace(config, beta=0.3, report_beta=None)
    assert [told.align("puzzles", name).beta for name in ("grpo", "dr_grpo", "")] == [0.3] * 3
    assert launch.command("online", config) == "python -m experiments.online --methods=grpo,dr_grpo,rloo"
