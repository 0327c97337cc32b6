"""Tokenizers that put a space before every text put none before a completion, and decoding keeps the one it has."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiltjax.data import text
from tiltjax.data.continuation import decode_continuation, encode_continuation

KINDS = ("metaspace first", "metaspace always", "prepend")


def sentencepiece(kind):
    """Words with their space, as Llama 2 (prepend) and Mistral (metaspace) have them."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁is", -1.0), ("is", -1.0), ("▁blue", -1.0), ("blue", -1.0), ("sky", -1.0)]
    backend = Tokenizer(models.Unigram([*pieces, ("▁sky", -1.0)], 0))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    else:
        scheme = kind.removeprefix("metaspace ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.robustness(
    "Text", given="a SentencePiece tokenizer, which puts a space before a text", outcome="no space before a completion"
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_gains_and_loses_no_space(kind):
    tokenizer = sentencepiece(kind)
    texts = ["blue", " blue", "sky is blue", "", "blue</s>"]
    ids = text.encode_completions(tokenizer, texts)
    assert [tokenizer.convert_ids_to_tokens(row) for row in ids] == [
        ["blue", "</s>"],
        ["▁blue", "</s>"],
        ["sky", "▁is", "▁blue", "</s>"],
        ["</s>"],
        ["blue", "</s>"],
    ]
    tokens, mask = np.zeros((1, 5, 4), int), np.zeros((1, 5, 4), bool)
    for i, row in enumerate(ids):
        tokens[0, i, : len(row)], mask[0, i, : len(row)] = row, True
    assert text.decode_completions(tokenizer, tokens, mask) == [["blue", " blue", "sky is blue", "", "blue"]]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_the_tokens_of_the_whole(kind):
    tokenizer = sentencepiece(kind)
    prompt, completion = "sky is", " blue is blue</s>sky is"
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    ids = text.encode_prompts(tokenizer, [prompt])[0] + encode_continuation(tokenizer, [completion])[0]
    assert ids == whole
    assert decode_continuation(tokenizer, ids).replace(" ", "") == (prompt + completion).replace(" ", "")


def test_a_tokenizer_without_such_a_space_is_used_as_it_is(make_tokenizer):
    tokenizer = make_tokenizer()
    assert encode_continuation(tokenizer, [" a", "b"]) == tokenizer([" a", "b"], add_special_tokens=False)["input_ids"]
    assert encode_continuation(tokenizer, []) == []
