"""The cases as Tunix runs them (PeftTrainer, DPOTrainer, its GRPO loss, its Sampler), on random weights and tokens.

    .venv.tunix/bin/python -m benchmarks.peers.tunix_worker --cases=sft_8x128 --dtype=float32

``--dtype``: "float32" or "bfloat16" (weights and all). What differs from the case, in 0.1.7: it has no precomputed
reference, no N per prompt (prompts are repeated), it pads a prompt to the next power of two, and it ignores the base
of the rotary angles.
"""

import os

from benchmarks import harness
from benchmarks.cases import CASES, SHAPES, Case

if __name__ == "__main__":
    harness.huge_pages()

os.environ |= {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"}

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama

__all__ = ["DTYPES", "main", "run"]

DTYPES = ("float32", "bfloat16")
_FIRST = 10
"""Tokens below are special or stay unused."""


def model_of(shape: str, dtype: str) -> Any:
    """A model of a named shape with random parameters (Tunix starts its MLP at zero)."""
    s = SHAPES[shape]
    config = llama.ModelConfig(
        num_layers=s.num_layers,
        vocab_size=s.vocab_size,
        embed_dim=s.features,
        hidden_dim=s.mlp_features,
        num_heads=s.num_heads,
        head_dim=s.head_dim,
        num_kv_heads=s.num_kv_heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))

    def fill(x):
        x = jax.random.normal(jax.random.key(1), x.shape) * 0.02 if x.ndim > 1 else x
        return x.astype(dtype)

    nnx.update(model, jax.tree.map(fill, nnx.state(model, nnx.Param)))
    return model


def tokens(case: Case, given: harness.Options, *shape: int) -> np.ndarray:
    """Random ones."""
    return np.random.default_rng(0).integers(_FIRST, SHAPES[given.shape].vocab_size, shape).astype(np.int32)


def train(case: Case, given: harness.Options) -> harness.Stopwatch:
    """Runs Tunix's trainer of the case. Its log lags a step behind, so steps are timed where it asks for a batch."""
    from tunix.sft import peft_trainer

    model, watch = model_of(given.shape, given.dtype), harness.Stopwatch(compiles=True)
    make = functools.partial(tokens, case, given)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-5))
    settings: dict[str, Any] = {
        "eval_every_n_steps": 1000,
        "max_steps": given.repeats + 1,
        "max_inflight_computations": 1,
    }

    def feed(batch: Any) -> Iterator[Any]:
        while not watch.enough(given.repeats, given.budget):
            watch.begin()
            yield batch
            jax.block_until_ready(nnx.state(model, nnx.Param))
            watch.end()

    rows = case.B * case.N
    if case.module == "dpo":
        from tunix.sft.dpo import dpo_trainer

        if case.reference == "precomputed":
            raise ValueError("Tunix has no precomputed reference")
        ones = np.ones((case.B, case.S), np.int32), np.ones((case.B, case.T), np.int32)
        batch: Any = dpo_trainer.TrainingInput(
            prompt_ids=make(case.B, case.S),
            prompt_mask=ones[0],
            chosen_ids=make(case.B, case.T),
            chosen_mask=ones[1],
            rejected_ids=make(case.B, case.T)[:, ::-1],
            rejected_mask=ones[1],
        )
        reference = model_of(given.shape, given.dtype)
        trainer: Any = dpo_trainer.DPOTrainer(model, reference, tx, dpo_trainer.DPOTrainingConfig(**settings))
    else:
        trainer = peft_trainer.PeftTrainer(model, tx, peft_trainer.TrainingConfig(**settings))
        trainer, batch = (supervised if case.module == "sft" else grouped)(trainer, case, make, rows)
    trainer.train(feed(batch))
    return watch


def supervised(trainer: Any, case: Case, make: Callable[..., np.ndarray], rows: int) -> tuple[Any, Any]:
    """The trainer and its batch for fine-tuning on every token."""
    from tunix.rl import common
    from tunix.sft import peft_trainer

    def inputs(x):
        mask = x.input_tokens != 0
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": common.build_positions_from_mask(mask),
            "attention_mask": common.make_causal_attn_mask(mask),
        }

    ids = make(rows, case.S + case.T)
    batch = peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones(ids.shape, bool))
    return trainer.with_gen_model_input_fn(inputs), batch


