"""The cases as tiltjax runs them: the library's own step, sampler and scorer, on random weights and random tokens."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.cases import SHAPES, Case
from tiltjax.advantages import group_normalised
from tiltjax.data.candidates import Candidates
from tiltjax.losses import preference
from tiltjax.losses.policy_gradient import aggregate, ppo_clip_loss
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.ops.masked import Average
from tiltjax.ops.tokens import sequence_logp
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.train.hardware import compilation_cache, fast_dtype, return_memory_after_compiling
from tiltjax.train.objectives import likelihood_objective, sft_objective
from tiltjax.train.rollout import make_sampler, make_scorer, narrow
from tiltjax.train.state import TrainState, init_state
from tiltjax.train.step import train_step
from tiltjax.types import Array, Float, Int, Params, PRNGKey

__all__ = ["DTYPES", "Compiling", "batch_of", "model_of", "multiply", "prepare", "programs", "run"]

DTYPES = ("auto", "bfloat16", "float32")
"""Operands of the matrix products; "auto" is what this machine has units for, as in `experiments.align`."""


def model_of(shape: str, dtype: str, *, remat: str = "dots", decoding: bool = False, **settings: Any) -> Transformer:
    """A model of a named shape with random parameters: float32, or for decoding in the type they are multiplied in.

    Made array by array: drawn in one program, all of them would be held several times over.
    """
    s = SHAPES[shape]
    config = TransformerConfig(
        vocab_size=s.vocab_size,
        features=s.features,
        num_layers=s.num_layers,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        mlp_features=s.mlp_features,
        rotary_dim=s.head_dim,
        compute_dtype=fast_dtype() if dtype == "auto" else dtype,
        remat=remat,
        **settings,
    )
    keys = map(jax.random.key, itertools.count())

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = {getattr(key, "name", None) for key in path}
        if names & {"scale", "bias"}:
            return jnp.full(leaf.shape, float("scale" in names), leaf.dtype)
        return _normal(next(keys), leaf.shape, leaf.dtype, s.features**-0.5)

    def new() -> Transformer:
        model = Transformer(jax.random.key(0), config)
        return model.cast(config.compute_dtype) if decoding else model

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(new))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: PRNGKey, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Some rows at a time: what drawing needs for itself would be the most that a process of the benchmark holds."""

    def row(key: PRNGKey) -> jax.Array:
        return (std * jax.random.normal(key, shape[-1:])).astype(dtype)

    keys = jax.random.split(key, math.prod(shape[:-1]))
    return jax.lax.map(row, keys, batch_size=2048).reshape(shape)


def batch_of(case: Case, shape: str) -> Candidates:
    """Random tokens without padding, with rewards and log-probabilities of the policy that drew them."""
    rng, V = np.random.default_rng(0), SHAPES[shape].vocab_size
    prompt = rng.integers(10, V, (case.B, case.S))
    completion = rng.integers(10, V, (case.B, case.N, case.T))
    return Candidates(
        prompt=jnp.asarray(prompt, jnp.int32),
        prompt_mask=jnp.ones(prompt.shape, bool),
        completion=jnp.asarray(completion, jnp.int32),
        completion_mask=jnp.ones(completion.shape, bool),
        reward=jnp.asarray(rng.normal(size=(case.B, case.N)), jnp.float32),
    )


def prepare(case: Case, shape: str, dtype: str) -> Callable[[], Any]:
    """What is timed: a function that does the work of the case and waits for it."""
    model, batch = model_of(shape, dtype, decoding=case.work == "decode"), batch_of(case, shape)
    if case.work == "score":
        return functools.partial(_wait, make_scorer(), model, batch)
    if case.work == "train":
        return _training(case, model, batch)
    sampler = make_sampler(num_candidates=case.N, max_tokens=case.T, eos_id=-1, pad_id=0)
    keys = iter(jax.random.split(jax.random.key(1), 10_000))

    def draw():
        drawn = sampler(next(keys), model, batch.prompt, batch.prompt_mask)
        return jax.block_until_ready(_winner(next(keys), drawn.completion) if case.N > 1 else drawn)

    return draw


@jax.jit
def _winner(key: PRNGKey, completion: Int[Array, "B N T"]) -> Int[Array, "B 1 T"]:
    """Soft best-of-N, where the share of even tokens stands for a reward that costs nothing."""
    reward = jnp.mean(completion % 2 == 0, axis=-1, dtype=jnp.float32)
    winner = soft_best_of_n(key, reward, beta=0.1)
    return jnp.take_along_axis(completion, winner[:, None, None], axis=1)


