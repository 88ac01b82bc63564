"""A method written down: the choices that both engines run."""

import abc
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import DTypeLike

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.engine.places import GlobalPlaces, MatrixPlaces, Places
from jaxsparse.select.carry import Carry, check_carry
from jaxsparse.select.schedules import Once, Schedule
from jaxsparse.select.scores import Score, score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget, Targets, is_masked, tree_size
from jaxsparse.subspaces.units import Subspace, Units

__all__ = ["Description", "Method", "Scope", "Sees", "SlotsDType", "SubspaceTransformation", "count_slots"]

SlotsDType = DTypeLike | None | Literal["promote"]
Scope = Literal["matrix", "global"]
Sees = Literal["zeros", "change", "weight"]


class Method(abc.ABC):
    """What a run must know of any method.

    Its state is a NamedTuple with a field `progress`, a `Progress`.

    Attributes:
        name: the constructor's name.
    """

    name: str

    @property
    @abc.abstractmethod
    def trains(self) -> bool:
        """Whether updates are steps, and not merely masked gradients."""

    @property
    def subspace_name(self) -> str:
        """Where weights may move, in a word or two."""
        return _words(type(self))

    @abc.abstractmethod
    def moving(self, params: Any) -> list[int]:
        """Returns the positions, among the leaves of the parameters, of the weights that may move.

        Raises:
            InputError: the model lacks what the method needs.
        """

    @abc.abstractmethod
    def slots(self, params: Any) -> Any:
        """Returns a tree of the shapes of everything that is trained at a time."""


