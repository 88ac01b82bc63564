"""The generalisation bounds of Beyond LoRA: Table 1, Theorem 1 and Theorem 6.

Layers are (in, out) pairs, the paper's (m_i, n_i); losses and bounds are in the loss's unit. Theorem 1 multiplies
spectral norms of all layers, so that for a real network it is astronomical: what can be read is how it orders methods.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxsparse.analysis.statistics import as_numbers
from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count, check_positive

__all__ = [
    "CorrectionTerms",
    "base_bound",
    "correction_terms",
    "generalisation_bound",
    "trained_parameters",
    "update_bound",
]

Shapes = Sequence[tuple[int, int]]


class CorrectionTerms(NamedTuple):
    """What Theorem 1 adds to the generalisation error of one part of the weights.

    Attributes:
        of_update: Φ_ΔW, to be added to the error of W0.
        of_base: Φ_W0, to be added to the error of ΔW.
    """

    of_update: float
    of_base: float


def _both(shapes: Shapes, rank: int) -> int:
    return rank * sum(inputs + outputs for inputs, outputs in shapes)


def _outputs(shapes: Shapes, rank: int) -> int:
    return rank * sum(outputs for _, outputs in shapes)


def _entries(shapes: Shapes, rank: int) -> int:
    return sum(inputs * outputs for inputs, outputs in shapes)


# Trained parameters of a chain, and whether a run has several chains.
_METHODS: dict[str, tuple[Callable[[Shapes, int], int], bool]] = {
    "full": (_entries, False),
    "lora": (_both, False),
    "lora_plus": (_both, False),
    "cola": (_both, True),
    "asym_lora": (_outputs, False),
    "rac_lora": (_outputs, True),
    "cla": (_outputs, False),
    "r_cla": (_outputs, False),
    "c3la": (_outputs, True),
    "r_c3la": (_outputs, True),
    "paca": (_outputs, False),
    "d_paca": (_outputs, False),
    "c_paca": (_outputs, True),
}


def trained_parameters(method: str, shapes: Shapes, *, rank: int, chains: int = 1) -> int:
    """Returns p, the number of parameters that a method trains over all its chains (appendix D.1.6, Lemma 1).

    Args:
        method: a constructor's name, such as "c3la".
        shapes: (in, out) of every adapted layer.
        rank: r.
        chains: k, the number of chains of a method that has several; without meaning for others.

    Raises:
        InputError: the method is not among the paper's, there are no layers, or a number is not positive.

    Example:
        >>> trained_parameters("cla", [(64, 32)], rank=4), trained_parameters("lora", [(64, 32)], rank=4)
        (128, 384)
    """
    if method not in _METHODS:
        raise InputError(f"method {method!r} has no bound in Beyond LoRA; those that have: {', '.join(_METHODS)}")
    check_count("rank", rank)
    check_count("chains", chains)
    if not shapes:
        raise InputError("shapes must name at least one layer's (in, out), got none")
    for inputs, outputs in shapes:
        check_count("in of a layer", inputs)
        check_count("out of a layer", outputs)
        if rank > inputs:
            raise InputError(f"rank={rank} is more than the {inputs} inputs of a layer of shape {(inputs, outputs)}")
    of_one, chained = _METHODS[method]
    return of_one(shapes, rank) * (chains if chained else 1)


def update_bound(
    method: str,
    shapes: Shapes,
    *,
    rank: int,
    samples: int,
    chains: int = 1,
    sigma: float = 1.0,
    bits: int = 32,
) -> float:
    """Bounds the generalisation error of the update alone, G(ΔW): the first term of Table 1's rows.

    G(ΔW) ≤ √(2σ² q p ln 2 / |N|) (Theorem 7 with Lemma 1), with p from `trained_parameters`:

    * lora, lora_plus: p = r Σ(m + n); cola: k times that.
    * asym_lora, cla, r_cla, paca, d_paca: p = r Σ n; rac_lora, c3la, r_c3la, c_paca: k times that.
    * full: p = Σ m·n.

    The table itself is a picture, which our text of the paper lacks. cola, rac_lora, c3la, cla, lora_plus and paca are
    derived in appendix D.1.6. The others are read from the prose: lora equals lora_plus there; section 4.2 says that
    r_cla equals cla and that asym_lora is smaller than rac_lora by √k; it says that r_c3la lies above r_cla, and c3la's
    is taken. full is Lemma 1 alone and no claim of the paper's. The print of paca's bound lacks the root that Theorem 7
    has: it is read as a misprint, since the text says that it equals cla's. For c3la with k·r above a layer's inputs,
    windows repeat, and the bound holds but is loose.

    Args:
        method: a constructor's name, such as "c3la".
        shapes: (in, out) of every adapted layer, the paper's (m, n).
        rank: r.
        samples: |N|, rows of the fine-tuning set.
        chains: k.
        sigma: the loss is σ-sub-Gaussian (Assumption 6).
        bits: q, bits of a trained number; the paper uses 32.

    Returns:
        The bound, in the loss's unit.

    Raises:
        InputError: the method is not among the paper's, or a number is not positive.

    Example:
        >>> layers = [(64, 32)] * 4
        >>> cheap = update_bound("cla", layers, rank=4, samples=1000)
        >>> round(update_bound("c3la", layers, rank=4, samples=1000, chains=9) / cheap, 6)
        3.0
    """
    check_count("samples", samples)
    check_count("bits", bits)
    check_positive("sigma", sigma)
    parameters = trained_parameters(method, shapes, rank=rank, chains=chains)
    return sigma * math.sqrt(2 * bits * parameters * math.log(2) / samples)


def base_bound(samples: int, *, epsilon: float, delta: float, loss_bound: float) -> float:
    """Bounds the generalisation error of the untouched model, G(W0): PAC-Bayes (Theorem 6, from Theorem 5 with Q = 0).

    G(W0) ≤ ε + C₂ √((3 ln(|N|/δ) + 8) / |N|), with probability at least 1 − 2δ.

    Args:
        samples: |N|, rows of the fine-tuning set.
        epsilon: ε, "an arbitrary small value".
        delta: δ, between 0 and ½.
        loss_bound: C₂, the largest loss possible (Assumption 5).

    Returns:
        The bound, in the loss's unit.

    Raises:
        InputError: a number is not positive, or δ is not below ½.

    Example:
        >>> base_bound(10_000, epsilon=0.01, delta=0.05, loss_bound=1.0) < 0.08
        True
    """
    check_count("samples", samples)
    for name, value in (("epsilon", epsilon), ("delta", delta), ("loss_bound", loss_bound)):
        check_positive(name, value)
    if delta >= 0.5:
        raise InputError(f"delta must be below 0.5, for the bound holds with probability 1 − 2 delta, got {delta}")
    return epsilon + loss_bound * math.sqrt((3 * math.log(samples / delta) + 8) / samples)


def correction_terms(
    base_norms: Sequence[float],
    update_norms: Sequence[float],
    *,
    input_bound: float,
    loss_lipschitz: float = 1.0,
    activation_lipschitz: Sequence[float] | None = None,
    activation_offsets: Sequence[float] | None = None,
) -> CorrectionTerms:
    """Returns Φ_ΔW and Φ_W0 of Theorem 1.

    The theorem writes out 2^L products; here they are the products of sums that they expand (section 3.1, "Tightness"),
    with w_i = ‖W0^i‖₂, d_i = ‖ΔW^i‖₂, λ_i the activation's Lipschitz constant, o_i = ‖σ_i(0)‖ and C the input's bound:

        Φ_ΔW = 2 L_loss [C Πλ (Π(w+d) − Πw) + Σ_{l<L} o_l Π_{i>l} λ_i (Π_{i>l}(w_i+d_i) − Π_{i>l} w_i)]

    and Φ_W0 the same with w and d exchanged. The paper's print exchanges the two in H: as printed, Φ_ΔW would not be 0
    for an update of 0, which appendix D.1.4 says it is, and the three-layer expansion in D.1.2 is as here. In P, the
    print of section 3.1 has 2^(L−1) where D.1.2 has 2^(L−j); the latter is meant.

    Args:
        base_norms: spectral norms of W0, first layer first, (layers,).
        update_norms: spectral norms of ΔW, (layers,).
        input_bound: C, the largest 2-norm of an input (Assumption 1).
        loss_lipschitz: of the loss (Assumption 2).
        activation_lipschitz: of every layer's activation (Assumption 3), (layers,); None: 1.
        activation_offsets: ‖σ(0)‖ of every layer's activation, (layers,); None: 0, as for ReLU and GELU.

    Returns:
        Both terms, in the loss's unit; infinity where they exceed a float.

    Raises:
        InputError: lengths differ or a number is negative.

    Example:
        >>> correction_terms([2.0], [0.5], input_bound=1.0)
        CorrectionTerms(of_update=1.0, of_base=4.0)
    """
    layers = len(base_norms)
    given = {
        "base_norms": base_norms,
        "update_norms": update_norms,
        "activation_lipschitz": [1.0] * layers if activation_lipschitz is None else activation_lipschitz,
        "activation_offsets": [0.0] * layers if activation_offsets is None else activation_offsets,
    }
    arrays = {name: as_numbers(name, values) for name, values in given.items()}
    for name, array in arrays.items():
        if array.size != layers or array.min() < 0:
            raise InputError(f"{name} must hold {layers} numbers that are not negative, one a layer, got {given[name]}")
    check_positive("input_bound", input_bound)
    check_positive("loss_lipschitz", loss_lipschitz)
    base, update, lipschitz, offsets = arrays.values()
    # What enters above each layer: the input below the first, the activations' offsets below the others.
    enters = np.concatenate([[input_bound], offsets[:-1]])
    with np.errstate(over="ignore", invalid="ignore"):
        of_update, of_base = (
            sum(
                float(size * np.prod(lipschitz[at:]) * _grown(kept[at:], added[at:]))
                for at, size in enumerate(enters)
                if size
            )
            for kept, added in ((base, update), (update, base))
        )
    return CorrectionTerms(2 * loss_lipschitz * of_update, 2 * loss_lipschitz * of_base)


def _grown(kept: np.ndarray, added: np.ndarray) -> float:
    """Π(kept + added) − Π kept, without cancellation: the sum over layers of what each one's addition adds."""
    total, below = 0.0, 1.0
    for k, a in zip(kept, added, strict=True):
        total, below = k * total + a * (total + below), below * k
    return total


def generalisation_bound(base_error: float, update_error: float, terms: CorrectionTerms) -> float:
    """Returns min(G(W0) + Φ_ΔW, G(ΔW) + Φ_W0), Theorem 1's bound on G(W0 + ΔW).

    Args:
        base_error: G(W0) or a bound on it, such as `base_bound`.
        update_error: G(ΔW) or a bound on it, such as `update_bound`.
        terms: what `correction_terms` returns.

    Example:
        >>> generalisation_bound(0.1, 0.3, CorrectionTerms(of_update=1.0, of_base=4.0))
        1.1
    """
    return min(base_error + terms.of_update, update_error + terms.of_base)
