"""Generalisation error as Beyond LoRA measures it (section 4.2): test loss minus training loss."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Num

from jaxsparse.analysis.statistics import as_numbers, check_confidence, interval_of
from jaxsparse.common.options import check_count

__all__ = ["GeneralisationGap", "generalisation_gap"]


@dataclass(frozen=True)
class GeneralisationGap:
    """Test loss minus training loss, in the losses' unit.

    Attributes:
        gap: mean test loss minus mean training loss.
        low: lower end of its interval.
        high: upper end of its interval.
        train_loss: mean over the training rows.
        test_loss: mean over the test rows.
    """

    gap: float
    low: float
    high: float
    train_loss: float
    test_loss: float


def generalisation_gap(
    train_losses: Num[Array | np.ndarray, "..."] | list[float],
    test_losses: Num[Array | np.ndarray, "..."] | list[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> GeneralisationGap:
    """Measures G(W) ≈ E(L_test) − L_train (Beyond LoRA, section 4.2) of one model.

    The interval resamples rows of both sets, each by itself: it says how much the rows at hand matter, not the seed of
    training. Losses of different tasks are on different scales: compare gaps of one task only, as the paper does.

    Args:
        train_losses: loss of the trained model on every training row.
        test_losses: loss of the trained model on every test row.
        confidence: of the interval, between 0 and 1.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: a set is empty, a loss is NaN or infinite, or confidence is outside (0, 1).

    Example:
        >>> gap = generalisation_gap([1.0, 1.0], [1.5, 1.5])
        >>> gap.gap, gap.low, gap.high
        (0.5, 0.5, 0.5)
    """
    train, test = as_numbers("train_losses", train_losses), as_numbers("test_losses", test_losses)
    check_confidence(confidence)
    check_count("resamples", resamples)
    generator = np.random.default_rng(seed)
    drawn = [
        generator.choice(test, test.size).mean() - generator.choice(train, train.size).mean() for _ in range(resamples)
    ]
    low, high = interval_of(drawn, confidence)
    train_loss, test_loss = float(train.mean()), float(test.mean())
    return GeneralisationGap(test_loss - train_loss, low, high, train_loss, test_loss)
