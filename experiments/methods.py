"""Every public function of the library as one table, with what the tilt makes of it.

    python -m experiments.methods

writes ``docs/methods.md`` (also ``make docs``): the method, its call, whether it samples, fits, inverts, climbs to or
iterates the tilt, and its paper. Names, summaries, signatures and papers come from the code; only the classification is
written here, in `ROLES`, and a function without one is an error.
"""

import importlib
import inspect
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from experiments.common.launch import program, run_program

__all__ = ["ROLES", "public_functions", "render", "short_path"]

COVERED = (
    "tiltjax.losses",
    "tiltjax.advantages",
    "tiltjax.tilt",
    "tiltjax.samplers",
    "tiltjax.rewards.internal",
    "tiltjax.rewards.shaping",
    "tiltjax.ops.order",
    "tiltjax.train.reference",
)
"""Packages and modules whose public functions the table lists."""

MEANING = {
    "is": "the tilt itself, as weights over N candidates; another divergence in place of the KL included",
    "samples": "draws from the tilt, or from a law that tends to it",
    "fits": "maximum likelihood under the tilt: the target is the tilt, or its limit, and the policy follows",
    "inverts": "reads the reward off the log-ratio, so that no sampling and no log Z is needed",
    "climbs": "ascends reward - beta KL, whose optimum is the tilt",
    "iterates": "tilts its own last result again, by a preference or a reward that moves with it",
    "other": "learns from preferences, but its minimum is no tilt: the function says why",
    "rewards": "learns the reward that the tilt will use",
    "estimates": "a number about it or its candidates: log Z, a divergence, a temperature, a bound, a curve",
    "shapes": "a reward, an advantage or a penalty: what the tilt is tilted by, or held with",
    "part": "a piece that others are made of",
}
"""The classes, in the order in which the page explains them."""

_PHRASE = {
    "is": "is it",
    "samples": "samples it",
    "fits": "fits it",
    "inverts": "inverts it",
    "climbs": "climbs to it",
    "iterates": "iterates it",
    "other": "none of these",
    "rewards": "learns its reward",
    "estimates": "measures it",
    "shapes": "shapes it",
    "part": "part",
}

