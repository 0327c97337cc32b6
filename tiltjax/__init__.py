"""tiltjax: every way of aligning a generative model is one exponential tilt of a reference distribution.

The tilt by a reward ``r`` at a temperature ``beta``::

    p*(y | x) = p_ref(y | x) exp(r(x, y) / beta) / Z(x),    log Z(x) = log E_{y ~ p_ref} exp(r(x, y) / beta)

Subpackages load on first use, so ``import tiltjax`` costs nothing. Each has a face: what its modules make public is
also its own, ``tiltjax.losses.dpo_loss``, and loads on first use too::

    tilt        rewards -> weights, log Z, effective sample size
    samplers    draw from the tilt: best-of-N, soft best-of-N, resampling, decoding
    losses      fit it (weighted MLE) or invert it (DPO)
    advantages  baselines and credit
    exact       worlds small enough to know everything
    models      transformers with a shared-prompt attention; Hugging Face in and out
    data        prompts, pairs, candidates
    files       where the files of a model lie
    rewards     text -> float
    train       one step, two ways to map it over devices
    align       a session: load, sample, estimate, align by any method, evaluate, save
    analysis    what a program costs: FLOPs, traffic, communication, memory, traces
    ops         the mathematics below
    papers      where all this is from: ``tiltjax.citation("dpo")`` is its BibTeX
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltjax.papers import citation

__version__ = "0.2.0"
__all__ = [
    "advantages",
    "align",
    "analysis",
    "citation",
    "data",
    "exact",
    "files",
    "losses",
    "models",
    "ops",
    "papers",
    "rewards",
    "samplers",
    "tilt",
    "train",
    "types",
]


def __getattr__(name: str) -> Any:
    if name == "citation":
        return importlib.import_module("tiltjax.papers").citation
    if name in __all__:
        return importlib.import_module(f"tiltjax.{name}")
    raise AttributeError(f"module 'tiltjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
