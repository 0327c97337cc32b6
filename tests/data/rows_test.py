import json

import numpy as np
import pytest

from tiltjax.data import rows as lib


def say(*contents, first="user"):
    """A conversation between user and assistant in turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


ASK, BLUE, GREEN = (
    say("What color is the sky?"),
    say("It is blue.", first="assistant"),
    say("Green.", first="assistant"),
)


@pytest.mark.parametrize("prompt", ["The sky is", ASK, [{"role": "system", "content": "Be brief."}, *ASK]])
def test_prompt(prompt):
    record = {"prompt": prompt, "answer": "blue", "n": [1, 2]}
    assert lib.parse_row(record, "prompt") == lib.PromptRow(prompt, {"answer": "blue", "n": [1, 2]})
    assert list(record) == ["prompt", "answer", "n"], "the record itself stays as it was"


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is", " blue."),
        ({"prompt": ASK, "completion": BLUE}, ASK, BLUE),
        ({"prompt": ASK, "completion": "It is blue."}, ASK, "It is blue."),
        ({"text": "The sky is blue."}, "", "The sky is blue."),
        ({"messages": say("a", "b", "c", "d")}, say("a", "b", "c"), [{"role": "assistant", "content": "d"}]),
    ],
)
def test_supervised(record, prompt, completion):
    assert lib.parse_row(record | {"id": 3}, "supervised") == lib.SupervisedRow(prompt, completion, {"id": 3})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ("The sky is", " blue.", " green.", {})),
        ({"prompt": ASK, "chosen": BLUE, "rejected": GREEN}, (ASK, BLUE, GREEN, {})),
        ({"prompt": ASK, "chosen": "blue", "rejected": "green", "s": 1}, (ASK, "blue", "green", {"s": 1})),
        # The prompt is implicit: the space before a word goes with the word, on both sides.
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.", {})),
        ({"chosen": "A:\n\nyes", "rejected": "A:\n\nno"}, ("A:\n\n", "yes", "no", {})),
        ({"chosen": "a  x", "rejected": "a  y"}, ("a ", " x", " y", {})),
        ({"chosen": "The sky", "rejected": "The sky is"}, ("The sky", "", " is", {})),
        ({"chosen": "The sky ", "rejected": "The sky is"}, ("The sky", " ", " is", {})),
        ({"chosen": ASK + BLUE, "rejected": ASK + GREEN}, (ASK, BLUE, GREEN, {})),
        (
            {"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b", "c", "e", "f", "g")},
            (say("a", "b", "c"), say("d", first="assistant"), say("e", "f", "g", first="assistant"), {}),
        ),
        # A text that repeats the prompt of two conversations.
        ({"prompt": "What?", "chosen": ASK + BLUE, "rejected": ASK + GREEN}, (ASK, BLUE, GREEN, {"prompt": "What?"})),
    ],
)
def test_pair(record, expected):
    assert lib.parse_row(record, "pair") == lib.PairRow(*expected)


def test_implicit_prompt_and_completions_join_to_the_texts():
    rng = np.random.default_rng(0)
    parsed = 0
    for _ in range(300):
        chosen, rejected = ("a " + "".join(rng.choice(list("ab \n"), 6)) for _ in range(2))
        if chosen == rejected:
            continue
        row = lib.parse_row({"chosen": chosen, "rejected": rejected}, "pair")
        assert (row.prompt + row.chosen, row.prompt + row.rejected) == (chosen, rejected)
        for completion in (row.chosen, row.rejected):
            assert row.prompt[-1:].isspace() or completion[:1] in ("", " ", "\n"), "a word is cut in two"
        parsed += 1
    assert parsed > 200


@pytest.mark.robustness("Data", given="a column margin beside a pair", outcome="kept as the margin of the pair")
@pytest.mark.robustness(
    "Data", given="scores beside a pair", outcome="they ride along; refused where the rejected one has the higher"
)
def test_margin_and_scores_of_a_pair():
    scores = {"score_chosen": 7.5, "score_rejected": 7.5}
    row = lib.parse_row(PAIR | scores | {"margin": 2}, "pair")
    assert row == lib.PairRow("p", "a", "b", scores, margin=2.0)
    assert (
        lib.parse_row(PAIR | {"margin": None}, "pair") == lib.parse_row(PAIR, "pair") == lib.PairRow("p", "a", "b", {})
    )


@pytest.mark.parametrize("label", [True, False])
def test_unpaired(label):
    record = {"prompt": ASK, "completion": BLUE, "label": label, "source": "x"}
    assert lib.parse_row(record, "unpaired") == lib.UnpairedRow(ASK, BLUE, label, {"source": "x"})


def test_ranked():
    record = {"prompt": "q", "completions": ["a", "b", ""], "rewards": [1, -0.5, 0.0], "id": "x"}
    assert lib.parse_row(record, "ranked") == lib.RankedRow("q", ["a", "b", ""], [1.0, -0.5, 0.0], {"id": "x"})
    record = {"prompt": ASK, "completions": [BLUE, GREEN], "rewards": [1, 0]}
    assert lib.parse_row(record, "ranked") == lib.RankedRow(ASK, [BLUE, GREEN], [1.0, 0.0], {})


def test_messages_column_by_column_and_nulls():
    columns = {"role": ["user", "assistant"], "content": ["a", "b"], "name": [None, None]}
    row = lib.parse_row({"messages": columns}, "supervised")
    assert (row.prompt, row.completion) == (say("a"), say("b", first="assistant"))
    call = {"role": "assistant", "tool_calls": [{"name": "f"}], "content": None}
    assert lib.parse_row({"prompt": [*ASK, call]}, "prompt").prompt[1] == {
        "role": "assistant",
        "tool_calls": [{"name": "f"}],
    }


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}


@pytest.mark.robustness(
    "Text", given="columns tools and chat_template_kwargs", outcome="kept with the row, for the chat template"
)
@pytest.mark.parametrize("kind", ["prompt", "supervised", "pair"])
def test_what_the_template_is_given(kind):
    record = {"prompt": ASK, "completion": BLUE, "chosen": BLUE, "rejected": GREEN, "tools": [TOOL]}
    options = {"enable_thinking": False}
    for tools, extra in (([TOOL], options), (json.dumps([TOOL]), json.dumps(options))):
        row = lib.parse_row(record | {"tools": tools, "chat_template_kwargs": extra}, kind)
        assert row.template == {"tools": [TOOL], "enable_thinking": False}
        assert (row.columns["tools"], row.columns["chat_template_kwargs"]) == ([TOOL], options)
    for none in (None, "", []):
        assert lib.parse_row(record | {"tools": none, "chat_template_kwargs": {}}, kind).template == {}
    assert lib.PromptRow(ASK, {}).template == {}


def test_a_place_is_no_part_of_what_a_row_says():
    here, there = (lib.parse_row({"prompt": "p"}, "prompt", place=place) for place in ("a.jsonl:1", "b.jsonl:2"))
    assert here == there
    assert repr(here) == repr(there) == repr(lib.PromptRow("p", {}))
    assert here.place == "a.jsonl:1"


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 2.0]}
BAD = [
    ("prompt", [1], "a row must be an object, got a list"),
    ("prompt", {}, "no column 'prompt'; columns: none"),
    ("prompt", {"question": "q", "answer": "a"}, "no column 'prompt'; columns: question, answer"),
    ("prompt", {"prompt": None}, "prompt must be a text or a list of messages, got null"),
    ("prompt", {"prompt": 3}, "prompt must be a text or a list of messages, got a number"),
    ("prompt", {"prompt": " \n"}, "prompt is empty"),
    ("prompt", {"prompt": []}, "prompt is empty"),
    ("prompt", {"prompt": say(" ")}, "prompt is empty"),
    ("prompt", {"prompt": ["a"]}, "prompt[0] must be a message with role and content, got a text"),
    (
        "prompt",
        {"prompt": [*ASK, {"role": "bot", "content": "x"}]},
        "prompt[1] has unknown role 'bot'; known: assistant",
    ),
    ("prompt", {"prompt": [{"content": "x"}]}, "prompt[0] has unknown role None"),
    ("prompt", {"prompt": [{"role": "user"}]}, "prompt[0] must have a text as content, got null"),
    ("prompt", {"prompt": [{"role": "user", "content": [1]}]}, "prompt[0].content[0] is a part of type 'int'"),
    ("prompt", {"prompt": {"role": ["user"], "content": []}}, "prompt has columns of unequal lengths"),
    ("prompt", {"prompt": ASK, "tools": {}}, "tools must be a list, got an object"),
    ("prompt", {"prompt": ASK, "tools": "weather"}, "tools is a text, but not JSON: Expecting value"),
    ("prompt", {"prompt": ASK, "tools": [TOOL, "clock"]}, "tools[1] must be an object, got a text"),
    ("prompt", {"prompt": ASK, "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, got a list"),
    (
        "prompt",
        {"prompt": ASK, "chat_template_kwargs": {"tokenize": 1}},
        "chat_template_kwargs must not set 'tokenize'",
    ),
    ("supervised", {"prompt": "p"}, "no column 'completion'; columns: prompt"),
    ("supervised", {"prompt": "p", "completion": BLUE}, "completion is a conversation but prompt is a text"),
    ("supervised", {"prompt": ASK, "completion": ASK}, "completion must begin with a message of the assistant"),
    ("supervised", {"prompt": ASK, "completion": []}, "completion must begin with a message of the assistant"),
    ("supervised", {"messages": say("a", "b", "c")}, "messages must be a conversation that ends with the assistant"),
    ("supervised", {"messages": BLUE}, "messages must be a conversation that ends with the assistant"),
    ("supervised", {"messages": "text"}, "messages must be a conversation that ends with the assistant"),
    ("supervised", {"text": ""}, "text must be a text that is not empty"),
    ("pair", PAIR | {"rejected": "a"}, "chosen and rejected are equal"),
    ("pair", PAIR | {"prompt": ""}, "prompt is empty"),
    ("pair", {"prompt": "p", "chosen": "a"}, "no column 'rejected'; columns: prompt, chosen"),
    ("pair", {"chosen": "a", "rejected": "b"}, "no prompt: chosen and rejected do not begin alike"),
    ("pair", {"chosen": " a", "rejected": " b"}, "no prompt: chosen and rejected do not begin alike"),
    (
        "pair",
        {"chosen": "blue", "rejected": "black"},
        "no prompt: chosen and rejected do not begin alike, word by word",
    ),
    (
        "pair",
        {"chosen": "\n\nHuman: a b\n\nAssistant: c", "rejected": "\n\nHuman: a d\n\nAssistant: c"},
        "no prompt: chosen and rejected part in a turn that is not the assistant's",
    ),
    ("pair", PAIR | {"margin": "1"}, "margin must be a number, got a text"),
    ("pair", PAIR | {"margin": float("nan")}, "margin must be finite, got nan"),
    ("pair", PAIR | {"margin": -0.5}, "margin must be at least 0, got -0.5"),
    ("pair", PAIR | {"score_chosen": 2, "score_rejected": 7.5}, "score_chosen = 2 is below score_rejected = 7.5"),
    ("pair", PAIR | {"chosen_score": "x", "rejected_score": 1}, "chosen_score must be a number, got a text"),
    ("pair", {"chosen": BLUE, "rejected": GREEN}, "no prompt: chosen and rejected do not begin alike"),
    (
        "pair",
        {"chosen": ASK + BLUE, "rejected": "b"},
        "chosen and rejected must both be texts or both be conversations",
    ),
    ("pair", {"chosen": ASK, "rejected": ASK + BLUE}, "chosen must begin with a message of the assistant"),
    ("pair", {"prompt": "p", "chosen": "a", "rejected": BLUE}, "rejected is a conversation but prompt is a text"),
    ("unpaired", {"prompt": "p", "completion": "c"}, "no column 'label'; columns: prompt, completion"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": 1}, "label must be true or false, got a number"),
    ("ranked", RANKED | {"rewards": [1.0]}, "2 completions but 1 rewards"),
    ("ranked", RANKED | {"rewards": 1.0}, "rewards must be a list that is not empty, got a number"),
    ("ranked", RANKED | {"completions": []}, "completions must be a list that is not empty, got a list"),
    ("ranked", RANKED | {"completions": ["a", 2]}, "completions[1] must be a text or a list of messages, got a number"),
    ("ranked", RANKED | {"completions": ["a", BLUE]}, "completions[1] is a conversation but prompt is a text"),
    ("ranked", RANKED | {"rewards": [1.0, "2"]}, "rewards[1] must be a number, got a text"),
    ("ranked", RANKED | {"rewards": [True, 2]}, "rewards[0] must be a number, got a boolean"),
    ("ranked", RANKED | {"rewards": [1, float("nan")]}, "rewards[1] must be finite, got nan"),
    ("ranked", RANKED | {"rewards": [-float("inf"), 1]}, "rewards[0] must be finite, got -inf"),
    ("ranked", RANKED | {"rewards": [10**400, 1]}, "rewards[0] must be finite, got inf"),
    ("other", {"prompt": "p"}, "kind must be one of pair, prompt, ranked, supervised, unpaired; got 'other'"),
]


@pytest.mark.parametrize(("kind", "record", "reason"), BAD)
def test_bad_records_are_refused_in_one_line(kind, record, reason):
    with pytest.raises(ValueError) as error:
        lib.parse_row(record, kind)
    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)
