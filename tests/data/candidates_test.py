import os

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tiltjax.data import candidates as lib
from tiltjax.data import kept

PROMPTS = [[5], [5, 6, 7], [8, 9]]
GROUPS = [[[1, 2], [3, 4, 2]], [[2]], [[7, 2], [2], [9, 9, 9, 2]]]
REWARD = [[0.5, -1.0], [2.0], [0.0, 3, 1.5]]


@pytest.fixture
def batch():
    return lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD)


def unpad(candidates):
    """Back to lists, by nothing but the masks."""
    rows = range(candidates.prompt.shape[0])
    where = np.ones(candidates.completion.shape[:2], bool) if candidates.where is None else candidates.where
    prompts = [np.asarray(candidates.prompt[b])[np.asarray(candidates.prompt_mask[b])].tolist() for b in rows]
    groups = [
        [
            np.asarray(candidates.completion[b, n])[np.asarray(candidates.completion_mask[b, n])].tolist()
            for n in range(candidates.completion.shape[1])
            if where[b, n]
        ]
        for b in rows
    ]
    return prompts, groups


class PadTest(chex.TestCase):
    def test_right_padding_and_mask(self):
        tokens, mask = lib.pad([[1, 2, 3], [], np.array([4])], length=4, pad_id=9)
        np.testing.assert_array_equal(tokens, [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]])
        np.testing.assert_array_equal(mask.sum(-1), [3, 0, 1])
        assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)

    def test_truncates_the_end_that_was_named(self):
        np.testing.assert_array_equal(lib.pad([[1, 2, 3]], length=2, truncate="left")[0], [[2, 3]])
        np.testing.assert_array_equal(lib.pad([[1, 2, 3]], length=2, truncate="right")[0], [[1, 2]])
        chex.assert_shape(lib.pad([[1, 2, 3]], length=0, truncate="left"), (1, 0))

    def test_too_long_is_refused_by_index(self):
        with pytest.raises(ValueError, match=r"sequence 1 has 3 tokens, more than length=2"):
            lib.pad([[1], [1, 2, 3]], length=2)

    def test_bad_options_are_named(self):
        with pytest.raises(ValueError, match="truncate must be one of left, right; got 'middle'"):
            lib.pad([[1]], truncate="middle")
        with pytest.raises(ValueError, match="length must be at least 0, got -1"):
            lib.pad([[1]], length=-1)
        with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
            lib.bucket_length(3, multiple=0)


