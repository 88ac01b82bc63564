"""What experiments.kernels counts and times is what the ops promise."""

import pytest

from experiments.kernels import KernelsConfig, measure
from experiments.ops import OPS
from experiments.shapes import PROJECTIONS
from jaxsparse.common.errors import InputError


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_topk_moves_little_beside_x_and_dy(dtype: str) -> None:
    """At most 5 % of what writing the product, which is summed in float32, and reading it again would."""
    for projection in PROJECTIONS:
        case = OPS["gradient_topk"](projection, 1e-4, dtype)
        product = projection.inputs * projection.outputs * 4
        assert case.cost.moved_bytes <= 0.05 * 2 * product, projection


def test_every_op_runs_beside_its_dense_route() -> None:
    config = KernelsConfig(
        models=("smollm2-135m",), projections=("self_attn/k_proj",), dtype="float32", compile=False, rounds=1
    )
    rows = measure(config)
    assert [row.op for row in rows] == list(OPS)
    for row in rows:
        assert row.op_s is not None
        assert row.op_s[0] > 0
        assert 0 < row.roofline_s <= row.dense_roofline_s or row.op == "column_topk"


def test_unknown_names_are_named() -> None:
    with pytest.raises(InputError, match=r"ops are gradient_topk, .*; models are llama2-7b, .*; dtypes are bfloat16"):
        measure(KernelsConfig(ops=("gradient_top",)))