def grouped(trainer: Any, case: Case, make: Callable[..., np.ndarray], rows: int) -> tuple[Any, Any]:
    """The trainer and its batch for a GRPO step on given completions."""
    from tunix.rl import algo_core, common
    from tunix.rl.grpo.grpo_learner import GRPOConfig

    config: Any = GRPOConfig(num_generations=case.N, beta=0.0)
    config.temperature = 1.0  # As its learner does.
    prompt, completion = np.repeat(make(case.B, case.S), case.N, axis=0), make(rows, case.T)
    batch = common.TrainExample(
        prompt_ids=prompt,
        prompt_mask=np.ones_like(prompt),
        completion_ids=completion,
        completion_mask=np.ones_like(completion),
        advantages=np.random.default_rng(0).normal(size=rows).astype(np.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    loss = functools.partial(algo_core.grpo_loss_fn, algo_config=config, pad_id=0, eos_id=2)
    trainer = trainer.with_loss_fn(lambda model, train_example: loss(model, train_example), has_aux=True)
    return trainer.with_gen_model_input_fn(lambda x: {"train_example": x}), batch


def score(case: Case, given: harness.Options) -> harness.Stopwatch:
    """The pass that its learners make to score completions."""
    from tunix.rl import common

    graph, state = nnx.split(model_of(given.shape, given.dtype))
    prompt = jnp.repeat(tokens(case, given, case.B, case.S), case.N, axis=0)
    completion = jnp.asarray(tokens(case, given, case.B * case.N, case.T))

    def call():
        jax.block_until_ready(common.compute_per_token_logps(graph, state, prompt, completion, 0, 2))

    return harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=True)


def draw(case: Case, given: harness.Options) -> harness.Stopwatch:
    """Its sampler; for N > 1 the prompts are repeated and one of N is drawn."""
    from tunix.generate import sampler

    class Words:
        """A tokenizer of one word per token."""

        def encode(self, text, **_):
            return [int(word) for word in text.split()]

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

        def bos_id(self):
            return 1

        def eos_id(self):
            return 2

        def pad_id(self):
            return 0

    s = SHAPES[given.shape]
    cache = sampler.CacheConfig(
        cache_size=case.S + case.T, num_layers=s.num_layers, num_kv_heads=s.num_kv_heads, head_dim=s.head_dim
    )
    drawer = sampler.Sampler(model_of(given.shape, given.dtype), Words(), cache)
    # One token less: it puts BOS in front.
    texts = [" ".join(map(str, row)) for row in tokens(case, given, case.B, case.S - 1)]
    texts = [text for text in texts for _ in range(case.N)]
    seeds = iter(range(1_000_000))

    def call():
        out = drawer(
            texts,
            max_generation_steps=case.T,
            max_prompt_length=case.S,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[3],
            seed=next(seeds),
        )
        reward = np.array([np.mean(np.asarray(ids) % 2 == 0) for ids in out.tokens]).reshape(case.B, case.N)
        return np.argmax(reward / 0.1 + np.random.default_rng(0).gumbel(size=reward.shape), axis=1)

    return harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=True)


def multiply(dtype: str, size: int) -> tuple[Callable[[], Any], int]:
    """The yardstick: a matrix product as the model makes it, operands and result in ``dtype``."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b).block_until_ready(), size


def run(case: Case, given: harness.Options) -> dict[str, Any]:
    """Times a case and returns its row."""
    imported = harness.age()
    watch = {"train": train, "score": score, "decode": draw}[case.work](case, given)
    yardstick = multiply(given.dtype, 64 if given.shape == "tiny" else 2048)
    return harness.report(
        case, watch, given, library="tunix", shared=False, multiply=yardstick, import_seconds=round(imported, 2)
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("peers.tunix_worker", run, CASES, argv, dtypes=DTYPES)


if __name__ == "__main__":
    main()
