import dataclasses
import gc
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.plan import __main__ as plan
from experiments.plan import compile as plan_compile
from experiments.plan.__main__ import PlanConfig
from experiments.plan.compile import Job
from experiments.plan.shapes import SHAPES, policy_config
from tiltjax.analysis import Collective, Shape, chips, hlo, kept, num_parameters, step_flops
from tiltjax.models import lora
from tiltjax.models.config import config_to_hf
from tiltjax.models.transformer import Transformer
from tiltjax.train.sharding import batch_sharding, make_mesh, shard, shardings

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = {"EleutherAI/pythia-1.4b": 1_414_647_808, "EleutherAI/pythia-6.9b": 6_857_302_016,
             "HuggingFaceTB/SmolLM2-135M": 134_515_008, "meta-llama/Llama-3.1-8B": 8_030_261_248}  # fmt: skip
NEOX = dataclasses.replace(policy_config("mini"), num_layers=2, features=1024, mlp_features=4096, num_heads=8,
                           num_kv_heads=8, head_dim=128, vocab_size=3072)  # fmt: skip
LLAMA = dataclasses.replace(policy_config("HuggingFaceTB/SmolLM2-135M"), num_layers=3, features=64, mlp_features=96,
                            num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=16, vocab_size=3072 * 2)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_as_many_parameters_as_was_published(name):
    assert set(PUBLISHED) == set(SHAPES) - {"mini"}
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), policy_config(name)))
    assert num_parameters(shapes) == PUBLISHED[name]


def test_loops_count_as_often_as_they_run():
    def nested(x, w):
        def outer(x, w):
            return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ w) + i, x), None

        return jax.lax.scan(outer, x, w)[0]

    x, w = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((5, 16, 16), "float32")
    compiled = jax.jit(nested).lower(x, w).compile()
    counts = hlo.count(compiled.as_text(), {"data": 1})
    assert counts.flops == 5 * 3 * 2 * 8 * 16 * 16
    assert counts.product_traffic == 5 * 3 * 4 * (8 * 16 + 16 * 16 + 8 * 16)
    assert compiled.cost_analysis()["flops"] < counts.flops / 2
    assert counts.traffic >= counts.product_traffic
    assert not counts.collectives
    assert not counts.unknown_loops
    until = jax.jit(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, x))
    text = until.lower(jax.ShapeDtypeStruct((4, 4), "float32")).compile().as_text()
    assert len(hlo.count(text, {"data": 1}).unknown_loops) == 1


def test_collectives_are_found_with_their_axes_and_bytes():
    mesh = make_mesh("data:2,fsdp:4")
    bytes_ = 4.0 * 32 * 8

    def talk(x):
        y = jax.lax.psum(x, "data")
        z = jax.lax.all_gather(x, "fsdp", tiled=True)
        s = jax.lax.psum(x, ("data", "fsdp"))
        t = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        a = jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)
        return y * jnp.sum(z) + s * jnp.sum(t) + jnp.sum(a * a)

    mapped = jax.shard_map(
        talk, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")), check_vma=False
    )
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((256, 8), "float32")).compile().as_text()
    found = {(c.kind, c.axes): c for c in hlo.count(text, dict(mesh.shape)).collectives}
    expected = {("all-reduce", "data"): 2 * bytes_ / 2, ("all-gather", "fsdp"): 3 * bytes_,
                ("all-reduce", "data+fsdp"): 2 * bytes_ * 7 / 8, ("collective-permute", "data"): bytes_,
                ("all-to-all", "fsdp"): bytes_ * 3 / 4}  # fmt: skip
    assert {key: one.wire_bytes for key, one in found.items()} == expected
    assert found["all-reduce", "data"].group == (0, 4)
    assert found["all-gather", "fsdp"].group == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=1", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("source_target_pairs={{0,4},{4,0},{1,1}}", [[0, 4], [4, 0]]),
    ],
)
def test_groups_in_every_spelling(text, groups):
    opcode = "collective-permute" if "pairs" in text else "all-reduce"
    instruction = hlo.Instruction("x", "f32[]", opcode, (), "", text, False)
    np.testing.assert_array_equal(hlo.replica_groups(instruction, 8), groups)


def test_operations_are_those_xla_counts_on_an_unrolled_model():
    model, shape = dataclasses.replace(NEOX, remat="none"), Shape(64, 2, 64, 65)
    flops = plan_compile.run(Job(model, shape, "data:8", unroll=True))["flops"]
    np.testing.assert_allclose(flops["cost_analysis"], flops["analytic"], rtol=0.02)
    np.testing.assert_allclose(flops["counted"], flops["analytic"], rtol=1e-3)
    # Where the forward pass of the last layer stands next to its recomputation, XLA makes one of the two.
    full = plan_compile.run(Job(NEOX, shape, "data:8", unroll=True))["flops"]
    again = (full["analytic"] - flops["analytic"]) / NEOX.num_layers
    np.testing.assert_allclose(full["cost_analysis"], full["analytic"] - again, rtol=0.02)
    np.testing.assert_allclose(full["counted"], full["analytic"] - again, rtol=5e-3)


