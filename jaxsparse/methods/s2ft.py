"""S2FT: trains whole heads and channels of the projections that couple them."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.select.scores import ACTIVATION, GRADIENT, RANDOM, WEIGHT, product, smallest
from jaxsparse.subspaces.coupled import CoupledSlices
from jaxsparse.subspaces.targets import Targets

__all__ = ["s2ft"]

_SCORES = {
    "random": RANDOM,
    "weight": WEIGHT,
    "activation": ACTIVATION,
    "product": product(WEIGHT, ACTIVATION),
    "gradient": GRADIENT,
}


def s2ft(
    inner: optax.GradientTransformation | None = None,
    *,
    output: float | None = 0.052,
    down: float | None = 0.02,
    query: float | None = None,
    key: float | None = None,
    value: float | None = None,
    up: float | None = None,
    gate: float | None = None,
    head_size: int | None = None,
    score: Literal["random", "weight", "activation", "product", "gradient"] = "random",
    which: Literal["large", "small"] = "large",
    calibration_steps: int = 0,
    gradients: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains a few heads and channels of every layer: slices of the projections that couple them, picked once.

    .. math:: W_o[\text{inputs of head } i], \; W_{down}[c] \quad \text{for chosen } i, c
        \text{; on request } W_{q,k,v}[:, \text{outputs of head } i], \; W_{up,gate}[:, c]

    S2FT, sections 3.1 and 3.2; the scores R, W, A, S and G of section 5.4. Uniform over layers, as the paper says (its
    released code samples over all layers jointly): round(share * units) of every weight, at least one. The paper trains
    with AdamW, a linear schedule with 100 warm-up steps, at a rate of 2e-4 (commonsense) or 1e-3 (arithmetic).

    Grouped-query attention, which the paper leaves open: heads of output and query are heads, those of key and value
    are groups, whose activation is that of all their heads. Every projection picks on its own.

    Args:
        inner: optimizer of the slices; it sees those of W as parameters, so weight decay acts on them. AdamW in the
            paper.
        output: trained heads / heads of the output projections (input slices); 5.2 % in the released scripts for
            LLaMA-2, none for LLaMA-3. None: not trained.
        down: trained channels / channels of the down projections (input slices); 2 % in the released scripts for
            LLaMA-2, 3 % for LLaMA-3. None: not trained.
        query: trained heads / heads of the query projections (output slices).
        key: trained heads / heads of the key projections (output slices).
        value: trained heads / heads of the value projections (output slices).
        up: trained channels / channels of the up projections (output slices).
        gate: trained channels / channels of the gate projections (output slices).
        head_size: width of one attention head; None: the shapes of the parameters show it, as kernels of (heads,
            width, out) do. A run from the command line takes it from the model's configuration.
        score: what picks a slice: "random" (R, the paper's default); "weight" (W), the 2-norm of the slice;
            "activation" (A), the 2-norm of the activation between the two sides of the structure over a calibration
            set (a run from the command line takes 1 % of its data); "product" (S), W times A; "gradient" (G), the
            2-norm of the slice's mean gradient.
        which: whether the "large" or the "small" scores are picked; means nothing to "random". Small activations were
            best in the paper.
        calibration_steps: for score "gradient": so many first updates change nothing; the mean of their gradients
            picks. The state then holds a dense sum, which `gradients` spare. 0: the first step's gradient picks, and
            trains too.
        gradients: for score "gradient": mean gradients by parameter path.
        activations: for scores "activation" and "product": the 2-norms of the inputs, (layers, in), by the path of
            every output and down projection, as `js.collect_activations` returns them. The paper takes 1 % of the data.
        targets: None: all projections that have a share. Or some of those; or weights of any model, each a `js.Target`
            with its own subspace, such as `js.subspaces.Slices(share=0.02)`.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: of the draw.

    Returns:
        A gradient transformation with state `js.SubspaceState`; its support, numbers of heads and channels, is a
        selection for `js.permute_coupled`.

    Raises:
        InputError: a value out of range; in `init`: a model without the structure, or whose head size is not known; in
            `update`: no activations for a score that needs them.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"up_proj": {"kernel": jnp.ones((3, 4))}, "down_proj": {"kernel": jnp.ones((4, 3))}}
        >>> tx = js.s2ft(optax.adamw(2e-4), output=None, down=0.5)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> (updates["down_proj"]["kernel"] != 0).sum(axis=1).tolist().count(3)  # whole input slices
        2
    """
    if score not in _SCORES:
        raise InputError(f"score must be one of {', '.join(map(repr, _SCORES))}, got {score!r}")
    if which not in ("large", "small"):
        raise InputError(f"which must be 'large' or 'small', got {which!r}")
    if calibration_steps and score != "gradient":
        raise InputError(f"calibration_steps={calibration_steps} serve score='gradient' alone, got score={score!r}")
    subspace = CoupledSlices(output, down, query, key, value, up, gate, head_size)
    if targets is None and not subspace.shares:
        raise InputError("output, down, query, key, value, up and gate are None: give at least one a share")
    return reference_engine(
        Description(
            name="s2ft",
            inner=inner,
            subspace=subspace,
            score=_SCORES[score] if which == "large" else smallest(_SCORES[score]),
            sees="weight",
            calibration_steps=0 if gradients is not None else calibration_steps,
            given={"gradient": gradients or {}, "activation": activations or {}},
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )
