"""Beyond LoRA, figures 1, 3 and 8 to 10: the loss around tuned models, and the optimizer's way there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.beyond_lora.landscape.paths import OptimizerPath, follow
from experiments.layers import LINEAR_LAYERS
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from jaxsparse.analysis import filter_normalise, loss_grid, path_plane, project_path, random_plane, sharpness
from jaxsparse.analysis.landscape import Plane
from jaxsparse.common.errors import InputError

__all__ = ["EXPERIMENT"]

_NAMES = {"random": "random directions", "path": "principal directions of the path"}


@dataclass(frozen=True)
class _Landscape:
    """Losses around a tuned model; `first` along the first axis of each grid.

    Attributes:
        steps: the places along both directions of the surfaces.
        surfaces: by kind of directions, the losses.
        first: the places along the first direction of the contour.
        second: those along the second.
        contour: the losses.
        points: where the path's points lie in the contour, (points, 2).
        explained: of the path's variance, by each of its two directions.
    """

    steps: np.ndarray
    surfaces: dict[str, np.ndarray]
    first: np.ndarray
    second: np.ndarray
    contour: np.ndarray
    points: np.ndarray
    explained: tuple[float, float]


def run(bench: Bench) -> None:
    """Draws surfaces and contours of every method on the first task, and compares their sharpness."""
    task, found = bench.settings.tasks[0], {}
    for label in bench.labels:
        try:
            found[label] = _landscape(bench, follow(bench, label, task))
        except InputError as error:
            bench.report.failure(f"{label} on {task}: {error}")
    if not found:
        return
    _draw_surfaces(bench, found, task)
    _draw_contours(bench, found, task)
    table = [_sharpness(bench, label, each, kind) for label, each in found.items() for kind in _NAMES]
    bench.report.table(
        "sharpness", table, "How fast the loss grows within the reach of the surfaces, nats a token; one seed"
    )
    _findings(bench, table)
    bench.report.text(
        "Directions move all linear layers of every method, filter-normalised: a step of 1 changes every output's "
        "weights by as much as they are long. A contour's plane has the path's principal directions as they are; "
        "normalised ones would not hold the path. The loss is that of training rows. The paper says that landscapes "
        "mostly contradict the measured generalisation."
    )


def _landscape(bench: Bench, path: OptimizerPath) -> _Landscape:
    more = bench.settings.more
    steps = np.linspace(-more["reach"], more["reach"], more["points"])
    found = path_plane(path.points, targets=LINEAR_LAYERS)
    ways = {
        "random": random_plane(path.params, jax.random.key(0), targets=LINEAR_LAYERS),
        "path": filter_normalise(found.plane, path.params, targets=LINEAR_LAYERS),
    }

    def losses(plane: Plane, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return loss_grid(
            path.model.loss,
            path.params,
            plane,
            first,
            second,
            batches=path.batches,
            targets=LINEAR_LAYERS,
            has_aux=True,
        )

    points = project_path(path.points, found.plane, origin=path.points[-1], targets=LINEAR_LAYERS)
    first, second = (_axis(places, more["points"]) for places in points.T)
    surfaces = {kind: losses(plane, steps, steps) for kind, plane in ways.items()}
    contour = losses(found.plane, first, second)
    return _Landscape(steps, surfaces, first, second, contour, points, found.explained)


def _axis(places: np.ndarray, count: int) -> np.ndarray:
    """An axis that holds the whole path, with room at both ends."""
    low, high = float(places.min()), float(places.max())
    room = 0.25 * (high - low)
    return np.linspace(low - room, high + room, count)


def _draw_surfaces(bench: Bench, found: dict[str, _Landscape], task: str) -> None:
    """A row of panels for each kind of directions; panels of a row share their heights."""
    figure = Figure(figsize=(4.6 * len(found), 4.4 * len(_NAMES)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Loss around tuned models, {task}")
    data, number = [], 0
    for kind, named in _NAMES.items():
        low = min(each.surfaces[kind].min() for each in found.values())
        high = max(np.nanmax(each.surfaces[kind]) for each in found.values())
        for label, each in found.items():
            number += 1
            panel: Any = figure.add_subplot(len(_NAMES), len(found), number, projection="3d")
            x, y = np.meshgrid(each.steps, each.steps, indexing="ij")
            panel.plot_surface(x, y, each.surfaces[kind], cmap="viridis", vmin=low, vmax=high)
            panel.set(title=f"{label}, {named}", xlabel="first", ylabel="second", zlabel="loss, nats a token")
            panel.set_zlim(low, high)
            ends = [-bench.settings.more["reach"], 0.0, bench.settings.more["reach"]]
            panel.set(xticks=ends, yticks=ends)
            panel.set_box_aspect(None, zoom=0.85)  # room for the label of the heights
            data += _rows(label, kind, each.steps, each.steps, each.surfaces[kind])
    caption = "Loss on training rows over filter-normalised directions; heights are those of the whole row of panels"
    bench.report.picture("surfaces", figure, data, caption)


def _draw_contours(bench: Bench, found: dict[str, _Landscape], task: str) -> None:
    figure, drawn = panels(len(found), title=f"The optimizer's path, {task}", size=(5.4, 4.6))
    data = []
    for panel, (label, each) in zip(drawn[0], found.items(), strict=True):
        filled = panel.contourf(each.first, each.second, each.contour.T, levels=16, cmap="viridis")
        figure.colorbar(filled, ax=panel, label="loss, nats a token")
        panel.plot(*each.points.T, color="white", marker=".", linewidth=1.2)
        panel.plot(*each.points[0], color="white", marker="s")
        panel.plot(*each.points[-1], color="red", marker="X", markersize=9)
        shares = [f"direction {at}: {share:.0%} of the path" for at, share in enumerate(each.explained, 1)]
        panel.set(title=f"{label}: square to cross", xlabel=shares[0], ylabel=shares[1])
        data += _rows(label, "contour", each.first, each.second, each.contour)
        data += [
            {"method": label, "directions": "path's points", "first": float(a), "second": float(b), "loss": None}
            for a, b in each.points
        ]
    bench.report.picture("contours", figure, data, "Loss on training rows in the plane of each method's own path")


def _rows(
    label: str, kind: str, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, losses: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {"method": label, "directions": kind, "first": float(a), "second": float(b), "loss": float(losses[i, j])}
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def _sharpness(bench: Bench, label: str, each: _Landscape, kind: str) -> dict[str, Any]:
    found = sharpness(each.surfaces[kind], each.steps, each.steps, radius=bench.settings.more["reach"])
    middle = len(each.steps) // 2
    return {
        "method": label,
        "directions": _NAMES[kind],
        "loss in the middle": float(each.surfaces[kind][middle, middle]),
        "largest increase": found.largest_increase,
        "mean increase": found.mean_increase,
        "curvature": found.curvature,
    }


def _findings(bench: Bench, table: list[dict[str, Any]]) -> None:
    for named in _NAMES.values():
        increases = {line["method"]: line["mean increase"] for line in table if line["directions"] == named}
        if "full" not in increases or len(increases) < 2:
            continue
        said = "mean increase " + ", ".join(f"{label} {value:.3g}" for label, value in increases.items())
        claim = f"full fine-tuning has the spikiest landscape, {named}"
        bench.report.finding(claim, max(increases, key=lambda label: increases[label]) == "full", f"{said}; one seed")


EXPERIMENT = Experiment(
    name="beyond_lora/landscape",
    shows="Beyond LoRA, figures 1, 3 and 8 to 10",
    question="How sharp is the loss around models tuned in full, by LoRA and by cheap LoRA?",
    run=run,
    folder=Path(__file__).parent,
)