@pytest.fixture(scope="module")
def sharded():
    """A job on all eight devices whose layers, vocabulary and batch are walked in loops: result, step and program."""
    job = Job(LLAMA, Shape(16, 2, 12, 9), "data:2,fsdp:4", microbatches=2, method="dpo")
    step = plan_compile.prepare(job)
    compiled = step.function.lower(step.state, step.batch, step.key, step.frozen).compile()
    return job, plan_compile.analyse(job, step, compiled), step, compiled


def test_operations_of_a_sharded_step_in_loops(sharded):
    job, result, *_ = sharded
    flops = result["flops"]
    assert flops["analytic"] * 8 == step_flops(job.model, job.shape, devices=8).executed
    np.testing.assert_allclose(flops["counted"], flops["analytic"], rtol=0.02)
    assert flops["cost_analysis"] < 0.7 * flops["counted"]
    assert flops["model"] < flops["analytic"]
    assert not result["unknown_loops"]
    assert not result["opaque"]


@pytest.mark.parametrize(("mesh", "twice"), [("data:2,fsdp:4", True), ("data:4,tensor:2", False)])
def test_a_vocabulary_of_one_chunk_is_multiplied_twice_only_where_each_pass_gathers_it(mesh, twice):
    job = Job(dataclasses.replace(LLAMA, vocab_size=512, compute_dtype="bfloat16"), Shape(16, 2, 12, 9), mesh)
    flops = plan_compile.run(job)["flops"]
    assert flops["counted"] == flops["analytic"]
    assert flops["analytic"] * 8 == step_flops(job.model, job.shape, devices=8, gathered=twice).executed
    head = 2.0 * 16 * 2 * 9 * 512 * 64
    assert flops["analytic"] * 8 - step_flops(job.model, job.shape, devices=8).executed == twice * head


def test_memory_is_what_the_state_takes_on_a_device(sharded):
    _, result, step, _ = sharded
    state = shard(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), step.state), step.mesh)
    device = jax.devices()[0]
    held = lambda tree: sum(
        s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device
    )
    memory = result["memory"]
    assert memory["parameters"] == held(state.params) == memory["gradients"]
    assert memory["optimizer"] == held(state.opt_state)
    # Tokens and masks; the reference's log-probability of each; rewards, and what counts.
    batch = 2 * 5 * (12 + 2 * 9) + 2 * 2 * 4 * 9 + 2 * 2 * (4 + 1)
    assert memory["arguments"] == memory["parameters"] + memory["optimizer"] + batch + 4
    assert memory["donated"] == held(state)
    assert memory["peak"] > memory["arguments"] + memory["gradients"]


def test_collectives_of_a_sharded_step_are_on_known_axes(sharded):
    collectives = sharded[1]["collectives"]
    assert {axis for one in collectives for axis in one["axes"].split("+")} == {"data", "fsdp"}
    # Every gradient must cross the data axis.
    data = sum(one["wire_bytes"] for one in collectives if one["axes"] == "data")
    assert data >= sharded[1]["memory"]["gradients"]


def test_a_policy_gradient_step_takes_what_a_round_prepares(sharded):
    job = dataclasses.replace(sharded[0], method="grpo")
    result = plan_compile.run(job)
    flops, memory = result["flops"], result["memory"]
    assert flops["analytic"] * 8 == step_flops(job.model, job.shape, devices=8).executed
    np.testing.assert_allclose(flops["counted"], flops["analytic"], rtol=1e-3)
    tokens = 2 * 5 * (12 + 2 * 9)
    groups = 2 * 2 * (4 + 4 + 1) + 2  # Rewards, advantages, what counts; whether the policy is still the old one.
    assert memory["arguments"] == memory["parameters"] + memory["optimizer"] + tokens + groups + 2 * 4 * 2 * 2 * 9 + 4
    batch = plan_compile.prepare(job).batch
    assert batch.advantage.shape == (16, 2)
    assert batch.old.token_logp.shape == batch.ref.token_logp.shape == (16, 2, 9)


def residuals(job):
    step = plan_compile.prepare(job)
    return kept(step.loss_fn, step.state.params, step.frozen, step.batch, step.key, mesh=step.mesh)