ROLES: dict[str, dict[str, str]] = {
    "tiltjax.tilt.weights": {"is": "tilt"},
    "tiltjax.tilt.partition": {
        "estimates": "log_partition leave_one_out_log_partition jackknife_log_partition delta_log_partition "
        "in_batch_log_partition"
    },
    "tiltjax.tilt.temperature": {"estimates": "beta_for_ess beta_for_kl"},
    "tiltjax.tilt.divergence": {
        "estimates": "best_of_n_kl_bound candidates_needed chi_squared chi_squared_bound soft_best_of_n_kl_bound "
        "tilt_kl tilted_reward weights_kl"
    },
    "tiltjax.tilt.tails": {"estimates": "pareto_k pareto_k_limit pareto_smooth"},
    "tiltjax.tilt.f_divergence": {"is": "f_divergence_tilt", "estimates": "f_divergence", "part": "divergence_link"},
    "tiltjax.tilt.pessimism": {"is": "pessimistic_weights", "part": "pessimistic_threshold"},
    "tiltjax.tilt.overoptimisation": {"estimates": "best_of_n_curve fit_overoptimisation peak_distance rl_curve"},
    "tiltjax.tilt.diversity": {"estimates": "distinct_n limem self_bleu"},
    "tiltjax.samplers.best_of_n": {
        "samples": "best_of_n soft_best_of_n",
        "part": "init merge merge_over update",
    },
    "tiltjax.samplers.pessimism": {"samples": "inference_time_pessimism"},
    "tiltjax.samplers.resample": {"samples": "resample", "part": "counts inverse_cdf"},
    "tiltjax.samplers.guarded": {"samples": "guarded_resample", "part": "cap_weights"},
    "tiltjax.samplers.steer": {"samples": "smc steered_denoise"},
    "tiltjax.samplers.guidance": {
        "samples": "soft_best_of_n_denoise soft_best_of_n_step",
        "part": "classifier_free_guidance classifier_guidance guidance_weight_for guided_denoiser",
    },
    "tiltjax.samplers.denoise": {"part": "ddim ddpm ddpm_path levels probability_flow reverse_kernel twisted_mean"},
    "tiltjax.samplers.continuous": {"part": "decode_queue grid_of occupancy"},
    "tiltjax.samplers.decode": {"part": "blank candidate_keys decode decoded draw"},
    "tiltjax.samplers.logits": {
        "part": "categorical categorical_and_logp greedy min_p processed support_of temper top_k top_p"
    },
    "tiltjax.losses.mle": {
        "fits": "sft_loss weighted_mle_loss tilted_mle_loss var_loss var_importance_loss best_of_n_sft_loss "
        "reward_weighted_regression_loss advantage_weighted_regression_loss",
        "part": "var_weights",
    },
    "tiltjax.losses.preference.dpo": {
        "inverts": "dpo_loss robust_dpo_loss dpop_loss dpo_nll_loss chi_po_loss implicit_reward",
    },
    "tiltjax.losses.preference.margin": {
        "inverts": "ipo_loss exo_loss",
        "other": "hinge_loss slic_loss apo_zero_loss apo_down_loss aot_loss aot_unpaired_loss discopop_loss",
    },
    "tiltjax.losses.preference.ranking": {"inverts": "plackett_luce_dpo_loss ipl_loss"},
    "tiltjax.losses.preference.reference_free": {
        "other": "simpo_loss cpo_loss orpo_loss local_reward_loss",
    },
    "tiltjax.losses.preference.tokens": {"part": "length_desensitised_logp wpo_weights"},
    "tiltjax.losses.preference.pairs": {"part": "check_smoothing gap logistic mean_logp pairs ratio_gap"},
    "tiltjax.losses.binary": {
        "inverts": "bco_loss info_nca_loss",
        "fits": "nca_loss nca_pair_loss",
        "other": "kto_loss",
        "part": "bco_shift",
    },
    "tiltjax.losses.regression": {
        "iterates": "sppo_loss rebel_loss",
        "inverts": "log_ratio_regression_loss",
    },
    "tiltjax.losses.game": {
        "iterates": "dno_loss inpo_loss magnetic_kl_loss mpo_loss nash_md_loss nash_md_surrogate_loss spin_loss",
        "climbs": "xpo_loss",
        "shapes": "self_play_reward spo_reward",
        "part": "geometric_mixture_logits",
    },
    "tiltjax.losses.reward_model": {
        "rewards": "bradley_terry_loss cost_model_loss outcome_loss plackett_luce_loss process_class_loss process_loss",
        "part": "labelled_steps",
    },
    "tiltjax.losses.process": {
        "inverts": "implicit_prm_ce_loss implicit_prm_dpo_loss implicit_prm_kto_loss implicit_prm_nca_loss "
        "implicit_process_reward implicit_q",
        "part": "aggregate_steps step_index step_reward",
    },
    "tiltjax.losses.policy_gradient": {
        "climbs": "reinforce_loss ppo_clip_loss gspo_loss cispo_loss",
        "iterates": "mdpo_loss mdloo_loss",
        "part": "aggregate value_loss",
    },
    "tiltjax.losses.denoising": {
        "fits": "denoising_loss weighted_denoising_loss",
        "climbs": "ddpo_loss",
        "estimates": "transition_kl",
        "part": "transition_logp",
    },
    "tiltjax.losses.constrained": {
        "climbs": "combined_advantage update_multiplier",
        "fits": "ptx_loss",
        "part": "init_multiplier",
    },
    "tiltjax.losses.penalties": {
        "shapes": "entropy full_vocabulary_kl kl_k1 kl_k2 kl_k3 kl_k3_corrected",
    },
    "tiltjax.advantages": {
        "shapes": "batch_whitened gae greedy_baseline group_normalised leave_one_out prime_advantage "
        "reinforce_pp_advantage reward_to_go token_reward"
    },
    "tiltjax.rewards.internal": {
        "shapes": "empo_reward self_certainty sequence_entropy_reward token_entropy_reward token_mean ttrl_reward",
        "part": "cluster_answers majority_vote semantic_entropy",
    },
    "tiltjax.rewards.shaping": {"shapes": "format_penalty length_penalty overlong_penalty repetition_penalty"},
    "tiltjax.ops.order": {"estimates": "expected_max pass_at_k pass_at_k_bound", "part": "plackett_luce_logp"},
    "tiltjax.train.reference": {"iterates": "hard_update soft_update update_reference"},
}
"""Module -> class -> its functions."""

