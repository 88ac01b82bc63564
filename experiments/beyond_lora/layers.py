"""The layers that Beyond LoRA's bounds speak of."""

from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.subspaces.targets import Targets, resolve_targets

__all__ = ["target_shapes"]


def target_shapes(model: str, targets: Targets = None) -> list[tuple[int, int]]:
    """(in, out) of every adapted layer of a model, by its shape alone.

    Args:
        model: a folder or a known name.
        targets: which weights; None: the attention projections.
    """
    params = LanguageModel(load_config(model)).abstract()
    views = [target.view for target in resolve_targets(params, targets)]
    return [(view.in_size, view.out_size) for view in views for _ in range(view.stack)]
