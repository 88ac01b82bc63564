"""What a run has done, for people and for programs."""

import dataclasses

from rich.table import Table

__all__ = ["Report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a run; `report.json` holds the same.

    Attributes:
        loss_before: mean cross-entropy of the held-out answers under the base, nats per token; None without them, or
            where it is not finite.
        loss_after: the same under the tuned model.
        exact_match_before: share of held-out rows that the base answers right, from 0 to 1.
        exact_match_after: the same for the tuned model.
        eval_rows: number of held-out rows.
        entries_changed: weights whose bits differ from the base's.
        slots: free coordinates at a time.
        delta_bytes: size of the delta on disk.
        bit_identical: whether the delta as saved, applied to the base as it is on disk, is the tuned model bit for bit.
        tokens_per_second: input tokens (padding left out) per second of the steps that did not compile.
        retention_mean: mean over refreshing steps of ||masked g||^2 / ||g||^2 over all targets (GASDU, equation 4);
            None where it is not finite, or was not measured: the fused engine measures it only for methods that pick
            by the step's own gradient.
        refreshes: how often a support was picked.
        steps: optimizer steps.
        skipped: steps left out because of a gradient that was not finite.
        method: the method's name.
        engine: what ran it, "fused" or "reference".
        base: the model that the delta belongs to.
        delta: where the delta lies.
    """

    loss_before: float | None
    loss_after: float | None
    exact_match_before: float | None
    exact_match_after: float | None
    eval_rows: int
    entries_changed: int
    slots: int
    delta_bytes: int
    bit_identical: bool
    tokens_per_second: float
    retention_mean: float | None
    refreshes: int
    steps: int
    skipped: int
    method: str
    engine: str
    base: str
    delta: str

    def table(self) -> Table:
        """Returns the report as a table for a terminal."""
        table = Table(
            title=f"{self.method} on {self.base}, {self.engine} engine", show_header=False, title_justify="left"
        )
        if self.eval_rows:
            losses = f"{_shown(self.loss_before, '.3f')} -> {_shown(self.loss_after, '.3f')}"
            table.add_row(f"held-out loss ({self.eval_rows} rows)", losses)
            matches = f"{_shown(self.exact_match_before, '.1%')} -> {_shown(self.exact_match_after, '.1%')}"
            table.add_row("exact match", matches)
        table.add_row("steps, refreshes", f"{self.steps:,}, {self.refreshes:,}")
        table.add_row("free coordinates at a time", f"{self.slots:,}")
        table.add_row("entries changed", f"{self.entries_changed:,}")
        per_entry = self.delta_bytes / max(self.entries_changed, 1)
        table.add_row("delta on disk", f"{self.delta_bytes:,} bytes ({per_entry:.2f} per entry)")
        table.add_row("base + delta = tuned model", "bit-identical" if self.bit_identical else "[red]NOT identical")
        retention = "not measured" if self.retention_mean is None else f"{self.retention_mean:.3f}"
        table.add_row("mean retention at refreshes", retention)
        table.add_row("speed", f"{self.tokens_per_second:,.0f} tokens/s")
        if self.skipped:
            table.add_row("skipped steps (gradient not finite)", f"[red]{self.skipped:,}")
        table.add_row("delta", self.delta)
        return table


def _shown(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
