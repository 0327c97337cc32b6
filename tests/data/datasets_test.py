import dataclasses
import gzip
import json
import pathlib
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiltjax.data import datasets as lib

CASES = pathlib.Path(__file__).parents[1] / "cases"
ASK = [{"role": "user", "content": "What color is the sky?"}]
PAIRS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "id": 1},
    {"prompt": "Grass is", "chosen": " green — é 🙂", "rejected": " blue.", "id": 2},
    {"prompt": "x", "chosen": "a", "rejected": "b", "id": 3},
]
EXPECTED = [lib.PairRow(r["prompt"], r["chosen"], r["rejected"], {"id": r["id"]}) for r in PAIRS]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestFiles:
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_json_lines(self, tmp_path, mark):
        for name in ("a.jsonl", "a.json"):
            (tmp_path / name).write_text(mark + "\n" * (mark == "") + lines(PAIRS) + "\n\n", encoding="utf-8")
            assert lib.read(tmp_path / name, "pair") == EXPECTED
            assert lib.read(str(tmp_path / name), "pair", limit=2) == EXPECTED[:2]
            assert lib.read(str(tmp_path / name), "pair", limit=9) == EXPECTED

    @pytest.mark.parametrize("indent", [None, 2])
    def test_json_array(self, tmp_path, indent):
        (tmp_path / "a.json").write_text("  " + json.dumps(PAIRS, indent=indent))
        assert lib.read(tmp_path / "a.json", "pair") == EXPECTED

    def test_parquet(self, tmp_path):
        pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "a.parquet", row_group_size=2)
        assert lib.read(tmp_path / "a.parquet", "pair") == EXPECTED

    def test_parquet_conversations_and_rankings(self, tmp_path):
        tool = {"role": "tool", "name": "f", "content": "1"}
        rows = [{"prompt": [*ASK, tool], "completions": ["a", "b"], "rewards": [0.5, 1.0], "meta": {"k": [1]}}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        expected = lib.RankedRow([*ASK, tool], ["a", "b"], [0.5, 1.0], {"meta": {"k": [1]}})
        assert lib.read(tmp_path / "a.parquet", "ranked") == [expected]

    def test_folder_glob_and_split(self, tmp_path):
        (tmp_path / "train-00001-of-00002.jsonl").write_text(lines(PAIRS[1:2]))
        pq.write_table(pa.Table.from_pylist(PAIRS[:1]), tmp_path / "train-00000-of-00002.parquet")
        (tmp_path / "validation.json").write_text(json.dumps(PAIRS[2:]))
        (tmp_path / "README.md").write_text("not data")
        (tmp_path / ".hidden.jsonl").write_text("not data")
        assert lib.read(tmp_path, "pair", split="train") == EXPECTED[:2]
        assert lib.read(f"{tmp_path}?split=train", "pair") == EXPECTED[:2]
        assert lib.read(tmp_path, "pair", split="validation") == EXPECTED[2:]
        assert lib.read(f"{tmp_path}/*.json*?split=train", "pair") == EXPECTED[1:2]
        assert lib.read(f"{tmp_path}/train*", "pair", limit=1) == EXPECTED[:1]

    def test_each_kind_is_its_own_type(self, tmp_path):
        row = {"prompt": "p", "completion": "c", "label": False}
        (tmp_path / "a.jsonl").write_text(lines([row]))
        assert lib.read(tmp_path / "a.jsonl", "unpaired") == [lib.UnpairedRow("p", "c", False, {})]
        assert lib.read(tmp_path / "a.jsonl", "supervised") == [lib.SupervisedRow("p", "c", {"label": False})]
        assert lib.read(tmp_path / "a.jsonl", "prompt") == [lib.PromptRow("p", {"completion": "c", "label": False})]


def refused(source, reason, kind="prompt", **options):
    """The reason, in one line that begins with the place."""
    with pytest.raises(lib.DataError) as error:
        lib.read(source, kind, **options)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.robustness("Data", given="JSON Lines, JSON or CSV compressed by gzip", outcome="read")
@pytest.mark.robustness("Data", given="a CSV", outcome="read; the first line names the columns, values are texts")
def test_csv_and_gzip(tmp_path):
    texts = {
        "a.jsonl": lines(PAIRS),
        "a.json": json.dumps(PAIRS, indent=1),
        "a.csv": "\ufeffprompt,chosen,rejected,id\r\n"
        + "".join(f'{r["prompt"]},"{r["chosen"]}",{r["rejected"]},{r["id"]}\r\n\r\n' for r in PAIRS),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        rows = lib.read(tmp_path / f"{name}.gz", "pair")
        if name == "a.csv":
            (tmp_path / name).write_bytes(text.encode())
            assert lib.read(tmp_path / name, "pair") == rows
            assert [row.place for row in rows] == [f"{tmp_path}/a.csv.gz:{line}" for line in (2, 4, 6)]
            rows = [dataclasses.replace(row, columns={"id": int(row.columns["id"])}) for row in rows]
        assert rows == EXPECTED
    (tmp_path / "b.csv").write_text('prompt,answer\n"one, ""two""\nthree",007\nlast,""\n')
    assert lib.read(tmp_path / "b.csv", "prompt") == [
        lib.PromptRow('one, "two"\nthree', {"answer": "007"}),
        lib.PromptRow("last", {"answer": ""}),
    ]


@pytest.mark.robustness("Data", given="an Arrow file or stream", outcome="read")
@pytest.mark.robustness("Data", given="an Arrow stream that was cut between two batches", outcome="refused")
def test_arrow(tmp_path):
    table = pa.Table.from_pylist(PAIRS)
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with new(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert lib.read(tmp_path / "a.arrow", "pair") == EXPECTED
    whole = (tmp_path / "a.arrow").read_bytes()
    for size in (len(whole) - 8, len(whole) // 2, 5):
        (tmp_path / "a.arrow").write_bytes(whole[:size])
        refused(tmp_path / "a.arrow", "a.arrow: not a whole Arrow file: ", "pair")


@pytest.mark.robustness("Data", given="a folder of datasets.save_to_disk", outcome="read, in the order of state.json")
@pytest.mark.robustness(
    "Data", given="a folder of save_to_disk with several splits", outcome="asks for one: FOLDER?split=train"
)
def test_saved_to_disk(tmp_path):
    saved = CASES / "saved-to-disk-folder" / "saved"
    rows = lib.read(saved, "prompt")
    assert [row.prompt for row in rows[:2]] == ["Say 0", "Say 1"]
    for split in ("train", "test"):
        shutil.copytree(saved, tmp_path / split)
    (tmp_path / "train" / "data-00001-of-00002.arrow").write_bytes(b"left by an older run")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(tmp_path, f"{tmp_path}: split must be one of train, test; got None; write {tmp_path}?split=train")
    assert lib.read(f"{tmp_path}?split=train", "prompt") == rows
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert lib.read(tmp_path, "prompt") == rows
    state = tmp_path / "test" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "x"}]}))
    refused(tmp_path, "test: its rows are chosen by indices; save it again with flatten_indices()")
    for broken, reason in (("[]", "not an object"), ("{", "invalid JSON"), ("{}", "does not name the data files")):
        state.write_text(broken)
        refused(tmp_path, f"state.json: {reason}")
    state.unlink()  # As in the cache of datasets: the file about the data is still no data.
    assert lib.read(tmp_path, "prompt") == rows


