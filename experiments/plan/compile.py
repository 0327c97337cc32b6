"""Compiles the real train step for a mesh of devices that need not exist, and says what it costs.

Run as ``python -m experiments.plan.compile JOB.json RESULT.json`` in a process whose XLA_FLAGS force as many host
devices as the mesh has; `experiments.plan` starts it.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import math
import pathlib
import re
import sys
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from tiltjax.analysis import Shape, hlo, kept, num_parameters, step_flops
from tiltjax.data.candidates import Candidates
from tiltjax.models import lora
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.train import rounds
from tiltjax.train.method import Feedback, Method
from tiltjax.train.methods import get_method
from tiltjax.train.policy import model_objective, model_view, with_critics
from tiltjax.train.sharding import batch_sharding, make_mesh, param_spec, sharded_step, shardings
from tiltjax.train.state import init_state
from tiltjax.train.step import LossFn, train_step

__all__ = ["Job", "Step", "analyse", "job_from", "measure", "prepare", "run"]

BETA = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to compile.

    Attributes:
      model: Of the policy.
      shape: Of the global batch.
      mesh: As `tiltjax.train.sharding.make_mesh` takes it.
      method: A record, by name: of a gradient step, to which labels and the views that it reads are data.
      param_dtype: Of parameters and of the optimizer's moments.
      lora_rank: 0 trains all parameters.
      microbatches: Parts of the batch.
      measure: Whether to run the step too, and to measure the memory of this process.
      unroll: Whether to unroll the loop over layers, so that XLA's cost analysis counts all of them.
    """

    model: TransformerConfig
    shape: Shape
    mesh: str = ""
    method: str = "tilted_mle"
    param_dtype: str = "float32"
    lora_rank: int = 0
    microbatches: int = 1
    measure: bool = False
    unroll: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """The step of a job, on shapes alone."""

    function: Any
    state: Any
    frozen: Any
    batch: Any
    key: Any
    mesh: Any
    tx: Any
    make: Any
    loss_fn: LossFn


def prepare(job: Job) -> Step:
    """The sharded step with everything it takes, none of it allocated."""
    mesh = make_mesh(job.mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, b2=0.95, weight_decay=0.0))

    def parts():
        model = Transformer(jax.random.key(0), job.model)
        model = jax.tree.map(lambda x: x.astype(job.param_dtype), model)
        if not job.lora_rank:
            return init_state(_trained(job, model), tx), None
        adapted = lora.add(jax.random.key(1), model, rank=job.lora_rank)
        trained, frozen = lora.partition(adapted, lora.is_adapter)
        return init_state(_trained(job, trained), tx), frozen

    state, frozen = jax.eval_shape(parts)
    loss_fn = model_objective(_record(job), beta=BETA)
    step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, microbatches=job.microbatches)
    function = sharded_step(step, state, frozen, mesh)
    batch = jax.eval_shape(functools.partial(_batch, job, tx=tx), state.params, frozen)
    return Step(function, state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)), mesh, tx, parts, loss_fn)


def _record(job: Job) -> Method:
    """The record, with the job's number of candidates."""
    record, N = get_method(job.method), job.shape.N
    if record.cross > 1:
        return dataclasses.replace(record, cross=N)
    return record if record.num_candidates == N else dataclasses.replace(record, draw=((record.draw[0][0], N),))


def _trained(job: Job, params: Any) -> Any:
    critics = _record(job).critics
    return with_critics(params, features=job.model.features, num=critics) if critics else params


def _batch(job: Job, params: Any, frozen: Any, *, tx: Any) -> Any:
    """What a step takes, parameters being there for the views and advantages that a round prepares."""
    B, N, S, T = dataclasses.astuple(job.shape)
    batch = Candidates(
        prompt=jnp.zeros((B, S), jnp.int32),
        prompt_mask=jnp.ones((B, S), jnp.bool_),
        completion=jnp.zeros((B, N, T), jnp.int32),
        completion_mask=jnp.ones((B, N, T), jnp.bool_),
        old_token_logp=jnp.zeros((B, N, T)),
    )
    zeros = jnp.zeros((B, N))
    told = Feedback(reward=zeros, cost=zeros, correct=zeros > 0, answer=jnp.zeros((B, N), jnp.int32))
    players = rounds.init_players(_record(job), params, tx)
    options: dict[str, Any] = {"view": model_view(frozen=frozen), "beta": BETA}
    _, ready = rounds.prepare(_record(job), players, batch, told, jax.random.key(0), **options)
    ready = ready.change(candidates=dataclasses.replace(ready.candidates, old_token_logp=None))
    return ready.change(fresh=jnp.zeros(B, bool)) if ready.old_view is not None else ready


