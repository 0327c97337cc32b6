import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiltjax.data import datasets as lib

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
        assert lib.read(tmp_path, "pair") == EXPECTED
        assert lib.read(tmp_path, "pair", split="train") == EXPECTED[:2]
        assert lib.read(tmp_path, "pair", split="validation") == EXPECTED[2:]
        assert lib.read(f"{tmp_path}/*.json*", "pair") == EXPECTED[1:]
        assert lib.read(f"{tmp_path}/train*", "pair", limit=1) == EXPECTED[:1]

    def test_each_kind_is_its_own_type(self, tmp_path):
        row = {"prompt": "p", "completion": "c", "label": False}
        (tmp_path / "a.jsonl").write_text(lines([row]))
        assert lib.read(tmp_path / "a.jsonl", "unpaired") == [lib.UnpairedRow("p", "c", False, {})]
        assert lib.read(tmp_path / "a.jsonl", "supervised") == [lib.SupervisedRow("p", "c", {"label": False})]
        assert lib.read(tmp_path / "a.jsonl", "prompt") == [lib.PromptRow("p", {"completion": "c", "label": False})]


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
            ("", "a.jsonl: no rows"),
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
        for broken in (b"", b"text", whole[: len(whole) // 2]):
            (tmp_path / "a.parquet").write_bytes(broken)
            self.check(tmp_path, "a.parquet", "a.parquet: not a whole Parquet file: ")

    def test_files_of_another_kind(self, tmp_path):
        (tmp_path / "a.csv").write_text("prompt\np\n")
        self.check(tmp_path, "a.csv", "a.csv: only .json, .jsonl, .parquet files are read")

    def check(self, folder, name, message):
        with pytest.raises(lib.DataError) as error:
            lib.read(folder / name, "prompt")
        assert str(error.value).startswith(f"{folder}/{message}")
        assert "\n" not in str(error.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"^no such file: {tmp_path}/none\.jsonl$"):
            lib.read(tmp_path / "none.jsonl", "prompt")
        with pytest.raises(FileNotFoundError, match=rf"^no \.json, \.jsonl, \.parquet file: {tmp_path}$"):
            lib.read(tmp_path, "prompt")
        with pytest.raises(FileNotFoundError, match=r"^no \.json, \.jsonl, \.parquet file: .*/\*\.jsonl$"):
            lib.read(f"{tmp_path}/*.jsonl", "prompt")
        (tmp_path / "train.jsonl").write_text(lines(PAIRS))
        with pytest.raises(FileNotFoundError, match="file of split 'test': "):
            lib.read(tmp_path, "prompt", split="test")

    def test_bad_options(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(lines(PAIRS))
        with pytest.raises(ValueError, match="kind must be one of pair, prompt, ranked, supervised, unpaired; got 'x'"):
            lib.read(tmp_path / "a.jsonl", "x")
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            lib.read(tmp_path / "a.jsonl", "pair", limit=0)
        with pytest.raises(ValueError, match="split must be None for a single file, got 'train'"):
            lib.read(tmp_path / "a.jsonl", "pair", split="train")


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
