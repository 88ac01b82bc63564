"""Sparse deltas: what fine-tuning changed, against a named base; exact both ways, small on disk, safe to share."""

from jaxsparse.deltas.changes import entry_changes
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.description import describe, overlap
from jaxsparse.deltas.difference import diff
from jaxsparse.deltas.export import export_entries, export_merged
from jaxsparse.deltas.files import load, save
from jaxsparse.deltas.live import Live, live
from jaxsparse.deltas.mix import mix
from jaxsparse.deltas.patch import apply, check_base, revert
from jaxsparse.deltas.peft_export import export_peft
from jaxsparse.deltas.peft_import import import_peft
from jaxsparse.deltas.picture import heat_map
from jaxsparse.deltas.stack import Stacked, stack
from jaxsparse.deltas.switch import switch
from jaxsparse.deltas.tensors import CoordinateDelta, FactorDelta, SliceDelta, TensorDelta

__all__ = [
    "CoordinateDelta",
    "Delta",
    "FactorDelta",
    "Live",
    "Metadata",
    "SliceDelta",
    "Stacked",
    "TensorDelta",
    "apply",
    "check_base",
    "describe",
    "diff",
    "entry_changes",
    "export_entries",
    "export_merged",
    "export_peft",
    "heat_map",
    "import_peft",
    "live",
    "load",
    "mix",
    "overlap",
    "revert",
    "save",
    "stack",
    "switch",
]
