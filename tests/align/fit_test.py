"""Length buckets of a fit: what a step is padded to, on one host and on several, and that it moves nothing."""

import dataclasses
import json
import logging

import chex
import jax
import numpy as np
import pytest

from experiments.align.config import AlignConfig
from tests.tiny import save_policy
from tiltjax.align import fit as align_fit
from tiltjax.align import session as align_session
from tiltjax.align.inputs import Inputs
from tiltjax.data import candidates as batches
from tiltjax.data.candidates import Candidates
from tiltjax.train import distributed

P, N, T = 32, 2, 24
SETTINGS = {"reward": "length?target=3", "beta": 0.2, "num_candidates": N, "num_prompts": P, "num_eval_prompts": 2,
            "max_tokens": T, "steps": 6, "checkpoint_every": 6, "batch_size": 8, "sample_batch": 8, "lora_rank": 0,
            "learning_rate": 0.01, "compute_dtype": "float32", "fit_candidates": 0}  # fmt: skip
KINDS = [(3, 5), (4, 24), (30, 6), (32, 20)]
"""Prompt and completion lengths of eight rows one after the other, so that rows that cross prompts differ too."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny policy, and as many short as long prompts."""
    home = tmp_path_factory.mktemp("fit")
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(14))]
    save_policy(home / "policy", words)
    rows = [
        {"prompt": " ".join(words[2 + (i * 7 + i // P * 3 + k) % 14] for k in range(KINDS[i // 8 % 4][0]))}
        for i in range(P + 2)
    ]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def world_of(home, tmp_path):
    """A run, and candidates of its prompts that nobody drew: the lengths are those of `KINDS`, or less."""

    def world_of(method, **changes):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        paths = {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl", "output": f"{directory}"}
        given = {"demonstrations": "told"} if method == "sft" else {}
        config = AlignConfig(method=method, **(paths | SETTINGS | given | changes))
        session = align_session.prepare(dataclasses.replace(config, method="tilted_mle"), directory)
        tokens, mask = batches.pad(
            align_session.text.encode_prompts(session.tokenizer, [r.prompt for r in session.rows["train"]])
        )
        rng = np.random.default_rng(0)
        longest = np.repeat([kind[1] for kind in KINDS], P // 4)
        sizes = np.stack([longest, rng.integers(1, longest + 1)], axis=1)
        drawn = Candidates(
            prompt=tokens,
            prompt_mask=mask,
            completion=rng.integers(2, 16, (P, N, T)).astype(np.int32),
            completion_mask=np.arange(T) < sizes[..., None],
            reward=rng.normal(size=(P, N)).astype(np.float32),
        )
        told = [[rng.integers(2, 16, size).tolist() for size in some[: 1 + i % 2]] for i, some in enumerate(sizes)]
        return dataclasses.replace(session, settings=config, inputs=Inputs(demonstrations=told)), drawn

    return world_of


CASES = {
    "tilted_mle": {"length_window": 4},
    "dpo": {"length_window": 2, "microbatches": 2, "mesh": "data:2,fsdp:2,tensor:2"},
    "sft": {"length_window": 3, "mapping": "pmap", "length_buckets": 3},
    "kto": {"length_buckets": 2, "length_window": 8},
}


@pytest.mark.parametrize("method", CASES)
def test_every_step_is_padded_to_what_holds_the_batch_of_all_hosts(world_of, monkeypatch, method):
    session, drawn = world_of(method, **CASES[method])
    data = align_fit.training_data(session, session.settings.record, drawn)
    dataset, size = align_fit.host_data(session, data)
    plain = dataclasses.replace(session, settings=dataclasses.replace(session.settings, length_buckets=1))
    wide, _ = align_fit.host_data(plain, data)
    shares = []
    for mine in (np.arange(2), np.arange(2, 8)):
        monkeypatch.setattr(distributed, "host_rows", lambda place, num: mine)  # noqa: B023
        shares.append(align_fit.host_data(session, data)[0])
    shapes, own = [], []
    for step in range(session.settings.steps):
        batch, whole, parts = dataset[step], wide[step], [share[step] for share in shares]
        S, L = batch.candidates.prompt.shape[1], batch.candidates.completion.shape[2]
        chex.assert_trees_all_equal(batch, jax.tree.map(lambda *rows: np.concatenate(rows), *parts))
        chex.assert_trees_all_equal(batch.candidates, batches.trim(whole.candidates, S, L))
        np.testing.assert_array_equal(batches.lengths(batch.candidates), batches.lengths(whole.candidates))
        assert size == len(batch.candidates.prompt) == 8
        shapes.append((S, L))
        own.append(batches.lengths(parts[0].candidates).max(axis=0).tolist())
    assert 1 < len(set(shapes)) <= session.settings.length_buckets
    assert any(S > 8 >= short for (S, _), (short, _) in zip(shapes, own, strict=True)) or method != "sft"


@pytest.mark.parametrize("method", ["dpo", "sft", "kto"])  # Rows on a mesh, rows under pmap, and crossed rows.
def test_a_fit_compiles_once_a_shape_and_ends_where_one_without_buckets_does(world_of, monkeypatch, caplog, method):
    caplog.set_level(logging.INFO, logger="tiltjax.align.fit")
    traced, step = [], align_fit.train_step

    def noted(state, batch, *arguments, **options):
        traced.append(batch.candidates.prompt.shape[-1:] + batch.candidates.completion.shape[-1:])
        return step(state, batch, *arguments, **options)

    monkeypatch.setattr(align_fit, "train_step", noted)
    ends = {}
    for most in (1, 2):
        traced.clear()
        ends[most] = align_fit.tune(*world_of(method, **CASES[method] | {"length_buckets": most}))
        again = len(traced) - len(set(traced))
        assert again == (method == "sft")  # Under pmap the first state is not yet where a step leaves it.
        assert len(set(traced)) <= most
    assert len(set(traced)) > 1
    chex.assert_trees_all_close(*ends.values(), atol=2e-5, rtol=0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"fit: 6 steps of {len(set(traced))} shapes (compilations) {sorted(set(traced))}, ")


def test_every_demonstration_is_a_row(world_of):
    session, drawn = world_of("sft")
    data = align_fit.training_data(session, session.settings.record, drawn)
    rows, order = data.rows.candidates, data.order
    assert len(rows.prompt) == P + P // 2
    seen = np.concatenate([order(step) for step in range(6)])
    assert sorted(seen.tolist()) == list(range(48))
    told = [one for group in session.inputs.demonstrations for one in group]
    assert [
        ids[mask].tolist() for ids, mask in zip(rows.completion[:, 0], rows.completion_mask[:, 0], strict=True)
    ] == told
    np.testing.assert_array_equal(rows.prompt, np.repeat(drawn.prompt, np.resize([1, 2], P), axis=0))


@pytest.mark.parametrize("changes", [{"method": "rloo"}, {"method": "best_of_n_sft", "pack": True}])
def test_a_window_is_refused_where_it_could_do_nothing(changes):
    with pytest.raises(ValueError, match="length_window is for methods that learn once, without pack; got method="):
        AlignConfig(length_window=2, **changes)
    with pytest.raises(ValueError, match="length_buckets must be at least 1, got 0"):
        AlignConfig(length_buckets=0)
