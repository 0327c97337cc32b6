import json
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

from tiltjax.data import text as lib
from tiltjax.data.limits import Limits, limit

CASES = pathlib.Path(__file__).parents[1] / "cases"
BOS, EOS, TURN = 256, 257, 258
SKY = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
OPEN_SKY = [TURN, *b"user: What color is the sky?", EOS, *b"\n", TURN, *b"assistant: "]


class TestEncodePrompts:
    def test_text_as_it_is(self, make_tokenizer):
        assert lib.encode_prompts(make_tokenizer(), ["hi", " né\n🙂"]) == [list(b"hi"), list(" né\n🙂".encode())]
        assert lib.encode_prompts(make_tokenizer(), ["<|turn|>user: hi<|eos|>"]) == [[TURN, *b"user: hi", EOS]]
        assert lib.encode_prompts(make_tokenizer(), []) == []

    def test_bos_only_where_the_tokenizer_adds_it_and_once(self, make_tokenizer):
        tokenizer = make_tokenizer(add_bos_token=True, add_eos_token=True)
        assert lib.encode_prompts(tokenizer, ["hi", "<|bos|>hi", SKY]) == [[BOS, *b"hi"], [BOS, *b"hi"], OPEN_SKY]

    def test_conversation_opens_the_assistants_turn(self, make_tokenizer):
        assert lib.encode_prompts(make_tokenizer(), [SKY, "hi"]) == [OPEN_SKY, list(b"hi")]

    def test_conversation_that_ends_with_the_assistant_is_continued(self, make_tokenizer):
        begun = [*SKY, {"role": "assistant", "content": "It is"}]
        assert lib.encode_prompts(make_tokenizer(), [begun]) == [[*OPEN_SKY, *b"It is"]]

    def test_empty_prompt_is_bos_or_refused(self, make_tokenizer):
        assert lib.encode_prompts(make_tokenizer(), ["", "a"]) == [[BOS], list(b"a")]
        with pytest.raises(ValueError, match="prompt 1 encodes to no token: ''"):
            lib.encode_prompts(make_tokenizer(bos_token=None), ["a", ""])

    def test_no_template_and_a_template_that_refuses(self, make_tokenizer):
        with pytest.raises(ValueError, match="prompt 1 is a conversation, but the tokenizer has no chat template"):
            lib.encode_prompts(make_tokenizer(chat_template=None), ["a", SKY])
        strict = make_tokenizer(chat_template="{{ raise_exception('user must\nbegin') }}")
        with pytest.raises(ValueError, match="prompt 0: the chat template refuses the conversation: user must begin"):
            lib.encode_prompts(strict, [SKY])


