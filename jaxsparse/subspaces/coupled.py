"""Coupled structures: the slices of several weights that belong to one attention head, or to one channel.

S2FT, section 3.1: the outputs of head i of the query, key and value projections couple to its inputs of the output
projection; output c of the up and gate projections couples to input c of the down projection.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.subspaces.budgets import check_fraction
from jaxsparse.subspaces.targets import ResolvedTarget, Target, Targets, is_masked, resolve_targets
from jaxsparse.subspaces.units import Slices, Subspace

__all__ = ["CoupledSlices", "Structure", "coupled_structures"]

# The names of a structure's projections, by role; the first layout whose names a module has all of wins.
LAYOUTS: tuple[tuple[dict[str, str], ...], ...] = (
    (
        {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"},
        {"query": "query", "key": "key", "value": "value", "output": "out"},
        {"query_key_value": "c_attn", "output": "c_proj"},
    ),
    (
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        {"up": "up_proj", "down": "down_proj"},
        {"up": "c_fc", "down": "c_proj"},
    ),
)
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Structure:
    """The projections of one attention or feed-forward module, of one layer or of a stack.

    Attributes:
        prefix: path of the module, with a slash at its end unless it is the whole model.
        names: the names of its projections by role: "query", "key", "value" (or "query_key_value", all three in one
            weight) and "output"; or "up", "gate" and "down".
        shapes: the shapes of their kernels by role, those left out by `optax.masked` excluded.
        layers: how many leading axes count layers, 0 or 1.
    """

    prefix: str
    names: Mapping[str, str]
    shapes: _Shapes
    layers: int

    @property
    def joint(self) -> str:
        """The role of the projection whose inputs couple to the others' outputs."""
        return "output" if "output" in self.names else "down"

    def path(self, role: str, leaf: str = "kernel") -> str:
        """Returns the path of a projection's kernel or bias."""
        return f"{self.prefix}{self.names[role]}/{leaf}"

    def target(self, role: str, share: float, head_size: int | None) -> Target:
        """Returns the target that frees a share of a projection's coupled slices."""
        axes = range(self.layers, len(self.shapes[role]))
        inputs = axes[:-1] if role == self.joint else axes[:1]
        subspace = Slices(
            share=share, axis="input" if role == self.joint else "output", group=self.unit_size(head_size)
        )
        return Target(
            re.escape(self.path(role)),
            in_axes=tuple(inputs),
            out_axes=tuple(axes[len(inputs) :]),
            stack_axes=tuple(range(self.layers)),
            subspace=subspace,
        )

    def unit_size(self, head_size: int | None) -> int:
        """Returns how many slices belong together: those of a head, or the one of a channel.

        Args:
            head_size: what the user says; needed where no kernel has heads on an axis of their own.

        Raises:
            InputError: the size of a head is not known, or the model shows another one.
        """
        if self.joint == "down":
            return 1
        per_head = {role: shape for role, shape in self.shapes.items() if len(shape) - self.layers == 3}
        shown = {shape[-2 if role == self.joint else -1] for role, shape in per_head.items()}
        if head_size is None and not shown:
            raise InputError(
                f"head_size is not given, and the shapes of {self.path(self.joint)} and its like do not show it; give "
                "the width of one attention head (config.head_dim of the models of this package)"
            )
        size = head_size if head_size is not None else min(shown)
        if shown - {size}:
            raise InputError(f"head_size={size} does not fit the kernels of {self.prefix}: {dict(self.shapes)}")
        return size


def coupled_structures(params: Any) -> list[Structure]:
    """Finds the attention and feed-forward modules of a model by the names of their projections.

    Args:
        params: any tree of parameters; linen, NNX or plain.

    Returns:
        The structures, in the order of their modules in the flattened tree.

    Raises:
        InputError: kernels of a module do not fit each other.

    Example:
        >>> import jax.numpy as jnp
        >>> mlp = {"c_fc": {"kernel": jnp.ones((4, 8))}, "c_proj": {"kernel": jnp.ones((8, 4))}}
        >>> [structure.path("down") for structure in coupled_structures({"h": [{"mlp": mlp}]})]
        ['h/0/mlp/c_proj/kernel']
    """
    pairs, _ = flatten_with_paths(params, is_leaf=is_masked)
    shapes = {path: None if is_masked(leaf) else tuple(leaf.shape) for path, leaf in pairs}
    modules: dict[str, set[str]] = {}
    for path in shapes:
        if match := re.fullmatch(r"((?:.*/)?)([^/]+)/kernel", path):
            modules.setdefault(match[1], set()).add(match[2])
    return [
        _structure(prefix, layout, shapes)
        for prefix, names in modules.items()
        for layouts in LAYOUTS
        for layout in [next((layout for layout in layouts if names.issuperset(layout.values())), None)]
        if layout is not None
    ]


def _structure(prefix: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...] | None]) -> Structure:
    def known(leaf: str) -> dict[str, tuple[int, ...]]:
        found = {role: shapes.get(f"{prefix}{name}/{leaf}") for role, name in names.items()}
        return {role: shape for role, shape in found.items() if shape is not None}

    kernels, biases = known("kernel"), known("bias")
    fitting = [layers for layers in (0, 1) if _fit(names, kernels, biases, layers)]
    if not fitting:
        raise InputError(
            f"the projections of {prefix or 'the model'} do not couple: kernels of {kernels}, biases of {biases}; "
            "kernels must be (in, out) or have heads on an axis of their own, and layers may be stacked on axis 0"
        )
    # Shapes alone may leave it open whether axis 0 counts layers; a layer with a number is no stack.
    numbered = re.search(r"(^|[/_])\d+/", prefix)
    return Structure(prefix, names, kernels, fitting[0] if numbered else fitting[-1])


