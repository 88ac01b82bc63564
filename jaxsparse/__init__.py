"""Sparse and structured fine-tuning of language models in JAX.

Every method is an optax gradient transformation: `tx = js.gasdu(optax.adam(1e-4), density=1e-4)`.
"""

import importlib
from typing import Any

from jaxsparse import select as select
from jaxsparse import subspaces as subspaces
from jaxsparse.common.errors import InputError as InputError
from jaxsparse.engine.calibration import calibrate as calibrate
from jaxsparse.engine.calibration import collect_activations as collect_activations
from jaxsparse.engine.calibration import collect_gradients as collect_gradients
from jaxsparse.engine.calibration import with_support as with_support
from jaxsparse.engine.fused import fuse as fuse
from jaxsparse.engine.layers import LayersState as LayersState
from jaxsparse.engine.low_rank import LowRankState as LowRankState
from jaxsparse.engine.reference import SubspaceState as SubspaceState
from jaxsparse.engine.serving import ServedModel as ServedModel
from jaxsparse.engine.serving import serve as serve
from jaxsparse.engine.sharding import Sharding as Sharding
from jaxsparse.engine.spiel import SpielState as SpielState
from jaxsparse.engine.tuner import ReferenceTuner as ReferenceTuner
from jaxsparse.methods.baselines import saft as saft
from jaxsparse.methods.baselines import shira as shira
from jaxsparse.methods.baselines import sift as sift
from jaxsparse.methods.baselines import super_tuning as super_tuning
from jaxsparse.methods.cheap_lora import c3la as c3la
from jaxsparse.methods.cheap_lora import cla as cla
from jaxsparse.methods.cheap_lora import r_c3la as r_c3la
from jaxsparse.methods.cheap_lora import r_cla as r_cla
from jaxsparse.methods.composition import subspace_descent as subspace_descent
from jaxsparse.methods.dora import dora as dora
from jaxsparse.methods.full import bitfit as bitfit
from jaxsparse.methods.full import full as full
from jaxsparse.methods.gallop import gallop as gallop
from jaxsparse.methods.gasdu import fixed_mask as fixed_mask
from jaxsparse.methods.gasdu import gasdu as gasdu
from jaxsparse.methods.gradient_lora import lora_ga as lora_ga
from jaxsparse.methods.gradient_lora import lora_one as lora_one
from jaxsparse.methods.lisa import lisa as lisa
from jaxsparse.methods.lora import asym_lora as asym_lora
from jaxsparse.methods.lora import cola as cola
from jaxsparse.methods.lora import lora as lora
from jaxsparse.methods.lora import lora_plus as lora_plus
from jaxsparse.methods.lora import rac_lora as rac_lora
from jaxsparse.methods.neuroada import neuroada as neuroada
from jaxsparse.methods.paca import c_paca as c_paca
from jaxsparse.methods.paca import d_paca as d_paca
from jaxsparse.methods.paca import paca as paca
from jaxsparse.methods.s2ft import s2ft as s2ft
from jaxsparse.methods.smt import smt as smt
from jaxsparse.methods.spiel import spiel as spiel
from jaxsparse.select.schedules import adaptive as adaptive
from jaxsparse.subspaces.permutation import permute_coupled as permute_coupled
from jaxsparse.subspaces.targets import Target as Target

# Imported on first use: who chains a method into an optax pipeline need not wait for Orbax and grain.
_ON_DEMAND = ("data", "deltas", "evaluate", "models", "train")


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"jaxsparse.{name}")
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
