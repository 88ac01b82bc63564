"""S²FT, figure 6: switching between adapters of a layer, and serving many at once."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.adapter_serving import AdapterServingConfig, Row, serving, switching
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels

__all__ = ["EXPERIMENT"]


def run(bench: Bench) -> None:
    """Times all routes in turns, on layers of several sizes and for several numbers of adapters."""
    told = bench.settings.more
    config = AdapterServingConfig(
        sizes=tuple(told["sizes"]),
        adapters=tuple(told["adapters"]),
        width=told["width"],
        rows=told["rows"],
        slices=told["slices"],
        rank=told["rank"],
        density=told["density"],
        dtype="bfloat16" if bench.settings.dtype == "bfloat16" else "float32",
        rounds=told["rounds"],
        device="cpu" if jax.default_backend() == "cpu" else "gpu",
    )
    switched, served = switching(config), serving(config)
    bench.report.table("switching", [_line(row) for row in switched], "A switch from one adapter of a layer to another")
    bench.report.table(
        "serving",
        [_line(row) for row in served],
        f"A batch of {config.rows} rows times a layer of {config.width} x {config.width}, each row with its adapter",
    )
    _picture(bench, switched, served)
    _switch_findings(bench, config, switched)
    _serve_findings(bench, config, served)
    bench.report.text(
        "The paper prints of figure 6: LoRA's switch grows with the square of the layer's size, S²FT's stays nearly "
        "constant; S²FT serves up to 22 % faster than LoRA, by more the more adapters there are."
    )


def _line(row: Row) -> dict[str, Any]:
    return {
        "layer": f"{row.size} x {row.size}",
        "adapters": row.adapters,
        "route": row.route,
        "ms": 1e3 * row.median_s,
        "spread, ms": 1e3 * row.spread_s,
        "/ LoRA": row.to_lora,
    }


def _picture(bench: Bench, switched: list[Row], served: list[Row]) -> None:
    figure, drawn = panels(2, title="Adapters of a layer: switching, and serving many at once", size=(6.0, 5.0))
    for panel, rows, name in ((drawn[0, 0], switched, "size"), (drawn[0, 1], served, "adapters")):
        for route in dict.fromkeys(row.route for row in rows):
            own = [row for row in rows if row.route == route]
            panel.errorbar(
                [getattr(row, name) for row in own],
                [1e3 * row.median_s for row in own],
                yerr=[1e3 * row.spread_s for row in own],
                marker="o",
                capsize=3,
                label=route,
            )
        panel.set(xscale="log", yscale="log", ylabel="ms")
        panel.set_xticks(sorted({getattr(row, name) for row in rows}), minor=False)
        panel.set_xticks([], minor=True)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.legend(fontsize="small")
    drawn[0, 0].set(title="one switch", xlabel="inputs and outputs of the layer")
    drawn[0, 1].set(title="one batch", xlabel="adapters in the batch")
    data = [{"part": row.part} | _line(row) for row in (*switched, *served)]
    caption = "Times; whiskers: half the distance between quartiles, of a few calls each"
    bench.report.picture("times", figure, data, caption)


def _switch_findings(bench: Bench, config: AdapterServingConfig, rows: list[Row]) -> None:
    lora = _by_size(rows, "LoRA")
    for route in (f"{config.slices} slices, two scatter-adds", f"{config.slices} slices, live"):
        own = _by_size(rows, route)
        largest = max(own)
        said = (
            f"{1e3 * own[largest]:.3g} against {1e3 * lora[largest]:.3g} ms at {largest}; time grows with the size to "
            f"the power of {_power(own):.2f}, LoRA's of {_power(lora):.2f}"
        )
        faster = own[largest] < lora[largest]
        bench.report.finding(f"at the largest layer {route} switches faster than LoRA", faster, said)
        bench.report.finding(f"{route}: nearly constant in the layer's size (power below 0.5)", _power(own) < 0.5, said)
    said = f"the power is {_power(lora):.2f} over {min(lora)} to {max(lora)}"
    bench.report.finding("LoRA's switch grows about quadratically (power above 1.5)", _power(lora) > 1.5, said)


def _by_size(rows: list[Row], route: str) -> dict[int, float]:
    return {row.size: row.median_s for row in rows if row.route.startswith(route)}


def _power(times: dict[int, float]) -> float:
    """The exponent of a power law through all points."""
    if len(times) < 2:
        return float("nan")
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def _serve_findings(bench: Bench, config: AdapterServingConfig, rows: list[Row]) -> None:
    slices, by_hand = (
        {row.adapters: row for row in rows if row.route == route}
        for route in (f"{config.slices} slices, js.serve", f"LoRA r={config.rank}, by hand")
    )
    ratios = {adapters: slices[adapters].median_s / by_hand[adapters].median_s for adapters in slices}
    most = max(ratios)
    said = "; ".join(f"{ratio:.2f} of LoRA's time with {adapters}" for adapters, ratio in ratios.items())
    clear = (
        slices[most].median_s + slices[most].spread_s < by_hand[most].median_s - by_hand[most].spread_s,
        ratios[most] < ratios[min(ratios)],
    )
    bench.report.finding(f"S²FT serves {most} adapters faster than batched LoRA", clear[0], said)
    bench.report.finding("its lead grows with the number of adapters", clear[1], said)


EXPERIMENT = Experiment(
    name="s2ft/serving",
    shows="S²FT, figure 6",
    question="What does it take to switch from one adapter to another, and to serve many at once?",
    run=run,
    folder=Path(__file__).parent,
)