def _fit(names: Mapping[str, str], kernels: _Shapes, biases: _Shapes, layers: int) -> bool:
    """Whether shapes make sense with so many axes that count layers."""
    if any(len(shape) - layers not in ((2,) if "down" in names else (2, 3)) for shape in kernels.values()):
        return False
    joint = "down" if "down" in names else "output"
    for role, bias in biases.items():
        kernel = kernels.get(role, ())
        out_axes = kernel[-1:] if role == joint else kernel[layers + 1 :]
        if kernel and bias != kernel[:layers] + out_axes:
            return False
    if joint not in kernels:
        return True
    coupled, width, stack = math.prod(kernels[joint][layers:-1]), kernels[joint][-1], kernels[joint][:layers]
    for role, kernel in kernels.items():
        outputs = math.prod(kernel[layers + 1 :])
        held = outputs == coupled * (3 if role == "query_key_value" else 1)
        shared = role in ("key", "value") and coupled % outputs == 0  # grouped queries
        if role != joint and (kernel[: layers + 1] != (*stack, width) or not (held or shared)):
            return False
    return True


@dataclass(frozen=True)
class CoupledSlices(Subspace):
    """Slices of a transformer's coupled structures, each projection with its own share (S2FT, section 3).

    Input slices of the output projections (a unit is a head) and of the down projections (a unit is a channel); output
    slices of the query, key and value projections (heads) and of the up and gate projections (channels). Every layer
    gets the same number, round(share * units), at least one.

    Attributes:
        output: free heads / heads of every output projection; None: it is not trained.
        down: free channels / channels of every down projection; None likewise.
        query: the same for the query projections.
        key: the same for the key projections; under grouped-query attention of their heads.
        value: the same for the value projections, likewise.
        up: the same for the up projections.
        gate: the same for the gate projections.
        head_size: inputs of one attention head; None: the shapes of the parameters show it.
    """

    output: float | None = None
    down: float | None = None
    query: float | None = None
    key: float | None = None
    value: float | None = None
    up: float | None = None
    gate: float | None = None
    head_size: int | None = None

    def __post_init__(self) -> None:
        for role, share in self.shares.items():
            check_fraction(role, share)
        if self.head_size is not None and self.head_size < 1:
            raise InputError(f"head_size must be at least 1, got {self.head_size}")

    @property
    def shares(self) -> dict[str, float]:
        """The shares by role, of what is trained."""
        roles = ("output", "down", "query", "key", "value", "up", "gate")
        return {role: getattr(self, role) for role in roles if getattr(self, role) is not None}

    def resolve(self, tree: Any, targets: Targets) -> list[ResolvedTarget]:
        """Returns the targets with their slices.

        Args:
            tree: shaped like the parameters.
            targets: None: every projection that has a share; else weights among those, or with a subspace of their own.

        Raises:
            InputError: the model lacks the structure, or a target is none of its projections.
        """
        if targets is None:
            found = [(structure, role) for structure in coupled_structures(tree) for role in structure.shapes]
            self._check_found({role for _, role in found}, tree)
            return self._resolved(tree, [(s, role) for s, role in found if role in self.shares])
        resolved = resolve_targets(tree, targets)
        for target in resolved:
            if target.density is not None and target.subspace is None:
                raise InputError(
                    f"the js.Target of {target.path} asks for density={target.density}; coupled slices have a share of "
                    "their own for every kind of projection"
                )
        open_paths = {target.path for target in resolved if target.subspace is None}
        ours = {target.path: target for target in self._resolved(tree, list(self._named(tree, open_paths)))}
        return [ours.get(target.path, target) for target in resolved]

    def _resolved(self, tree: Any, chosen: list[tuple[Structure, str]]) -> list[ResolvedTarget]:
        if not chosen:
            return []
        own = {s.path(role): s.target(role, self.shares[role], self.head_size) for s, role in chosen}
        # What lies between the two sides of a structure are the inputs of its joint.
        joints = {s.path(role): s.path(s.joint) for s, role in chosen if role != s.joint and s.joint in s.shapes}
        theirs = {
            s.path(s.joint): s.target(s.joint, 1.0, self.head_size) for s, role in chosen if s.path(role) in joints
        }
        found = {target.path: target for target in resolve_targets(tree, list((theirs | own).values()))}
        return [
            replace(target, activation_of=found[joints[path]] if path in joints else None)
            for path, target in found.items()
            if path in own
        ]

    def _named(self, tree: Any, paths: Collection[str]) -> Iterator[tuple[Structure, str]]:
        """The projections that the user's targets name."""
        missing = {*paths}
        for structure in coupled_structures(tree) if paths else []:
            for role in structure.shapes:
                path = structure.path(role)
                if path in paths and role in self.shares:
                    missing.discard(path)
                    yield structure, role
        if missing:
            raise InputError(
                f"target {min(missing)} is no projection that is trained ({', '.join(self.shares) or 'none'}); "
                f"give its share, or its slices by {_BY_HAND}"
            )

    def _check_found(self, found: Collection[str], tree: Any) -> None:
        missing = [role for role in self.shares if role not in found]
        if not self.shares:
            raise InputError(f"nothing is trained: give a share, such as output or down, or targets by {_BY_HAND}")
        if missing and flatten_with_paths(tree)[0]:
            held = " (one weight holds query, key and value)" if "query_key_value" in found else ""
            layouts = "; ".join(" ".join(layout.values()) for group in LAYOUTS for layout in group)
            raise InputError(
                f"{', '.join(missing)}: the model has no such projection{held}; known are modules with {layouts}. "
                f"Give {missing[0]}=None, or name the weights by {_BY_HAND}"
            )


_BY_HAND = "targets=[js.Target(pattern, subspace=js.subspaces.Slices(share=..., group=...))]"