_NEVER_SHOWN = ("where", "axis_name")


def public_functions(covered: tuple[str, ...] = COVERED) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Every public function of the covered modules, in the order of `ROLES`, as (module, name, function)."""
    names: list[str] = []
    for root in covered:
        path = getattr(importlib.import_module(root), "__path__", None)
        names += [root] if path is None else [m.name for m in pkgutil.walk_packages(path, f"{root}.") if not m.ispkg]
    place = {name: i for i, name in enumerate(ROLES)}
    for name in sorted(names, key=lambda n: place.get(n, len(place))):
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            function = getattr(module, public)
            if inspect.isfunction(function) and function.__module__ == name:
                yield name, public, function


def short_path(module: str, name: str) -> str:
    """Where a public function is found, without ``tiltjax.``: at the face of its package, else in its module.

    Args:
      module: In which it is defined.
      name: Its own.

    Example:
      >>> short_path("tiltjax.losses.preference.dpo", "dpo_loss")
      'losses.dpo_loss'
    """
    package = module.split(".")[1]
    function = getattr(importlib.import_module(module), name)
    face = importlib.import_module(f"tiltjax.{package}")
    return f"{package}.{name}" if getattr(face, name, None) is function else f"{module.partition('.')[2]}.{name}"


def render() -> str:
    """The page as Markdown.

    Raises:
      LookupError: If a function has no class in `ROLES`, or `ROLES` names one that does not exist.
    """
    known = {
        f"{module}.{name}": role
        for module, roles in ROLES.items()
        for role, names in roles.items()
        for name in names.split()
    }
    rows, family = [], None
    for module, name, function in public_functions():
        role = known.pop(f"{module}.{name}", None)
        if role is None:
            raise LookupError(f"experiments.methods.ROLES has no class for {module}.{name}")
        if module != family:
            rows.append(f"| [**{module}**](../{module.replace('.', '/')}.py) | | | |")
            family = module
        call = _call(short_path(module, name), function)
        rows.append(f"| `{call}` | {_summary(function)} | {_PHRASE[role]} | {_papers(function)} |")
    if known:
        raise LookupError(f"experiments.methods.ROLES names what does not exist: {', '.join(sorted(known))}")
    legend = "\n".join(f"* **{_PHRASE[role]}**: {text}." for role, text in MEANING.items())
    return "\n\n".join(
        [
            "# Methods",
            "One line a function, generated from the code by `make docs`; `losses.dpo_loss` is "
            "`tiltjax.losses.dpo_loss` after `import tiltjax`. All take plain arrays and return one value per prompt, "
            "candidate or token; options are keywords. Every function with a mask takes `where` (True means real), "
            "and those that reduce over candidates or prompts take `axis_name` for use under `pmap` and `shard_map`; "
            "the table leaves both out. The third column says what the function has to do with the tilt "
            "p*(y|x) = p_ref(y|x) exp(r(x,y) / beta) / Z(x):",
            legend,
            "| call | what | the tilt | source |\n| --- | --- | --- | --- |\n" + "\n".join(rows),
        ]
    ) + "\n"  # fmt: skip


def _call(name: str, function: Callable[..., Any]) -> str:
    shown, keywords = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in _NEVER_SHOWN:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            shown.append("*")
            keywords = True
        value = parameter.default
        if value is parameter.empty:
            shown.append(parameter.name)
        else:
            shown.append(f"{parameter.name}={getattr(value, '__name__', None) or repr(value)}")
    return f"{name}({', '.join(shown)})"


def _summary(function: Callable[..., Any]) -> str:
    return _cell(inspect.getdoc(function).split("\n\n")[0])  # type: ignore[union-attr]


def _papers(function: Callable[..., Any]) -> str:
    _, _, references = inspect.getdoc(function).partition("References:\n")  # type: ignore[union-attr]
    text = _cell(references.split("\n\n")[0])
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _cell(text: str) -> str:
    text = re.sub(r":math:`([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return text.replace("|", "\\|")


@program
def main() -> None:
    """Writes the page."""
    path = pathlib.Path(flags.FLAGS.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render())
    print(f"{path}: {sum(1 for _ in public_functions())} functions")


if __name__ == "__main__":
    flags.DEFINE_string("output", "docs/methods.md", "File to write.")
    run_program(main)
