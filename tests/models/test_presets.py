"""Configurations by name have the sizes that the models' makers publish."""

import math

import jax
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.presets import PRESETS

SIZES = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name: str) -> None:
    shapes = jax.tree.leaves(LanguageModel(load_config(name)).abstract())
    assert sum(math.prod(leaf.shape) for leaf in shapes) == SIZES[name]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="llama3-8b"):
        load_config("llama9-1b")