@pytest.mark.robustness(
    "Data", given="a folder with files of several splits", outcome="asks for one: FOLDER?split=train"
)
def test_a_folder_with_several_splits_asks_for_one(tmp_path):
    splits = CASES / "repeated-prompts" / "splits"
    refused(splits, f"{splits}: split must be one of test, train; got None; write {splits}?split=train")
    refused(f"{splits}/*.parquet", "split must be one of test, train")
    test, train = (lib.read(f"{splits}?split={name}", "prompt") for name in ("test", "train"))
    assert test != train
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl", "train-extra.csv.gz", "notes.jsonl", "part-0-of-1.jsonl"):
        text = b"prompt\np" if ".csv" in name else b'{"prompt": "p"}'
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    refused(tmp_path, "split must be one of part, test, train; got None")
    for split, number in (("train", 2), ("test", 1), ("part", 1), ("notes", 1)):
        assert len(lib.read(f"{tmp_path}?split={split}", "prompt")) == number


@pytest.mark.robustness(
    "Text", given="nulls that Parquet fills in inside tool calls", outcome="dropped, at every depth"
)
def test_what_parquet_fills_in_is_dropped(tmp_path):
    case = CASES / "parquet-null-arguments"
    assert lib.read(case / "calls.parquet", "supervised") == lib.read(case / "calls.jsonl", "supervised")
    tools = [{"name": "f", "parameters": {"city": {"type": "string"}}}]
    rows = [
        {"prompt": ASK, "tools": tools, "meta": {"a": 1}},
        {"prompt": ASK, "tools": [{"name": "g", "parameters": {"zone": {"enum": ["a"]}}}], "meta": {"b": 2}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = lib.read(tmp_path / "a.parquet", "prompt")
    assert [row.template["tools"] for row in read] == [row["tools"] for row in rows]
    assert read[0].columns["meta"] == {"a": 1, "b": None}, "other columns stay what they are"
    # What somebody has written is theirs.
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": ASK, "tools": [{"default": None}]}))
    assert lib.read(tmp_path / "a.jsonl", "prompt")[0].template == {"tools": [{"default": None}]}
    arguments = pa.array([[("city", "Oslo")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"prompt": ["p"], "chosen": arguments}), tmp_path / "a.parquet")
    assert lib.read(tmp_path / "a.parquet", "prompt")[0].columns == {"chosen": {"city": "Oslo"}}


HALF = '{"prompt": "p", "chosen": "a", "rejected": "b\\ud83d"}'


@pytest.mark.robustness("Text", given="half of a surrogate pair in any column", outcome="refused, with file and line")
@pytest.mark.robustness("Text", given="Parquet, CSV or JSON that is not UTF-8", outcome="refused, with file and line")
def test_text_that_is_none(tmp_path):
    case = CASES / "lone-surrogate" / "prompts.jsonl"
    place = refused(case, "prompt has half of a surrogate pair, \\ud83d, at character 14")
    assert place.startswith(f"{case}:3: ")
    for kind, row, name in (
        ("pair", HALF, "rejected"),
        ("prompt", HALF, "rejected"),
        ("supervised", '{"messages": [{"role": "user", "content": "\\udc00"}]}', "messages[0].content"),
        ("prompt", '{"prompt": "p", "a\\udc00": 1}', "a name in the columns"),
        ("ranked", '{"prompt": "p", "completions": ["a", "\\udc00"], "rewards": [1, 2]}', "completions[1]"),
    ):
        (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * (kind == "pair") + row)
        line = 1 + (kind == "pair")
        assert refused(tmp_path / "a.jsonl", name, kind).startswith(f"{tmp_path}/a.jsonl:{line}: {name} has half of a")
        (tmp_path / "a.json").write_text(f"[{row}]")
        refused(tmp_path / "a.json", f"a.json:1: {name} has half", kind)
    column = pa.array([b"good", b"\xed\xa0\xbd"]).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": column}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "a.parquet:2: answer is not UTF-8")
    (tmp_path / "a.csv").write_bytes(b"prompt\ngood\n\xff\n")
    refused(tmp_path / "a.csv", "a.csv:3: not UTF-8")


@pytest.mark.robustness("Data", given="an empty file", outcome="refused: empty file")
@pytest.mark.robustness("Data", given="a file whose name does not say what it is", outcome="refused: what it is")
@pytest.mark.robustness("Data", given="a truncated gzip, Parquet or Arrow file", outcome="refused: not a whole file")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "empty file"),
        ("a.parquet", b"", "empty file"),
        ("a.txt", b"p", "only .arrow, .csv, .csv.gz, .json, .json.gz, .jsonl, .jsonl.gz, .parquet files are read"),
        ("a.jsonl", gzip.compress(b"{}"), "its first bytes are those of a .gz file: its name must end so"),
        ("a.json", b"PAR1....", "its first bytes are those of a .parquet file: its name must end so"),
        ("a.parquet", b"ARROW1..", "its first bytes are those of a .arrow file: its name must end so"),
        ("a.jsonl.gz", b"{}", "not compressed by gzip: its name must not end in .gz"),
        ("a.jsonl.gz", gzip.compress(lines(PAIRS).encode())[:-9], "not a whole gzip file: "),
        ("a.csv.gz", gzip.compress(b"prompt\np\n")[:-9], "not a whole gzip file: "),
        ("a.jsonl", '{"prompt": "p"}'.encode("utf-16"), "UTF-16, not UTF-8, by its byte-order mark"),
        ("a.csv", "prompt".encode("utf-16-be").join([b"\xfe\xff", b""]), "UTF-16, not UTF-8"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the data"),
        ("a.json", b"<!DOCTYPE html><html>", "a page of HTML, not data"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd..", "compressed by zstd: unpack it"),
        ("a.json", b'{\n "prompt": ["p"]\n}', "one JSON object, not a list of rows"),
        ("a.csv", b"prompt,prompt\na,b\n", "the header names 'prompt' twice"),
        ("a.csv", b"prompt,answer\na,b\nc\n", "a.csv:3: 1 values, but the header has 2 names"),
        ("a.csv", b'prompt\na\n"b\nc\n', "a.csv:3: invalid CSV: unexpected end of data"),
        ("a.csv", b"prompt\n", "no rows"),
        ("a.csv", b"question\na\n", "a.csv:2: no column 'prompt'; columns: question"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",  # Those of gzip have the time in them.
)
def test_files_that_cannot_be_used(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name, reason).startswith(f"{tmp_path}/{name}:")


@pytest.mark.robustness("Data", given="a bad row", outcome="refused, with file and line; --skip_bad_rows counts it")
def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path, caplog):
    bad = ["{", '{"prompt": ""}', "[1]", '{"prompt": "\\ud83d"}', '{"q": 1}']
    good = ['{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join([bad[0], good[0], *bad[1:], *good[1:]]))
    refused(tmp_path / "a.jsonl", "a.jsonl:1: invalid JSON")
    assert [row.prompt for row in lib.read(tmp_path / "a.jsonl", "prompt", skip_bad=True)] == ["a", "b", "c"]
    (record,) = caplog.records
    assert record.message.startswith(
        f"{tmp_path}/a.jsonl: 5 bad rows left out; the first: {tmp_path}/a.jsonl:1: invalid"
    )
    assert len(lib.read(tmp_path / "a.jsonl", "prompt", skip_bad=True, limit=2)) == 2
    (tmp_path / "a.csv").write_text("prompt,n\na,1,2\nb,1\n")
    assert [row.prompt for row in lib.read(tmp_path / "a.csv", "prompt", skip_bad=True)] == ["b"]
    (tmp_path / "a.jsonl").write_text("\n".join(bad))
    refused(tmp_path / "a.jsonl", "no rows but 5 bad ones; the first: ", skip_bad=True)


@pytest.mark.robustness(
    "Data", given="a null in a column that a reward needs, in any row", outcome="refused, by its line"
)
def test_columns_that_are_needed(tmp_path, caplog):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": None}, {"prompt": "c"}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    needs, options = {"answer": "reward 'x'"}, {"source": f"{tmp_path}/a.jsonl"}
    read = lib.read(tmp_path / "a.jsonl", "prompt")
    with pytest.raises(lib.DataError, match=r"a\.jsonl:2: column 'answer' is null, which reward 'x' needs$"):
        lib.with_columns(read, needs, **options)
    with pytest.raises(lib.DataError, match=r"a\.jsonl:3: no column 'answer', which reward 'x' needs$"):
        lib.with_columns(read[2:], needs, skip_bad=True, **options)
    assert not caplog.records[1:]
    assert lib.with_columns(read, needs, skip_bad=True, **options) == read[:1]
    assert "2 bad rows left out; the first: " in caplog.records[-1].message
    assert lib.with_columns(read, {}, **options) == read


@pytest.mark.robustness(
    "Data", given="held-out prompts that are trained on", outcome="left out and counted; refused where too few are left"
)
def test_no_prompt_is_both_trained_on_and_held_out(caplog):
    rows = [lib.PromptRow(prompt, {"id": i}) for i, prompt in enumerate("aabacbcd")]
    assert lib.hold_out(rows, 2, 3, source="s") == (rows[:2], [rows[2], rows[4], rows[7]])
    told = "s: 1 rows after the first 2 repeat a prompt that is trained on and 2 one held out"
    assert [record.message for record in caplog.records] == [f"{told}: left out of the held-out prompts"]
    with pytest.raises(ValueError, match=r"^s: 4 held-out prompts are needed, there are 3: 1 rows after the first 2"):
        lib.hold_out(rows, 2, 4, source="s")
    with pytest.raises(ValueError, match=r"^s: 9 prompts are needed \(training and held-out\), the file has 8$"):
        lib.hold_out(rows, 2, 7, source="s")
    same = [lib.PromptRow(ASK, {"tools": [{"name": name}]}) for name in "fgf"]
    assert lib.hold_out(same, 1, 1, source="s") == (same[:1], same[1:2]), "other tools make another prompt"
    caplog.clear()
    lib.hold_out(same, 1, 1, source="s")
    assert not caplog.records


def test_tools_that_no_template_reads_are_said(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "p", "tools": []}, {"prompt": "p", "tools": [{"name": "f"}]}]))
    lib.read(tmp_path / "a.jsonl", "prompt")
    assert "1 of 2 rows have tools or chat_template_kwargs but a text as prompt" in caplog.records[-1].message


