"""The paths that a user walks, on SmolLM2-135M, in the types and with the adapters that are the defaults: `make smoke`.

    python -m tests.smoke [--only=rloo,plan] [--workers=2] [--keep]

Tests use tiny policies in float32 and 8 fake devices. These jobs use what a program uses when nobody says otherwise:
the real policy, bfloat16 operands, low-rank adapters, one device. Each takes two steps of a record and must end with
finite numbers. Jobs are listed in `JOBS`; every source of candidates and every family of records is there, which
`tests/smoke_test.py` checks. Programs are compiled with little optimisation, as in tests: it is the same semantics.
Compiled programs are shared between the jobs of a run, and never with another run.
`command` runs all 30 layers; the other jobs run the first `LAYERS` of them, with `--all_layers` all: each
layer is unrolled in decoding and compiled anew for every record.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.compiler import quick_flags

__all__ = ["JOBS", "METHODS", "main"]

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = 2
"""Layers of SmolLM2-135M in the jobs that run a part of it."""

SIZES: dict[str, Any] = {"num_prompts": 4, "num_eval_prompts": 4, "num_candidates": 4, "max_tokens": 4, "steps": 2}
SIZES |= {"batch_size": 2, "sample_batch": 2, "checkpoint_every": 1}

METHODS: dict[str, dict[str, Any]] = {
    "rloo": {"mask_truncated": True},
    "remax": {},
    "spo": {},
    "xpo": {},
    "nash_md": {},
    "dpo_nll": {},
    "online_kto": {},
    "online_tilted_mle": {},
    "prime": {"desirable_above": 0.5},
    "empo": {},
    "self_certainty": {},
    "ppo_ptx": {"corpus": "corpus"},
    "spin": {"demonstrations": "answer", "steps": 4},
    "safe_rlhf": {"cost": "brevity"},
}
"""Records, and what each needs: all sources, families and kinds of state are among them."""

PROMPTS = [f"I {seen} and" for seen in ("saw the film", "ate the soup", "met the band", "read the book",
                                        "rode the bike", "took the road", "wore the coat", "fed the bird")]  # fmt: skip


def check_finite(value: Any, name: str = "results") -> None:
    """Raises ValueError, with the name, where a number of nested results is not finite."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_finite(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            check_finite(part, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_metrics(folder: pathlib.Path, lines: int) -> None:
    """Raises ValueError unless the run has logged that many lines of finite metrics."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(found) != lines:
        raise ValueError(f"{folder}: metrics.jsonl must have {lines} lines, got {len(found)}")
    check_finite(found, "metrics")


def _inputs(folder: pathlib.Path) -> dict[str, str]:
    """Files that the jobs read: prompts of one length, with an answer each, and a corpus."""
    rows = [{"prompt": prompt, "answer": " it was good."} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {"prompts": str(folder / "prompts.jsonl"), "corpus": str(folder / "corpus.jsonl")}


def _policy(folder: pathlib.Path) -> str:
    """The directory of the policy that `main` has cut, or the whole policy."""
    return str(folder.parent / "policy") if (folder.parent / "policy").exists() else "smollm2"


def cut_policy(folder: pathlib.Path, layers: int) -> None:
    """Writes the first layers of the default policy, its tokenizer and its type, as a Hugging Face directory."""
    import dataclasses

    import jax

    from tiltjax.data import text
    from tiltjax.models import pretrained

    source = "smollm2"
    model = pretrained.load(source)
    model.blocks = jax.tree.map(lambda x: x[:layers], model.blocks)
    model.config = dataclasses.replace(model.config, num_layers=layers)
    pretrained.save(model, folder, source=source, tokenizer=text.load_tokenizer(source))


def _align_config(folder: pathlib.Path, name: str, **settings: Any) -> Any:
    from experiments.align.config import AlignConfig

    files = _inputs(folder)
    if "corpus" in settings:
        settings["corpus"] = files["corpus"]
    own = {"policy": _policy(folder), "prompts": files["prompts"], "output": str(folder / name)}
    return AlignConfig(**own | SIZES | settings)


@functools.cache
def _world(folder: pathlib.Path) -> Any:
    """Policy, tokenizer, prompts and reward, loaded once for the records that a process runs."""
    from tiltjax.align.session import prepare

    return prepare(_align_config(folder, "session", method="soft_best_of_n"), folder / "session")


def record(folder: pathlib.Path, name: str, **settings: Any) -> None:
    """Two steps of a record by the engine of `experiments.align`."""
    import dataclasses

    from tiltjax.align.fit import tune
    from tiltjax.align.rounds import improve
    from tiltjax.train.methods import get_method

    method = settings.pop("method", name)
    config = _align_config(folder, name, method=method, **settings)
    directory = pathlib.Path(config.output)
    session = dataclasses.replace(_world(folder), settings=config, directory=directory)
    if config.in_rounds:
        improve(session)
        check_metrics(directory, get_method(method).rounds or config.steps)
    else:
        tune(session, session.rollout("train", session.model, name="train")[0])
        check_metrics(directory, config.steps)


def align(folder: pathlib.Path, name: str, **settings: Any) -> None:
    """All of `experiments.align`: estimates, a fit, evaluation, report and export."""
    from experiments.align import __main__ as align

    config = _align_config(folder, name, **settings)
    check_finite(align.run(config))
    for file in ("report.md", "hf/model.safetensors", "hf/tokenizer.json"):
        if not (pathlib.Path(config.output) / file).exists():
            raise FileNotFoundError(f"{config.output}: there is no {file}")


def learned_reward(folder: pathlib.Path) -> None:
    """Reward models of two kinds, one of them as the reward of `experiments.align`."""
    from experiments.reward_model import __main__ as reward_model

    names = ("num_prompts", "num_eval_prompts", "num_candidates", "max_tokens", "steps", "batch_size", "sample_batch")
    sizes = {name: SIZES[name] for name in names}
    config = reward_model.RewardConfig(
        kinds="global,outcome",
        policy=_policy(folder),
        prompts=_inputs(folder)["prompts"],
        output=str(folder / "reward_models"),
        **sizes,
    )
    check_finite(reward_model.run(config))
    align(folder, "by_model", method="tilted_mle", reward=f"model:{folder / 'reward_models' / 'global' / 'model'}")


def online(folder: pathlib.Path) -> None:
    """Both tasks of `experiments.online`."""
    from experiments.online import __main__ as online

    sizes = {name: SIZES[name] for name in ("num_prompts", "num_eval_prompts", "num_candidates", "steps", "batch_size")}
    tasks = {"prompts": _inputs(folder)["prompts"], "proxy": "sentiment", "gold": "length?target=3"}
    few = {"puzzle_candidates": 4, "sentiment_candidates": 4, "reference_draws": 1, "sample_batch": 4}
    short = {"puzzle_tokens": 4, "sentiment_tokens": 4, "checkpoint_every": 2}
    config = online.OnlineConfig(
        tasks="puzzles,sentiment",
        methods="rloo",
        policy=_policy(folder),
        output=str(folder / "online"),
        **sizes,
        **tasks,
        **few,
        **short,
    )
    check_finite(online.run(config))


def diffusion(folder: pathlib.Path, name: str, *flags: str) -> None:
    """A diffusion experiment with all of its stages."""
    command(folder, name, f"experiments.diffusion_{name}", "--quick", *flags)
    check_finite(json.loads((folder / name / "results.json").read_text()))


def digits(folder: pathlib.Path) -> None:
    """A denoiser, and the experiment that tunes it."""
    diffusion(folder, "digits")
    diffusion(folder, "reward", f"--denoiser={folder / 'digits'}")


def command(folder: pathlib.Path, name: str, module: str, *flags: str) -> None:
    """A program as a user starts it; ChildProcessError with the end of what it printed, if it fails."""
    words = [sys.executable, "-m", module, f"--output={folder / name}", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(words[1:])}: status {done.returncode}\n{done.stderr[-2000:]}")


def notebook(folder: pathlib.Path, name: str, *, exact: bool = True) -> None:
    """Every cell of a notebook runs and shows what the committed one shows: the same text where ``exact``, or as much.

    Numbers of a policy depend on the machine and on how its programs are compiled. The policy is that of `_policy`.
    """
    import nbclient
    import nbformat

    path = ROOT / "notebooks" / f"{name}.ipynb"
    content = nbformat.read(path, as_version=4)
    before = [_shown(cell, exact) for cell in content.cells]
    for cell in content.cells:
        cell.source = cell.source.replace('"smollm2"', repr(_policy(folder)))
    nbclient.NotebookClient(content, timeout=300, kernel_name="python3").execute(cwd=path.parent)
    for cell in content.cells:  # Progress and log lines are not kept with a notebook.
        kept = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        cell.update({"outputs": kept} if "outputs" in cell else {})
    after = [_shown(cell, exact) for cell in content.cells]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            raise ValueError(f"{path.name}: cell {i} must show {old}, got {new}")
    if not any("image/png" in kinds for kinds in after):
        raise ValueError(f"{path.name}: must show a picture, got none")


def _shown(cell: Any, exact: bool) -> list[str]:
    """What a cell shows, without the pixels: types of data, and text as it is, or the number of its lines."""
    found: list[str] = []
    for output in cell.get("outputs", []):
        kinds = [kind for kind in output.get("data", {}) if kind != "text/plain"]
        text = output.get("text")
        found += kinds if text is None else [text if exact else f"{text.count(chr(10))} lines"]
    return found


def _plan(folder: pathlib.Path) -> None:
    """A step of the default policy, compiled for four devices."""
    size = ("--batch_size=8", "--prompt_tokens=16", "--max_tokens=16", "--lora_rank=16")
    command(folder, "plan", "experiments.plan", "--policy=HuggingFaceTB/SmolLM2-135M", "--mesh=data:2,fsdp:2", *size)


def _readme(folder: pathlib.Path) -> None:
    """The command of README, cut down; all that it draws has one shape, which is compiled once."""
    sizes = [f"--{name}={value}" for name, value in (SIZES | {"batch_size": 4, "sample_batch": 4}).items()]
    command(folder, "command", "experiments.align", "--method=rloo", *sizes)


JOBS: dict[str, Callable[[pathlib.Path], None]] = {
    "command": _readme,
    "notebook_align": lambda folder: notebook(folder, "align", exact=False),
    "guidance": lambda folder: diffusion(folder, "guidance"),
    "digits": digits,
    "online": online,
    "learned_reward": learned_reward,
    "all_parameters": lambda folder: record(folder, "all_parameters", method="rloo", lora_rank=0),
    **{name: functools.partial(record, name=name, **settings) for name, settings in METHODS.items()},
    "plan": _plan,
    "notebook_losses": lambda folder: notebook(folder, "losses"),
    "notebook_diffusion": lambda folder: notebook(folder, "diffusion"),
    "notebook_kernels": lambda folder: notebook(folder, "kernels", exact=False),
}
"""Name -> what to run in a folder of the worker's own; long jobs first."""


