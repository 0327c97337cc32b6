"""Conversations: what reaches the template, and which of a completion's tokens are the assistant's."""

import json
import pathlib

import pytest

from tests.data.conftest import TEMPLATE
from tiltjax.data import text
from tiltjax.data.chat import added_turns, plain_message, transcript
from tiltjax.data.datasets import read
from tiltjax.data.notes import warn_once

CASES = pathlib.Path(__file__).parents[1] / "cases"
SKY = [{"role": "user", "content": "Sky?"}]


@pytest.fixture(autouse=True)
def nothing_said():
    warn_once.cache_clear()


def said(content, **more):
    return [{"role": "assistant", "content": content, **more}]


def shown(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.robustness(
    "Text", given="columns tools and chat_template_kwargs of a row", outcome="the template has them"
)
def test_tools_and_settings_of_a_row_reach_the_template():
    tokenizer, rows = (
        text.load_tokenizer(CASES / "tools-column/policy"),
        read(CASES / "tools-column/prompts.jsonl", "prompt"),
    )
    encoded = text.encode_prompts(tokenizer, [r.prompt for r in rows], templates=[r.template for r in rows])
    assert shown(tokenizer, encoded[0]) == (
        "<|im_start|>system\nTools: weather<|im_end|>\n<|im_start|>user\nWeather in town 0?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    quiet = text.encode_prompts(tokenizer, [SKY], templates=[{"enable_thinking": False}])
    assert shown(tokenizer, quiet[0]).endswith("assistant\n<think>\n\n</think>\n\n")
    # A completion stands behind the same prompt.
    blue = text.encode_completions(
        tokenizer, [said("blue")], prompts=[SKY], templates=[{"tools": rows[0].template["tools"]}]
    )
    assert shown(tokenizer, blue[0]) == "blue<|im_end|>"


@pytest.mark.robustness(
    "Text",
    given="tools or settings that the chat template never reads, or beside a prompt that is text",
    outcome="one line says so",
)
def test_tools_that_nobody_reads_are_said(make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    for prompt in (SKY, "Sky?"):
        text.encode_prompts(
            tokenizer, [prompt] * 2, templates=[{"tools": [{"function": {}}], "enable_thinking": True}] * 2
        )
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template has no use for 'tools': it is not read",
        "the chat template has no use for 'enable_thinking': it is not read",
        "prompts that are texts go through no chat template: tools, enable_thinking are not read",
    ]


@pytest.mark.robustness(
    "Text", given="nulls that Parquet adds inside tool calls and other nested values", outcome="dropped at every depth"
)
def test_the_same_conversation_from_json_and_from_parquet():
    tokenizer = text.load_tokenizer(CASES / "parquet-null-arguments/policy")
    encoded = []
    for name in ("calls.jsonl", "calls.parquet"):
        rows = read(CASES / "parquet-null-arguments" / name, "supervised")
        prompts = [row.prompt for row in rows]
        encoded.append(text.encode_completions(tokenizer, [row.completion for row in rows], prompts=prompts))
    assert encoded[0] == encoded[1]
    assert shown(tokenizer, encoded[0][0]) == 'CALL weather {"city": "Oslo"}<|im_end|>'
    tool = {"function": {"name": "f", "parameters": {"city": {"type": "string", "enum": None}, "zone": None}}}
    sparse = {"function": {"name": "f", "parameters": {"city": {"type": "string"}}}}
    tokenizer.chat_template = "{{ tools | tojson }}"
    both = text.encode_prompts(tokenizer, [SKY] * 2, templates=[{"tools": [tool]}, {"tools": [sparse]}])
    assert both[0] == both[1]


@pytest.mark.robustness("Text", given="content as a list of parts of text", outcome="read as one text")
@pytest.mark.robustness(
    "Text", given="content with an image or another part that is not text", outcome="refused by name"
)
def test_content_in_parts(make_tokenizer, tmp_path):
    parts = [{"type": "text", "text": "Sk"}, {"type": "text", "text": "y?", "image": None}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": parts}]}))
    (row,) = read(tmp_path / "a.jsonl", "prompt")
    assert row.prompt == SKY
    assert text.prompt_text([{"role": "user", "content": parts}]) == "Sky?"
    for prompt in (row.prompt, [{"role": "user", "content": parts}]):
        assert text.encode_prompts(make_tokenizer(), [prompt]) == text.encode_prompts(make_tokenizer(), [SKY])
    with pytest.raises(
        ValueError, match=r"^m.content\[1\] is a part of type 'image_url'; only parts of text are read$"
    ):
        plain_message("m", {"role": "user", "content": [parts[0], {"type": "image_url", "image_url": {}}]})


@pytest.mark.robustness(
    "Text",
    given="a reasoning model's template, which opens <think> and hides the thoughts of past answers",
    outcome="an answer is learned as it is written; what the prompt has opened is not written twice",
)
def test_thoughts_are_learned_behind_an_open_tag():
    tokenizer = text.load_tokenizer(CASES / "open-think-template/policy")
    rows = read(CASES / "open-think-template/told.jsonl", "supervised")
    prompts = [row.prompt for row in rows]
    assert shown(tokenizer, text.encode_prompts(tokenizer, prompts)[0]).endswith("assistant\n<think>\n")
    encoded, mask = text.encode_completions_masked(tokenizer, [row.completion for row in rows], prompts=prompts)
    assert shown(tokenizer, encoded[0]) == "one more\n</think>1<|im_end|>"
    assert all(all(row) for row in mask)
    # What a model draws behind the open tag is the same text, and so has the same ids.
    assert text.encode_completions(tokenizer, ["one more\n</think>1"], prompts=prompts[:1]) == encoded[:1]
    for content in ("one more\n</think>1", "<think>one more\n</think>1", "\n<think>\none more\n</think>1"):
        assert text.encode_completions(tokenizer, [said(content)], prompts=prompts[:1]) == encoded[:1]


@pytest.mark.robustness(
    "Text",
    given="an answer without thoughts behind a template that opens <think>",
    outcome="refused with the tag's name",
)
def test_an_answer_that_never_closes_what_the_prompt_opens_is_refused():
    tokenizer = text.load_tokenizer(CASES / "open-think-template/policy")
    with pytest.raises(
        ValueError, match="completion 0: the chat template opens <think> for the answer, and the answer"
    ):
        text.encode_completions(tokenizer, [said("1")], prompts=[SKY])
    with pytest.raises(ValueError, match="completion 0: the chat template leaves out its reasoning_content"):
        text.encode_completions(tokenizer, [said("1", reasoning_content="so")], prompts=[SKY])


@pytest.mark.robustness(
    "Text",
    given="a template that shows past answers without their thoughts",
    outcome="thoughts are learned all the same",
)
def test_thoughts_that_the_template_drops_are_learned(make_tokenizer):
    template = (
        "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content.split('</think>')[-1] }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    ids = text.encode_completions(tokenizer, [said("<think>why</think>blue")], prompts=[SKY])
    assert shown(tokenizer, ids[0]) == "<think>why</think>blue<|eos|>"
    twice = [*said("<think>a</think>b"), *SKY, *said("c")]
    with pytest.raises(
        ValueError, match="leaves out the content of turn 0 where more follow; give each answer a row of its own"
    ):
        text.encode_completions(tokenizer, [twice], prompts=[SKY])


def test_an_answer_that_the_prompt_has_begun_is_continued(make_tokenizer):
    tokenizer, begun = make_tokenizer(), [*SKY, *said("It is ")]
    assert shown(tokenizer, text.encode_prompts(tokenizer, [begun])[0]).endswith("assistant: It is ")
    ids = text.encode_completions(tokenizer, [said("blue.")], prompts=[begun])
    assert shown(tokenizer, ids[0]) == "blue.<|eos|>"


@pytest.mark.robustness(
    "Text", given="tools' answers and other turns inside a completion", outcome="read, and not learned from"
)
def test_only_what_the_assistant_says_is_learned_from(make_tokenizer):
    tokenizer = make_tokenizer()
    turns = [*said("call"), {"role": "tool", "content": "rain"}, *said("wet"), *said("very")]
    ids, mask = text.encode_completions_masked(tokenizer, [turns, "blue"], prompts=[SKY, SKY])
    assert [len(row) for row in ids] == [len(row) for row in mask]
    parts = [
        (said, shown(tokenizer, [i for i, m in zip(ids[0], mask[0], strict=True) if m == said])) for said in (1, 0)
    ]
    assert parts == [
        (1, "call<|eos|>wet<|eos|>very<|eos|>"),
        (0, "\n<|turn|>tool: rain<|eos|>\n<|turn|>assistant: \n<|turn|>assistant: "),
    ]
    assert mask[1] == [True] * 5
    assert text.encode_completions(tokenizer, [turns], prompts=[SKY]) == [ids[0]]
    opened = make_tokenizer(chat_template=TEMPLATE.replace("assistant: {%", "assistant: <think>{%"))
    thought = said("<think>a</think>b")
    ids = text.encode_completions(opened, [[*thought, *SKY, *thought]], prompts=[SKY])
    assert shown(opened, ids[0]) == (
        "a</think>b<|eos|>\n<|turn|>user: Sky?<|eos|>\n<|turn|>assistant: <think>a</think>b<|eos|>"
    )
    # Behind a turn of another there is nothing to end.
    ids, mask = text.encode_completions_masked(tokenizer, [turns[:2]], prompts=[SKY])
    assert shown(tokenizer, ids[0]) == "call<|eos|>\n<|turn|>tool: rain"
    assert mask[0] == [True] * 5 + [False] * (len(mask[0]) - 5)


@pytest.mark.parametrize(
    ("turn", "opening", "message"),
    [
        ("{{ m.content.split('</think>')[-1] }}<|eos|>", "", "leaves out the content of turn 0 where more follow"),
        ("{% if loop.last %}{{ m.thinking }}{% endif %}b<|eos|>", "", "leaves out the reasoning_content of turn 0"),
        ("{{ m.content }}{{ '<|eos|>' if loop.last and m.role == 'assistant' }}", "", "does not say where turn 0 ends"),
        ("{{ m.content }}{{ loop.revindex if loop.index == 3 }}<|eos|>", "", "writes what is before turn 2 otherwise"),
        ("{{ m.content }}<|eos|>", "<draft>", "does not begin the first answer as it opens it: '.*<draft>'"),
    ],
)
def test_turns_that_are_written_otherwise_once_more_follow_are_refused(make_tokenizer, turn, opening, message):
    template = (
        f"{{% for m in messages %}}<|turn|>{{{{ m.role }}}}: {turn}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|turn|>assistant: {opening}{{% endif %}}"
    )
    answer = said("b", reasoning_content="hm") if "thinking" in turn else said("<think>a</think>b")
    with pytest.raises(ValueError, match=f"^completion 0: the chat template {message}"):
        text.encode_completions(make_tokenizer(chat_template=template), [[*answer, *SKY, *answer]], prompts=[SKY])


def test_a_last_turn_that_is_written_otherwise_moves_no_border(make_tokenizer):
    """As in Qwen3: an answer has an empty thought where it is the last one."""
    template = (
        "{% for m in messages %}<|turn|>{{ m.role }}: {% if loop.last and m.role == 'assistant' %}"
        "<think></think>{% endif %}{{ m.content }}<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    turns = [*said("call"), {"role": "tool", "content": "rain"}, *said("wet")]
    segments = added_turns(tokenizer, SKY, turns, "x")
    assert segments == [
        ("call<|eos|>", True),
        ("\n<|turn|>tool: rain<|eos|>\n<|turn|>assistant: ", False),
        ("<think></think>wet<|eos|>\n", True),
    ]


def test_a_reader_sees_every_turn():
    assert transcript("as it is") == "as it is"
    assert transcript(SKY) == "Sky?"
    assert transcript([*SKY, *said("Blue.")]) == "user: Sky?\n\nassistant: Blue."
