"""A token tree small enough to know everything: soft values, projections, preferences and search, exactly.

`world` holds the representation, `soft` backward induction, `projection` the nearest policies of a class, `preferences`
Bradley-Terry data and its maximum likelihood, `intrinsic` reinforcement learning from internal feedback, `search` what
search procedures return, and `newton` the minimiser behind them. Pure functions in the precision they are given:
under ``jax.enable_x64(True)`` they are exact to about 1e-13.
"""

from tiltjax.exact.tree.intrinsic import certainty, rlif_objective, rlif_optimum
from tiltjax.exact.tree.newton import Minimum, minimise
from tiltjax.exact.tree.preferences import (
    expected_wins,
    fit_dpo,
    fit_local,
    fit_reward,
    mean_pair_loss,
    sample_wins,
    strongly_connected,
)
from tiltjax.exact.tree.projection import (
    Projection,
    log_linear,
    memoryless,
    memoryless_marginals,
    memoryless_projection,
    project,
)
from tiltjax.exact.tree.search import beam_search, blockwise_best_of_n_law, lookahead_search, uct_search
from tiltjax.exact.tree.soft import (
    implicit_values,
    max_values,
    mean_values,
    regularised_reward,
    soft_values,
    tilted_policy,
)
from tiltjax.exact.tree.world import (
    Levels,
    completions,
    conditionals,
    horizon,
    path_sums,
    random_policy,
    sequence_logp,
    total_reward,
)

__all__ = [
    "Levels",
    "Minimum",
    "Projection",
    "beam_search",
    "blockwise_best_of_n_law",
    "certainty",
    "completions",
    "conditionals",
    "expected_wins",
    "fit_dpo",
    "fit_local",
    "fit_reward",
    "horizon",
    "implicit_values",
    "log_linear",
    "lookahead_search",
    "max_values",
    "mean_pair_loss",
    "mean_values",
    "memoryless",
    "memoryless_marginals",
    "memoryless_projection",
    "minimise",
    "path_sums",
    "project",
    "random_policy",
    "regularised_reward",
    "rlif_objective",
    "rlif_optimum",
    "sample_wins",
    "sequence_logp",
    "soft_values",
    "strongly_connected",
    "tilted_policy",
    "total_reward",
    "uct_search",
]
