"""The law that candidates are drawn from, what ends them, and what becomes of those that are cut."""

import json
import logging
import pathlib

import numpy as np
import pytest

from experiments.align import __main__ as align
from experiments.align.config import AlignConfig
from experiments.online.__main__ import OnlineConfig
from experiments.reward_model.__main__ import RewardConfig
from tiltjax.align import inputs as align_inputs
from tiltjax.align import law as align_law
from tiltjax.align import session as align_session
from tiltjax.align.sources import prompt_rows
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.train import methods

CASES = pathlib.Path(__file__).parents[1] / "cases"
SETTINGS = {"num_prompts": 8, "num_eval_prompts": 4, "num_candidates": 4, "max_tokens": 12, "steps": 2, "batch_size": 8,
            "sample_batch": 8, "lora_rank": 0, "compute_dtype": "float32", "reward": "length?target=3",
            "method": "soft_best_of_n"}  # fmt: skip


def case(name, output, **changes):
    """The settings of a case, as its README has them."""
    policy = CASES / name / "policy"
    paths = {"policy": str(policy if policy.is_dir() else CASES / "policy"), "output": str(output)}
    return AlignConfig(**(SETTINGS | paths | changes))


@pytest.mark.robustness(
    "Tokens",
    given="a policy that ends its turns with <|im_end|>, sampled, scored and reported",
    outcome="nothing behind the end of a turn is sampled, scored or trained on",
)
def test_a_turn_ends_where_the_model_ends_it(tmp_path):
    folder = CASES / "turn-end-token"
    config = case("turn-end-token", tmp_path, prompts=str(folder / "prompts.jsonl"))
    session = align_session.prepare(config, tmp_path)
    drawn, _ = session.rollout("train", session.model, name="train")
    assert drawn.completion_mask.sum(-1).mean() < 2
    ends = text.end_ids(text.load_tokenizer(folder / "policy"))
    last = np.take_along_axis(drawn.completion, drawn.completion_mask.sum(-1, keepdims=True) - 1, axis=-1)[..., 0]
    cut = batches.truncated(drawn, ends)
    np.testing.assert_array_equal(np.isin(last, ends), ~cut)
    assert align_law.share_cut(drawn, ends) == cut.mean() < 0.5


def test_the_loss_and_the_report_are_of_the_law_that_drew(tmp_path):
    """A policy that has not moved is the reference: its margins and its KL are 0, at any temperature and filter."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(12)))
    law = {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "eval_temperature": 1.7}
    config = case("policy", tmp_path / "run", prompts=str(prompts), method="dpo", steps=1, learning_rate=1e-12, **law)
    results = align.run(config)
    (line,) = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["margin"] == pytest.approx(0, abs=1e-4)
    assert results["points"]["tuned"][0].kl.mean == pytest.approx(0, abs=1e-4)
    assert results["law"] == "temperature 1.7, top-k 40, top-p 0.9"
    assert 0 < results["truncated"]["reference"] <= 1
    report = (tmp_path / "run" / "report.md").read_text()
    assert "drawn at temperature 0.6, top-k 40, top-p 0.9, those of held-out prompts at temperature 1.7" in report
    assert "the reference, the tilt, log Z and every KL are those of the law that drew" in report
    for split, temperature in (("train", 0.6), ("heldout", 1.7)):
        drawn = batches.load(tmp_path / "run" / "candidates" / f"{split}.npz")
        sizes = np.unpackbits(drawn.support[drawn.completion_mask], axis=-1).sum(-1)
        assert sizes.max() <= 40, temperature


@pytest.mark.robustness(
    "Data",
    given="demonstrations or texts of a corpus longer than --max_tokens",
    outcome="cut there and learned without an end, and the log says how many of how many and how long they are",
)
@pytest.mark.parametrize("flag", ["demonstrations", "corpus"])
def test_what_is_cut_is_counted_and_taught_without_an_end(tmp_path, caplog, flag):
    told = CASES / "long-demonstration" / "told.jsonl"
    method = "sft" if flag == "demonstrations" else "ppo_ptx"
    config = case("long-demonstration", tmp_path, prompts=str(told), method=method, **{flag: str(told)})
    rows = prompt_rows(config.prompts, 12, seed=0)[:8]
    tokenizer = text.load_tokenizer(config.policy)
    with caplog.at_level(logging.WARNING):
        given = align_inputs.load_inputs(config, methods.METHODS[method], rows, tokenizer)
    number = "4 of 8" if flag == "demonstrations" else "8 of 16"
    message = f"{flag}: {number} completions have more than max_tokens=12 tokens, the longest 61"
    assert message in caplog.text
    assert "cut there and are learned without an end" in caplog.text
    if flag == "corpus":
        data = given.corpus
    else:
        prompt = np.zeros((8, 1), np.int32)
        empty = np.zeros((8, 0, 12), np.int32)
        fields = {"prompt": prompt, "prompt_mask": prompt == 0, "completion": empty, "completion_mask": empty > 0}
        data, _ = given.each(batches.Candidates(**fields))
    ends = text.end_ids(tokenizer)
    cut = batches.truncated(data, ends)
    assert cut.sum() == len(cut) / 2
    np.testing.assert_array_equal(np.isin(data.completion, ends).any(-1), ~cut)
    masked = batches.without_truncated(data, ends)
    np.testing.assert_array_equal(batches.learned(masked), ~cut)
    align_law.report_cut(flag, [[1] * 13, [1]], 12, masked=True)
    assert f"{flag}: 1 of 2" in caplog.text.splitlines()[-1]
    assert caplog.text.endswith("are left out of the loss\n")


@pytest.mark.robustness(
    "Flags",
    given="a temperature of 0, a top-p outside (0, 1], or a filter for a method that scores others' completions",
    outcome="refused by name before anything is drawn",
)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"eval_temperature": -1.0}, "eval_temperature must be a finite number above 0, got -1.0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        (
            {"top_k": 5, "method": "var"},
            "top_k must be 0 and top_p 1 for method=var, which scores completions of",
        ),
        ({"top_p": 0.5, "method": "kto"}, "top_k must be 0 and top_p 1 for method=kto"),
        ({"top_k": 5, "method": "tilted_mle", "pack": True}, "top_k must be 0 and top_p 1 with pack; got top_k=5"),
    ],
)
def test_laws_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        AlignConfig(**flags)
    if "method" not in flags:
        with pytest.raises(ValueError, match=message):
            RewardConfig(**flags).drawing()
        with pytest.raises(ValueError, match=message):
            OnlineConfig(**flags)


def test_temperatures_are_the_records_where_nothing_is_said():
    assert (AlignConfig().temperature, AlignConfig().eval_temperature) == (1.0, 1.0)
    own = AlignConfig(method="dpo_best_worst")
    assert (own.temperature, own.eval_temperature) == (0.1, 0.1)
    own = AlignConfig(method="dpo_best_worst", temperature=0.5, eval_temperature=1.0)
    assert (own.temperature, own.eval_temperature) == (0.5, 1.0)
    online = OnlineConfig(temperature=0.7, top_p=0.9, mask_truncated=True)
    task, method = online.align("puzzles", ""), online.align("puzzles", "grpo")
    assert task.describe_law() == method.describe_law() == "temperature 0.7, top-p 0.9"
    assert (method.mask_truncated, method.eval_temperature) == (True, 0.7)
    law = RewardConfig(top_k=3, eval_temperature=0.5).drawing().law(evaluation=True)
    assert law == {"temperature": 0.5, "top_k": 3, "top_p": None}