@dataclass(frozen=True)
class Description(Method):
    """A method's four choices, and what they are applied to.

    Attributes:
        name: the constructor's name.
        inner: the optimizer of the slots; None: the method only masks gradients.
        subspace: where a weight may move, unless its `Target` says otherwise.
        score: which units of the subspace are picked.
        scope: whether units compete inside their matrix, or over all matrices.
        schedule: when they are picked again.
        carry: what then happens to the inner optimizer's moments.
        targets: which weights may move; None: the attention projections of a known model, or every floating-point
            weight where the subspace takes weights whole.
        slots_dtype: "promote": slots and masters are kept in promote_types(weight dtype, float32); None: in the
            weight's own dtype without masters, as the papers' code does; or a dtype.
        seed: source of all randomness of the method.
        sees: what the inner optimizer gets as parameters: zeros, the change of the slots since they were picked,
            or the weights themselves. Weight decay acts on that.
        scale: the change of a weight for a change of 1 of its slot; gradients of slots are scaled alike.
        learning_rate: if given, a step is -learning_rate(step) times what the inner optimizer says, where steps
            are counted over the whole run; for carries that reset the inner optimizer's own count.
        calibration_steps: so many first updates change nothing: the mean of their gradients picks the units. The
            state then holds a dense sum.
        unmerged: the fused engine leaves the weights alone while it trains and adds the product with the slots to
            theirs; then slots may be narrower than the weights. The reference engine, whose updates are of weights,
            commits every step all the same, by masters in promote_types(weight dtype, float32). For slots that hold
            the change of weights, picked once.
        given: statistics by parameter path, to be used in place of this step's: "gradient" (in the parameter's
            shape), "activation" (stack, in) or for output slices (stack, out), or "support", the units themselves
            (stack, ...).
    """

    name: str
    inner: optax.GradientTransformation | None
    subspace: Subspace
    score: Score
    schedule: Schedule = field(default_factory=Once)
    scope: Scope = "matrix"
    carry: Carry = "slot"
    targets: Targets = None
    slots_dtype: SlotsDType = "promote"
    seed: Any = 0
    sees: Sees = "zeros"
    scale: Any = 1.0
    learning_rate: Any = None
    calibration_steps: int = 0
    unmerged: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_carry(self.carry)
        for option, allowed in (("scope", get_args(Scope)), ("sees", get_args(Sees))):
            if getattr(self, option) not in allowed:
                raise InputError(f"{option} must be {' or '.join(map(repr, allowed))}, got {getattr(self, option)!r}")
        for option, kind, example in (
            ("subspace", Subspace, "js.subspaces.Neurons(2)"),
            ("score", Score, "js.select.GRADIENT"),
            ("schedule", get_args(Schedule), "js.select.Every(50)"),
        ):
            if not isinstance(getattr(self, option), kind):
                raise TypeError(f"{self.name}: {option} must be such as {example}, got {getattr(self, option)!r}")
        if unknown := {*self.given} - {"gradient", "activation", "support"}:
            raise InputError(f"given may hold 'gradient', 'activation' and 'support', not {min(unknown)!r}")
        if self.inner is not None and not isinstance(self.inner, optax.GradientTransformation):
            raise TypeError(
                f"{self.name}: the inner optimizer must be an optax.GradientTransformation, got {self.inner!r}"
            )
        if not _is_slots_dtype(self.slots_dtype):
            raise InputError(f"slots_dtype must be a floating-point dtype, None or 'promote', got {self.slots_dtype!r}")
        check_count("calibration_steps", self.calibration_steps, least=0)
        if self.unmerged and (self.sees != "change" or not isinstance(self.schedule, Once)):
            raise InputError(
                f"{self.name}: unmerged=True is for slots that hold the change of weights, picked once: it needs "
                f"sees='change' and js.select.Once(), got sees={self.sees!r} and {self.schedule!r}"
            )

    @property
    def trains(self) -> bool:
        """Whether there is an inner optimizer."""
        return self.inner is not None

    @property
    def subspace_name(self) -> str:
        """The kind of subspace."""
        return _words(type(self.subspace))

    def resolve(self, tree: Any) -> list[ResolvedTarget]:
        """Returns the targets in a tree shaped like the parameters, each with its subspace.

        Raises:
            InputError: the model lacks a target, or a `Target` has a density that its subspace has no use for.
            TypeError: the subspace of a `Target` is none.
        """
        targets = self.subspace.resolve(tree, self.targets)
        for target in targets:
            if not isinstance(target.subspace, Units):
                raise TypeError(
                    f"the js.Target of {target.path} has the subspace {target.subspace!r}, which is no units"
                )
            if target.density is not None and not target.subspace.takes_density:
                raise InputError(
                    f"{self.name}: the js.Target of {target.path} asks for density={target.density}, which "
                    f"says nothing to {_words(type(target.subspace))}"
                )
        return targets

    def moving(self, params: Any) -> list[int]:
        """Returns the positions of the targets."""
        return [target.position for target in self.resolve(params)]

    def places(self, targets: list[ResolvedTarget], structure: Any) -> Places:
        """Returns where the slots of targets lie in a tree."""
        return (GlobalPlaces if self.scope == "global" else MatrixPlaces)(targets, structure)

    def start(self, params: Any) -> tuple[Places, Any, Any]:
        """Returns the slots' places in a model, the support to start from, and the shapes of the slots' weights."""
        targets = self.resolve(params)
        leaves, structure = jax.tree.flatten(params, is_leaf=is_masked)
        if self.scope == "global" and len({leaves[target.position].dtype for target in targets}) > 1:
            dtypes = {target.path: leaves[target.position].dtype.name for target in targets}
            raise InputError(f"scope='global' needs targets of one dtype, got {dtypes}")
        places = self.places(targets, structure)
        support = places.empty(tree_size(params))

        def gather(weights: list[Any]) -> Any:
            matrices = [target.view.matrices(weight) for target, weight in zip(targets, weights, strict=True)]
            return places.gather(matrices, support)

        return places, support, jax.eval_shape(gather, [leaves[target.position] for target in targets])

    def slots(self, params: Any) -> Any:
        """Returns the shapes of the slots."""
        return self.start(params)[2]

    def slot_dtype(self, weight_dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype of the slots of a weight.

        Raises:
            InputError: slots that are committed cannot hold the weight's values in their dtype.
        """
        if self.slots_dtype is None:
            return jnp.dtype(weight_dtype)
        if isinstance(self.slots_dtype, str) and self.slots_dtype == "promote":
            return score_dtype(weight_dtype)
        dtype = jnp.dtype(self.slots_dtype)
        if not self.unmerged and jnp.promote_types(dtype, weight_dtype) != dtype:
            raise InputError(
                f"slots_dtype={dtype} cannot hold weights of {weight_dtype}; use 'promote' or a wider dtype"
            )
        return dtype

    def master_dtype(self, weight_dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype of what is written into a weight before it is rounded: the slots', unless unmerged."""
        return score_dtype(weight_dtype) if self.unmerged else self.slot_dtype(weight_dtype)


def _words(kind: type) -> str:
    """The name of a class, or of the first public one that it is made from, in words."""
    name = next(base.__name__ for base in kind.__mro__ if not base.__name__.startswith("_"))
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def _is_slots_dtype(dtype: Any) -> bool:
    if dtype is None or (isinstance(dtype, str) and dtype == "promote"):
        return True
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


class SubspaceTransformation(optax.GradientTransformationExtraArgs):
    """An optax gradient transformation that still knows the description it runs.

    Attributes:
        description: the method's choices.
    """

    description: Any

    def __new__(
        cls, init: Callable[..., Any], update: Callable[..., Any], description: Method
    ) -> "SubspaceTransformation":
        """Makes the (init, update) pair that optax knows and remembers the description."""
        transformation = super().__new__(cls, init, update)
        transformation.description = description
        return transformation

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What a copy is made from."""
        return (*self, self.description)


def count_slots(method: SubspaceTransformation, params: Any) -> int:
    """Returns how many numbers a method trains at a time.

    Args:
        method: what a constructor returns.
        params: the parameters, or their shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsparse as js
        >>> count_slots(js.cla(rank=2, targets="kernel"), {"kernel": jnp.ones((4, 3))})
        6
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(method.description.slots(params)))
