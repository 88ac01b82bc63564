"""Our side: a method of jaxsparse in the fused engine."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxsparse as js
from experiments.peers.setting import Arrays, Setting, Start, size_on_disk
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.data.batches import Batch
from jaxsparse.deltas.peft_layout import linears
from jaxsparse.engine.low_rank import LowRankState
from jaxsparse.engine.tuner import TunerState
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel

__all__ = ["Ours", "make_method"]


def make_method(setting: Setting) -> Any:
    """Returns the method that a setting describes."""
    inner = optax.adam(setting.lr, b1=setting.beta1, b2=setting.beta2, eps=setting.eps)
    low_rank: dict[str, Any] = {"rank": setting.rank, "alpha": setting.alpha}
    made = {
        "lora": lambda: js.lora(inner, **low_rank),
        "dora": lambda: js.dora(inner, **low_rank),
        "shira": lambda: js.shira(inner, rank=setting.rank),
        "super_tuning": lambda: js.super_tuning(inner, density=setting.density),
        "full": lambda: js.full(inner),
        "gasdu": lambda: js.gasdu(inner, density=setting.density, refresh_every=setting.refresh_every),
    }
    return made[setting.method]()


class Ours:
    """A model that trains by the fused engine.

    Args:
        setting: the method.
        folder: the model, as Hugging Face lays it out; read as float32.
        keep_base: keep the weights that training begins with, which `save` of a method without factors needs.

    Raises:
        InputError: the method does not fit the model.
    """

    def __init__(self, setting: Setting, folder: Path, *, keep_base: bool = True) -> None:
        loaded = load(folder, dtype="float32")
        self.setting, self.config = setting, loaded.config
        self.base, self.base_fingerprint = loaded.params, loaded.fingerprint
        self.tuner: Any = js.fuse(LanguageModel(loaded.config).loss, make_method(setting), has_aux=True)
        self.state: TunerState = self.tuner.init(self.base, donate=not keep_base)

    def start(self) -> Start:
        """Returns what the method starts from, before the first step; of GASDU, which waits for a gradient, nothing."""
        if self.setting.method in ("full", "gasdu"):
            return {}
        method, modules = self.state.method, linears(self.config)
        found: dict[str, dict[str, np.ndarray]] = {}
        low_rank = isinstance(method, LowRankState)
        for path, leaf in flatten_with_paths(method.factors.a if low_rank else method.support)[0]:
            linear = modules[path]
            for name, own in zip(linear.modules, np.asarray(leaf), strict=True):
                found[name] = {"a": own} if low_rank else {"index": _transposed(own, linear.view)}
        return found

    def step(self, batch: Arrays) -> float:
        """Trains one step and returns the loss before it."""
        # Positions as both sides count them: every row is one sequence.
        places = np.broadcast_to(np.arange(batch["tokens"].shape[1], dtype=np.int32), batch["tokens"].shape)
        rows = Batch(batch["tokens"], batch["targets"], batch["weights"], np.array(places), batch["segments"])
        self.state, metrics = jax.block_until_ready(self.tuner.step(self.state, rows))
        return float(metrics.loss)

    def state_bytes(self) -> int:
        """Returns the bytes of the method's state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.method))

    def save(self, folder: Path) -> int:
        """Saves the delta and returns its bytes."""
        delta = self.tuner.delta(self.state, self.base, base_fingerprint=self.base_fingerprint)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            file = Path(own) / "delta.safetensors"
            js.deltas.save(file, delta)
            return size_on_disk([file])

    def close(self) -> None:
        """Gives the memory back."""
        self.state = self.base = self.tuner = None  # type: ignore[assignment]
        jax.clear_caches()
        gc.collect()


def _transposed(index: np.ndarray, view: Any) -> np.ndarray:
    """Flat places in an (in, out) kernel as places in the (out, in) weight of torch."""
    row, column = np.divmod(index.astype(np.int64), view.out_size)
    return column * view.in_size + row