class TestFileErrors:
    """Every message is one line that begins with the place."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"prompt": "p"}\n{"prompt": }\n', "a.jsonl:2: invalid JSON: Expecting value at column 12"),
            ('{"prompt": "p"}\n\n{"q": "p"}\n', "a.jsonl:3: no column 'prompt'; columns: q"),
            ('{"prompt": "p"}\n{"prompt": ""}', "a.jsonl:2: prompt is empty"),
            ('["p"]\n', "a.jsonl:1: a row must be an object, got a list"),
            ('{"prompt": "p"', "a.jsonl:1: invalid JSON: Expecting ',' delimiter at column 15"),
            ("[" * 100_000, "a.jsonl:1: invalid JSON: maximum recursion depth"),
            ("\n\n", "a.jsonl: no rows"),
            (b'{"prompt": "p"}\n{"prompt": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ],
    )
    def test_json_lines(self, tmp_path, text, message):
        (tmp_path / "a.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        self.check(tmp_path, "a.jsonl", message)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"prompt": "p"}, {"prompt": 1}]', "a.json:2: prompt must be a text or a list of messages, got a number"),
            ('[\n{"prompt": "p"},\n{"prompt"}]', "a.json:3: invalid JSON: Expecting ':' delimiter at column 10"),
            (b'[\n{"prompt": "\xff"}]', "a.json:2: not UTF-8"),
            ('{"prompt": "p"}\n{"prompt": "p"', "a.json:2: invalid JSON: Expecting ',' delimiter at column 15"),
            ("[]", "a.json: no rows"),
        ],
    )
    def test_json(self, tmp_path, text, message):
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        self.check(tmp_path, "a.json", message)

    def test_parquet(self, tmp_path):
        rows = [{"prompt": "p"}] * 1500 + [{"prompt": None}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        self.check(tmp_path, "a.parquet", "a.parquet:1501: prompt must be a text or a list of messages, got null")
        whole = (tmp_path / "a.parquet").read_bytes()
        for broken in (b"text", whole[: len(whole) // 2]):
            (tmp_path / "a.parquet").write_bytes(broken)
            self.check(tmp_path, "a.parquet", "a.parquet: not a whole Parquet file: ")

    def check(self, folder, name, message):
        with pytest.raises(lib.DataError) as error:
            lib.read(folder / name, "prompt")
        assert str(error.value).startswith(f"{folder}/{message}")
        assert "\n" not in str(error.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"^no such file: {tmp_path}/none\.jsonl$"):
            lib.read(tmp_path / "none.jsonl", "prompt")
        with pytest.raises(FileNotFoundError, match=rf"^no \.arrow, .* file in folder {tmp_path}; it has: nothing$"):
            lib.read(tmp_path, "prompt")
        (tmp_path / "data").mkdir()
        (tmp_path / "notes.txt").touch()
        with pytest.raises(FileNotFoundError, match=r"; it has: data/, notes\.txt$"):
            lib.read(tmp_path, "prompt")
        with pytest.raises(FileNotFoundError, match=r"^no file matches .*/\*\.jsonl$"):
            lib.read(f"{tmp_path}/*.jsonl", "prompt")
        (tmp_path / "train.jsonl").write_text(lines(PAIRS))
        with pytest.raises(lib.DataError, match=r": split must be one of train; got test; write .*\?split=train$"):
            lib.read(tmp_path, "prompt", split="test")

    def test_bad_options(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(lines(PAIRS))
        with pytest.raises(ValueError, match="kind must be one of pair, prompt, ranked, supervised, unpaired; got 'x'"):
            lib.read(tmp_path / "a.jsonl", "x")
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            lib.read(tmp_path / "a.jsonl", "pair", limit=0)
        with pytest.raises(ValueError, match="split must be None for a single file, got 'train'"):
            lib.read(tmp_path / "a.jsonl", "pair", split="train")
        with pytest.raises(ValueError, match="split must be that of the source, 'test', got 'train'"):
            lib.read(f"{tmp_path}?split=test", "pair", split="train")


def prepare(folder, features, splits, file_format="array_record"):
    """Writes a prepared TensorFlow dataset, without TensorFlow."""
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=folder.parent.name, version=tfds.core.Version(folder.name), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features), description="")
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format=file_format)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return folder


class TestTFDS:
    @pytest.fixture
    def pairs(self, tmp_path):
        from tensorflow_datasets import features as f

        features = {"prompt": f.Text(), "chosen": f.Text(), "rejected": f.Text(), "id": f.Scalar(np.int64)}
        return prepare(tmp_path / "pairs" / "1.0.0", features, {"train": PAIRS, "test": PAIRS[:1]})

    def test_splits_over_shards(self, pairs):
        assert len(list(pairs.glob("*train*"))) == 2
        assert lib.read(f"tfds:{pairs}", "pair", split="train") == EXPECTED
        assert lib.read(f"tfds:{pairs}", "pair", split="test") == EXPECTED[:1]
        assert lib.read(f"tfds:{pairs}", "pair", split="train[1:]", limit=1) == EXPECTED[1:2]
        assert "tensorflow" not in sys.modules

    def test_every_type_becomes_plain(self, tmp_path):
        from tensorflow_datasets import features as f

        features = {
            "prompt": f.Sequence({"role": f.Text(), "content": f.Text()}),
            "completions": f.Sequence(f.Text()),
            "rewards": f.Sequence(f.Scalar(np.float32)),
            "vector": f.Tensor(shape=(2,), dtype=np.float32),
            "flag": f.Scalar(np.bool_),
        }
        example = {"prompt": ASK, "completions": ["é", "b"], "rewards": [0.5, 1.0], "vector": np.ones(2, np.float32)}
        folder = prepare(tmp_path / "ranked" / "1.0.0", features, {"train": [example | {"flag": True}]})
        (row,) = lib.read(f"tfds:{folder}", "ranked")
        assert row == lib.RankedRow(ASK, ["é", "b"], [0.5, 1.0], {"vector": [1.0, 1.0], "flag": True})
        assert type(row.columns["flag"]) is bool

    def test_unpaired_label(self, tmp_path):
        from tensorflow_datasets import features as f

        features = {"prompt": f.Text(), "completion": f.Text(), "label": f.Scalar(np.bool_)}
        rows = [{"prompt": "p", "completion": "c", "label": False}]
        folder = prepare(tmp_path / "unpaired" / "1.0.0", features, {"train": rows})
        assert lib.read(f"tfds:{folder}", "unpaired") == [lib.UnpairedRow("p", "c", False, {})]

    def test_errors_are_one_line(self, pairs, tmp_path):
        cases = [
            (f"tfds:{pairs}", None, f"tfds:{pairs}: split must be one of train, test; got None"),
            (f"tfds:{pairs}?split=dev", None, f"tfds:{pairs}: Unknown split 'dev'."),
            (f"tfds:{pairs}", "dev", f"tfds:{pairs}: Unknown split 'dev'. Should be one of ['train', 'test']."),
            (f"tfds:{pairs.parent}", "train", f"tfds:{pairs.parent}: Could not read dataset info from "),
            ("tfds:no_such_dataset", "train", "tfds:no_such_dataset: Dataset no_such_dataset not found."),
        ]
        for source, split, message in cases:
            with pytest.raises(lib.DataError) as error:
                lib.read(source, "pair", split=split)
            assert str(error.value).startswith(message)
            assert "\n" not in str(error.value)
        with pytest.raises(lib.DataError, match=r"1\.0\.0:1: no column 'completions'; columns: "):
            lib.read(f"tfds:{pairs}", "ranked", split="test")
        with pytest.raises(FileNotFoundError, match=f"^no such folder: {tmp_path}/none$"):
            lib.read(f"tfds:{tmp_path}/none", "pair")

    def test_a_dataset_that_is_not_prepared(self):
        import tensorflow_datasets as tfds

        class NeverPrepared(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"x": np.int64}))

            def _split_generators(self, dl_manager):
                raise AssertionError("nothing is downloaded")

            def _generate_examples(self):
                raise AssertionError("nothing is generated")

        with pytest.raises(lib.DataError) as error:
            lib.read("tfds:never_prepared", "prompt")
        remedy = "not prepared; with TensorFlow, run: tfds build never_prepared --file_format=array_record"
        assert str(error.value) == f"tfds:never_prepared: {remedy}"

    def test_tfrecord_is_refused_with_the_remedy(self, pairs):
        info = json.loads((pairs / "dataset_info.json").read_text())
        (pairs / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
        with pytest.raises(lib.DataError, match=r"stored as tfrecord; prepare it with file_format='array_record'$"):
            lib.read(f"tfds:{pairs}", "pair", split="train")

    def test_damaged_records_are_refused(self, pairs):
        (shard,) = pairs.glob("*test*")
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(lib.DataError, match=rf"^tfds:{pairs}"):
            lib.read(f"tfds:{pairs}", "pair", split="test")
