"""Tilt a language model towards a reward: at test time (soft best-of-N) and in its weights.

    python -m experiments.align --output=runs/align

draws N candidates per prompt from the reference policy, scores them, estimates log Z and the effective sample size,
fits the tilted distribution, and evaluates on held-out prompts beside what theory predicts. It writes `report.md` with
plots and samples, `results.json`, `metrics.jsonl`, TensorBoard events, Orbax checkpoints and a Hugging Face export. The
export stops where the policy stops (it has all its end ids, generation_config.json and chat template) and is of the
type that the policy's config.json declares, float32 where it declares none.

Expected at the default settings (SmolLM2-135M, VADER sentiment): what docs/align/report.md shows, to the draw of the
candidates; the interval of the tuned policy's gain excludes 0. Two to four minutes on two cores.

`--method=rloo`, or the name of any record of `tiltjax.train.methods`, learns in rounds of fresh candidates. Some need
more than prompts and a reward:

    --method=spin --demonstrations=answer         a column of the prompts, or a file with completions of them (sft too)
    --method=ppo_ptx --corpus=text.jsonl          text that must not be forgotten
    --method=safe_rlhf --cost=model:runs/reward/cost/model    a cost, above 0 where a completion harms
    --method=online_kto --desirable_above=0.5     a threshold that makes the reward a binary label

On several hosts, the same command on each, and a directory that all of them see (under SLURM, Open MPI, GKE and on TPU
pods the last three flags are found by themselves):

    python -m experiments.align --output=/shared/run --resume --coordinator=host0:8476 --num_processes=2 --process_id=0

Bad input ends with one line and exit status 2; TILTJAX_TRACEBACK=1 shows the whole traceback.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import reporting
from experiments.align_config import FREE, HOW, UNTRAINED, AlignConfig, resolved
from experiments.align_fit import tune
from experiments.align_law import described, share_cut
from experiments.align_online import improve
from experiments.align_world import World, prepare
from experiments.launch import program, run_program
from experiments.run_directory import open_run
from tiltjax.data import text
from tiltjax.data.candidates import Candidates
from tiltjax.models import pretrained
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import sequence_logp
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.tilt.temperature import beta_for_ess
from tiltjax.train import distributed, evaluate
from tiltjax.train.config import from_flags
from tiltjax.train.distributed import Hosts
from tiltjax.train.metrics import bootstrap_interval
from tiltjax.train.streams import stream

_LOG = logging.getLogger("experiments.align")  # Not "__main__", whose lines are not shown.


def warn_of_collapse(config: AlignConfig, reward: np.ndarray, ess: np.ndarray) -> None:
    """One line where the weights rest on a few candidates, with the beta that would restore them."""
    if np.mean(ess) < 0.1 * config.num_candidates:
        wanted = float(np.mean(beta_for_ess(jnp.asarray(reward), ess=0.25 * config.num_candidates)))
        _LOG.warning(
            "weights have collapsed: mean effective sample size %.1f of %d; --%s=%.3g would give a quarter of N",
            np.mean(ess), config.num_candidates, "report_beta" if config.in_rounds else "beta", wanted,
        )  # fmt: skip


def run(config: AlignConfig) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    with open_run(config, free=(*FREE, *HOW)) as held:
        directory = held.directory
        distributed.by_main(lambda: _LOG.info(resolved(config)))
        world = prepare(config, directory)
        held.begin(world.parts)  # Not before: input that is refused leaves no run behind.
        drawn, _ = world.rollout("train", world.model, name="train")
        reward = np.asarray(drawn.reward)
        estimates = evaluate.estimate(reward, beta=config.report_beta)
        warn_of_collapse(config, reward, estimates.ess)
        tuned = improve(world) if config.in_rounds else tune(world, drawn)
        held_out, texts = world.rollout("heldout", world.model, name="heldout")
        results, samples = compare(world, held_out, texts, tuned)
        if config.method != UNTRAINED:
            pretrained.save(tuned, directory / "hf", source=config.policy, tokenizer=world.tokenizer, overwrite=True)
        write = functools.partial(reporting.write, reward=reward, train=estimates)
        distributed.by_main(lambda: write(directory, config, results, samples))
    return results


_soft_best_of_n = jax.jit(soft_best_of_n)


def compare(world: World, held_out: Candidates, texts: list[list[str]], tuned: Transformer) -> tuple[dict, list]:
    """Reference, soft best-of-N, theory and the tuned policy on the held-out prompts."""
    config, beta = world.config, world.config.report_beta
    reward = np.asarray(held_out.reward)
    theory = evaluate.estimate(reward, beta=beta)
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= max(1, config.num_candidates // 2)]
    points = {
        "reference": [evaluate.policy_point("reference", reward, np.zeros_like(reward))],
        "soft_best_of_n": evaluate.soft_best_of_n_frontier(reward, beta=beta, ns=ns),
        "best_of_n": evaluate.best_of_n_frontier(reward, ns=ns),
        "tilt": evaluate.tilt_frontier(reward, betas=np.geomspace(beta / 8, beta * 32, 17).tolist()),
    }
    picked = _soft_best_of_n(stream(config.seed, "soft best-of-n"), jnp.asarray(reward), beta=beta)
    samples = [
        {
            "prompt": text.prompt_text(row.prompt),
            "reference": (texts[i][0], float(reward[i, 0])),
            f"soft best-of-{config.num_candidates}": (texts[i][int(picked[i])], float(reward[i, int(picked[i])])),
        }
        for i, row in enumerate(world.rows["heldout"])
    ]
    results: dict[str, Any] = {
        "settings": resolved(config),
        **{name: getattr(config, name) for name in ("beta", "learning_rate", "report_beta")},
        "log_z": bootstrap_interval(theory.log_z_jackknife),
        "optimum": bootstrap_interval(beta * theory.log_z_jackknife),
        "tilted_reward": bootstrap_interval(theory.tilted_reward),
        "tilt_kl": bootstrap_interval(theory.tilt_kl),
        "ess": bootstrap_interval(theory.ess),
        "points": points,
        "law": described(config, evaluation=True),
        "truncated": {"reference": share_cut(held_out, text.end_ids(world.tokenizer))},
    }
    if config.method != UNTRAINED:
        sampled, tuned_texts = world.rollout("heldout-tuned", tuned, name="heldout tuned")
        results["truncated"]["tuned"] = share_cut(sampled, text.end_ids(world.tokenizer))
        logp = np.asarray(sequence_logp(sampled.old_token_logp, sampled.completion_mask))
        ref_logp = world.ref_logp(sampled, "score tuned", temperature=config.eval_temperature)
        log_ratio, tuned_reward = logp - ref_logp, np.asarray(sampled.reward)
        points["tuned"] = [evaluate.policy_point(config.method, tuned_reward, log_ratio)]
        results["improvement"] = bootstrap_interval(tuned_reward.mean(1) - reward.mean(1))
        results["objective"] = bootstrap_interval((tuned_reward - beta * log_ratio).mean(1))
        for i, sample in enumerate(samples):
            sample["tuned"] = (tuned_texts[i][0], float(tuned_reward[i, 0]))
    return results, samples


@program
def main() -> None:
    """Reads the flags, joins the other hosts and runs."""
    config = from_flags(AlignConfig)
    distributed.initialize(from_flags(Hosts))
    with distributed.ends_with_the_others():
        run(config)


if __name__ == "__main__":
    run_program(main, AlignConfig, Hosts)
