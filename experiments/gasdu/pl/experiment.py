"""GASDU, figure 3: whether the squared gradient norm follows the excess loss along full fine-tuning."""

from pathlib import Path

import numpy as np

from experiments.gasdu.pl.trajectory import Trajectory, watch
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from jaxsparse.analysis import fit_pl
from jaxsparse.analysis.pl_fit import PLFit
from jaxsparse.common.errors import InputError

__all__ = ["EXPERIMENT"]

_VIEWS = {
    "figure 3": "f of held-out rows, gradient of the step's batch",
    "same rows": "f and gradient of the same training rows",
}
Points = tuple[np.ndarray, np.ndarray]


def run(bench: Bench) -> None:
    """Watches full fine-tuning on every task, and fits a line through the logarithms."""
    (label,) = bench.labels
    found: dict[tuple[str, int], Trajectory] = {}
    for task in bench.settings.tasks:
        for seed in bench.seeds:
            if (trajectory := watch(bench, label, task, seed)) is not None:
                found[task, seed] = trajectory
    fits = {
        (view, task, seed): fit
        for (task, seed), trajectory in found.items()
        for view in _VIEWS
        if (fit := _fit(bench, _points(trajectory, view), f"{view}, {task}, seed {seed}")) is not None
    }
    _table(bench, fits)
    _draw(bench, found, fits)
    for view, said in _VIEWS.items():
        for task in bench.settings.tasks:
            _finding(bench, [fit for key, fit in fits.items() if key[:2] == (view, task)], f"{task}, {said}")
    bench.report.text(
        "f* is the least loss of the run, and the last "
        f"{bench.settings.more['drop_last']} steps take no part, as in section 4.3. The interval of a slope is that of "
        "the moving-block bootstrap: steps that follow each other are not independent. The paper prints no slope: its "
        "figure 3 shows 'a near-linear slope of approximately one'. Where held-out loss rises again, its least value "
        "lies in the middle of the run and the first view means little; the second has f and g of the same function."
    )


def _points(trajectory: Trajectory, view: str) -> Points:
    if view == "figure 3":
        return trajectory.held_out_losses, trajectory.batch_norms
    return trajectory.fixed_losses, trajectory.fixed_norms


def _fit(bench: Bench, points: Points, named: str) -> PLFit | None:
    try:
        return fit_pl(*points, drop_last=bench.settings.more["drop_last"])
    except InputError as error:
        bench.report.failure(f"{named}: {error}")
        return None


def _table(bench: Bench, fits: dict[tuple[str, str, int], PLFit]) -> None:
    table = [
        {
            "view": view,
            "task": task,
            "seed": seed,
            "slope": fit.slope,
            "slope, low": fit.slope_interval[0],
            "slope, high": fit.slope_interval[1],
            "r²": fit.explained,
            "largest μ that holds": fit.mu,
            "typical μ": fit.typical_mu,
            "points": fit.points,
        }
        for (view, task, seed), fit in fits.items()
    ]
    bench.report.table("fits", table, "Lines through log ‖g‖² against log (f − f*), natural logarithms, 95 % intervals")


def _draw(bench: Bench, found: dict[tuple[str, int], Trajectory], fits: dict[tuple[str, str, int], PLFit]) -> None:
    tasks = [task for task in bench.settings.tasks if any(key[0] == task for key in found)]
    if not tasks:
        return
    figure, drawn = panels(len(_VIEWS), len(tasks), title="Squared gradient norm by excess loss, full fine-tuning")
    data = []
    for row, task in zip(drawn, tasks, strict=True):
        for panel, (view, said) in zip(row, _VIEWS.items(), strict=True):
            for seed in bench.seeds:
                fit = fits.get((view, task, seed))
                if fit is None:
                    continue
                losses, norms = (each[: -bench.settings.more["drop_last"]] for each in _points(found[task, seed], view))
                excess, norms = (losses - fit.optimum)[losses > fit.optimum], norms[losses > fit.optimum]
                panel.scatter(excess, norms, s=6, alpha=0.4, color=f"C{seed}")
                line = np.array([excess.min(), excess.max()])
                label = f"seed {seed}: slope {fit.slope:.2f} [{fit.slope_interval[0]:.2f}, {fit.slope_interval[1]:.2f}]"
                panel.plot(line, np.exp(fit.intercept) * line**fit.slope, color=f"C{seed}", label=label)
                data += [
                    {"view": view, "task": task, "seed": seed, "excess loss": float(x), "squared norm": float(y)}
                    for x, y in zip(excess, norms, strict=True)
                ]
            panel.set(xscale="log", yscale="log", title=f"{task}: {said}")
            panel.set(xlabel="f − f*, nats a token", ylabel="‖g‖²")
            panel.title.set_fontsize("small")
            if panel.lines:
                panel.legend(fontsize="small")
            else:
                panel.remove()
    bench.report.picture(
        "pl", figure, data, "A point a step, lines fitted; the condition is tight where the slope is 1"
    )


def _finding(bench: Bench, fits: list[PLFit], where: str) -> None:
    """Whether a slope of one lies in the interval, and none of zero, by the medians over seeds."""
    if not fits:
        return
    slope, low, high = (
        float(np.median([each(fit) for fit in fits]))
        for each in (lambda fit: fit.slope, lambda fit: fit.slope_interval[0], lambda fit: fit.slope_interval[1])
    )
    said = (
        f"slope {slope:.2f}, interval {low:.2f} to {high:.2f}, r² {np.median([fit.explained for fit in fits]):.2f}, "
        f"medians of {len(fits)} seeds"
    )
    seen = None if low <= 0 and high >= 1 else low > 0 and low <= 1 <= high
    bench.report.finding(f"log ‖g‖² grows with log (f − f*) with a slope near one ({where})", seen, said)


EXPERIMENT = Experiment(
    name="gasdu/pl",
    shows="GASDU, figure 3",
    question="Does full fine-tuning satisfy the local Polyak-Łojasiewicz condition that the theory needs?",
    run=run,
    folder=Path(__file__).parent,
)
