import collections
import math
import subprocess
import sys

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.tilt.diversity import distinct_n, limem, self_bleu

TEXTS = [
    "the cat sat on the mat and the cat slept",
    "the cat sat on a mat",
    "a dog ran over the hill and far away today",
    "the dog sat on the mat and slept",
    "zebras yawn quietly",
]


@pytest.mark.parametrize(
    ("completions", "n", "want"),
    [
        ([[1, 2, 3], [1, 2, 4]], 1, 4 / 6),
        ([[1, 2, 3], [1, 2, 4]], 3, 1.0),
        ([[1, 2], [3, 4], [2, 3]], 2, 1.0),  # (2, 3) is in the first two together only
        ([[5] * 10], 2, 1 / 9),
        ([["a", "b"], ["a", "b"], ["a"]], 2, 1 / 2),
        ([[1], []], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n_pools_the_completions(completions, n, want):
    assert distinct_n(completions, n=n) == want


def test_distinct_n_refuses_a_text_and_no_length():
    with pytest.raises(
        ValueError, match=r"completions\[1\] must be a sequence of tokens or words, got the string 'ab'"
    ):
        distinct_n([["a"], "ab"], n=1)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n([["a"]], n=0)


def bleu(words, references):
    """Sentence BLEU-4 as the docstring defines it."""
    logs, halvings = [], 0
    for n in range(1, min(4, len(words)) + 1):
        count = lambda text, n=n: collections.Counter(zip(*(text[i:] for i in range(n)), strict=False))
        most = collections.Counter()
        for reference in references:
            most |= count(reference)
        matched, total = (count(words) & most).total(), len(words) - n + 1
        if n == 1 and not matched:
            return 0.0
        halvings += not matched
        logs.append(math.log((matched or 0.5**halvings) / total))
    closest = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    return math.exp(min(0, 1 - closest / len(words)) + sum(logs) / len(logs))


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], TEXTS[1:], ["a b", "b a", "a b c"]])
def test_self_bleu_is_the_formula(texts):
    words = [text.split() for text in texts]
    want = np.mean([bleu(w, words[:i] + words[i + 1 :]) for i, w in enumerate(words)])
    np.testing.assert_allclose(self_bleu(texts), want, rtol=1e-12)
    assert 0.05 < want < 1


def test_self_bleu_runs_from_0_to_1():
    assert self_bleu(["one two three four five"] * 3) == 1.0
    assert self_bleu(["a b c d e", "f g h i j"]) == 0.0
    assert self_bleu(["", ""]) == 0.0


def test_self_bleu_needs_two_texts_and_its_package(monkeypatch):
    with pytest.raises(ValueError, match="completions must be at least 2 texts, got 1"):
        self_bleu(["a"])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"self_bleu needs the package 'sacrebleu.*pip install 'tiltjax\[rewards\]'"):
        self_bleu(["a", "b"])


def test_importing_the_module_imports_no_optional_package():
    code = "import sys, tiltjax.tilt.diversity; print(sorted({'sacrebleu', 'lxml', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class LimemTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_is_accuracy_times_inconsistency(self):
        rng = np.random.default_rng(0)
        solved, perturbed, where = rng.random((3, 4, 9)) < 0.6
        solved[1] = False
        where[2] = False
        out = self.variant(limem)(solved, perturbed, where=where)
        want = []
        for s, p, w in zip(solved, perturbed, where, strict=True):
            solved_count = (s & w).sum()
            consistency = (s & p & w).sum() / max(solved_count, 1)
            want.append(solved_count / max(w.sum(), 1) * (1 - consistency))
        np.testing.assert_allclose(out, want, rtol=1e-6)
        assert want[0] > 0
        assert want[1] == want[2] == 0

    def test_skill_is_0_and_memory_is_the_accuracy(self):
        solved = jnp.asarray([True, True, False, False])
        np.testing.assert_array_equal([limem(solved, solved), limem(solved, ~solved)], [0, 0.5])
