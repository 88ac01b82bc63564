"""Arrays of one process and of several: what a host can read, and which host writes."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Sharding

from jaxsparse.common.errors import InputError

__all__ = [
    "AgreedError",
    "agreed",
    "alone",
    "gathered",
    "is_first",
    "on_all",
    "on_first",
    "placed",
    "to_host",
    "wait_for_all",
]

_LONGEST_MESSAGE = 4096
_Result = TypeVar("_Result")


class AgreedError(InputError):
    """What does not work on one of several processes, raised on all of them."""


def is_first() -> bool:
    """Whether this process writes files and reports: the first of those that work together."""
    return jax.process_index() == 0


def alone() -> Any:
    """Returns what tells Orbax that this process reads or writes by itself, and is not to wait for others."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}")


def to_host(array: Any) -> np.ndarray:
    """Returns an array's values; where other processes hold parts of it, all processes must ask together.

    Example:
        >>> to_host(jax.numpy.arange(3))
        array([0, 1, 2], dtype=int32)
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gathered(tree: Any) -> Any:
    """Returns a tree of arrays as the host can read it: unchanged where it can, else gathered by all processes."""
    return jax.tree.map(to_host, tree) if jax.process_count() > 1 else tree


def placed(array: Any, sharding: Sharding) -> jax.Array:
    """Returns an array on the devices of a sharding; of several processes each brings what belongs on its own.

    `jax.device_put` would have them compare all values first, for which they would have to talk.

    Args:
        array: the same on all processes; or one that is divided between them already.
        sharding: where it goes.

    Example:
        >>> placed(np.arange(3), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        Array([0, 1, 2], dtype=int32)
    """
    traced = isinstance(array, jax.core.Tracer)
    if traced or sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def agreed(value: bool | int) -> int:
    """Returns the truth value or the number that the first process says, on all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def on_first(work: Callable[[], _Result]) -> _Result | None:
    """Does something on the first process alone; all of them learn that it went well, or why not.

    Args:
        work: what to do.

    Returns:
        What the work returned on the first process, None on the others.

    Raises:
        AgreedError: of several processes on every one, where the work raised an InputError or an OSError on the first.

    Example:
        >>> on_first(lambda: 3)
        3
    """
    if jax.process_count() == 1:
        return work()
    result, own = _attempted(work) if is_first() else (None, "")
    first = _told_by_all(own)[0]
    if first:
        raise AgreedError(first)
    return result


def on_all(work: Callable[[], _Result]) -> _Result:
    """Does something on every process; where it does not work on one of them, all of them say so.

    Args:
        work: what to do; nothing for which processes must talk.

    Returns:
        What the work returned on this process.

    Raises:
        AgreedError: of several processes on every one, where the work raised an InputError or an OSError on one.

    Example:
        >>> on_all(lambda: 3)
        3
    """
    if jax.process_count() == 1:
        return work()
    result, own = _attempted(work)
    for process, message in enumerate(_told_by_all(own)):
        if message:
            raise AgreedError(own or f"process {process}: {message}")
    return cast(_Result, result)


def _attempted(work: Callable[[], _Result]) -> tuple[_Result | None, str]:
    """What the work returned, and what it complained of."""
    try:
        return work(), ""
    except (InputError, OSError) as error:
        return None, str(error) or type(error).__name__


def _told_by_all(message: str) -> list[str]:
    """The messages of all processes, by their numbers."""
    from jax.experimental import multihost_utils

    text = np.zeros(_LONGEST_MESSAGE, np.uint8)
    encoded = np.frombuffer(message.encode()[:_LONGEST_MESSAGE], np.uint8)
    text[: len(encoded)] = encoded
    every = np.asarray(multihost_utils.process_allgather(text)).reshape(-1, _LONGEST_MESSAGE)
    return [bytes(one).rstrip(b"\0").decode(errors="ignore") for one in every]


def wait_for_all(what: str) -> None:
    """Waits until every process is here.

    Args:
        what: the same on all of them.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