class TestEncodeCompletions:
    def test_text_and_eos(self, make_tokenizer):
        texts = [" blue.", "", "done<|eos|>"]
        assert lib.encode_completions(make_tokenizer(), texts) == [[*b" blue.", EOS], [EOS], [*b"done", EOS]]
        assert lib.encode_completions(make_tokenizer(), texts[:2], eos=False) == [list(b" blue."), []]

    def test_never_adds_bos(self, make_tokenizer):
        assert lib.encode_completions(make_tokenizer(add_bos_token=True), ["a"]) == [[*b"a", EOS]]

    def test_conversation_is_what_the_template_adds(self, make_tokenizer):
        tokenizer = make_tokenizer()
        out = lib.encode_completions(tokenizer, [BLUE, "green"], prompts=[SKY, SKY])
        assert out == [[*b"It is blue.", EOS], [*b"green", EOS]]
        assert lib.encode_completions(tokenizer, [BLUE], prompts=[SKY], eos=False) == [list(b"It is blue.")]
        whole = tokenizer.apply_chat_template(SKY + BLUE, tokenize=False)
        assert bytes(t for t in OPEN_SKY + out[0] if t < 256).decode() + "\n" == whole.replace("<|turn|>", "").replace(
            "<|eos|>", ""
        )

    def test_more_turns_keep_the_eos_between(self, make_tokenizer):
        more = [*BLUE, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air."}]
        out = lib.encode_completions(make_tokenizer(), [more], prompts=[SKY])
        expected = [*b"It is blue.", EOS, *b"\n", TURN, *b"user: Why?", EOS, *b"\n", TURN, *b"assistant: Air.", EOS]
        assert out == [expected]

    def test_conversation_needs_its_prompt(self, make_tokenizer):
        for prompts in (None, ["What color?"]):
            with pytest.raises(ValueError, match="completion 0 is a conversation, so its prompt must be given"):
                lib.encode_completions(make_tokenizer(), [BLUE], prompts=prompts)
        with pytest.raises(ValueError, match=r"prompts must be as many as completions \(1\), got 2"):
            lib.encode_completions(make_tokenizer(), [BLUE], prompts=[SKY, SKY])
        with pytest.raises(ValueError, match="completion 0 must begin with a message of the assistant"):
            lib.encode_completions(make_tokenizer(), [SKY], prompts=[SKY])


class TestDecodeCompletions:
    def test_masked_and_special_tokens_are_left_out(self, make_tokenizer):
        tokens = np.array([[[*b"one", EOS, *b"x"], [TURN, *b"two!"]], [[*b"thr  "], [EOS, 0, 0, 0, 0]]])
        mask = np.array([[[1, 1, 1, 1, 0], [1] * 5], [[1] * 5, [1, 0, 0, 0, 0]]], bool)
        expected = [["one", "two!"], ["thr  ", ""]]
        assert lib.decode_completions(make_tokenizer(), tokens, mask) == expected
        assert lib.decode_completions(make_tokenizer(), jnp.asarray(tokens), jnp.asarray(mask)) == expected

    def test_eos_that_is_no_special_token_is_left_out(self, make_tokenizer):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<end>"])
        tokenizer.eos_token = "<end>"
        ids = lib.encode_completions(tokenizer, ["hi"])
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == "hi<end>"
        assert lib.decode_completions(tokenizer, np.array([ids]), np.ones((1, 1, 3), bool)) == [["hi"]]

    def test_is_the_inverse_of_encoding(self, make_tokenizer):
        texts = ["It's  naïve .", "東京 🙂\n", "a , b !", ""]
        ids = lib.encode_completions(make_tokenizer(), texts)
        tokens, mask = np.zeros((2, 2, 32), np.int32), np.zeros((2, 2, 32), bool)
        for i, row in enumerate(ids):
            tokens[divmod(i, 2)][: len(row)], mask[divmod(i, 2)][: len(row)] = row, True
        assert lib.decode_completions(make_tokenizer(), tokens, mask) == [texts[:2], texts[2:]]


class TestSpecialIds:
    def test_pad_falls_back_to_eos(self, make_tokenizer):
        assert (lib.eos_id(make_tokenizer()), lib.pad_id(make_tokenizer())) == (EOS, EOS)
        assert lib.pad_id(make_tokenizer(pad_token="<|bos|>")) == BOS

    def test_no_eos_is_refused(self, make_tokenizer):
        tokenizer = make_tokenizer(eos_token=None)
        for call in (lib.eos_id, lib.pad_id, lib.tokenizer_fingerprint, lambda t: lib.encode_completions(t, ["a"])):
            with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
                call(tokenizer)

    def test_prompt_text(self):
        asked = [{"role": "system", "content": "s"}, *SKY, *BLUE, {"role": "user", "content": "Why?"}, *BLUE]
        assert (lib.prompt_text("as it is "), lib.prompt_text(SKY)) == ("as it is ", "What color is the sky?")
        assert (lib.prompt_text(asked), lib.prompt_text(BLUE)) == ("Why?", "")


class TestFingerprint:
    def test_tells_tokenizers_apart(self, make_tokenizer):
        changes = [{}, {"chat_template": "x"}, {"chat_template": None}, {"eos_token": "<|turn|>"}, {"bos_token": None}]
        prints = [lib.tokenizer_fingerprint(make_tokenizer(**change)) for change in changes]
        assert len(set(prints)) == len(prints)
        grown = make_tokenizer()
        grown.add_tokens(["new"])
        assert lib.tokenizer_fingerprint(grown) not in prints
        assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)

    def test_tells_apart_the_same_vocabulary_used_otherwise(self):
        """Other merges, or another normaliser, make other tokens of the same text."""
        vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "c", "ab", "bc", "A"])}

        def tokenizer(merges, normalizer=None):
            backend = Tokenizer(BPE(vocabulary, merges))
            backend.normalizer = normalizer
            return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")

        made = [tokenizer([("a", "b")]), tokenizer([("b", "c")]), tokenizer([("a", "b")], Lowercase())]
        encoded = [lib.encode_completions(t, ["abc", "A"]) for t in made]
        assert len({str(ids) for ids in encoded}) == 3
        assert len({lib.tokenizer_fingerprint(t) for t in made}) == 3

    def test_survives_a_folder_and_a_pad_that_changes_nothing(self, make_tokenizer, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        print_ = lib.tokenizer_fingerprint(make_tokenizer())
        assert lib.tokenizer_fingerprint(lib.load_tokenizer(tmp_path)) == print_
        assert lib.tokenizer_fingerprint(make_tokenizer(pad_token="<|eos|>")) == print_


class TestLoad:
    def test_importing_loads_nothing_heavy(self):
        code = (
            "import sys, tiltjax.data.text, tiltjax.data.datasets, tiltjax.data.candidates\n"
            "heavy = {'transformers', 'tokenizers', 'tensorflow_datasets', 'pyarrow', 'gguf', 'jinja2'}\n"
            "print(sorted(heavy & set(sys.modules)))"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.robustness(
    "Tokens",
    given="a chat model whose turns end in another token than its tokenizer's EOS",
    outcome="a completion ends at any end that generation_config.json, config.json or the tokenizer names",
)
def test_a_turn_ends_as_the_files_of_the_model_say():
    tokenizer = lib.load_tokenizer(CASES / "turn-end-token" / "policy")
    text_end, turn_end = 256, 258
    a, blue = (tokenizer.encode(said, add_special_tokens=False) for said in ("a", "It is blue."))
    assert (lib.end_ids(tokenizer), lib.eos_id(tokenizer)) == ((text_end, turn_end), text_end)
    # A turn ends once, as the template ends it; so does a bare text that answers a conversation.
    turn, bare = lib.encode_completions(tokenizer, [BLUE, "It is blue."], prompts=[SKY, SKY])
    assert turn == bare == [*blue, turn_end]
    assert lib.encode_completions(tokenizer, ["a", "a<|im_end|>"]) == [[*a, text_end], [*a, turn_end]]
    assert lib.encode_completions(tokenizer, [BLUE], prompts=[SKY], eos=False) == [blue]
    ids = np.array([[[*a, turn_end], [*a, text_end]]])
    assert lib.decode_completions(tokenizer, ids, np.ones(ids.shape, bool)) == [["a", "a"]]


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [TURN, EOS]}, {"eos_token_id": BOS}, (EOS, TURN, BOS)),
        ({"eos_token_id": 0}, None, (EOS, 0)),
        (None, {"text_config": {"eos_token_id": TURN}, "eos_token_id": None}, (EOS,)),
        (None, {"text_config": {"eos_token_id": TURN}}, (EOS, TURN)),
        ({}, {"eos_token_id": None}, (EOS,)),
    ],
)
def test_ends_of_every_file(make_tokenizer, tmp_path, generation, config, ends):
    make_tokenizer().save_pretrained(tmp_path)
    for name, facts in (("generation_config.json", generation), ("config.json", config)):
        if facts is not None:
            (tmp_path / name).write_text(json.dumps(facts))
    assert lib.end_ids(lib.load_tokenizer(tmp_path)) == ends


