"""The inner optimizer and the method that a configuration describes."""

import dataclasses
import inspect
import math
import re
from typing import Any

import optax

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.methods.registry import constructor_of
from jaxsparse.subspaces.targets import Target, Targets
from jaxsparse.train.config import FinetuneConfig, OptimizerConfig

__all__ = ["inner_optimizer", "learning_rate", "make_method", "stacked_targets"]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the optimizer step.

    Raises:
        InputError: the rate is not positive, or the warm-up is longer than the run.

    Example:
        >>> rate = learning_rate(OptimizerConfig(lr=0.5, schedule="linear", warmup_steps=2), steps=6)
        >>> [round(float(rate(step)), 3) for step in range(6)]
        [0.0, 0.25, 0.5, 0.375, 0.25, 0.125]
    """
    if not 0 < config.lr < math.inf:
        raise InputError(f"lr must be a positive number, got {config.lr}")
    if not 0 <= config.warmup_steps <= steps:
        raise InputError(f"warmup_steps must lie between 0 and the {steps} steps of the run, got {config.warmup_steps}")
    rest = max(steps - config.warmup_steps, 1)
    falls = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }
    if not config.warmup_steps:
        return falls[config.schedule]
    rise = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([rise, falls[config.schedule]], [config.warmup_steps])


def inner_optimizer(config: OptimizerConfig, steps: int, *, scaled: bool = True) -> optax.GradientTransformation:
    """Returns the optimizer of the slots: clipping, then Adam, AdamW or gradient descent.

    Args:
        config: the optimizer's options.
        steps: optimizer steps of the run.
        scaled: by the learning rate, downhill. Methods that start their inner optimizer afresh do that themselves, so
            that the rate's schedule does not start again.

    Returns:
        The optimizer.

    Raises:
        InputError: a value is out of range, or weight decay is asked of an optimizer that has none.
    """
    rate = learning_rate(config, steps)
    if not 0 <= config.clip < math.inf:
        raise InputError(f"clip must be a positive number, or 0 for none, got {config.clip}")
    if not 0 <= config.weight_decay < math.inf:
        raise InputError(f"weight_decay must be a positive number, or 0 for none, got {config.weight_decay}")
    if config.weight_decay and config.optimizer != "adamw":
        raise InputError(f"weight_decay={config.weight_decay} needs --optimizer adamw, not {config.optimizer}")
    links = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    links += [optax.identity() if config.optimizer == "sgd" else optax.scale_by_adam()]
    links += [optax.add_decayed_weights(config.weight_decay)] if config.optimizer == "adamw" else []
    links += [optax.scale_by_learning_rate(rate)] if scaled else []
    return optax.chain(*links)


def stacked_targets(params: Any, pattern: str | None) -> Targets:
    """Turns a pattern over our own models' paths into targets that know which axis counts layers.

    Our models stack their layers, so a weight under `layers/` of three axes is one matrix per layer.

    Args:
        params: the model's parameters.
        pattern: a regular expression for whole paths; None: the default targets.

    Returns:
        Something for a constructor's `targets`.

    Example:
        >>> import jax.numpy as jnp
        >>> stacked_targets({"layers": {"kernel": jnp.ones((2, 3, 4))}}, ".*/kernel")[0].stack_axes
        (0,)
    """
    if pattern is None or not _compiles(pattern):
        return pattern  # a broken pattern gets its message where all patterns do
    matching = [path for path, _ in flatten_with_paths(params)[0] if re.fullmatch(pattern, path)]
    targets = [Target(re.escape(path), stack_axes=(0,) if path.startswith("layers/") else ()) for path in matching]
    return targets or pattern


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _options_without_inner(method: str, config: OptimizerConfig, steps: int) -> dict[str, Any]:
    """What a method that brings its own optimizer takes from the options of the inner one."""
    inner_optimizer(config, steps)  # complains about what is out of range
    if config.optimizer == "sgd":
        raise InputError(f"{method} brings its own optimizer, so optimizer=sgd cannot be had; leave it out")
    return {"weight_decay": config.weight_decay, "clip": config.clip or None}


def make_method(
    config: FinetuneConfig, params: Any, steps: int, head_size: int | None = None
) -> SubspaceTransformation:
    """Builds the method that a configuration names, around its inner optimizer.

    Args:
        config: the run's configuration.
        params: the model's parameters, or their shapes.
        steps: optimizer steps of the run.
        head_size: width of one attention head, for methods that ask for it and are not told.

    Returns:
        The transformation.

    Raises:
        InputError: an option does not work.
    """
    inner = config.inner
    if getattr(config.chosen_method, "carry", None) == "reset" and (inner.schedule != "constant" or inner.warmup_steps):
        raise InputError(
            f"carry=reset starts the inner optimizer afresh at every refresh, and schedule={inner.schedule} with "
            f"warmup_steps={inner.warmup_steps} would start again with it; use carry=slot or carry=coordinate, or "
            "schedule=constant and warmup_steps=0"
        )
    fields = dataclasses.fields(config.chosen_method)
    options = {option.name: getattr(config.chosen_method, option.name) for option in fields}
    if "head_size" in options and options["head_size"] is None:
        options["head_size"] = head_size
    constructor = constructor_of(config.method)
    takes = inspect.signature(constructor).parameters
    if "learning_rate" in takes:
        options["learning_rate"] = learning_rate(inner, steps)
    if "inner" in takes:
        options["inner"] = inner_optimizer(inner, steps, scaled="learning_rate" not in takes)
    else:
        options |= _options_without_inner(config.method, inner, steps)
    # The run knows its length; chains ask for it only together with their number.
    if options.get("total_steps", steps) is None and options.get("chains", 1) is not None:
        options["total_steps"] = steps
    return constructor(
        targets=stacked_targets(params, config.targets),
        seed=config.run.seed,
        **options,
    )
