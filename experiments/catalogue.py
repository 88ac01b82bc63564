"""All experiments, by name."""

from importlib import import_module

from experiments.runner.experiment import Experiment
from jaxsparse.common.errors import InputError

__all__ = ["EXPERIMENTS", "chosen"]

_NAMES = (
    "gasdu/tasks",
    "gasdu/retention",
    "gasdu/pl",
    "gasdu/refresh_interval",
    "gasdu/cost",
    "gasdu/budget",
    "gasdu/code",
    "neuroada/tasks",
    "neuroada/mask_based",
    "neuroada/cost",
    "neuroada/neurons",
    "neuroada/selection",
    "beyond_lora/tasks",
    "beyond_lora/generalisation",
    "beyond_lora/intruders",
    "beyond_lora/landscape",
    "beyond_lora/bounds",
    "beyond_lora/ablations",
    "beyond_lora/cost",
    "s2ft/budgets",
    "s2ft/projections",
    "s2ft/selection",
    "s2ft/efficiency",
    "s2ft/serving",
    "s2ft/fusion",
    "gallop/transfer",
)


def _load(name: str) -> Experiment:
    experiment: Experiment = import_module(f"experiments.{name.replace('/', '.')}.experiment").EXPERIMENT
    assert experiment.name == name
    return experiment


EXPERIMENTS: dict[str, Experiment] = {name: _load(name) for name in _NAMES}


def chosen(name: str) -> list[Experiment]:
    """Returns the experiments of a name: of one, of a paper's all, or of "all".

    Raises:
        InputError: there is none.
    """
    found = [each for each in EXPERIMENTS.values() if name in ("all", each.name, each.name.split("/")[0])]
    if not found:
        papers = sorted({each.split("/")[0] for each in EXPERIMENTS})
        raise InputError(f"no experiment {name!r}; there are all, {', '.join(papers)}, and {', '.join(EXPERIMENTS)}")
    return found