@pytest.mark.robustness(
    "Tokens",
    given="an end in generation_config.json that is no token id",
    outcome="one line with the file and the value",
)
@pytest.mark.parametrize("said", ["</s>", [2, "</s>"], True, -1, 1.5, {"id": 2}])
def test_an_end_that_is_no_id_is_refused(make_tokenizer, tmp_path, said):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be a token id or a list of them"):
        lib.load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def smollm2():
    return lib.load_tokenizer("smollm2")


# As llama.cpp and the GGUF loader of transformers give them for the same file.
SMOLLM2_IDS = {
    "Hello world": [19556, 905],
    "The year is 2024, isn't it?\n\n  x = 10 ** 3": [
        *(504, 713, 314, 216, 34, 32, 34, 36, 28, 3247, 982, 357, 47, 8866, 1792, 446, 216, 33, 32, 1903, 216, 35)
    ],
    "naïve café 東京 🙂 ٣½\t\r\n{}<|im_end|>": [
        *(3546, 46494, 37366, 17097, 247, 126, 16736, 122, 47526, 216, 164, 113, 16738, 197, 201, 198, 6150, 2)
    ],
}
SMOLLM2_OPEN_SKY = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2),
    *(198, 1, 4093, 198, 1780, 2380, 314, 260, 6376, 47, 2, 198, 1, 520, 9531, 198),
]


class TestSmolLM2:
    def test_ids_and_back(self, smollm2):
        assert lib.encode_prompts(smollm2, list(SMOLLM2_IDS)) == list(SMOLLM2_IDS.values())
        for string, ids in SMOLLM2_IDS.items():
            assert smollm2.decode(ids, clean_up_tokenization_spaces=False) == string

    def test_special_tokens(self, smollm2):
        assert len(smollm2) == 49152
        assert (smollm2.bos_token_id, lib.eos_id(smollm2), lib.pad_id(smollm2), smollm2.unk_token_id) == (1, 2, 2, 0)
        assert smollm2.eos_token == "<|im_end|>"

    def test_chat_template(self, smollm2):
        rendered = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert lib.encode_prompts(smollm2, [SKY, rendered]) == [SMOLLM2_OPEN_SKY] * 2
        out = lib.encode_completions(smollm2, [BLUE, "It is blue."], prompts=[SKY, SKY])
        assert out == [[1589, 314, 4461, 30, 2]] * 2
        assert lib.decode_completions(smollm2, np.array([out]), np.ones((1, 2, 5), bool)) == [["It is blue."] * 2]


