"""Beyond LoRA, table 1: the generalisation bounds of methods as curves over rank, rows and chains."""

import math
from pathlib import Path
from typing import Any

from experiments.beyond_lora.layers import target_shapes
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from jaxsparse.analysis import update_bound
from jaxsparse.models.checkpoints import load_config

__all__ = ["EXPERIMENT"]

_STYLES = ("-", "--", ":", "-.")


def run(bench: Bench) -> None:
    """Computes the first term of every bound, and says how it orders the methods."""
    shapes = target_shapes(bench.settings.model, bench.settings.targets)
    more = bench.settings.more
    usual = {"rank": more["rank"], "samples": more["sample"], "chains": more["chain"]}
    axes = {"rank": more["ranks"], "samples": more["samples"], "chains": more["chains"]}
    names = {"rank": "rank r", "samples": "rows |N|", "chains": "chains k"}
    told = ", ".join(f"{names[name]} = {value:,}" for name, value in usual.items())
    figure, drawn = panels(3, title=f"First term of the bounds, σ = 1; unless varied {told}", size=(5.2, 4.4))
    data: list[dict[str, Any]] = []
    for panel, (varied, values) in zip(drawn[0], axes.items(), strict=True):
        for at, label in enumerate(bench.labels):
            method = bench.settings.methods[label].get("method", label)
            curve = [update_bound(method, shapes, **(usual | {varied: value})) for value in values]
            # Several methods have the same bound: their lines have different dashes and widths, and all can be seen.
            width = 1.2 + 0.9 * (len(bench.labels) - at) / 2
            panel.plot(values, curve, label=label, linestyle=_STYLES[at % len(_STYLES)], linewidth=width)
            data += [
                {"method": label, "varied": varied, "value": value, "bound": bound}
                for value, bound in zip(values, curve, strict=True)
            ]
        panel.set(xlabel=names[varied], ylabel="bound on G(ΔW), nats", xscale="log", yscale="log")
        panel.legend(fontsize="small")
    bench.report.picture("bounds", figure, data, "√(2σ²qp ln 2 / |N|), p the numbers trained over all chains, q = 32")
    bound = {
        name: update_bound(name, shapes, **usual) for name in ("lora", "cola", "asym_lora", "rac_lora", "cla", "c3la")
    }
    root = math.sqrt(usual["chains"])
    ratios = [
        bound[chain] / bound[single] for chain, single in (("cola", "lora"), ("rac_lora", "asym_lora"), ("c3la", "cla"))
    ]
    said = f"ratios {', '.join(f'{each:.3g}' for each in ratios)} with √k = {root:.3g}"
    bench.report.finding("chains raise the bound by √k", all(math.isclose(each, root) for each in ratios), said)
    said = f"cla {bound['cla']:.3g}, asym_lora {bound['asym_lora']:.3g}, lora {bound['lora']:.3g} nats"
    alike = math.isclose(bound["cla"], bound["asym_lora"]) and bound["cla"] < bound["lora"]
    bench.report.finding("cla's bound is asymmetric LoRA's, and below LoRA's", alike, said)
    vocabulary = load_config(bench.settings.model).vocab_size
    least, guess = min(bound.values()), math.log(vocabulary)
    said = f"{least:.3g} nats and more; an untrained guess among {vocabulary:,} tokens loses {guess:.3g}"
    claim = "the bounds order methods, and are too large to say how large a gap is"
    bench.report.finding(claim, least > guess, said)
    bench.report.text(
        "What is unclear: table 1 is a picture, which the text at hand lacks. The bounds of cola, rac_lora, c3la, cla, "
        "lora_plus and paca are derived in appendix D.1.6; those of lora, asym_lora, r_cla and r_c3la are read from "
        "the prose (section 4.2), where r_c3la's lies above r_cla's without a formula. Paca's is printed without its "
        "root. The full bound adds Φ of theorem 1, which multiplies spectral norms of all layers; it is left out here. "
        "σ, for which the loss must be sub-Gaussian, is not known of any model and is 1 here. That an update is spread "
        "over the same inputs in several chains is not used: p counts numbers trained, even where they repeat. With "
        "one chain the chain methods' lines lie on those of their single ones."
    )


EXPERIMENT = Experiment(
    name="beyond_lora/bounds",
    shows="Beyond LoRA, table 1",
    question="How do the bounds grow with rank, rows and chains, and how do they order the methods?",
    run=run,
    folder=Path(__file__).parent,
)