class FromTokensTest(chex.TestCase):
    def test_masks_give_the_tokens_back(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD)
        assert unpad(batch) == (PROMPTS, GROUPS)
        chex.assert_shape(batch.completion, (3, 3, 4))
        np.testing.assert_array_equal(batch.where, [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
        np.testing.assert_array_equal(batch.reward, [[0.5, -1, 0], [2, 0, 0], [0, 3, 1.5]])
        np.testing.assert_array_equal(batch.completion[~batch.completion_mask], 0)

    def test_where_is_none_when_every_candidate_is_real(self):
        assert lib.from_tokens(PROMPTS[:2], GROUPS[:1] * 2, pad_id=0).where is None

    def test_a_prompt_without_candidates_is_all_masked(self):
        batch = lib.from_tokens(PROMPTS[:2], [[], [[1, 2]]], pad_id=0, reward=[[], [1.0]])
        np.testing.assert_array_equal(batch.where, [[False], [True]])
        assert not batch.completion_mask[0].any()
        chex.assert_shape(lib.from_tokens(PROMPTS[:1], [[]], pad_id=0, completion_length=4).completion, (1, 1, 4))

    def test_pad_id_and_lengths(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=77, prompt_length=8, completion_length=16)
        chex.assert_shape([batch.prompt, batch.completion], [(3, 8), (3, 3, 16)])
        assert (batch.prompt[~batch.prompt_mask] == 77).all()
        assert (batch.completion[~batch.completion_mask] == 77).all()
        assert unpad(batch) == (PROMPTS, GROUPS)

    def test_truncation_keeps_the_end_of_prompts_and_the_start_of_completions(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, prompt_length=2, completion_length=2, truncate=True)
        expected = [p[-2:] for p in PROMPTS], [[c[:2] for c in group] for group in GROUPS]
        assert unpad(batch) == expected

    def test_one_and_two_candidates(self):
        one = lib.supervised(PROMPTS, [[1], [2, 3], [4]], pad_id=0)
        assert unpad(one) == (PROMPTS, [[[1]], [[2, 3]], [[4]]])
        two = lib.pairs(PROMPTS, [[1], [2, 3], [4]], [[9, 9, 9], [8], [7]], pad_id=0, completion_length=5)
        assert unpad(two)[1] == [[[1], [9, 9, 9]], [[2, 3], [8]], [[4], [7]]]
        chex.assert_shape([one.completion, two.completion], [(3, 1, 2), (3, 2, 5)])
        cut = lib.pairs([[1, 2, 3]], [[4, 5]], [[6]], pad_id=0, prompt_length=2, completion_length=1, truncate=True)
        assert unpad(cut) == ([[2, 3]], [[[4], [6]]])

    def test_errors_name_the_place(self):
        cases = {
            r"completions must be as many as prompts \(3\), got 1": {"completions": GROUPS[:1]},
            r"prompt\[1\] is empty": {"prompts": [[1], [], [2]]},
            r"prompt\[1\] has 3 tokens, more than prompt_length=2": {"prompt_length": 2},
            r"completion\[2\]\[2\] has 4 tokens, more than completion_length=3": {"completion_length": 3},
            r"prompt_length must be at least 1, got 0": {"prompt_length": 0, "truncate": True},
            r"reward must be as many as prompts \(3\), got 1": {"reward": [[1.0]]},
            r"reward\[0\] must be as many as its completions \(2\), got 1": {"reward": [[1.0], [1.0], [1.0]]},
            r"reward\[2\]\[1\] must be finite, got nan": {"reward": [[0, 0], [0], [0, float("nan"), 0]]},
            r"reward\[0\]\[0\] must be finite, got -inf": {"reward": [[-float("inf"), 0], [0], [0, 0, 0]]},
        }
        for message, change in cases.items():
            with pytest.raises(ValueError, match=message):
                lib.from_tokens(**({"prompts": PROMPTS, "completions": GROUPS, "pad_id": 0} | change))
        with pytest.raises(ValueError, match=r"rejected must be as many as chosen \(2\), got 1"):
            lib.pairs(PROMPTS[:2], [[1], [2]], [[1]], pad_id=0)


class TreeTest(chex.TestCase):
    def test_is_a_pytree_that_holds_anything(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD)
        specs = jax.tree.map(lambda x: PartitionSpec("data"), batch)
        assert (specs.prompt, specs.reward, specs.ref_logp) == (PartitionSpec("data"), PartitionSpec("data"), None)
        assert jax.tree.structure(specs) == jax.tree.structure(batch)
        assert jax.eval_shape(lambda b: b, batch).completion.shape == (3, 3, 4)
        stacked = jax.tree.map(lambda x: x[None], batch)
        chex.assert_shape(stacked.completion, (1, 3, 3, 4))
        chex.assert_trees_all_equal(jax.vmap(lambda b: b)(stacked), jax.tree.map(jnp.asarray, stacked))

    @chex.variants(with_jit=True)
    def test_goes_through_a_function_as_it_is(self):
        batch = jax.tree.map(jnp.asarray, lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD))

        def count(b):
            return b.replace(ref_logp=-jnp.sum(b.completion_mask, -1, dtype=jnp.float32))

        out = self.variant(count)(batch)
        np.testing.assert_array_equal(out.ref_logp, [[-2, -3, 0], [-1, 0, 0], [-2, -1, -4]])
        chex.assert_trees_all_equal(out.replace(ref_logp=None), batch)

    def test_wrong_shapes_are_refused_under_test(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0)
        with pytest.raises(TypeError):
            batch.replace(reward=np.zeros((3, 2), np.float32))


class ChooseTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_take(self):
        batch = jax.tree.map(jnp.asarray, lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD))
        out = self.variant(lib.take)(batch, jnp.array([2, 0]))
        assert unpad(out) == ([PROMPTS[2], PROMPTS[0]], [GROUPS[2], GROUPS[0]])
        np.testing.assert_array_equal(out.reward[0], [0, 3, 1.5])

    def test_take_by_list_and_by_slice(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0)
        assert unpad(lib.take(batch, [1])) == (PROMPTS[1:2], GROUPS[1:2])
        assert unpad(lib.take(batch, slice(1, 3))) == (PROMPTS[1:], GROUPS[1:])
        chex.assert_trees_all_equal(lib.take(jax.tree.map(jnp.asarray, batch), [2, 1]), lib.take(batch, [2, 1]))

    def test_trimming_leaves_every_token(self):
        wide = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD, prompt_length=8, completion_length=9)
        wide = wide.replace(old_token_logp=np.zeros(wide.completion.shape, np.float32))
        np.testing.assert_array_equal(lib.lengths(wide), [[1, 3], [3, 1], [2, 4]])
        out = lib.trim(wide, 3, 4)
        assert unpad(out) == (PROMPTS, GROUPS)
        assert {x.shape for x in (out.completion, out.completion_mask, out.old_token_logp)} == {(3, 3, 4)}
        assert out.prompt.shape == out.prompt_mask.shape == (3, 3)
        assert (out.reward is wide.reward, out.ref_logp) == (True, None)
        assert unpad(lib.trim(lib.take(wide, [0, 1]), 3, 3)) == (PROMPTS[:2], GROUPS[:2])

    @chex.variants(with_jit=True)
    def test_select_best_and_worst(self):
        batch = jax.tree.map(jnp.asarray, lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD))

        def best_and_worst(b):
            best = jnp.argmax(jnp.where(b.where, b.reward, -jnp.inf), -1)
            worst = jnp.argmin(jnp.where(b.where, b.reward, jnp.inf), -1)
            return lib.select(b, jnp.stack([best, worst], -1))

        out = self.variant(best_and_worst)(batch)
        expected = [[GROUPS[0][0], GROUPS[0][1]], [GROUPS[1][0]] * 2, [GROUPS[2][1], GROUPS[2][0]]]
        assert unpad(out) == (PROMPTS, expected)
        np.testing.assert_array_equal(out.reward, [[0.5, -1], [2, 2], [3, 0]])

    def test_select_on_the_host_carries_every_field(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0)
        batch = batch.replace(
            ref_logp=np.arange(9, dtype=np.float32).reshape(3, 3),
            old_token_logp=np.arange(36, dtype=np.float32).reshape(3, 3, 4),
        )
        out = lib.select(batch, np.array([[2], [0], [1]]))
        np.testing.assert_array_equal(out.ref_logp, [[2], [3], [7]])
        np.testing.assert_array_equal(out.old_token_logp[:, 0, 0], [8, 12, 28])
        np.testing.assert_array_equal(out.where, [[False], [True], [True]])
        assert isinstance(out.completion, np.ndarray)


