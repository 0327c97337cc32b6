import sys

import gguf
import numpy as np
import pytest

from tiltjax.data.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer
from tiltjax.data.text import end_ids

STRING = "I'LL pay 12345 dollars!!\n\n ok"


@pytest.fixture
def write(byte_vocab, tmp_path):
    """Writes a GGUF file that holds bytes, three control tokens, merges, and one token that the user defined."""

    def write(pre="gpt-2", *, model="gpt2", merges=("h i", "Ġ hi"), extra=("hi", "Ġhi", "<think>"), **flags):
        tokens = [*byte_vocab, *extra]
        kinds = [3 if i in (256, 257, 258) else 4 if t == "<think>" else 1 for i, t in enumerate(tokens)]
        path = tmp_path / f"{pre}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(list(merges))
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_chat_template("{{ messages[0].content }}")
        for name, value in flags.items():
            add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
            add(f"tokenizer.ggml.{name}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_every_end_that_the_file_names(write):
    assert end_ids(gguf_tokenizer(write())) == (257,)
    assert end_ids(gguf_tokenizer(write(eot_token_id=258, eom_token_id=0))) == (257, 258, 0)


def test_bytes_merges_and_special_tokens(write):
    tokenizer = gguf_tokenizer(write())

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    assert encode("aé") == list("aé".encode())
    assert encode("hi hi") == [259, 260]
    assert encode("<|bos|>hi<|eos|>") == [256, 259, 257]
    assert encode("a<think>b") == [97, 261, 98]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", None)
    assert tokenizer.decode([256, 259, 261, 258, 257], skip_special_tokens=True) == "hi<think>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert len(tokenizer) == 262


def test_decoding_is_the_inverse_of_encoding(write):
    texts = ["".join(map(chr, row)) for row in np.random.default_rng(0).integers(1, 0xD7FF, (50, 12))]
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        tokenizer = gguf_tokenizer(write(pre))
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert bytes(ids).decode() == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


PIECES = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", " dollars", "!!", "\n\n", " ok"],
    "smollm": ["I", "'", "LL", " pay", " ", *"12345", " dollars", "!!", "\n\n", " ok"],
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", " dollars", "!!\n\n", " ok"],
    "qwen2": ["I", "'LL", " pay", " ", *"12345", " dollars", "!!\n\n", " ok"],
}


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_pieces_of_every_pre_tokenizer(write, pre):
    pieces = gguf_tokenizer(write(pre)).backend_tokenizer.pre_tokenizer.pre_tokenize_str(STRING)
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == PIECES[pre]


def test_qwen2_composes_accents_and_llama_takes_whole_tokens(write):
    assert gguf_tokenizer(write("qwen2")).encode("e\u0301") == list("é".encode())
    assert gguf_tokenizer(write("gpt-2")).encode("e\u0301") == list("e\u0301".encode())
    assert gguf_tokenizer(write("llama-bpe", merges=())).encode("hi", add_special_tokens=False) == [259]
    assert gguf_tokenizer(write("gpt-2", merges=())).encode("hi") == list(b"hi")


def test_bos_by_flag_and_by_custom(write):
    assert gguf_tokenizer(write("gpt-2")).encode("a") == [97]
    assert gguf_tokenizer(write("gpt-2", add_bos_token=True)).encode("a") == [256, 97]
    assert gguf_tokenizer(write("gpt-2", add_bos_token=True, add_eos_token=True)).encode("a") == [256, 97, 257]
    assert gguf_tokenizer(write("llama-bpe")).encode("a") == [256, 97]
    assert gguf_tokenizer(write("llama-bpe", add_bos_token=False)).encode("a") == [97]


def test_other_kinds_are_refused_by_name(write):
    known = "gpt-2, llama-bpe, qwen2, smollm"
    with pytest.raises(ValueError, match=rf"tekken\.gguf: pre-tokenizer 'tekken'; known: {known}$"):
        gguf_tokenizer(write("tekken"))
    with pytest.raises(ValueError, match=r"gpt-2\.gguf: tokenizer model 'llama'; only byte-level BPE"):
        gguf_tokenizer(write(model="llama"))
    with pytest.raises(ValueError, match=r"gpt-2\.gguf: vocabulary and merges do not fit each other: .*"):
        gguf_tokenizer(write(merges=("h o",)))


def test_broken_files_are_refused_in_one_line(write, tmp_path):
    path = write()
    whole = path.read_bytes()
    for size in (8, 40, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^\S*gpt-2\.gguf: GGUF file cut short or damaged[^\n]*$"):
            gguf_tokenizer(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"^\S*gpt-2\.gguf: not a GGUF file$"):
        gguf_tokenizer(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"gpt-2\.gguf: no tokenizer in this GGUF file"):
        gguf_tokenizer(path)


def test_missing_package_says_how_to_install_it(write, monkeypatch):
    path = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'gguf>=0.17'"):
        gguf_tokenizer(path)
