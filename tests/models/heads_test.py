import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.models import heads, lora
from tiltjax.models.heads import RewardModel, preference_logits
from tiltjax.train.sharding import make_mesh, param_spec


def reward_model(num_heads=2):
    model = RewardModel(tiny_model(), num_heads=num_heads)
    kernel = np.random.default_rng(1).normal(size=model.kernel.shape).astype(np.float32)
    model.kernel, model.bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.arange(num_heads) + 0.5)
    return model


@functools.cache
def said():
    """Candidates, one of them empty, and what the model says after every token and after the last."""
    model, batch = reward_model(), ragged_candidates(3, 4)
    mask = np.array(batch.completion_mask)
    mask[1, 2] = False
    asked = (batch.prompt, batch.prompt_mask, batch.completion)
    read = jax.jit(lambda model, asked, mask: (model.scores(*asked), model.last(*asked, mask)))
    return batch, mask, read, *jax.device_get(read(model, asked, mask))


def test_scores_are_those_of_every_text_alone():
    batch, mask, _, scores, _ = said()
    model = reward_model()
    texts, wanted = [], []
    for b, n, t in np.argwhere(mask):
        texts.append([*batch.prompt[b][batch.prompt_mask[b]], *batch.completion[b, n, : t + 1]])
        wanted.append(scores[b, n, t])
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    real = np.arange(rows.shape[1])[None] < np.array([len(x) for x in texts])[:, None]
    rows[real] = np.concatenate(texts)
    state = jax.jit(model.backbone.hidden)(rows, real, np.zeros((len(rows), 1, 1), np.int32))[:, 0, 0]
    np.testing.assert_allclose(wanted, state @ model.kernel[...] + model.bias[...][None], rtol=1e-4, atol=1e-5)


def test_a_completion_is_read_at_its_last_real_token_and_padding_moves_nothing():
    batch, mask, read, scores, last = said()
    at = np.maximum(mask.sum(-1) - 1, 0)
    expected = np.take_along_axis(scores, at[..., None, None], axis=2)[:, :, 0]
    np.testing.assert_array_equal(last, np.where(mask.any(-1)[..., None], expected, 0))
    assert (last[1, 2] == 0).all()
    other = np.where(mask, batch.completion, 31)
    again = read(reward_model(), (np.where(batch.prompt_mask, batch.prompt, 30), batch.prompt_mask, other), mask)[1]
    np.testing.assert_allclose(again, last, rtol=1e-6, atol=1e-6)


def test_untrained_heads_are_indifferent_and_learn():
    model, batch = RewardModel(tiny_model()), ragged_candidates(3, 4)
    asked = (batch.prompt, batch.prompt_mask, batch.completion, batch.completion_mask)
    model.backbone = lora.add(jax.random.key(0), model.backbone, rank=2)
    trained, frozen = lora.partition(model, heads.is_trainable)
    shapes = {np.shape(x) for x in jax.tree.leaves(trained)}
    assert {(16, 1), (1,)} < shapes
    assert (32, 16) not in shapes
    value, grads = jax.jit(jax.value_and_grad(lambda p: jnp.sum(lora.combine(p, frozen).reward(*asked)[:, 0])))(trained)
    assert value == 0
    assert np.abs(grads.kernel[...]).max() > 0.1
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        RewardModel(tiny_model(), num_heads=0)


def test_it_lies_beside_the_backbone_and_comes_back(tmp_path):
    model = reward_model()
    heads.save(model, tmp_path / "model")
    again = heads.load(tmp_path / "model")
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "reward_head.json", "reward_head.safetensors"}
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1
    tensors = tmp_path / "model" / "reward_head.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"reward_head\.safetensors: truncated"):
        heads.load(tmp_path / "model")
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"reward_head\.safetensors: no such file"):
        heads.load(tmp_path / "model")
    heads.save(reward_model(num_heads=3), tmp_path / "other")
    tensors.write_bytes((tmp_path / "other" / "reward_head.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"'kernel': \(16, 3\)"):
        heads.load(tmp_path / "model")


@pytest.mark.robustness(
    "Checkpoints",
    given="a reward model whose heads are not finite, or whose number of heads is no number",
    outcome="refused with file and tensor or field",
)
def test_damaged_heads(tmp_path):
    model = reward_model()
    heads.save(model, tmp_path / "model")
    file = tmp_path / "model/reward_head.safetensors"
    save_file(load_file(file) | {"bias": np.array([0, np.nan], np.float32)}, file)
    with pytest.raises(ValueError, match=r"reward_head\.safetensors: the tensor bias is not finite"):
        heads.load(tmp_path / "model")
    model.bias = nnx.Param(model.bias[...].at[1].set(jnp.inf))
    with pytest.raises(ValueError, match="the bias of the heads is not finite; the model is not written"):
        heads.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    for value in ("2", None, 0, [2]):
        (tmp_path / "model/reward_head.json").write_text(json.dumps({"num_heads": value}))
        with pytest.raises(ValueError, match=r"reward_head\.json: num_heads must be an integer between 1 .*, got"):
            heads.load(tmp_path / "model")


def test_the_rules_of_the_mesh_see_the_backbone_and_leave_the_heads_whole():
    mesh = make_mesh("data:2,fsdp:2,tensor:2")

    def specs(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p): param_spec(jax.tree_util.keystr(p), x.shape, mesh) for p, x in leaves}

    found, plain = specs(reward_model()), specs(tiny_model())
    own = {name: spec for name, spec in found.items() if "backbone" not in name}
    assert len(own) == 2
    assert all(not any(spec) for spec in own.values())
    assert {name.replace(".backbone", ""): spec for name, spec in found.items() if name not in own} == plain
    assert any(any(spec) for spec in plain.values())


def test_preferences_are_antisymmetric_and_begin_as_bradley_terry():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5, 4, 2))
    expected = np.array([[[b[1] * (1 + c[0]) - (1 + b[0]) * c[1] for c in row] for b in row] for row in v])
    np.testing.assert_allclose(preference_logits(jnp.asarray(v, jnp.float32)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(expected, -np.swapaxes(expected, 1, 2))
    reward = rng.normal(size=4).astype(np.float32)
    plain = preference_logits(jnp.stack([jnp.zeros(4), jnp.asarray(reward)], axis=-1))
    np.testing.assert_allclose(plain, reward[:, None] - reward[None], rtol=1e-6)
    grad = jax.grad(lambda v: preference_logits(v)[0, 1])(jnp.zeros((2, 2)))
    np.testing.assert_array_equal(grad, [[0, 1], [0, -1]])