LOSS_MASK = [[[True, True], [False, True, False]], [[True]], [[False, False], [True], [True, False, False, True]]]


def test_a_loss_mask_stays_with_its_tokens(tmp_path):
    masked = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, loss_mask=LOSS_MASK)

    def kept(batch):
        pairs = [(batch.completion[b, n], batch.loss_mask[b, n]) for b, n in np.ndindex(batch.completion.shape[:2])]
        return [tokens[mask].tolist() for tokens, mask in pairs]

    assert kept(masked) == [[1, 2], [4], [], [2], [], [], [], [2], [9, 2]]
    support = np.arange(masked.completion.size, dtype=np.uint8).reshape(*masked.completion.shape, 1)
    masked = masked.replace(support=support)
    assert kept(lib.take(masked, [2])) == kept(lib.trim(lib.take(masked, [2]), 2, 4)) == [[], [2], [9, 2]]
    assert kept(lib.select(masked, np.array([[1], [0], [2]]))) == [[4], [2], [9, 2]]
    np.testing.assert_array_equal(lib.trim(masked, 3, 2).support, support[:, :, :2])
    lib.save(tmp_path / "b.npz", masked)
    chex.assert_trees_all_equal(lib.load(tmp_path / "b.npz"), masked)
    # Beside a batch that is learned from throughout, and one that no filter drew.
    both = lib.concatenate([lib.from_tokens(PROMPTS[:1], GROUPS[:1], pad_id=0), lib.take(masked, [0])])
    assert kept(both) == [[1, 2], [3, 4, 2], [], [1, 2], [4], []]
    assert (both.support[0, 0, 0, 0], both.support[1, 0, 1, 0]) == (255, 1)
    cut = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, loss_mask=LOSS_MASK, completion_length=2, truncate=True)
    assert kept(cut)[-1] == [9]


