"""The cases as TRL runs them (SFTTrainer, DPOTrainer, GRPOTrainer's loss, `generate`), on random weights and tokens.

    .venv.trl/bin/python -m benchmarks.peers.trl_worker --cases=sft_8x128 --dtype=bfloat16

``--dtype``: "float32", "bfloat16" (weights and all) or "autocast" (float32 weights, bfloat16 products). Gradient
checkpointing is off, which is faster and takes more memory. Nothing is fetched from anywhere.
"""

import os

from benchmarks import harness
from benchmarks.cases import CASES, SHAPES, Case

if __name__ == "__main__":
    harness.huge_pages()

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import contextlib
import random
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

__all__ = ["DTYPES", "main", "run"]

DTYPES = ("bfloat16", "float32", "autocast")
_FIRST = 10
"""Tokens below are special or stay unused."""


def model_of(shape: str, dtype: str) -> LlamaForCausalLM:
    """A model of a named shape with random parameters."""
    s = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.features,
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        num_key_value_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        intermediate_size=s.mlp_features,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word per token, ``t10 t11 ...``, so that lengths are what a case says."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {f"t{i}": i for i in range(len(special), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel({**{s: i for i, s in enumerate(special)}, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class Laps(TrainerCallback):
    """Times the optimizer steps of a trainer and stops it when there are enough."""

    def __init__(self, given: harness.Options):
        self.watch, self.given = harness.Stopwatch(compiles=False), given

    def on_step_begin(self, *_, **__):
        """Of the base class."""
        self.watch.begin()

    def on_step_end(self, args, state, control, **_):
        """Of the base class."""
        self.watch.end()
        control.should_training_stop = self.watch.enough(self.given.repeats, self.given.budget)
        return control


def train(case: Case, given: harness.Options, folder: str) -> harness.Stopwatch:
    """Runs TRL's trainer of the case on as many batches as are timed."""
    import trl

    s, rng, laps = SHAPES[given.shape], random.Random(0), Laps(given)

    def words(n: int) -> str:
        return " ".join(f"t{rng.randrange(_FIRST, s.vocab_size)}" for _ in range(n))

    steps = given.repeats + 1
    model, tokenizer = model_of(given.shape, given.dtype), tokenizer_of(s.vocab_size)
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": given.dtype == "autocast",
        "gradient_checkpointing": False,
        "learning_rate": 2e-5,
    }
    length = case.S + case.T
    parts: dict[str, Any] = {"model": model, "processing_class": tokenizer, "callbacks": [laps]}
    if case.module == "sft":
        rows = [{"text": words(length - 1)} for _ in range(case.B * steps)]  # And its EOS.
        args = trl.SFTConfig(per_device_train_batch_size=case.B, max_length=length, **common)
        trainer = trl.SFTTrainer(args=args, train_dataset=Dataset.from_list(rows), **parts)
        wanted = (case.B, length)
    elif case.module == "dpo":
        rows = [
            {"prompt": words(case.S) + " ", "chosen": words(case.T - 1), "rejected": words(case.T - 1)}
            for _ in range(case.B * steps)
        ]
        before = case.reference == "precomputed"
        args = trl.DPOConfig(
            per_device_train_batch_size=case.B, max_length=length, precompute_ref_log_probs=before, **common
        )
        reference = None if before else model_of(given.shape, given.dtype)
        trainer = trl.DPOTrainer(ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), **parts)
        wanted = (2 * case.B, length)
    else:
        trainer, wanted = group_trainer(case, given, common, parts), None
    if wanted:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(case.B)])
        shape = tuple(batch["input_ids"].shape)
        assert shape == wanted, f"{shape} is not {wanted}"
    trainer.train()
    return laps.watch


def group_trainer(case: Case, given: harness.Options, common: dict[str, Any], parts: dict[str, Any]) -> Any:
    """TRL's GRPO trainer with the sampling taken out: the loss and the step on given completions."""
    import trl

    generator, V = torch.Generator().manual_seed(0), SHAPES[given.shape].vocab_size
    rows = case.B * case.N

    def tokens(*shape):
        return torch.randint(_FIRST, V, shape, generator=generator)

    class OnGiven(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            prompt, completion = tokens(case.B, case.S).repeat_interleave(case.N, 0), tokens(rows, case.T)
            reward = torch.randn(case.B, case.N, generator=generator)
            advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
            return {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": completion,
                "completion_mask": torch.ones_like(completion),
                "advantages": advantage.reshape(-1),
                "num_items_in_batch": torch.tensor(completion.numel()),
            }

    args = trl.GRPOConfig(
        per_device_train_batch_size=rows,
        num_generations=case.N,
        steps_per_generation=1,
        max_completion_length=case.T,
        loss_type="grpo",
        beta=0.0,
        **common,
    )
    data = Dataset.from_list([{"prompt": "t10"}] * (case.B * (given.repeats + 1)))
    return OnGiven(
        reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=data, **parts
    )


def score(case: Case, given: harness.Options, folder: str) -> harness.Stopwatch:
    """The pass that GRPO makes to score its completions."""
    common = {"output_dir": folder, "max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    common |= {"bf16": given.dtype == "autocast", "gradient_checkpointing": False}
    model, V = model_of(given.shape, given.dtype), SHAPES[given.shape].vocab_size
    trainer = group_trainer(case, given, common, {"model": model, "processing_class": tokenizer_of(V)})
    ids = torch.randint(_FIRST, V, (case.B * case.N, case.S + case.T))
    mask = torch.ones_like(ids)

    def call():
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(model, ids, mask, case.T)

    return harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=False)


def draw(case: Case, given: harness.Options, folder: str) -> harness.Stopwatch:
    """``generate``, what TRL samples with where vLLM is not; for N > 1 one of N is drawn."""
    model = model_of(given.shape, given.dtype).eval()
    ids = torch.randint(_FIRST, SHAPES[given.shape].vocab_size, (case.B, case.S))
    context = torch.autocast("cpu", torch.bfloat16) if given.dtype == "autocast" else contextlib.nullcontext()

    def call():
        with torch.inference_mode(), context:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=case.T,
                min_new_tokens=case.T,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=case.N,
            )
        assert out.shape == (case.B * case.N, case.S + case.T), out.shape
        completion = out[:, case.S :].reshape(case.B, case.N, case.T)
        reward = (completion % 2 == 0).float().mean(-1)
        return torch.multinomial(torch.softmax(reward / 0.1, -1), 1)

    return harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=False)


def multiply(dtype: str, size: int) -> tuple[Callable[[], Any], int]:
    """The yardstick: a matrix product in torch's own fast path for the operands."""
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    a, b = torch.rand(size, size).to(kind), torch.rand(size, size).to(kind)
    out = torch.empty(size, size, dtype=kind)
    return lambda: torch.mm(a, b, out=out), size


def run(case: Case, given: harness.Options) -> dict[str, Any]:
    """Times a case and returns its row."""
    imported = harness.age()
    disable_progress_bars()
    how = {"train": train, "score": score, "decode": draw}[case.work]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        watch = how(case, given, folder)
    yardstick = multiply(given.dtype, 64 if given.shape == "tiny" else 2048)
    return harness.report(
        case, watch, given, library="trl", shared=False, multiply=yardstick, import_seconds=round(imported, 2)
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("peers.trl_worker", run, CASES, argv, dtypes=DTYPES)


if __name__ == "__main__":
    main()