@pytest.mark.robustness(
    "Tokens",
    given="a token that the tokenizer has and the model's vocabulary has not",
    outcome="refused by token, id and size",
)
def test_an_id_beyond_the_vocabulary_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    assert lib.encode_prompts(tokenizer, ["<|turn|>"]) == [[TURN]]
    limit(tokenizer, Limits(vocab_size=300))
    limit(tokenizer, Limits(vocab_size=TURN))
    limit(tokenizer, Limits(vocab_size=300, max_positions=9))  # Another model that reads the same tokens.
    message = "has the token '<|turn|>' of id 258, but the model's vocab_size is 258"
    with pytest.raises(ValueError, match=f"prompt 1 {re.escape(message)}"):
        lib.encode_prompts(tokenizer, ["a", "<|turn|>"])
    with pytest.raises(ValueError, match=f"completion 0 {re.escape(message)}"):
        lib.encode_completions(tokenizer, ["a<|turn|>"])
    assert lib.encode_completions(tokenizer, ["a"]) == [[*b"a", EOS]]
    for encode, kind in ((lib.encode_prompts, "prompt"), (lib.encode_completions, "completion")):
        with pytest.raises(ValueError, match=rf"^f\.jsonl:7: {kind} has the token"):
            encode(tokenizer, ["a", "<|turn|>"], places=["f.jsonl:2", "f.jsonl:7"])


@pytest.mark.robustness(
    "Tokens", given="a sequence longer than a model's learned positions", outcome="refused before anything is sampled"
)
def test_a_position_beyond_the_table_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    limit(tokenizer, Limits(vocab_size=300, position_table=5, max_positions=5))
    assert lib.encode_prompts(tokenizer, ["abc"], max_tokens=2) == [list(b"abc")]
    with pytest.raises(ValueError, match="prompt 1 takes 6 positions, but the model has 5 learned ones"):
        lib.encode_prompts(tokenizer, ["abc", "abcd"], max_tokens=2)
    assert len(lib.encode_completions(tokenizer, ["abcde"])[0]) == 6  # It may be cut.


@pytest.mark.robustness(
    "Tokens",
    given="a sequence longer than a model with rotary positions was trained on",
    outcome="one line warns of it",
)
def test_a_length_beyond_training_is_warned_of_once(make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    limit(tokenizer, Limits(vocab_size=300, max_positions=7))
    for _ in range(2):
        lib.encode_prompts(tokenizer, ["abc", "abcd", "abcde"], max_tokens=4)
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 texts take more than the 7 positions that the model was trained on")


@pytest.mark.robustness("Text", given="half of a surrogate pair in a text", outcome="refused with its place")
def test_half_of_a_surrogate_pair_is_refused(make_tokenizer):
    half = "half a smile \ud83d"
    for prompt in (half, [{"role": "user", "content": half}]):
        with pytest.raises(ValueError, match=r"prompt 1 is no valid text: half of a surrogate pair, '\\ud83d', after"):
            lib.encode_prompts(make_tokenizer(), ["a", prompt])
    for completion in (half, [{"role": "assistant", "content": half}]):
        with pytest.raises(ValueError, match="completion 1 is no valid text: half of a surrogate pair"):
            lib.encode_completions(make_tokenizer(), ["a", completion], prompts=[SKY, SKY])


@pytest.mark.robustness(
    "Text",
    given="special tokens such as <think> in a completion",
    outcome="rewards see them; ends and turn marks are left out",
)
def test_rewards_see_the_tags_that_a_model_wrote():
    tokenizer = lib.load_tokenizer(CASES / "special-tags-in-reward" / "policy")
    (ids,) = lib.encode_completions(tokenizer, ["<think>a</think>4<|im_start|><|im_end|><|endoftext|>"])
    whole = np.ones((1, 1, len(ids)), bool)
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        (shown,) = lib.decode_completions(tokenizer, np.array([[ids]]), whole)
        assert shown == ["<think>a</think>4" + ("<|im_start|>" if template is None else "")]
    # A prompt that opens a thought does not make the tag a mark of turns.
    tokenizer.chat_template = (CASES / "open-think-template/policy/chat_template.jinja").read_text()
    assert lib.decode_completions(tokenizer, np.array([[ids]]), whole) == [["<think>a</think>4"]]
