"""What a tilt may cost: how alike the candidates have become, and how much of a skill is memory.

Figures to report, not to train on; `distinct_n` and `self_bleu` run on the host. Entropies in nats come from
`tiltjax.ops.tokens.token_logp` (per token) and from the mean of ``-logp`` (per completion).
"""

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_boolean
from tiltjax.ops.masked import check_alike, masked_mean
from tiltjax.types import Array, Bool, Float

__all__ = ["distinct_n", "limem", "self_bleu"]


def distinct_n(completions: Sequence[Sequence[int] | Sequence[str]], *, n: int) -> float:
    r"""Different n-grams over all n-grams, pooled over the completions.

    .. math:: \text{distinct-}n = \frac{\#\{\text{different n-grams}\}}{\#\{\text{n-grams}\}}

    It falls as more text is pooled, however diverse: compare equal numbers of completions of similar length.

    Args:
      completions: Token ids or words of every completion, without padding and special tokens.
      n: Length of the n-grams, at least 1; none spans two completions.

    Returns:
      A share in (0, 1], higher is more diverse; 0 where no completion has n tokens.

    Raises:
      ValueError: If ``n < 1``, or a completion is one string.

    Example:
      >>> distinct_n([[1, 2, 3], [1, 2, 4]], n=2)
      0.75

    References:
      Li et al., 2016, arXiv:1510.03055.
    """
    check_at_least("n", n, 1)
    for index, completion in enumerate(completions):
        if isinstance(completion, str):
            raise ValueError(
                f"completions[{index}] must be a sequence of tokens or words, got the string {completion!r}"
            )
    grams = list(itertools.chain.from_iterable(_ngrams(completion, n) for completion in completions))
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(completions: Sequence[str]) -> float:
    r"""Mean BLEU-4 of every completion with all the others as its references.

    .. math:: \text{self-BLEU} = \frac1N \sum_i \mathrm{BLEU}_4\bigl(y_i; \{y_j\}_{j \ne i}\bigr)

    Sentence BLEU of sacrebleu: uniform weights on n-grams of 1 to 4 tokens, fewer where the completion is shorter
    (effective order); counts clipped to the most in any one reference; brevity penalty against the reference of the
    closest length; tokenizer "13a", cased; and its smoothing "exp", which puts ``1/2, 1/4, ...`` in place of the first,
    second, ... count that is 0, as long as any n-gram matches at all. More references match more: compare equal
    numbers of completions. The cost grows with the square of their number.

    Args:
      completions: At least 2 texts, of the same prompt.

    Returns:
      A mean in [0, 1], higher is less diverse: 1 where all are the same. An empty completion counts 0.

    Raises:
      ValueError: If there are fewer than 2 completions.
      ImportError: If sacrebleu is not installed.

    Example:
      >>> self_bleu(["the cat sat on the mat", "the cat sat on the mat"])
      1.0

    References:
      Zhu et al., 2018, arXiv:1802.01886; Post, 2018, arXiv:1804.08771 (sacrebleu).
    """
    if len(completions) < 2:
        raise ValueError(f"completions must be at least 2 texts, got {len(completions)}")
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as error:
        raise ImportError(
            f"self_bleu needs the package {error.name!r}, which is not installed: pip install 'tiltjax[rewards]'",
            name=error.name,
        ) from error
    bleu = BLEU(max_ngram_order=4, smooth_method="exp", effective_order=True)
    each = [
        bleu.sentence_score(completion, [*completions[:i], *completions[i + 1 :]]).score / 100
        for i, completion in enumerate(completions)
    ]
    # The library's exp of a sum of logarithms may be 1 + 1e-15.
    return min(sum(each) / len(each), 1.0)


def limem(
    solved: Bool[Array, "*batch P"],
    solved_perturbed: Bool[Array, "*batch P"],
    *,
    where: Bool[Array, "*batch P"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Local memorisation: the accuracy that does not survive a small change of the puzzle.

    .. math:: \mathrm{LiMem} = \mathrm{Acc} \, (1 - \mathrm{CR}), \qquad
              \mathrm{CR} = \frac{\#\{\text{solved, and solved perturbed}\}}{\#\{\text{solved}\}}

    which is the share of all puzzles that are solved but not once perturbed, so 0 where nothing is solved.

    Args:
      solved: Whether each of P puzzles is solved.
      solved_perturbed: Whether a locally changed version of the same puzzle is.
      where: True for real puzzles; None means all.

    Returns:
      LiMem in [0, 1], ``[*batch]``; high where what looks like skill is memory.

    Example:
      >>> float(limem(jnp.array([True, True, True, False]), jnp.array([True, False, False, True])))  # 3/4 (1 - 1/3)
      0.5

    References:
      Xie et al., 2024, arXiv:2410.23123.
    """
    check_boolean("solved", solved)
    check_boolean("solved_perturbed", solved_perturbed)
    check_alike(where, solved, solved_perturbed)
    return masked_mean(jnp.where(solved & ~solved_perturbed, 1.0, 0.0), where)


def _ngrams(completion: Sequence[int] | Sequence[str], n: int) -> Iterator[tuple]:
    return zip(*(completion[i:] for i in range(n)), strict=False)
