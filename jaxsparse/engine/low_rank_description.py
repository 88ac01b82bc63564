"""A low-rank method written down, and the factors that it starts from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count, check_positive
from jaxsparse.engine.description import Method
from jaxsparse.engine.factors import Factors, normal_factors, norms_of_columns
from jaxsparse.engine.places import MatrixPlaces, leaves_of
from jaxsparse.select.schedules import Once, Schedule
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget, Targets, is_masked, resolve_targets

__all__ = ["GradientStart", "LowRank", "as_trees", "of_targets"]


@dataclass(frozen=True)
class GradientStart:
    """Factors that start from a gradient of the weights.

    Attributes:
        factors: from (mean gradient (stack, in, out), r) to A (stack, in, r) and B (stack, r, out).
        triples: singular triples that this takes for every rank; a matrix must have r times as many.
        offset: take s A_0 B_0 off the base, so that the model starts unchanged; or add it to the model.
        calibration_steps: the mean gradient of so many first updates, which train nothing.
        gradients: mean gradients by parameter path, in place of calibration steps.
    """

    factors: Callable[[Array, int], tuple[Array, Array]]
    triples: int
    offset: bool
    calibration_steps: int = 1
    gradients: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_count("calibration_steps", self.calibration_steps, least=0)
        if self.gradients is None and self.calibration_steps < 1:
            raise InputError(f"give gradients, or calibration_steps of at least 1, got {self.calibration_steps}")


@dataclass(frozen=True)
class LowRank(Method):
    """A low-rank method's choices: W = W_0 + s A B, or DoRA's W = m V / c with V = W_0 + s A B and its norms c.

    Attributes:
        name: the constructor's name.
        inner: the optimizer of the factors; it sees them as parameters.
        rank: r.
        alpha: of s = alpha / r; None: 2 r.
        trains_a: whether A trains, or B alone.
        magnitude: whether the norm of every output's weights trains apart from their direction.
        ratio: a step of B is so many times what the inner optimizer says; None: 1.
        schedule: when the product is merged, A drawn anew, B zero and the inner optimizer fresh.
        learning_rate: if given, a step is -learning_rate(step) times what the inner optimizer says, where steps
            are counted over the whole run, across resets.
        start: how factors start from a gradient; None: A from N(0, 0.02^2), B = 0.
        targets: which weights may move; None: the attention projections of a known model.
        seed: of A.
    """

    name: str
    inner: optax.GradientTransformation | None
    rank: int
    alpha: Any = None
    trains_a: bool = True
    magnitude: bool = False
    ratio: Any = None
    schedule: Schedule = field(default_factory=Once)
    learning_rate: Any = None
    start: GradientStart | None = None
    targets: Targets = None
    seed: Any = 0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, optax.GradientTransformation):
            raise TypeError(
                f"{self.name} trains factors of the weights and needs an inner optimizer to do so, "
                f"such as js.{self.name}(optax.adam(1e-4)); got {self.inner!r}"
            )
        check_count("rank", self.rank)
        for name in ("alpha", "ratio"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    @property
    def scale(self) -> Any:
        """The factor s = alpha / r of the product."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    @property
    def trains(self) -> bool:
        """Always: without an inner optimizer there is no low-rank method."""
        return True

    def resolve(self, tree: Any) -> list[ResolvedTarget]:
        """Returns the targets in a tree shaped like the parameters.

        Raises:
            InputError: the rank does not fit a matrix, or a `Target` asks for what factors do not have.
        """
        targets = resolve_targets(tree, self.targets)
        triples = self.rank * (self.start.triples if self.start else 1)
        for target in targets:
            size = min(target.view.in_size, target.view.out_size)
            if triples > size:
                needs = f", of which {self.name} needs {triples}" if self.start else ""
                raise InputError(
                    f"{self.name}: rank={self.rank} does not fit target {target.path} of "
                    f"{target.view.in_size} x {target.view.out_size}: it has {size} singular directions{needs}"
                )
            if target.density is not None or target.subspace is not None:
                raise InputError(
                    f"{self.name}: the js.Target of {target.path} asks for a density or subspace, "
                    "but a low-rank method has a rank"
                )
        return targets

    def moving(self, params: Any) -> list[int]:
        """Returns the positions of the targets."""
        return [target.position for target in self.resolve(params)]

    def slots(self, params: Any) -> Factors:
        """Returns the shapes of the factors that train."""
        return jax.eval_shape(lambda params: self.trained(self.first(params)), params)

    def trained(self, factors: Factors) -> Factors:
        """Returns the factors of a model with `optax.MaskedNode` for those that do not train."""
        if self.trains_a:
            return factors
        return factors._replace(a=jax.tree.map(lambda _: optax.MaskedNode(), factors.a))

    def weights(self, params: Any) -> list[Array]:
        """Returns the targets' weights as matrices, in their factors' dtype."""
        targets = self.resolve(params)
        pairs = zip(targets, leaves_of(targets, params), strict=True)
        return [target.view.matrices(leaf).astype(score_dtype(leaf.dtype)) for target, leaf in pairs]

    def first(self, params: Any) -> Factors:
        """Returns trees of the factors to start from; zeros where a gradient will decide."""
        places = MatrixPlaces(self.resolve(params), jax.tree.structure(params, is_leaf=is_masked))
        weights = self.weights(params)
        factors = self.draw(places, [weight.dtype for weight in weights], 0)
        if self.start is not None:
            return jax.tree.map(jnp.zeros_like, factors)
        if self.magnitude:
            return factors._replace(magnitude=places.spread([norms_of_columns(weight) for weight in weights]))
        return factors

    def draw(self, places: MatrixPlaces, dtypes: Sequence[Any], chain: Any) -> Factors:
        """Returns trees of the factors that a chain starts from.

        Args:
            places: of the targets.
            dtypes: of every target's factors.
            chain: number of the chain.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), chain)
        drawn = [
            normal_factors(jax.random.fold_in(key, number), target.view, self.rank, dtype)
            for number, (target, dtype) in enumerate(zip(places.targets, dtypes, strict=True))
        ]
        return as_trees(places, drawn)


def as_trees(places: MatrixPlaces, factors: Sequence[Factors]) -> Factors:
    """Returns trees of factors from the factors of every target."""
    return Factors(*(places.spread(part) for part in zip(*factors, strict=True)))


def of_targets(places: MatrixPlaces, factors: Factors) -> list[Factors]:
    """Returns the factors of every target from trees of factors."""
    parts = (leaves_of(places.targets, tree) for tree in factors)
    return [Factors(*part) for part in zip(*parts, strict=True)]