def _training(case: Case, model: Transformer, batch: Candidates) -> Callable[[], Any]:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-5))
    frozen = None
    if case.module == "sft":
        loss_fn = sft_objective()
    elif case.module == "group":
        stats = jax.jit(Transformer.score)(model, batch.prompt, batch.prompt_mask, batch.completion)
        batch, loss_fn = dataclasses.replace(batch, old_token_logp=stats.logp), group_objective
    else:
        loss_fn = likelihood_objective(_dpo)
        batch = dataclasses.replace(batch, ref_logp=make_scorer()(model, batch))
        if case.reference == "in_step":
            frozen = narrow(jax.tree.map(jnp.copy, model))

    def step(state: TrainState, batch: Candidates, key: PRNGKey, reference: Params):
        if reference is not None:
            stats = reference.score(batch.prompt, batch.prompt_mask, batch.completion)
            batch = dataclasses.replace(batch, ref_logp=sequence_logp(stats.logp, batch.completion_mask))
        return train_step(state, batch, key, loss_fn=loss_fn, tx=tx)

    state, key = init_state(model, tx), jax.random.key(2)
    compiled = jax.jit(step, donate_argnums=0)

    def advance():
        nonlocal state
        state, scalars = compiled(state, batch, key, frozen)
        return jax.block_until_ready((state, scalars))

    return advance


def _dpo(logp: Float[Array, "B 2"], batch: Candidates) -> tuple[Float[Array, " B"], dict[str, Array]]:
    """DPO on pairs whose reference log-probabilities are known, with the two numbers that peers log."""
    chosen, rejected = jnp.moveaxis(preference.implicit_reward(logp, batch.ref_logp, beta=0.1), -1, 0)
    metrics = {"margin": chosen - rejected, "accuracy": jnp.asarray(chosen > rejected, logp.dtype)}
    return preference.dpo_loss(logp, batch.ref_logp, beta=0.1), metrics


def group_objective(params: Params, frozen: Params, batch: Candidates, key: PRNGKey) -> tuple[Average, dict]:
    """GRPO without a KL term: clipped ratios, advantages normalised in the group, a mean over tokens per completion."""
    logp = params.score(batch.prompt, batch.prompt_mask, batch.completion).logp
    advantage = group_normalised(batch.reward)
    values = ppo_clip_loss(logp, batch.old_token_logp, advantage, batch.completion_mask)
    return aggregate(values, batch.completion_mask, mode="seq_mean_token_mean"), {}


def _wait(function: Callable, *arguments: Any) -> Any:
    return jax.block_until_ready(function(*arguments))


def multiply(dtype: str, size: int = 2048) -> tuple[Callable[[], Any], int]:
    """The yardstick: a matrix product with operands in ``dtype`` and a float32 result."""
    dtype = fast_dtype() if dtype == "auto" else dtype
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return functools.partial(_wait, product, a, b), size


_STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


_HIT = "/jax/compilation_cache/cache_hits"

_LONG = 2.0
"""Seconds of compiling above which a program counts: JAX keeps none on disk that took less than one."""


class Compiling:
    """Seconds that JAX has spent tracing, lowering and compiling since this was made, by stage.

    ``missed`` counts the programs that took long to compile because no cache on disk had them.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(_STAGES.values(), 0.0)
        self.missed = 0
        self._hit = False
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **kwargs: str | int) -> None:
        self._hit |= event == _HIT  # Told before the seconds of the same program.

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _STAGES:
            self.seconds[_STAGES[event]] += duration_secs
        if event in _STAGES and _STAGES[event] == "compile":
            self.missed += duration_secs > _LONG and not self._hit
            self._hit = False


def programs() -> list[Any]:
    """Every compiled program of this process, as JAX's client has it."""
    return jax.devices()[0].client.live_executables()


def run(case: Case, given: harness.Options) -> dict[str, Any]:
    """Times a case and returns its row."""
    imported, libraries = harness.age(), harness.peak_memory()
    compilation_cache()
    return_memory_after_compiling()
    compiling = Compiling()
    call = prepare(case, given.shape, given.dtype)
    before = harness.peak_memory()
    watch = harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=True)
    arrays = sum(array.nbytes for array in jax.live_arrays())
    program = max(loaded.get_compiled_memory_stats().temp_size_in_bytes for loaded in programs())
    given = dataclasses.replace(given, dtype=fast_dtype() if given.dtype == "auto" else given.dtype)
    stages = {f"{name}_seconds": round(seconds, 3) for name, seconds in compiling.seconds.items()}
    return harness.report(
        case,
        watch,
        given,
        library="tiltjax",
        shared=True,
        multiply=multiply(given.dtype, 2048 if given.shape != "tiny" else 64),
        import_seconds=round(imported, 2),
        cached=not compiling.missed,
        libraries_gb=round(libraries / 1e9, 3),
        peak_before_gb=round(before / 1e9, 3),
        arrays_gb=round(arrays / 1e9, 3),
        program_gb=round(program / 1e9, 3),
        **stages,
    )