def test_activations_are_one_residual_per_layer_and_what_the_vocabulary_keeps():
    model = dataclasses.replace(LLAMA, compute_dtype="float32")
    job = Job(model, Shape(16, 2, 12, 9), "data:2,fsdp:4")
    B, N, L, P, D, b = 16, 2, 3, 12 + 2 * 8, 64, 2
    found = {(one.shape, one.dtype): one for one in residuals(job)}
    assert found.pop(((L, B, 1, P, D), "float32")).nbytes == L * b * P * D * 4
    words = B * N * 9
    assert found.pop(((words, 1, D), "float32")).nbytes == words // 8 * D * 4
    assert found.pop(((words, 1), "int32")).nbytes == words // 8 * 4  # Tokens; log-normalisers and entropies below.
    assert found.pop(((words, 1), "float32")).nbytes == words // 8 * 4
    # What is left: a final norm of the completions, the angles of all positions, and a few numbers per token.
    norm, angles = 3 * b * N * 9 * D * 4, 2 * b * P * model.rotary_dim // 2 * 4
    assert sum(one.nbytes for one in found.values()) < 1.5 * (norm + angles)
    deeper = residuals(dataclasses.replace(job, model=dataclasses.replace(model, num_layers=L + 2)))
    before, after = (sum(one.nbytes for one in some if one.of_batch) for some in (residuals(job), deeper))
    assert after - before == 2 * b * P * D * 4


def test_what_is_kept_is_what_the_temporaries_of_xla_differ_by():
    """Between two ways to remat, all else being the same."""
    model = dataclasses.replace(LLAMA, compute_dtype="float32", vocab_size=512)
    full, none = (
        plan_compile.run(Job(dataclasses.replace(model, remat=remat), Shape(16, 2, 64, 33), "data:2,fsdp:4"))["memory"]
        for remat in ("full", "none")
    )
    more = none["activations"] + none["kept_parameters"] - full["activations"] - full["kept_parameters"]
    assert more > 10 * full["activations"]
    np.testing.assert_allclose(none["temporaries"] - full["temporaries"], more, rtol=0.1)
    for memory in (full, none):
        assert memory["temporaries"] > memory["activations"] + memory["kept_parameters"]


def test_parameters_that_are_kept_a_second_time_are_no_activations():
    model = dataclasses.replace(LLAMA, remat="none", num_layers=5)
    copies = [one for one in residuals(Job(model, Shape(16, 2, 12, 9), "data:2,fsdp:4")) if not one.of_batch]
    kernels = [one for one in copies if one.shape == (5, 64, 96)]
    assert len(kernels) == 2  # Gate and up.
    assert all(one.nbytes == 5 * 64 * 96 * np.dtype(one.dtype).itemsize for one in kernels)  # Gathered over fsdp.


def test_the_memory_of_a_plan_is_that_of_a_step_that_runs(sharded):
    """Run as training runs it."""
    _, result, step, compiled = sharded
    planned = result["memory"]
    key = jax.device_put(jax.random.key(0), NamedSharding(step.mesh, P()))

    def held():
        """Bytes of all arrays on one device."""
        gc.collect()
        arrays = [x for x in jax.live_arrays() if jax.devices()[0] in x.sharding.device_set]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)

    before = held()
    state = jax.jit(step.make, out_shardings=shardings((step.state, step.frozen), step.mesh))()[0]
    assert held() - before == planned["parameters"] + planned["optimizer"] + 4 == planned["donated"]
    batch = jax.device_put(jax.tree.map(lambda a: np.ones(a.shape, a.dtype), step.batch), batch_sharding(step.mesh))
    unread = 2 * 2 * 4 * (1 + 2 * 9)  # Of a pair: its source, and what the reference says beside log-probabilities.
    assert held() - before == planned["arguments"] + unread
    state, metrics = compiled(state, batch, key, None)
    jax.block_until_ready(state)
    # The old state has made room for the new one; a few scalars are new.
    assert held() - before == planned["arguments"] + unread + sum(x.nbytes for x in metrics.values())
    assert planned["temporaries"] == compiled.memory_analysis().temp_size_in_bytes
    assert np.isfinite(metrics["loss"])
    del state, batch


@pytest.mark.parametrize("method", ["sft", "var", "var_importance", "grpo"])
def test_other_methods_lower_too(method):
    config = PlanConfig(policy="mini", mesh="data:4,fsdp:2", batch_size=8, method=method, lora_rank=2)
    job = plan_compile.job_from(plan.job(config))
    step = plan_compile.prepare(dataclasses.replace(job, shape=dataclasses.replace(job.shape, S=4, T=3)))
    text = step.function.lower(step.state, step.batch, step.key, step.frozen).as_text()
    assert "mhlo.num_partitions = 8" in text
    assert num_parameters(step.state.params) < num_parameters(step.frozen)


