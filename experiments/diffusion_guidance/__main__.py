"""Guidance, soft best-of-N and the tilt on mixtures whose every law is known: which of them agree, and where.

    python -m experiments.diffusion_guidance --output=runs/diffusion_guidance

One Gaussian (p(x) = N(0, 2), p(x | c) = N(0, 1)), a mixture of three on the line and one in the plane, under the
variance-preserving noise. Whole laws come from closed forms and from grids, in float64; the library's samplers (DDPM,
DDIM, probability flow, soft best-of-N a step, sequential Monte Carlo) are held to them. Writes `report.md` with four
plots, every fact with its verdict, and `results.json`.

Expected: no fact FAILED (exit status 0). At scale 3 guidance ends in variance 0.25 (flow), 0.3875 (DDPM), and the tilt
has 0.5; N candidates a step act as guidance (1 - 1/N) scale; twice the exponent makes up for N = 2. About three minutes
on two cores. Bad input ends with one line and exit status 2.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import open_run, overwrite_field
from experiments.diffusion_guidance import report, world
from experiments.theory.claims import FAILED, Claim, at_most, equal, holds
from tiltjax.ops.checks import check_at_least
from tiltjax.train.config import field, output_field, seed_field, write_text
from tiltjax.train.streams import root_key

__all__ = ["GuidanceConfig", "judge", "run"]


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Everything that decides a run."""

    num_steps: int = field(200, "Reverse steps of the finest chains, at least 50.")
    num_samples: int = field(20_000, "Samples per sampler, at least 200.")
    seed: int = seed_field("Of the samplers; the laws have none.")
    output: str = output_field("runs/diffusion_guidance")
    overwrite: bool = overwrite_field()
    quick: bool = field(False, "Few steps and samples, to see in seconds that all stages run; tolerances are wide.")

    def __post_init__(self):
        check_at_least("num_steps", self.num_steps, 50)
        check_at_least("num_samples", self.num_samples, 200)
        check_at_least("seed", self.seed, 0)


def judge(results: dict[str, Any], *, quick: bool) -> list[Claim]:
    """Every fact of the run with its verdict; ``quick`` widens what depends on the number of steps and samples."""
    return [
        *_gaussian_facts(results["gaussian"], wide=3.0 if quick else 1.0),
        *_finite_facts(results["finite"], wide=3.0 if quick else 1.0),
        *_line_facts(results["line"], wide=3.0 if quick else 1.0),
        *_particle_facts(results["particles"], wide=3.0 if quick else 1.0),
    ]


def _gaussian_facts(g: dict[str, Any], *, wide: float) -> list[Claim]:
    spread = wide * 4 * np.sqrt(2 / g["num_samples"])  # Four standard errors of a normal variance, relative.
    return [
        equal("Guidance by DDPM of many steps: (2 - 2^(2 - 2g)) / (2g - 1)", "variance at scale g = 3, K to infinity",
              g["sde_limit"], 0.3875, rtol=4e-3 * wide),
        equal("Guidance by the probability flow: 2^(1 - g)", "variance at scale 3, K to infinity", g["ode_limit"], 0.25,
              rtol=4e-3 * wide),
        equal("The tilt p(x) p(c | x)^g itself: 2 / (g + 1)", "variance at scale 3, on the grid", g["tilt_grid"], 0.5,
              rtol=1e-9),
        holds("Classifier-free guidance samples the tilt it is named after", "variance at scale 3: DDPM, flow, tilt",
              f"{g['sde_limit']:.4f}, {g['ode_limit']:.4f}, {g['tilt_grid']:.4f}", "three different numbers",
              g["ode_limit"] < g["sde_limit"] - 0.05 < g["tilt_grid"] - 0.1, verdict="refuted"),
        at_most("The three agree at scale 0 and at scale 1", "largest difference of the closed forms there",
                g["agree"], 1e-12, verdict="sharpened"),
        equal("The library's DDPM with guidance", f"sample variance, {g['num_samples']} samples", g["sde_sample"],
              g["sde_recursion"], rtol=spread),
        equal("The library's probability flow with guidance", "sample variance", g["ode_sample"], 0.25,
              rtol=spread + 0.01 * wide),
        equal("Soft best-of-infinity with odds p(c | x') draws from p(x | c), at any number of steps: Doob's transform",
              "variance at scale 1, 20 steps", g["doob"], 1.0, rtol=1e-6),
        equal("Soft best-of-infinity with odds p(c | x')^3 tends to guidance by DDPM, and not to the tilt",
              "variance at scale 3, K to infinity", g["chain_limit"], 0.3875, rtol=4e-3 * wide),
    ]  # fmt: skip


