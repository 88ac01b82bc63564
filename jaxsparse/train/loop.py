"""The training loop: steps, metrics, checkpoints."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import deltas
from jaxsparse.common.errors import Stopped
from jaxsparse.common.hosts import agreed, gathered, is_first, on_first, placed, to_host, wait_for_all
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.common.progress import progress
from jaxsparse.engine.fused import FusedTuner
from jaxsparse.engine.sharding import Sharding
from jaxsparse.engine.tuner import StepMetrics, Tuner, TunerState
from jaxsparse.train.checkpoints import remove_unfinished, restore_newest
from jaxsparse.train.config import RunConfig
from jaxsparse.train.metrics import MetricsWriter, NoMetrics
from jaxsparse.train.reporter import Reporter, Totals
from jaxsparse.train.saver import Saver
from jaxsparse.train.stopping import StopRequests

__all__ = ["train"]

# To agree on the time takes a message between processes.
_STEPS_BETWEEN_CLOCKS = 16


def train(
    tuner: Tuner,
    params: Any,
    data: grain.DatasetIterator,
    run: RunConfig,
    steps: int,
    *,
    rate: Callable[[int], Any],
    base_fingerprint: str,
    sharding: Sharding | None = None,
) -> tuple[TunerState, Totals]:
    """Trains for a number of steps, from the start or from the newest checkpoint.

    Args:
        tuner: makes the steps.
        params: the base's parameters; their memory is taken over, they cannot be used afterwards.
        data: iterator of batches with `get_state` and `set_state`.
        run: where to write, how often, whether to resume.
        steps: optimizer steps of the whole run.
        rate: learning rate as a function of the step, for the metrics.
        base_fingerprint: of `params`.
        sharding: how the parameters are divided between devices, if they are.

    Returns:
        The last state and the sums over the run; `tuner.params` of that state is the tuned model.

    Raises:
        InputError: a checkpoint cannot be written, or none can be used.
        Stopped: SIGTERM or SIGINT came; the step that was running is done, and a checkpoint saved.
    """
    folder = run.out / "checkpoints"
    if is_first():
        remove_unfinished(folder)
    wait_for_all("the start")
    # A host copy of what may move: checkpoints hold the weights as a delta against it.
    moving = tuner.description.moving(params)
    base = {path: np.array(to_host(leaf)) for path, leaf in _at(params, moving)}
    found = None
    if run.resume:
        like = jax.eval_shape(tuner.init, params).method
        found = restore_newest(folder, like, base_fingerprint=base_fingerprint)
    if found is None:
        state, totals, start = tuner.init(params, donate=True), Totals(), 0
    else:
        # Not by way of `init`, which may change the weights that the delta is against (LoRA-GA).
        state = TunerState(deltas.apply(gathered(params), found.delta, donate=True), found.method_state)
        state = _placed(tuner, state, sharding)
        totals, start = Totals(**found.totals), found.step
        data.set_state(found.data_state)

    def take(batch: Any) -> StepMetrics:
        nonlocal state
        if sharding is not None:
            batch = jax.tree.map(placed, batch, sharding.of_batch(batch))
        state, metrics = tuner.step(state, batch)
        return metrics

    last_save = time.monotonic()
    with (
        StopRequests(of_all=jax.process_count() > 1) as requests,
        Saver(folder, base, base_fingerprint, keep=run.keep_checkpoints) as saver,
        MetricsWriter(run.out, start, tensorboard=run.tensorboard) if is_first() else NoMetrics() as writer,
        progress("training", steps, done=start) as advance,
    ):
        reporter = Reporter(writer, totals, rate, advance)
        for step in range(start + 1, steps + 1):
            batch = next(data)
            reporter.step(step, batch, partial(take, batch))
            stop = requests.at(step) or (requests.at(step + 1) if step == steps else None)
            if stop or (step < steps and _due(run, step, last_save)):
                reporter.flush()
                moved, method = gathered((dict(_at(state.params, moving)), state.method))
                on_first(partial(saver.save, step, moved, method, data.get_state(), vars(totals)))
                last_save = time.monotonic()
                reporter.restart()
            if stop:  # after the last step too: to measure takes time that a signal does not leave
                on_first(saver.wait)
                raise Stopped(stop, step)
        reporter.flush()
        on_first(saver.wait)
    return state, totals


def _placed(tuner: Tuner, state: TunerState, sharding: Sharding | None) -> TunerState:
    """A restored state on the devices where a new one would be."""
    if sharding is None:
        return state
    if isinstance(tuner, FusedTuner) and tuner.sharding is not None:
        return tuner.placed(state)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    params = jax.tree.map(placed, state.params, sharding.of(state.params))
    return TunerState(params, jax.tree.map(lambda leaf: placed(leaf, everywhere), state.method))


def _at(params: Any, positions: list[int]) -> list[tuple[str, Any]]:
    """(path, leaf) of the leaves at some positions."""
    pairs = flatten_with_paths(params)[0]
    return [pairs[at] for at in positions]


def _due(run: RunConfig, step: int, last_save: float) -> bool:
    """Whether a checkpoint is due after a step; of several processes the first one's clock decides, now and then."""
    if run.checkpoint_every is not None and step % run.checkpoint_every == 0:
        return True
    if run.checkpoint_minutes is None or (jax.process_count() > 1 and step % _STEPS_BETWEEN_CLOCKS):
        return False
    return bool(agreed(time.monotonic() - last_save >= 60 * run.checkpoint_minutes))