def _seconds() -> np.ndarray:
    """Of the clock, and of the processors that this process and its children have used."""
    return np.array([time.monotonic(), sum(os.times()[:4])])


def _run(name: str, folder: str) -> tuple[str, np.ndarray, str]:
    """``(name, seconds, traceback or "")`` of a job, in a worker."""
    start, printed = _seconds(), io.StringIO()
    place = pathlib.Path(folder) / str(os.getpid())
    place.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            JOBS[name](place)
    except BaseException:
        return name, _seconds() - start, f"{printed.getvalue()[-2000:]}\n{traceback.format_exc()}"
    return name, _seconds() - start, ""


def _start_worker() -> None:
    from experiments.common.launch import prepare_process

    prepare_process()


def main() -> int:
    """Runs the jobs that the command line names; the status is 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.smoke", description="Walks the real paths of every program.")
    parser.add_argument("--only", default="", help=f"jobs with commas between: {', '.join(JOBS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--all_layers", action="store_true", help="run every job on the whole policy")
    parser.add_argument("--keep", action="store_true", help="keep what the jobs write, and say where")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(JOBS)
    if unknown := sorted(set(names) - set(JOBS)):
        parser.error(f"unknown job {', '.join(unknown)}; there are {', '.join(JOBS)}")
    os.environ["XLA_FLAGS"] = quick_flags()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    folder = tempfile.mkdtemp(prefix="tiltjax-smoke-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    failed, start = [], time.monotonic()
    if not options.all_layers:
        cut_policy(pathlib.Path(folder) / "policy", LAYERS)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=spawn, initializer=_start_worker) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_run, name, folder) for name in names]):
            name, seconds, reason = done.result()
            print(
                "{:6} {:20} {:6.1f} s, {:6.1f} s of CPU".format("FAILED" if reason else "ok", name, *seconds),
                flush=True,
            )
            if reason:
                print(reason, flush=True)
                failed.append(name)
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed in {time.monotonic() - start:.0f} s")
    if options.keep:
        print(folder)
    else:
        import shutil

        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