def _finite_facts(f: dict[str, Any], *, wide: float) -> list[Claim]:
    out = [
        holds("Soft best-of-N at every step achieves guidance at the exponent that it is given, for fixed N",
              "variance at scale 3, N = 2, K to infinity", f["limit"]["2"], "not 0.3875",
              f["limit"]["2"] > 0.6, verdict="refuted"),
    ]  # fmt: skip
    for n in (2, 4, 8):
        out.append(equal("N candidates of a small step guide as (1 - 1/N) times the exponent",
                         f"displacement over that of the gradient, N = {n}", f["displacement"][str(n)], 1 - 1 / n,
                         rtol=1e-3, verdict="sharpened"))  # fmt: skip
    for n in (2, 4, 8):
        out.append(equal("So the chain ends in the variance of guidance at (1 - 1/N) g",
                         f"variance at scale 3, N = {n}, K to infinity", f["limit"][str(n)], f["law"][str(n)],
                         rtol=0.02 * wide, verdict="sharpened"))  # fmt: skip
    corrected = f["corrected_limit"]["2"]
    return [
        *out,
        equal("The exponent g N / (N - 1) makes up for it: two candidates a step are guidance by DDPM",
              "variance at scale 3, N = 2, exponent 6, K to infinity", corrected, 0.3875, rtol=0.03 * wide,
              verdict="sharpened"),
        equal("From the conditional kernel, with p(c | x')^w, the scale is 1 + (1 - 1/N) w: at w = 2, N = 2 it is 2",
              "variance, K to infinity", f["conditional_limit"], f["conditional_law"], rtol=0.02 * wide,
              verdict="sharpened"),
        at_most("The library's sampler draws from this law, for every N, with and without correction",
                "largest relative error of a sample variance", f["worst"], wide * f["tolerance"]),
    ]  # fmt: skip


def _line_facts(m: dict[str, Any], *, wide: float) -> list[Claim]:
    tv = m["tv"]
    return [
        holds("On a mixture, too, guidance is no tilt", "TV to the tilt at scale 4: DDPM, flow",
              f"{tv['sde']:.3f}, {tv['ode']:.3f}", "> 0.1, and the flow further", 0.1 < tv["sde"] < tv["ode"],
              verdict="confirmed"),
        at_most("The chain tilted by p_t(c | x)^4 is guidance by DDPM", "TV between the two laws", tv["chain_sde"],
                0.03 * wide),
        at_most("The chain twisted by the soft value h_t = E[p(c | x_0)^4 | x_t] ends in the tilt, at any number of "
                "steps", "TV to the tilt", tv["soft_value"], 1e-5),
        at_most("At scale 1 both are the conditional law", "TV of the chain tilted by p_t(c | x) to p(x | c)",
                tv["scale_one"], 1e-6),
        equal("1 / p(c | x) is a martingale at scale 1: its mean stays 1 / p(c)", "E[1 / p(c | x)] at scale 1",
              m["inverse"]["1.0"], 1 / m["class_probability"], rtol=1e-5),
        holds("Above scale 1 its mean falls towards 1: guidance forgets what is unlikely",
              "E[1 / p(c | x)] at scales 1.5, 2, 3",
              ", ".join(f"{m['inverse'][s]:.4f}" for s in ("1.5", "2.0", "3.0")), "falling to 1",
              m["inverse"]["1.0"] > m["inverse"]["1.5"] > m["inverse"]["2.0"] > m["inverse"]["3.0"] > 1,
              verdict="sharpened"),
    ]  # fmt: skip


def _particle_facts(p: dict[str, Any], *, wide: float) -> list[Claim]:
    out = []
    for name, found in p["estimates"].items():
        out.append(equal(f"Sequential Monte Carlo has an unbiased Z: {name}", "mean of Z-hat over Z",
                         found["mean"], 1.0, atol=wide * (4 * found["error"] + 0.015)))  # fmt: skip
    best, plain = p["estimates"]["soft value, twisted proposals"], p["estimates"]["importance sampling"]
    return [
        *out,
        holds("Proposals twisted by the exact soft value make the weights nearly equal",
              "deviation of Z-hat / Z: twisted, no steering",
              f"{best['deviation']:.4f}, {plain['deviation']:.4f}", "less than half",
              best["deviation"] < plain["deviation"] / 2),
    ]  # fmt: skip


def run(config: GuidanceConfig) -> tuple[dict[str, Any], list[Claim]]:
    """The whole job; returns what it writes to ``results.json``, and the judged facts."""
    with open_run(config, resume=False) as held:
        held.begin()
        return _run(config, held.directory)


def _run(config: GuidanceConfig, directory: pathlib.Path) -> tuple[dict[str, Any], list[Claim]]:
    num_steps, num_samples = (24, 1000) if config.quick else (config.num_steps, config.num_samples)
    keys = jax.random.split(root_key(config.seed), 4)
    stages = {
        "gaussian": lambda: world.gaussian(keys[0], num_steps, num_samples),
        "finite": lambda: world.finite(keys[1], num_steps, num_samples),
        "line": lambda: world.line(num_steps),
        "particles": lambda: world.particles(keys[2], num_steps, 24 if config.quick else 200),
        "plane": lambda: world.plane(keys[3], num_steps, min(num_samples, 1200)),
    }
    results: dict[str, Any] = {"num_steps": num_steps, "num_samples": num_samples}
    with tqdm(stages.items(), desc="stages", disable=None) as bar:
        for name, stage in bar:
            bar.set_postfix_str(name)
            results[name] = stage()
    facts = judge(results, quick=config.quick)
    report.write(directory, config, results, facts)
    results["facts"] = [dataclasses.asdict(fact) for fact in facts]
    write_text(directory / "results.json", json.dumps(report.plain(results), indent=1) + "\n")
    return results, facts


@program
def main() -> bool:
    """Reads the flags and runs; the exit status is 1 if a fact fails."""
    _, facts = run(from_flags(GuidanceConfig))
    return any(fact.verdict == FAILED for fact in facts)


if __name__ == "__main__":
    run_program(main, GuidanceConfig)
