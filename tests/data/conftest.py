"""A tokenizer whose ids are the UTF-8 bytes of the text, so that a test can tell the right ids by itself."""

import pytest

BOS, EOS, TURN = 256, 257, 258
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def byte_vocab():
    """GPT-2's printable spelling of every byte -> the byte; then BOS, EOS and the mark of a turn."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    spelling = {chr(b) if b in printable else chr(next(others)): b for b in range(256)}
    return spelling | {"<|bos|>": BOS, "<|eos|>": EOS, "<|turn|>": TURN}


@pytest.fixture
def make_tokenizer(byte_vocab):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(**options):
        backend = Tokenizer(models.BPE(vocab=byte_vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>", "<|turn|>")])
        options = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE} | options
        return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in options.items() if v is not None})

    return make
