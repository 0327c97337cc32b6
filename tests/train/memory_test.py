import dataclasses

import jax
import pytest

from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.train.memory import Drawing, check_memory, memory_limit

CONFIG = TransformerConfig(
    vocab_size=50, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=8, compute_dtype="float32"
)
DRAWING = Drawing(num_prompts=6, num_candidates=4, sample_batch=3, prompt_tokens=5, max_tokens=7)


def test_keys_and_values_are_those_of_the_cache():
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), CONFIG))
    prompt = jax.ShapeDtypeStruct((3, 5), "int32")
    _, cache = jax.eval_shape(
        lambda model, prompt: model.prefill(prompt, prompt >= 0, num_candidates=4, max_tokens=7), model, prompt
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.prefix, cache.own)))
    assert DRAWING.parts(CONFIG)["keys and values"] == size
    half = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    assert DRAWING.parts(half)["keys and values"] == size // 2


@pytest.mark.robustness(
    "Flags",
    given="--num_candidates or --max_tokens that need more memory than there is",
    outcome="refused before anything is drawn, with what is needed and what would fit",
)
def test_what_cannot_fit_is_refused_with_what_would():
    need = sum(DRAWING.parts(CONFIG).values())
    check_memory(DRAWING, CONFIG, held=10, limit=need + 10)
    check_memory(DRAWING, CONFIG, held=10**15, limit=None)
    with pytest.raises(ValueError, match="num_candidates=3 or max_tokens=6 or sample_batch=2 would fit"):
        check_memory(DRAWING, CONFIG, held=11, limit=need + 10)
    with pytest.raises(ValueError, match="no smaller number of one alone would fit"):
        check_memory(DRAWING, CONFIG, held=10**12, limit=10**12)
    many = dataclasses.replace(DRAWING, num_candidates=10**9)
    line = r"num_candidates=1000000000 of max_tokens=7 need 6,\d+\.\d GB \(keys and values 5,\d+.* there are 25\.0 GB"
    with pytest.raises(ValueError, match=line):
        check_memory(many, CONFIG, held=0, limit=25 * 10**9)


def test_there_is_a_limit():
    limit = memory_limit()
    assert limit is None or 10**8 < limit < 10**14
