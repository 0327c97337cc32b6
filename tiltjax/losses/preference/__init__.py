"""Direct alignment on preferences: losses that invert the tilt, so that the policy is its own reward model.

The family's public names, whichever module they live in: `dpo` (logistic losses of the implicit reward), `margin`
(other functions of the margin), `reference_free`, `ranking` (rankings and segments), and `tokens` (what a pair weighs,
and what it counts, token by token).
"""

from tiltjax.losses.preference.dpo import (
    chi_po_loss,
    divergence_link,
    dpo_loss,
    dpo_nll_loss,
    dpop_loss,
    implicit_reward,
    robust_dpo_loss,
)
from tiltjax.losses.preference.margin import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    slic_loss,
)
from tiltjax.losses.preference.ranking import ipl_loss, plackett_luce_dpo_loss
from tiltjax.losses.preference.reference_free import cpo_loss, local_reward_loss, orpo_loss, simpo_loss
from tiltjax.losses.preference.tokens import length_desensitised_logp, wpo_weights

__all__ = [
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "chi_po_loss",
    "cpo_loss",
    "discopop_loss",
    "divergence_link",
    "dpo_loss",
    "dpo_nll_loss",
    "dpop_loss",
    "exo_loss",
    "hinge_loss",
    "implicit_reward",
    "ipl_loss",
    "ipo_loss",
    "length_desensitised_logp",
    "local_reward_loss",
    "orpo_loss",
    "plackett_luce_dpo_loss",
    "robust_dpo_loss",
    "simpo_loss",
    "slic_loss",
    "wpo_weights",
]
