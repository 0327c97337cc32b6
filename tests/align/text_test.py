"""What policies, reward models and rewards read of the prompts of a run, on the small inputs of users."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from experiments.align.config import AlignConfig
from experiments.reward_model import data as reward_world
from tiltjax.align import inputs as align_inputs
from tiltjax.align import session as align_session
from tiltjax.data import text
from tiltjax.data.datasets import PromptRow, read
from tiltjax.data.limits import Limits, limit
from tiltjax.models import pretrained
from tiltjax.rewards.gate import score
from tiltjax.train import learned_reward
from tiltjax.train.methods import get_method
from tiltjax.train.reward_model import RewardSpec, make_reward, new_model

CASES = pathlib.Path(__file__).parents[1] / "cases"
SETTINGS = {"reward": "length?target=3", "num_prompts": 8, "num_eval_prompts": 4, "num_candidates": 2, "max_tokens": 4,
            "batch_size": 8, "sample_batch": 8, "lora_rank": 0, "compute_dtype": "float32",
            "method": "soft_best_of_n"}  # fmt: skip

LOCAL = RewardSpec(kind="local", offset=0.25)


def settings(case, **changes):
    places = {"policy": f"{CASES}/{case}/policy", "prompts": f"{CASES}/{case}/prompts.jsonl"}
    return AlignConfig(**{**places, **SETTINGS, **changes})


@pytest.fixture(scope="module")
def conversations():
    return read(CASES / "reward-of-a-conversation" / "prompts.jsonl", "prompt")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """The directory of a reward model, untrained."""
    folder, tokenizer = tmp_path_factory.mktemp("reward") / "model", text.load_tokenizer(CASES / "policy")
    model = new_model(LOCAL, pretrained.load(CASES / "policy"))
    learned_reward.save_reward_model(model, LOCAL, folder, tokenizer=tokenizer)
    return folder


@pytest.mark.robustness(
    "Tokens",
    given="prompts with a token beyond the policy's vocabulary",
    outcome="refused with token, id and vocab_size before anything is sampled",
)
def test_a_prompt_with_a_token_beyond_the_policy_is_refused(tmp_path):
    config = settings("token-beyond-vocabulary")
    message = r"prompts\.jsonl:1: prompt has the token '<answer>' of id 264, but the model's vocab_size is 264$"
    with pytest.raises(ValueError, match=message):
        align_session.prepare(config, tmp_path)


@pytest.mark.robustness(
    "Tokens",
    given="demonstrations, pairs or corpus with a token beyond the vocabulary, or a reward model or judge with one",
    outcome="refused with token, id and vocab_size",
)
def test_a_token_beyond_any_model_is_refused(tmp_path, reward_model):
    policy = CASES / "token-beyond-vocabulary" / "policy"
    beyond = "'<answer>' of id 264, but the model's vocab_size is 264"
    rows = [{"prompt": f"w{i % 12}", "completion": "<answer>", "told": "<answer>"} for i in range(12)]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"policy": str(policy), "prompts": f"{tmp_path}/told.jsonl"}
    for changes in ({"method": "sft", "demonstrations": "told"}, {"method": "ppo_ptx", "corpus": given["prompts"]}):
        with pytest.raises(ValueError, match=beyond):
            align_session.prepare(AlignConfig(**SETTINGS | given | changes), tmp_path)
    limited = align_session.prepare(settings("token-beyond-vocabulary", prompts="reviews"), tmp_path).tokenizer
    compare = reward_world.judge(str(policy), settings("tools-column"), criterion="is best", batch_size=2)
    with pytest.raises(ValueError, match=beyond):
        compare(["a"], ["b"], ["<answer>"])
    pairs = [{"prompt": f"w{i}", "chosen": "<answer>", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with pytest.raises(ValueError, match=beyond):
        reward_world.file_splits(str(tmp_path / "pairs.jsonl"), limited, LOCAL, held_out=2)
    folder = tmp_path / "model"
    shutil.copytree(reward_model, folder)
    tokenizer = text.load_tokenizer(policy)
    tokenizer.save_pretrained(folder)
    reward = learned_reward.load_reward_model(folder, compute_dtype="float32")
    with pytest.raises(ValueError, match=beyond):  # Its own tokenizer has more tokens than its model has rows.
        reward(["a"], ["<answer>"])


@pytest.mark.robustness("Text", given="prompts with a column of tools", outcome="the policy reads them")
def test_the_policy_reads_the_tools_of_a_row(tmp_path):
    session = align_session.prepare(settings("tools-column"), tmp_path)
    ids = session.encode(session.rows["train"])
    assert session.tokenizer.decode(ids[0]).startswith(
        "<|im_start|>system\nTools: weather<|im_end|>\n<|im_start|>user\n"
    )


@pytest.mark.robustness(
    "Text",
    given="a reward model of conversations",
    outcome="reads every turn, template and tools as in training; its reward is the same in both programs",
)
def test_a_reward_model_reads_a_conversation_as_in_training(conversations, reward_model):
    rows, said = conversations[:3], [["red", "never red"], ["blue", ""], ["green", "cold, so cold"]]
    tokenizer, model = text.load_tokenizer(reward_model), pretrained.load(CASES / "policy")
    trained = learned_reward.encode(tokenizer, [row.prompt for row in rows], said, templates=[r.template for r in rows])
    expected = learned_reward.reward_all(model, trained, scorer=make_reward(LOCAL), batch_size=3) - 0.25
    reward = learned_reward.load_reward_model(reward_model, compute_dtype="float32")
    found = align_session.score_rows(reward, rows, said)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    last = [text.prompt_text(row.prompt) for row in rows for _ in range(2)]
    alone = score(reward, last, [one for group in said for one in group])
    assert np.abs(alone.reshape(3, 2) - found).max() > 1e-4
    # A pair is written as a conversation, a drawn completion as a text: the same tokens.
    pair = [[[{"role": "assistant", "content": one}] for one in group] for group in said]
    again = learned_reward.encode(tokenizer, [row.prompt for row in rows], pair)
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    tools = [dataclasses.replace(row, columns={"tools": [{"function": {"name": "f"}}]}) for row in rows]
    np.testing.assert_allclose(
        align_session.score_rows(reward, tools, said), found, atol=1e-6
    )  # Its template has none.


@pytest.mark.robustness(
    "Text", given="a reward function with a parameter prompt", outcome="is given every message of the conversation"
)
def test_a_reward_function_can_ask_for_the_conversation(conversations):
    def turns(prompts, completions, prompt):
        assert [messages[-1]["content"] for messages in prompt] == prompts
        return [len(messages) for messages in prompt]

    assert align_session.score_rows(turns, conversations[:2], [["a", "b"], ["c", "d"]]).tolist() == [[4, 4], [4, 4]]
    assert score(lambda prompts, completions, prompt: [len(p) for p in prompt], ["abc"], ["x"]).tolist() == [3]


def test_a_judge_reads_every_turn(conversations):
    shown = []

    def compare(prompts, first, second):
        shown.extend(prompts)
        return np.zeros(len(prompts))

    session = types.SimpleNamespace(
        tokenizer=text.load_tokenizer(CASES / "policy"), rows={"train": conversations[:2]}, model=None,
        settings=settings("policy"), rollout=lambda *_, **__: (drawn, [["a", "b"]] * 2),
    )  # fmt: skip
    drawn = types.SimpleNamespace(reward=np.zeros((2, 2)))
    reward_world.drawn_split(session, "train", RewardSpec(kind="global"), scale=1.0, compare=compare)
    assert shown[0] == "system: Answer in one word.\n\nuser: Say red.\n\nassistant: No.\n\nuser: Please, 0."


def test_a_reward_sees_the_tags_that_a_model_wrote():
    spec = importlib.util.spec_from_file_location("reward", CASES / "special-tags-in-reward" / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = text.load_tokenizer(CASES / "special-tags-in-reward" / "policy")
    ids = text.encode_completions(tokenizer, ["<think>a</think>4", "4"])
    tokens, mask = np.zeros((1, 2, 8), int), np.zeros((1, 2, 8), bool)
    for i, row in enumerate(ids):
        tokens[0, i, : len(row)], mask[0, i, : len(row)] = row, True
    said = text.decode_completions(tokenizer, tokens, mask)
    rewards = align_session.score_rows(module.thinks, [PromptRow(prompt="q", columns={})], said)
    assert rewards.tolist() == [[1.0, 0.0]]


def test_demonstrations_with_thoughts_are_learned_behind_an_open_tag():
    case = CASES / "open-think-template"
    config = settings(
        "open-think-template", prompts=f"{case}/told.jsonl", demonstrations=f"{case}/told.jsonl", method="sft"
    )
    tokenizer = text.load_tokenizer(case / "policy")
    rows = [PromptRow(prompt=row.prompt, columns=row.columns) for row in read(case / "told.jsonl", "supervised")]
    given = align_inputs.load_inputs(config, get_method("sft"), rows, tokenizer)
    assert tokenizer.decode(given.demonstrations[0][0]) == "one more\n</think>1<|im_end|>"


@pytest.mark.robustness(
    "Tokens",
    given="a reward model with learned positions, a prompt and a completion that are longer together",
    outcome="refused with their length and that of the table",
)
def test_prompt_and_completion_of_a_reward_model_fit_its_positions_together(tmp_path):
    tokenizer = text.load_tokenizer(CASES / "policy")
    limit(tokenizer, Limits(vocab_size=264, position_table=9))
    assert learned_reward.encode(tokenizer, ["abcd"], [["efgh"]]).prompt.shape == (1, 4)
    with pytest.raises(
        ValueError, match=r"^prompt 0 with a completion takes 10 positions, but the model has 9 learned"
    ):
        learned_reward.encode(tokenizer, ["abcd"], [["efgh", "efghi"]])
    rows = [{"prompt": f"abc{i}", "completions": ["ef", "gh"[: 1 + i]], "labels": [1, 0]} for i in range(4)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"steps\.jsonl:2: prompt and completion takes 10 positions"):
        reward_world.file_splits(str(tmp_path / "steps.jsonl"), tokenizer, RewardSpec(kind="process"), held_out=1)
