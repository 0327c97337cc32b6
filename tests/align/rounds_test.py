"""Records on a tiny policy: what they draw and are told, and that a run that was cut off ends with the same bits."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from experiments.align.config import AlignConfig
from tests.tiny import save_policy
from tiltjax.align import inputs as align_inputs
from tiltjax.align import rounds as align_rounds
from tiltjax.align import session as align_session
from tiltjax.align.feedback import answer_ids
from tiltjax.align.law import share_cut
from tiltjax.align.sources import prompt_rows
from tiltjax.data.candidates import Candidates, learned
from tiltjax.data.datasets import PromptRow
from tiltjax.models.transformer import Transformer
from tiltjax.rewards.registry import load_reward
from tiltjax.train.config import load_config, save_config
from tiltjax.train.learned_reward import LearnedReward, RewardSpec
from tiltjax.train.methods import METHODS, RENAMED
from tiltjax.train.policy import model_view
from tiltjax.train.rounds import init_players
from tiltjax.train.sharding import make_mesh

WORDS = ["<eos>", "<pad>", *(f"w{i}" for i in range(14))]
EOS, T = 0, 6
SETTINGS = {"reward": "length?target=3", "beta": 0.2, "num_candidates": 4, "num_prompts": 16, "num_eval_prompts": 2,
            "max_tokens": T, "steps": 4, "checkpoint_every": 1, "batch_size": 8, "sample_batch": 8,
            "learning_rate": 0.01, "lora_rank": 2, "compute_dtype": "float32"}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny policy with a tokenizer of whole words, prompts with an answer, demonstrations and a corpus."""
    home = tmp_path_factory.mktemp("records")
    save_policy(home / "policy", WORDS)
    prompts = [f"w{i % 14} w{i // 14} w3" + " w4" * (i % 2) for i in range(18)]
    write(home / "prompts.jsonl", [{"prompt": p, "answer": f"w{i % 14} w1"} for i, p in enumerate(prompts)])
    write(home / "told.jsonl", [{"prompt": p, "completion": f"w5 w{i % 14}"} for i, p in enumerate(prompts)])
    write(home / "corpus.jsonl", [{"text": f"w{i} w7 w8 w9 w10 w11 w12 w13"} for i in range(5)])
    return home


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(home, output, method, **changes):
    paths = {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl", "output": f"{output}"}
    return AlignConfig(method=method, **(paths | SETTINGS | changes))


NOBODY = init_players(METHODS["rloo"], np.zeros(1, np.float32), optax.sgd(0.1))


@pytest.fixture
def drawing(home, tmp_path, monkeypatch):
    """Mini-batches of a record by a policy that writes at random, without a model: their NumPy arrays."""

    def at_random(key, players, source, prompts, num):
        drawing.events.append("draw")
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        length = rng.integers(1, T + 1, (len(prompts.prompt), num, 1))
        mask = np.arange(T) < length
        tokens = np.where(mask, rng.integers(2, 16, mask.shape), EOS).astype(np.int32)
        return Candidates(prompt=prompts.prompt, prompt_mask=prompts.prompt_mask, completion=tokens,
                          completion_mask=mask, old_token_logp=np.zeros(mask.shape, np.float32))  # fmt: skip

    def model_sample(**options):
        drawing.options = options
        return at_random

    monkeypatch.setattr(align_rounds, "model_sample", model_sample)

    def drawing(method, *, reward=None, seed=1, minibatches=1, **changes):
        config = config_of(home, tmp_path, method, **changes)
        tokenizer = align_session.text.load_tokenizer(home / "policy")
        rows = prompt_rows(config.prompts, 18, seed=0)[: config.num_prompts]
        session = object.__new__(align_session.Session)  # Without a model, which no field may lack.
        session.__dict__.update(
            settings=config, directory=tmp_path, tokenizer=tokenizer, model=None, scorer=None, sampler=None,
            reward=reward or load_reward(config.reward), rows={"train": rows}, mesh=make_mesh(""), fingerprint="",
            inputs=align_inputs.load_inputs(config, METHODS[method], rows, tokenizer),
        )  # fmt: skip
        record = config.record
        draw = align_rounds._drawing(session, record, minibatches=minibatches)
        drawn, told, draws = draw(NOBODY, jax.random.key(seed), 0)
        return session, drawn, told, draws

    drawing.events = []
    return drawing


def shown(session, drawn):
    """Prompts as texts."""
    return [session.tokenizer.decode(row[mask]) for row, mask in zip(drawn.prompt, drawn.prompt_mask, strict=True)]


def test_candidates_are_drawn_at_the_temperature_of_the_record(drawing):
    for method, temperature in (("dpo_best_worst", 0.1), ("online_dpo_best_worst", 1.0)):
        drawing(method)
        assert drawing.options["temperature"] == temperature


@pytest.mark.robustness(
    "Data",
    given="completions that --max_tokens cut",
    outcome="their share is a metric of every round; --mask_truncated leaves them out of the loss",
)
@pytest.mark.parametrize("method", ["rloo", "spin", "ppo_ptx"])
def test_what_is_cut_is_a_metric_and_may_be_masked(home, drawing, method):
    given = {"spin": {"demonstrations": "answer"}, "ppo_ptx": {"corpus": f"{home}/corpus.jsonl"}}.get(method, {})
    _, plain, _, _ = drawing(method, **given)
    _, masked, _, _ = drawing(method, mask_truncated=True, **given)
    cut = plain.completion_mask[..., -1] & (plain.completion[..., -1] != EOS)
    assert cut.any()
    np.testing.assert_array_equal(learned(masked), ~cut if plain.where is None else plain.where & ~cut)
    assert plain.loss_mask is None
    record = METHODS[method]
    written = [source not in ("data", "corpus") for source, num in record.draw for _ in range(num)]
    where = np.ones(cut.shape, bool) if plain.where is None else plain.where
    assert share_cut(plain, (EOS,), record) == cut[where & written].mean()


@pytest.mark.parametrize("source", ["told.jsonl", "answer"])
def test_demonstrations_are_those_of_the_prompt(home, drawing, source):
    """From a file, found by the prompt, or from a column; beside them what the policy writes."""
    given = f"{home}/{source}" if source.endswith("jsonl") else source
    session, drawn, _, _ = drawing("spin", demonstrations=given)
    assert drawn.completion.shape == (8, 2, T)
    expected = {row.prompt: row.columns["answer"] for row in session.rows["train"]}
    if source == "told.jsonl":
        rows = map(json.loads, (home / source).read_text().splitlines())
        expected = {row["prompt"]: row["completion"] for row in rows}
    for prompt, (told, _), ids, mask in zip(
        shown(session, drawn), session.texts(drawn), drawn.completion[:, 0], drawn.completion_mask[:, 0], strict=True
    ):
        assert told == expected[prompt]
        assert ids[mask][-1] == EOS


def test_a_corpus_comes_in_on_prompts_of_its_own(home, drawing):
    """It is trained on as it stands: not as the continuation of a prompt that it has nothing to do with."""
    session, drawn, told, _ = drawing("ppo_ptx", corpus=f"{home}/corpus.jsonl")
    assert drawn.completion.shape == (16, 4, T)
    np.testing.assert_array_equal(drawn.where[:8], [[True, True, True, False]] * 8)
    np.testing.assert_array_equal(drawn.where[8:], [[False, False, False, True]] * 8)
    np.testing.assert_array_equal(drawn.completion_mask.any(-1), drawn.where)
    assert {row.prompt for row in session.rows["train"]} >= set(shown(session, drawn)[:8])
    assert shown(session, drawn)[8:] == ["<eos>"] * 8
    lines = [json.loads(line)["text"] for line in (home / "corpus.jsonl").read_text().splitlines()]
    texts = [group[3] for group in session.texts(drawn)[8:]]
    assert set(texts) <= {" ".join(line.split()[:T]) for line in lines}
    assert len(set(texts)) > 1
    assert (told.reward[:8, :3] != 0).any()
    np.testing.assert_array_equal(told.reward[8:], 0)


def some_tie(prompts, completions):
    """Every second prompt gives all of its completions the same reward."""
    return [
        0.0 if prompt.endswith("w4") else float(len(said)) for prompt, said in zip(prompts, completions, strict=True)
    ]


def all_tie(prompts, completions):
    return [1.0] * len(prompts)


def test_the_next_mini_batch_is_begun_before_the_last_one_is_rewarded(drawing):
    """What a mini-batch is told is of its own candidates all the same."""

    def length(prompts, completions):
        drawing.events.append("reward")
        return [float(len(said.split())) for said in completions]

    session, drawn, told, _ = drawing("rebel", reward=length, minibatches=3, steps=12, num_prompts=16)
    assert drawing.events == ["draw", "draw", "reward", "draw", "reward", "reward"]
    np.testing.assert_array_equal(
        told.reward, [[len(said.split()) for said in group] for group in session.texts(drawn)]
    )
    order = align_rounds.epoch_batches(16, 8, seed=session.settings.seed)
    asked = [session.rows["train"][i].prompt for step in range(3) for i in order(step)]
    assert shown(session, drawn) == asked
    assert len({row.tobytes() for row in drawn.completion}) > 20


class TestDynamicSampling:
    def test_further_prompts_take_the_place_of_those_that_tie(self, drawing):
        session, drawn, told, draws = drawing("dapo", reward=some_tie)
        assert draws == 2
        assert not any(prompt.endswith("w4") for prompt in shown(session, drawn))
        assert len(set(shown(session, drawn))) == 8
        assert (np.ptp(told.reward, axis=1) > 0).all()
        asked = [row for row in session.rows["train"] if row.prompt in shown(session, drawn)]
        assert len(asked) == 8
        _, first, _, _ = drawing("rloo", reward=some_tie)
        own = [not prompt.endswith("w4") for prompt in shown(session, first)]
        for name in ("prompt", "completion"):  # What was good stays where it was.
            np.testing.assert_array_equal(getattr(drawn, name)[own], getattr(first, name)[own])
        again = drawing("dapo", reward=some_tie)
        np.testing.assert_array_equal(again[1].completion, drawn.completion)

    def test_it_ends_when_the_prompts_or_the_draws_do(self, drawing, monkeypatch):
        session, drawn, told, draws = drawing("dapo", reward=all_tie)
        assert draws == 2
        order = align_rounds.epoch_batches(16, 8, seed=session.settings.seed)(0)
        assert shown(session, drawn) == [session.rows["train"][i].prompt for i in order]
        np.testing.assert_array_equal(told.reward, 1)
        monkeypatch.setitem(METHODS, "dapo", dataclasses.replace(METHODS["dapo"], resample=0))
        assert drawing("dapo", reward=some_tie)[3] == 1


class TestFeedback:
    def test_a_cost_is_scored_beside_the_reward(self, drawing):
        session, drawn, told, _ = drawing("safe_rlhf", cost="length?target=1")
        lengths = np.array([[len(said.split()) for said in group] for group in session.texts(drawn)])
        np.testing.assert_allclose(told.cost, -np.abs(lengths - 1) / 1.0, rtol=1e-6)
        np.testing.assert_allclose(told.reward, -np.abs(lengths - 3) / 3.0, rtol=1e-6)

    def test_a_learned_cost_has_the_sign_of_harm(self, monkeypatch):
        class Learned(LearnedReward):
            spec, fingerprint = RewardSpec(kind="cost", offset=0.25), "0"

            def __init__(self):
                """It has no model."""

            def __call__(self, prompts, completions, *conversation):
                return [-float(said) - self.spec.offset for said in completions]

        monkeypatch.setattr(align_inputs, "load_reward_model", lambda *_, **__: Learned())
        assert align_inputs.load_cost("model:somewhere")(["", ""], ["2.0", "-0.5"]) == [2.0, -0.5]
        Learned.spec = RewardSpec(kind="global")
        with pytest.raises(ValueError, match="must be a reward model of kind 'cost', got kind 'global'"):
            align_inputs.load_cost("model:somewhere")

    def test_a_reward_above_the_threshold_is_desirable(self, drawing):
        _, _, told, _ = drawing("online_kto", desirable_above=-0.5)
        np.testing.assert_array_equal(told.correct, told.reward > -0.5)
        assert 0 < told.correct.mean() < 1
        assert drawing("online_kto")[2].correct is None

    def test_votes_are_counted_by_what_was_answered(self):
        rows = [PromptRow("q", {"answer": "7"}), PromptRow("q", {"answer": "red"}), PromptRow("q", {})]
        texts = [
            ["so 12.", "Answer: 12.0", "none", "3 + 4 = 7"],
            ["<answer>Blue</answer>", "hm. Answer: blue\nreally", "", "green"],
            ["1/2", "0.5", "Answer: 2", "two"],
        ]
        ids = answer_ids(rows, texts)
        np.testing.assert_array_equal(ids, [[0, 0, -1, 1], [0, 0, -1, 1], [0, 0, 1, 2]])


class TestWhatIsMissing:
    @pytest.mark.parametrize(
        ("method", "flag"), [("spin", "demonstrations"), ("sft", "demonstrations"), ("ppo_ptx", "corpus"),
                             ("safe_rlhf", "cost")],
    )  # fmt: skip
    def test_a_flag(self, home, tmp_path, method, flag):
        with pytest.raises(ValueError, match=f"^method {method} needs {flag}$"):
            config_of(home, tmp_path, method)

    def test_a_demonstration(self, home, tmp_path, drawing):
        rows = (home / "told.jsonl").read_text().splitlines()
        (tmp_path / "few.jsonl").write_text("\n".join(rows[:3]))
        with pytest.raises(
            ValueError, match=r"few.jsonl: no completion of the prompt of .*prompts.jsonl:4: 'w3 w0 w3 w4'"
        ):
            drawing("sft", demonstrations=f"{tmp_path}/few.jsonl")
        blank = [json.loads(row) for row in (home / "prompts.jsonl").read_text().splitlines()]
        write(tmp_path / "blank.jsonl", [row | {"answer": " " if i == 2 else "w1"} for i, row in enumerate(blank)])
        with pytest.raises(ValueError, match=r"blank.jsonl:3: column 'answer' is empty: nothing to learn"):
            drawing("sft", demonstrations="answer", prompts=f"{tmp_path}/blank.jsonl")
        columns = r"demonstrations must be a column of .*prompts.jsonl \(answer\) or a file, got 'nowhere'"
        with pytest.raises(ValueError, match=columns):
            drawing("sft", demonstrations="nowhere")
        with pytest.raises(ValueError, match=r"told.jsonl:1: no column 'answer', which cost 'exact_match' needs"):
            drawing("safe_rlhf", cost="exact_match", prompts=f"{home}/told.jsonl")

    def test_what_a_record_cannot_have(self, home, tmp_path):
        with pytest.raises(
            ValueError,
            match="mapping must be sharded for a method that learns in rounds; got method=rloo",
        ):
            config_of(home, tmp_path, "rloo", mapping="pmap")
        with pytest.raises(ValueError, match="steps must be a multiple of the 4 rounds of rebel, got 3"):
            config_of(home, tmp_path, "rebel", steps=3)


@pytest.mark.parametrize("old", RENAMED)
def test_a_name_of_before_is_refused_with_the_new_one(old):
    assert old not in METHODS
    with pytest.raises(ValueError, match=f"method '{old}' is now called '{RENAMED[old]}'"):
        AlignConfig(method=old)


class Killed(Exception):
    pass


def test_cut_off_in_a_rollout_and_in_an_update_it_ends_with_the_same_bits(home, tmp_path, monkeypatch, compilations):
    """A record with everything: adapters, critics, a cost with its multiplier, several epochs, parameters on a mesh."""
    seen, made = [], {}
    for name in ("_drawing", "_fitting"):  # All runs of this test share their compiled functions.
        make = getattr(align_rounds, name)
        monkeypatch.setattr(
            align_rounds, name, lambda *a, make=make, name=name, **k: made.setdefault(name, make(*a, **k))
        )
    tell, calls = align_rounds.feedback, []

    def telling(session, record, rows, drawn):
        calls.append((compilations(), drawn))
        if len(calls) in deaths:
            raise Killed
        return tell(session, record, rows, drawn)

    monkeypatch.setattr(align_rounds, "feedback", telling)

    def run(output, *, resume=False, watch=None):
        changes = {"cost": "length?target=9", "steps": 3, "mesh": "data:4,fsdp:2", "resume": resume}
        config = config_of(home, output, "safe_rlhf", **changes)
        session = dataclasses.replace(WORLD, settings=config, directory=output, resume=resume)
        return align_rounds.improve(session, watch=watch)

    deaths = ()
    start = config_of(home, tmp_path / "whole", "safe_rlhf", cost="length?target=9", steps=3, mesh="data:4,fsdp:2")
    WORLD = align_session.prepare(start, tmp_path / "whole")
    before = jax.device_get(jax.tree.leaves(WORLD.model))
    whole = run(tmp_path / "whole", watch=lambda r, model: seen.append((r, type(model))))
    assert seen == [(r, Transformer) for r in (1, 2, 3)]
    counts, rollouts = zip(*calls, strict=True)
    assert counts[2] == counts[1]  # Nothing is compiled from round to round.
    for one, other in zip(before, jax.tree.leaves(WORLD.model), strict=True):
        np.testing.assert_array_equal(one, other)

    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["cost"] < 0  # All completions are far from harm,
    assert 1 > lines[0]["multiplier"] > lines[1]["multiplier"] > lines[2]["multiplier"] > 0.5  # so it falls.
    assert [sorted(line) for line in lines] == [sorted(lines[0])] * 3
    expected = 0.1 * lines[0]["cost"]
    np.testing.assert_allclose(np.log(lines[0]["multiplier"]), expected, rtol=1e-5)

    # What is trained on are the log-probabilities of the distribution that was sampled.
    first = rollouts[0]
    said = jax.jit(model_view())(WORLD.model, dataclasses.replace(first, old_token_logp=None)).token_logp
    np.testing.assert_allclose(
        np.where(first.completion_mask, said, 0), np.where(first.completion_mask, first.old_token_logp, 0), atol=1e-5
    )

    def killed(r, model):
        if r == 2:
            raise Killed  # The update was made, and no checkpoint of it.

    with pytest.raises(Killed):
        run(tmp_path / "cut", watch=killed)
    calls.clear()
    deaths = (2,)
    with pytest.raises(Killed):  # The second round again, and the third is drawn but not rewarded.
        run(tmp_path / "cut", resume=True)
    deaths = ()
    again = run(tmp_path / "cut", resume=True)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    moved = np.abs(np.asarray(whole.blocks.up.kernel[0]) - np.asarray(WORLD.model.blocks.up.kernel[0]))
    assert 1e-5 < moved.max() < 1


OWN = """
from tiltjax.advantages import leave_one_out
from tiltjax.train import Method
from tiltjax.train.methods.labels import left_out
from tiltjax.train.methods.policy_gradient import POLICY_GRADIENT

MINE = Method("mine", "Nobody, 2026", POLICY_GRADIENT[0].loss, (("current", 4),), advantage=left_out, beta=0.3,
              zero_beta=True, reads_reference=False)
"""


class TestARecordOfOnesOwn:
    @pytest.fixture
    def own(self, tmp_path):
        (tmp_path / "own.py").write_text(OWN)
        return f"{tmp_path}/own.py:MINE"

    def test_it_learns_in_rounds_with_its_own_beta(self, home, tmp_path, own):
        config = config_of(home, tmp_path / "run", own, beta=None, steps=1, num_prompts=8)
        assert (config.beta, config.in_rounds) == (0.3, True)
        assert config.describe().startswith(f"{own}: beta 0.3 (published 0.3), ")
        session = align_session.prepare(config, tmp_path / "run")
        align_rounds.improve(session)
        (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        assert np.isfinite(line["loss"])
        (tmp_path / "own.py").write_text(OWN.replace("beta=0.3", "beta=0.4"))
        assert align_session.prepare(config, tmp_path / "run").fingerprint != session.fingerprint

    @pytest.mark.robustness(
        "Flags", given="--method=file.py:record that is no record", outcome="one line that says what it is"
    )
    def test_what_is_no_record_is_refused(self, home, tmp_path, own):
        for spec, message in {
            own.replace("MINE", "OURS"): "has no attribute 'OURS'",
            own.replace("MINE", "leave_one_out"): r"must be a tiltjax.train.Method, got function",
            "nowhere.to.be:found": "cannot be imported: ModuleNotFoundError",
            "mine": r"method must be one of \d+ names",
        }.items():
            with pytest.raises(ValueError, match=message) as error:
                config_of(home, tmp_path, spec)
            assert "\n" not in str(error.value)

    def test_a_file_of_settings_runs_no_code(self, home, tmp_path):
        path = tmp_path / "config.json"
        save_config(config_of(home, tmp_path, "rloo"), path)
        (tmp_path / "own.py").write_text("raise AssertionError")
        path.write_text(path.read_text().replace('"rloo"', f'"{tmp_path}/own.py:MINE"'))
        with pytest.raises(ValueError, match=r"config.json: .*method names code to run, .*, and the flags do not"):
            load_config(AlignConfig, path, like=config_of(home, tmp_path, "grpo"))