def test_what_is_learned_from_and_what_a_completion_is_seen_by():
    plain, masked = (lib.from_tokens(PROMPTS, GROUPS, pad_id=0, loss_mask=m) for m in (None, LOSS_MASK))
    assert lib.token_mask(plain) is plain.completion_mask
    assert lib.learned(plain) is plain.where
    np.testing.assert_array_equal(lib.token_mask(masked).sum(-1), [[2, 1, 0], [1, 0, 0], [2, 1, 2]])
    np.testing.assert_array_equal(lib.learned(masked), [[1, 1, 0], [1, 0, 0], [0, 1, 1]])
    assert lib.from_tokens([[5]], [[[7, 2]]], pad_id=0, loss_mask=[[[True, True]]]).loss_mask is None
    for bad, message in ((LOSS_MASK[:1], "loss_mask must be as many as completions"), ([[[True]]], r"loss_mask\[0\]")):
        with pytest.raises(ValueError, match=message):
            lib.from_tokens(PROMPTS[: len(bad[0])], GROUPS[:1] * len(bad[0]), pad_id=0, loss_mask=bad)


class ConcatenateTest(chex.TestCase):
    def test_different_sizes(self):
        parts = [lib.from_tokens(PROMPTS[i : i + 1], GROUPS[i : i + 1], pad_id=0) for i in range(3)]
        parts[1] = jax.tree.map(jnp.asarray, parts[1])
        out = lib.concatenate(parts)
        assert unpad(out) == (PROMPTS, GROUPS)
        chex.assert_trees_all_equal(out, lib.from_tokens(PROMPTS, GROUPS, pad_id=0))

    def test_where_is_kept_beside_a_batch_without_one(self):
        ragged = lib.from_tokens(PROMPTS[:2], GROUPS[:2], pad_id=0)
        out = lib.concatenate([lib.from_tokens(PROMPTS[2:], [GROUPS[0]], pad_id=0), ragged])
        np.testing.assert_array_equal(out.where, [[True, True], [True, True], [True, False]])
        assert unpad(out) == ([PROMPTS[2], *PROMPTS[:2]], [GROUPS[0], *GROUPS[:2]])

    def test_equal_sizes_need_no_where(self):
        batch = lib.from_tokens(PROMPTS, [GROUPS[0]] * 3, pad_id=0, reward=[REWARD[0]] * 3)
        out = lib.concatenate([batch, batch])
        assert out.where is None
        chex.assert_trees_all_equal(lib.take(out, slice(3, 6)), batch)

    def test_errors(self):
        batch = lib.from_tokens(PROMPTS, GROUPS, pad_id=0, reward=REWARD)
        with pytest.raises(ValueError, match="reward is in batch 0 but not in batch 1"):
            lib.concatenate([batch, batch.replace(reward=None)])
        with pytest.raises(ValueError, match="batches is empty"):
            lib.concatenate([])