def test_operations_of_adapters():
    shape = Shape(2, 3, 5, 7)
    whole, adapted = (step_flops(NEOX, shape, lora_rank=rank) for rank in (0, 4))
    model = jax.eval_shape(lambda: lora.add(jax.random.key(0), Transformer(jax.random.key(0), NEOX), rank=4))
    adapters = num_parameters(lora.partition(model, lora.is_adapter)[0])
    tokens = 2 * (5 + 3 * 6)
    kernels = sum(getattr(model.blocks, name).kernel.size for name in ("query", "key", "value", "out", "up", "down"))
    head = 2 * NEOX.vocab_size * NEOX.features * 2 * 3 * 7
    assert whole.model - adapted.model == 2 * tokens * kernels + head - 6 * tokens * adapters


def test_time_is_that_of_the_slowest_link_and_unit():
    h100, trillium = chips.CHIPS["h100"], chips.CHIPS["trillium"]
    inside = Collective("all-gather", (0, 1, 2, 3), "fsdp", 1, 450e9)
    across = Collective("all-reduce", (0, 4, 8, 12), "data", 1, 50e9)
    assert chips.network_seconds(h100, [inside]) == 1.0
    assert chips.network_seconds(h100, [across]) == 0.5  # Two members, and so two cards, in every host.
    assert chips.network_seconds(h100, [inside, across]) == 1.5
    assert chips.network_seconds(trillium, [across]) == 0.25
    assert chips.network_seconds(trillium, [dataclasses.replace(across, group=(0, 256))]) is None
    result = {"flops": {"counted": 989e12}, "traffic": {"least": 6.7e12}, "memory": {"peak": 81e9}}
    p = chips.predict(h100, result, [inside])
    assert (p.compute, p.memory, p.network, p.fits) == (1.0, 2.0, 1.0, False)
    assert (p.seconds, p.serial, p.bound) == (2.0, 4.0, "memory")
    assert chips.predict(chips.CHIPS["h200"], result, []).fits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data:-1"}, "mesh must give every size"),
        ({"mesh": "rows:8"}, "mesh must be like"),
        ({"batch_size": 100}, r"batch_size must be a multiple of data \* fsdp \* microbatches = 256, got 100"),
        ({"method": "dpo", "num_candidates": 4}, "num_candidates must be 2 for dpo, got 4"),
        ({"chip": "h100,abacus"}, "chip must be all or some of .*; got 'abacus'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**settings)


def test_unknown_policies_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"policy must be a local file or directory, or one of EleutherAI/pythia-1\.4b"
    ):
        policy_config("somebody/something")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match="model_type must be one of"):
            policy_config(str(path))
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(NEOX)))
    assert policy_config(str(tmp_path / "config.json")) == NEOX
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert policy_config(str(tmp_path / "adapter")) == NEOX


def test_a_plan_for_more_devices_than_there_are(tmp_path, capsys):
    config = PlanConfig(policy="mini", mesh="data:2,fsdp:8", batch_size=16, num_candidates=2, prompt_tokens=8,
                        max_tokens=8, chip="h100,v5e", output=str(tmp_path))  # fmt: skip
    results = plan.run(config)
    assert results["devices"] == 16
    assert json.loads((tmp_path / "results.json").read_text())["flops"] == results["flops"]
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# One tilted_mle step of mini on data:2,fsdp:8\n")
    assert "| fsdp | " in report
    assert "| TPU v5e | yes (" in report
    printed = capsys.readouterr().out
    assert "| operations, counted | " in printed
    assert "bfloat16 | memory" in printed


def test_a_step_that_does_not_compile_is_one_line(monkeypatch):
    monkeypatch.setattr(plan.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="the step does not compile on data:64,fsdp:4: exit status 1"):
        plan.compile_elsewhere(plan.job(PlanConfig()))


def test_the_committed_report_is_that_of_the_command():
    text = (ROOT / "docs" / "plan" / "report.md").read_text()
    assert text.startswith("# One tilted_mle step of EleutherAI/pythia-6.9b on data:8,fsdp:32\n")
    assert f"{PUBLISHED['EleutherAI/pythia-6.9b']:,} parameters" in text
    assert "--mesh=data:8,fsdp:32 --batch_size=1024" in text
    # Of 32 layers, 4 prompts of 256 tokens with 4 completions of 127 each, and some more at the end.
    layers = 32 * 4 * (256 + 4 * 127) * 4096 * 4
    kept = re.search(r"^\| activations, kept for the gradient \| ([\d.]+) GB \|$", text, re.MULTILINE)
    assert layers < float(kept[1]) * 1e9 < 1.2 * layers
    assert math.prod(plan.mesh_sizes("data:8,fsdp:32").values()) == 256