def analyse(job: Job, step: Step, compiled: Any) -> dict[str, Any]:
    """What a compiled step costs one device.

    Returns:
      ``memory`` and ``traffic`` in bytes, ``flops``, and the ``collectives``, ready for JSON.
    """
    mesh = {name: int(size) for name, size in step.mesh.shape.items()}
    devices = math.prod(mesh.values())
    counts = hlo.count(compiled.as_text(), mesh)
    stats, costs = compiled.memory_analysis(), compiled.cost_analysis()
    rows = mesh["data"] * mesh["fsdp"]
    head = (job.model.vocab_size, job.model.features)
    held = NamedSharding(step.mesh, param_spec("head", head, step.mesh)).shard_shape(head)
    gathered = held[1] < job.model.features
    whole = step_flops(job.model, job.shape, lora_rank=job.lora_rank, devices=rows, gathered=gathered)
    part = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((a.shape[0] // job.microbatches, *a.shape[1:]), a.dtype), step.batch
    )
    residuals = kept(step.loss_fn, step.state.params, step.frozen, part, step.key, mesh=step.mesh)
    params = _device_bytes(step.state.params, step.mesh)
    frozen = _device_bytes(step.frozen, step.mesh)
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    return {
        "devices": devices,
        "mesh": mesh,
        "parameters": num_parameters(step.state.params) + num_parameters(step.frozen),
        "trained": num_parameters(step.state.params),
        "memory": {
            "parameters": params + frozen,
            "gradients": params,
            "optimizer": _device_bytes(step.state.opt_state, step.mesh),
            "activations": sum(one.nbytes for one in residuals if one.of_batch),
            "kept_parameters": sum(one.nbytes for one in residuals if not one.of_batch),
            "temporaries": stats.temp_size_in_bytes,
            "arguments": arguments,
            "outputs": outputs,
            "donated": stats.alias_size_in_bytes,
            "peak": arguments + outputs - stats.alias_size_in_bytes + stats.temp_size_in_bytes,
            "peak_of_xla": stats.peak_memory_in_bytes,
        },
        "flops": {
            "model": whole.model / devices,
            "analytic": whole.executed / devices,
            "counted": counts.flops,
            "cost_analysis": costs["flops"],
        },
        "traffic": {
            # Products read and write, everything else is fused into them; state and batch are read and written once.
            "least": counts.product_traffic + arguments + outputs,
            "as_compiled": counts.traffic,
            "cost_analysis": costs["bytes accessed"],
        },
        "collectives": [dataclasses.asdict(one) for one in counts.collectives],
        "unknown_loops": counts.unknown_loops,
        "opaque": counts.opaque,
    }


def run(job: Job) -> dict[str, Any]:
    """Lowers, compiles, analyses, and where the job says so runs and measures."""
    times = [time.perf_counter()]
    step = prepare(job)
    scan = functools.partial(jax.lax.scan, unroll=True) if job.unroll else jax.lax.scan
    with mock.patch.object(jax.lax, "scan", scan):
        lowered = step.function.lower(step.state, step.batch, step.key, step.frozen)
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    result = analyse(job, step, compiled)
    result["seconds"] = {"lower": times[1] - times[0], "compile": times[2] - times[1]}
    result["host_peak"] = _status("VmHWM")
    if job.measure:
        del lowered
        result["measured"] = measure(step, compiled)
    return result


def measure(step: Step, compiled: Any) -> dict[str, float]:
    """Runs the step twice; ``peak`` is what the memory of this process grew by, ``seconds`` the second step's time."""
    _trim()
    before = _status("VmRSS")
    state, frozen = jax.jit(step.make, out_shardings=shardings((step.state, step.frozen), step.mesh))()
    batch = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), step.batch)
    batch = jax.device_put(batch, batch_sharding(step.mesh))
    key = jax.device_put(jax.random.key(0), jax.sharding.NamedSharding(step.mesh, jax.sharding.PartitionSpec()))
    jax.block_until_ready((state, frozen, batch))
    _trim()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
    for _ in range(2):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, key, frozen)
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - start
    return {"peak": _status("VmHWM") - before, "seconds": seconds, "loss": loss}


def _trim() -> None:
    """Gives freed memory back, so that what is measured is what is used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> float:
    """A field of /proc/self/status, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else math.nan


def _device_bytes(tree: Any, mesh: Any) -> int:
    """What one device holds of a sharded pytree."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh)), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)


def job_from(values: dict[str, Any]) -> Job:
    """The `Job` that its JSON says."""
    model = values["model"]
    scaling = model["rope_scaling"]
    model = TransformerConfig(**model | {"rope_scaling": None if scaling is None else tuple(scaling)})
    return Job(**values | {"model": model, "shape": Shape(**values["shape"])})


if __name__ == "__main__":
    source, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(json.dumps(run(job_from(json.loads(source.read_text())))))