def test_save_and_load_give_the_same_batch(batch, tmp_path):
    lib.save(tmp_path / "b.npz", batch)
    out = lib.load(tmp_path / "b.npz")
    chex.assert_trees_all_equal(out, batch)
    chex.assert_trees_all_equal_dtypes(out, batch)
    lib.save(str(tmp_path / "b.npz"), jax.tree.map(jnp.asarray, batch.replace(where=None)), fingerprint="abc")
    out = lib.load(str(tmp_path / "b.npz"), fingerprint="abc")
    assert out.where is None
    chex.assert_trees_all_equal(out, batch.replace(where=None))
    assert os.listdir(tmp_path) == ["b.npz"]


def test_bfloat16_is_saved_as_float32(batch, tmp_path):
    lib.save(tmp_path / "b.npz", batch.replace(reward=batch.reward.astype(ml_dtypes.bfloat16)))
    out = lib.load(tmp_path / "b.npz")
    assert out.reward.dtype == np.float32
    np.testing.assert_array_equal(out.reward, batch.reward)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(batch, tmp_path, monkeypatch):
    lib.save(tmp_path / "b.npz", batch)
    before = (tmp_path / "b.npz").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        lib.save(tmp_path / "b.npz", batch.replace(reward=None))
    assert os.listdir(tmp_path) == ["b.npz"]
    assert (tmp_path / "b.npz").read_bytes() == before


