import itertools
import pathlib

import numpy as np
import pytest

from tiltjax.data import shared_prompt as lib
from tiltjax.data.datasets import read

CASE = pathlib.Path(__file__).parents[1] / "cases" / "pair-inside-a-word"


@pytest.mark.robustness(
    "Text",
    given="a pair without a prompt column whose answers begin with the same letters",
    outcome="cut at the assistant's mark, else at the end of a word",
)
def test_pairs_are_cut_between_words():
    assert [(row.prompt, row.chosen, row.rejected) for row in read(CASE / "pairs.jsonl", "pair")] == [
        ("The sky is", " blue.", " black."),
        ("\n\nHuman: Why is it cold?\n\nAssistant:", " I can't say.", " I cannot say."),
        ("Q: name one\nA:", " café", " cafeteria"),
        ("List:\n", "\tone", "\tonly"),
        ("1 + 1 =", " 2", " 20"),
    ]


@pytest.mark.parametrize(
    "opened",
    [
        "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
        "User: Why?\nAssistant:",
        "Assistant:",
        "### Instruction:\nWhy?\n\n### Response:\n",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "<s>[INST] Why? [/INST]",
        "<|user|>\nWhy?</s>\n<|assistant|>\n",
    ],
)
def test_the_last_mark_of_the_assistant_comes_before_words(opened):
    assert lib.split(f"{opened} Because it is so.", f"{opened} Because it rains.") == (
        opened,
        " Because it is so.",
        " Because it rains.",
    )
    # One of them is the beginning of the other.
    assert lib.split(f"{opened} It", f"{opened} It is.") == (opened, " It", " It is.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        ("A:\nyes", "A:\n\nno", 2),  # No run of line breaks is cut in two, either.
        ("A:\r\nyes", "A:\r\nno", 4),
        ("a   b", "a  c", 1),
        ("a  ", "a  b", 1),
        ("Cafe\u0301 e\u0301", "Cafe\u0301 e\u0300", 5),  # The accent is a character of its own.
        ("So \U0001f44d\U0001f3fd", "So \U0001f44d\U0001f3fb", 2),
        ("天空是蓝色的", "天空是黑色的", 3),
        ("空がき", "空がき\u3099", 2),
        ("User: why?\nIt is so.", "User: why?\nIt rains.", 13),  # Nobody answers: no dialogue.
        ("I spoke to my assistant: he", "I spoke to my assistant: her", 24),
    ],
)
def test_where_the_prompt_ends(chosen, rejected, cut):
    assert lib.split(chosen, rejected) == (chosen[:cut], chosen[cut:], rejected[cut:])
    assert lib.split(rejected, chosen) == (chosen[:cut], rejected[cut:], chosen[cut:])


def test_no_token_is_cut_in_two():
    """By the two ways of splitting a text that most tokenizers share: GPT-2's, and that of Llama 3 and Qwen."""
    from tokenizers import Regex, pre_tokenizers

    modern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splitters = [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(Regex(modern), "isolated")]
    rng, cuts = np.random.default_rng(0), 0
    for _, splitter in itertools.product(range(300), splitters):
        chosen, rejected = ("ab " + "".join(rng.choice(list("ab1é \n\t"), 7)) for _ in range(2))
        prompt, *completions = lib.split(chosen, rejected)
        for completion in completions:
            ends = {end for _, (_, end) in splitter.pre_tokenize_str(prompt + completion)}
            assert len(prompt) in ends, (prompt, completion)
        cuts += prompt != "ab"
    assert cuts > 20
