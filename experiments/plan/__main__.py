"""What a train step will cost on a mesh that is not there: memory, operations, communication, and the time they take.

    python -m experiments.plan --policy=EleutherAI/pythia-6.9b --mesh=data:64,fsdp:4 --method=tilted_mle --chip=h100

compiles the real step (`tiltjax.train.step` under `tiltjax.train.sharding`) ahead of time, on shapes alone, for as many
forced host devices as the mesh has, and reads the compiled program. It writes `report.md` and `results.json`.

Policies are known by the names of `experiments.plan.shapes.SHAPES`, or read from a local ``config.json``, model
directory or GGUF file. ``--validate`` also holds the counts to XLA's own on unrolled models, and the memory to that of
steps which really run here (about 4 GB).

Bad input ends with one line and exit status 2; TILTJAX_TRACEBACK=1 shows the whole traceback.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import locked
from experiments.plan.report import render
from experiments.plan.shapes import SHAPES, policy_config
from tiltjax.analysis import CHIPS, Collective, Prediction, Shape, predict
from tiltjax.models.config import REMAT
from tiltjax.ops.checks import check_at_least
from tiltjax.train.config import field, output_field, write_text
from tiltjax.train.method import Method
from tiltjax.train.methods import get_method
from tiltjax.train.sharding import AXES, parse_mesh

__all__ = ["PlanConfig", "compile_elsewhere", "job", "predictions", "run", "validate"]

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Everything that decides a plan."""

    policy: str = field("EleutherAI/pythia-6.9b", f"One of {', '.join(SHAPES)}; or a local config.json, model or GGUF.")
    mesh: str = field("data:64,fsdp:4", "Device mesh, every size given, such as data:64,fsdp:2,tensor:2.")
    method: str = field(
        "tilted_mle",
        "A record of tiltjax.train.methods: a gradient step of it is compiled, to which rewards, advantages, old and "
        "reference log-probabilities are data.",
    )
    batch_size: int = field(256, "Prompts per step, over all devices.")
    num_candidates: int = field(
        0, "N, completions per prompt; 0 means what the record compares, 4 where it leaves that free."
    )
    prompt_tokens: int = field(256, "S, padded length of a prompt.")
    max_tokens: int = field(128, "T, padded length of a completion.")
    microbatches: int = field(1, "Parts into which a batch is cut to save memory.")
    lora_rank: int = field(0, "Rank of low-rank adapters; 0 trains all parameters.")
    remat: str = field("full", "What the backward pass computes again of each block.", choices=REMAT)
    param_dtype: str = field("float32", "Of parameters and optimizer moments.", choices=("float32", "bfloat16"))
    compute_dtype: str = field("bfloat16", "Operands of matrix products.", choices=("float32", "bfloat16"))
    chip: str = field("all", f"Chips to predict for, joined by commas: {', '.join(CHIPS)}; or all.")
    validate: bool = field(False, "Also hold the figures to what can be measured here.")
    output: str = output_field("runs/plan", "Directory of the report.")

    def __post_init__(self):
        for name in ("batch_size", "prompt_tokens", "max_tokens", "microbatches"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("num_candidates", "lora_rank"):
            check_at_least(name, getattr(self, name), 0)
        sizes = mesh_sizes(self.mesh)
        rows = sizes.get("data", 1) * sizes.get("fsdp", 1) * self.microbatches
        if self.batch_size % rows:
            raise ValueError(
                f"batch_size must be a multiple of data * fsdp * microbatches = {rows}, got {self.batch_size}"
            )
        own = _own_candidates(get_method(self.method))
        if own and self.num_candidates not in (0, own):
            raise ValueError(f"num_candidates must be {own} for {self.method}, got {self.num_candidates}")
        for name in self.chips:
            if name not in CHIPS:
                raise ValueError(f"chip must be all or some of {', '.join(CHIPS)}; got {name!r}")

    @property
    def chips(self) -> list[str]:
        """The names of ``chip``."""
        return list(CHIPS) if self.chip == "all" else self.chip.split(",")

    @property
    def shape(self) -> Shape:
        """Of the global batch."""
        N = self.num_candidates or _own_candidates(get_method(self.method)) or 4
        return Shape(self.batch_size, N, self.prompt_tokens, self.max_tokens)


def _own_candidates(record: Method) -> int:
    """How many completions of a prompt the record compares; 0 where it leaves that free."""
    free = record.cross > 1 or (len(record.draw) == 1 and record.num_candidates > 2)
    return 0 if free else record.num_candidates


def mesh_sizes(spec: str) -> dict[str, int]:
    """``"data:64,fsdp:4"`` as a mapping; no size may be left open, for there are no devices to fill it."""
    sizes = parse_mesh(spec)
    if not spec or -1 in sizes.values():
        raise ValueError(f"mesh must give every size, like data:64,fsdp:4 (axes {', '.join(AXES)}); got {spec!r}")
    return sizes


def job(config: PlanConfig) -> dict[str, Any]:
    """The settings as `experiments.plan.compile.Job` takes them."""
    model = dataclasses.replace(policy_config(config.policy), compute_dtype=config.compute_dtype, remat=config.remat)
    return {
        "model": dataclasses.asdict(model),
        "shape": dataclasses.asdict(config.shape),
        **{k: getattr(config, k) for k in ("mesh", "method", "param_dtype", "lora_rank", "microbatches")},
    }


def compile_elsewhere(work: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job in a process of its own, which has as many devices as the mesh has places.

    Raises:
      ValueError: If it fails; the message is the last line that it printed.
    """
    devices = math.prod(mesh_sizes(work["mesh"]).values())
    flags = f"--xla_force_host_platform_device_count={devices}"
    if not work.get("measure"):  # No machine code runs: the cheapest will do.
        flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "result.json")
        source.write_text(json.dumps(work))
        command = [sys.executable, "-m", "experiments.plan.compile", str(source), str(target)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"the step does not compile on {work['mesh']}: {last[-1]}")
        return json.loads(target.read_text())


def predictions(config: PlanConfig, result: dict[str, Any]) -> dict[str, Prediction]:
    """Per chip; none where the products are not those whose peak the datasheets give."""
    if config.compute_dtype != "bfloat16":
        return {}
    collectives = [Collective(**one | {"group": tuple(one["group"])}) for one in result["collectives"]]
    return {name: predict(CHIPS[name], result, collectives) for name in config.chips}


def validate() -> dict[str, list[dict[str, Any]]]:
    """Holds counted operations to XLA's on unrolled models, and planned memory to that of steps which run here."""
    wide: dict[str, Any] = {
        "num_layers": 2,
        "features": 1024,
        "mlp_features": 4096,
        "num_heads": 8,
        "head_dim": 128,
        "vocab_size": 3072,
    }
    models = {
        "GPT-NeoX, 2 layers of 1024": policy_config("mini"),
        "Llama, 2 layers of 1024": policy_config("HuggingFaceTB/SmolLM2-135M"),
    }
    flops: list[dict[str, Any]] = []
    for name, model in models.items():
        kv = 8 if model.family == "gpt_neox" else 2
        rotary = 32 if model.family == "gpt_neox" else 128
        for remat in ("none", "full"):
            changed = dataclasses.replace(model, **wide, num_kv_heads=kv, rotary_dim=rotary, remat=remat)
            work = {"model": dataclasses.asdict(changed), "shape": {"B": 4, "N": 2, "S": 64, "T": 64}, "mesh": "data:1"}
            rolled = compile_elsewhere(work)["flops"]
            flops.append({**rolled, "name": name, "remat": remat})
            if remat == "none":  # What stands in one computation with its copy, XLA does not compute again.
                unrolled = compile_elsewhere(work | {"unroll": True})["flops"]
                flops[-1] |= {"unrolled": unrolled["cost_analysis"], "counted_unrolled": unrolled["counted"]}
    memory: list[dict[str, Any]] = []
    cases = [("mini", "data:1", Shape(32, 4, 128, 128)), ("mini", "data:2,fsdp:4", Shape(64, 4, 128, 128)),
             ("HuggingFaceTB/SmolLM2-135M", "data:1", Shape(4, 2, 128, 128))]  # fmt: skip
    for policy, mesh, shape in cases:
        setting = {"model": dataclasses.asdict(policy_config(policy)), "shape": dataclasses.asdict(shape)}
        result = compile_elsewhere(setting | {"mesh": mesh, "measure": True})
        planned = result["memory"]["peak"] * result["devices"]
        memory.append({"policy": policy, "mesh": mesh, "shape": dataclasses.asdict(shape), "planned": planned,
                       "measured": result["measured"]["peak"]})  # fmt: skip
    return {"flops": flops, "memory": memory}


def run(config: PlanConfig) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    with locked(config.output) as directory:
        return _run(config, directory)


def _run(config: PlanConfig, directory: pathlib.Path) -> dict[str, Any]:
    result = compile_elsewhere(job(config))
    predicted = predictions(config, result)
    checks = validate() if config.validate else None
    chips = {name: dataclasses.asdict(p) | {"seconds": p.seconds, "serial": p.serial, "bound": p.bound}
             for name, p in predicted.items()}  # fmt: skip
    results = {"config": dataclasses.asdict(config), **result, "chips": chips, "validation": checks}
    write_text(directory / "results.json", json.dumps(results, indent=1) + "\n")
    parts = render(config, result, predicted, checks)
    write_text(directory / "report.md", "\n\n".join(parts) + "\n")
    print("\n\n".join(part for part in parts if part.startswith(("#", "|"))))
    print(f"\nreport: {directory / 'report.md'}")
    return results


@program
def main() -> None:
    """Reads the flags and runs."""
    run(from_flags(PlanConfig))


if __name__ == "__main__":
    run_program(main, PlanConfig)
