"""The training step: compiled once, never asks the host, gives its memory on."""

from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import jaxsparse as js
from jaxsparse.data import batches, encode_rows, load_rows
from jaxsparse.engine.tuner import ReferenceTuner
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel


def asks_the_host(step: Any, *arguments: Any) -> bool:
    """Whether a jitted function calls back to the host; one that reads a value there cannot be traced at all."""
    program = step.lower(*arguments).as_text()
    return any(word in program for word in ("callback", "infeed", "outfeed"))


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_the_step_does_not_ask_the_host_or_compile_again(
    engine: str, tiny_model: Path, problems: dict[str, Path]
) -> None:
    base = load(tiny_model)
    examples = encode_rows(load_rows(problems["train"]), base.tokenizer, "plain", 128)
    data = batches(examples, batch_size=4, max_length=128, buckets=[128])
    loss, method = LanguageModel(base.config).loss, js.gasdu(optax.adam(1e-2), density=0.02, refresh_every=2)
    tuner = js.fuse(loss, method, has_aux=True) if engine == "fused" else ReferenceTuner(loss, method)
    state = tuner.init(base.params)
    assert not asks_the_host(tuner.step, state, next(data))
    for _ in range(4):
        old, (state, _) = state, tuner.step(state, next(data))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))  # donated
    assert tuner.step._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base.params))  # init copied them

    def told(params: Any, batch: Any) -> Any:
        value, aux = loss(params, batch)
        jax.debug.print("{}", value)
        return value, aux

    assert asks_the_host(js.fuse(told, method, has_aux=True).step, state, next(data))