def test_load_refuses_what_is_not_a_whole_batch(batch, tmp_path):
    path = tmp_path / "b.npz"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*b\.npz"):
        lib.load(path)
    lib.save(path, batch)
    whole = path.read_bytes()
    for broken in (b"", b"text", whole[: len(whole) // 2], whole[:100] + b"\0" * 50 + whole[150:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"b\.npz: not a whole \.npz file$"):
            lib.load(path)
    with open(path, "wb") as file:
        np.savez(file, prompt=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match="not a whole"):
        lib.load(path)
    np.savez(path, prompt=np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match=r"b\.npz: no field prompt_mask, completion, completion_mask"):
        lib.load(path)
    np.savez(path, theta=np.zeros(1))
    with pytest.raises(ValueError, match=r"b\.npz: unknown field theta"):
        lib.load(path)


def test_load_refuses_another_fingerprint(batch, tmp_path):
    path = tmp_path / "b.npz"
    lib.save(path, batch, fingerprint="abc")
    with pytest.raises(ValueError, match=r"b\.npz: made by another .*: abc, not xyz"):
        lib.load(path, fingerprint="xyz")
    chex.assert_trees_all_equal(lib.load(path), batch)
    lib.save(path, batch)
    with pytest.raises(ValueError, match=r"made by another .*: None, not xyz"):
        lib.load(path, fingerprint="xyz")


def rewritten(path, **changes):
    """The file as somebody leaves it who edits it, digests and all; None takes a field out."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "digests"} | changes
    arrays = {name: np.asarray(x) for name, x in arrays.items() if x is not None}
    np.savez_compressed(path, **arrays, digests=np.array(kept.digests(arrays)))


@pytest.mark.robustness(
    "Runs", given="a kept file of candidates that was edited", outcome="refused, with path and field"
)
def test_load_refuses_what_was_changed_since_it_was_written(batch, tmp_path):
    path = tmp_path / "b.npz"
    lib.save(path, batch, fingerprint="abc")
    with np.load(path) as archive:
        arrays = dict(archive)
    for changes, reason in (
        ({"reward": batch.reward + np.float32(0.1)}, "field reward was changed after it was written"),
        ({"reward": batch.reward.astype(np.float64)}, "field reward was changed after it was written"),
        ({"where": np.ones_like(batch.where)}, "field where was changed after it was written"),
        ({"ref_logp": batch.reward}, "field ref_logp was added after it was written"),
        ({"reward": None}, "field reward is missing after it was written"),
        ({"fingerprint": np.array("xyz")}, "field fingerprint was changed after it was written"),
        ({"digests": None}, "no digest of its fields: written by another version, or edited"),
        ({"digests": np.array("[1]")}, "the digest of its fields cannot be read"),
    ):
        np.savez(path, **{name: x for name, x in (arrays | changes).items() if x is not None})
        with pytest.raises(ValueError, match=rf"b\.npz: {reason}; delete it to have it made again$"):
            lib.load(path)


@pytest.mark.robustness(
    "Runs",
    given="kept candidates with values that no run writes: rewards that are not finite, ids beyond the vocabulary, "
    "masks with holes",
    outcome="refused, with path and field",
)
def test_load_refuses_values_that_no_batch_can_have(batch, tmp_path):
    path = tmp_path / "b.npz"
    batch = batch.replace(old_token_logp=np.zeros(batch.completion.shape, np.float32))
    infinite, prompt, negative, holes, bare = (
        np.array(x) for x in (batch.reward, batch.prompt, batch.completion, batch.completion_mask, batch.prompt_mask)
    )
    infinite[1, 0], prompt[0, 0], negative[0, 0, 0], holes[0, 0, 0], bare[2] = np.inf, 99, -1, False, False
    nan = np.where(batch.completion_mask, np.nan, 0).astype(np.float32)
    B, N, T = batch.completion.shape
    for changes, reason in (
        ({"reward": infinite}, r"field reward has a value that is not finite, at \[1, 0\]"),
        ({"old_token_logp": nan}, r"field old_token_logp has a value that is not finite, at \[0, 0, 0\]"),
        ({"reward": batch.reward.astype(int)}, "field reward must be floats of 2 axes, got int64 of shape"),
        ({"reward": batch.reward[:, 0]}, "field reward must be floats of 2 axes, got float32 of shape"),
        ({"reward": batch.reward[:, :1]}, f"field reward has 1 along axis N, where {N} are expected"),
        ({"where": batch.where[1:]}, f"field where has {B - 1} along axis B, where {B} are expected"),
        ({"completion_mask": holes}, r"field completion_mask has a token behind padding, at \[0, 0, 0\]"),
        ({"completion_mask": holes.astype(int)}, "field completion_mask must be booleans of 3 axes, got int64"),
        ({"prompt_mask": bare}, r"field prompt_mask has a prompt without tokens, at \[2\]"),
        ({"prompt": prompt}, r"field prompt has a token id that is not below vocab_size=50, at \[0, 0\]"),
        ({"completion": negative}, r"field completion has a negative token id, at \[0, 0, 0\]"),
        ({"support": np.zeros((B, N, T, 3), np.uint8)}, "field support has 3 along axis W, where 7 are expected"),
        ({"completion": None}, "no field completion"),
    ):
        lib.save(path, batch)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=rf"b\.npz: {reason}"):
            lib.load(path, vocab_size=50)
    lib.save(path, batch.replace(reward=np.where(batch.where, batch.reward, np.nan)))
    chex.assert_trees_all_equal(lib.load(path, vocab_size=50).completion, batch.completion)


def test_every_field_has_its_form():
    assert tuple(kept.FORMS) == tuple(lib.Candidates.__annotations__)


def test_a_flipped_byte_is_never_believed(batch, tmp_path):
    path = tmp_path / "b.npz"
    lib.save(path, batch)
    whole = bytearray(path.read_bytes())
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            chex.assert_trees_all_equal(lib.load(path), batch)  # Where nothing reads it.
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
