"""One spelling for the path of a parameter, whatever tree it lives in."""

from collections.abc import Sequence
from typing import Any

import jax

__all__ = ["flatten_with_paths", "path_string"]


def _component(key: Any) -> str | None:
    """Returns the text of one key, or None for the level that NNX adds around a variable's array."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        # nnx.State holds Variables, whose array sits one level down under `.value`; linen and plain
        # trees have no such level, and neither have the plain arrays that nnx.Optimizer hands on.
        return None if key.name in ("value", "raw_value") else key.name
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    if isinstance(key, jax.tree_util.SequenceKey):
        return str(key.idx)
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
        return None
    return str(key)


def path_string(path: Sequence[Any]) -> str:
    """Returns the path of a leaf as `layers/self_attn/q_proj/kernel`.

    The same string comes out for linen dicts, NNX states (with or without Variables) and plain pytrees.

    Args:
        path: a key path as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        The keys joined by `/`.

    Example:
        >>> import jax
        >>> tree = {"params": {"q_proj": {"kernel": 0}}}
        >>> [path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        ['params/q_proj/kernel']
    """
    return "/".join(text for text in map(_component, path) if text is not None)


def flatten_with_paths(tree: Any, is_leaf: Any = None) -> tuple[list[tuple[str, Any]], Any]:
    """Flattens a tree into (path string, leaf) pairs and its tree definition.

    Args:
        tree: any pytree.
        is_leaf: as in `jax.tree.flatten`.

    Returns:
        The pairs in flattening order, and the tree definition.

    Example:
        >>> flatten_with_paths({"b": 1, "a": {"kernel": 2}})[0]
        [('a/kernel', 2), ('b', 1)]
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_string(path), leaf) for path, leaf in pairs], treedef
