"""The picture of what changes: its numbers are those of the dense models, and its axes say what they are."""

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxsparse.common.errors import InputError
from jaxsparse.deltas import diff, heat_map
from jaxsparse.deltas.picture import _LEAST_SPAN, _limits, _short_names, _ticks
from tests.deltas.models import changed

SHAPES = {
    "layers/self_attn/q_proj/kernel": (4, 16, 8),
    "layers/mlp/down_proj/kernel": (4, 12, 10),
    "layers/self_attn/k_proj/kernel": (4, 10, 12),
    "norm/scale": (30,),
}
MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def models(rng, tensors=SHAPES):
    base = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    tuned = {path: changed(rng, leaf, leaf.size // 9) if path in tensors else leaf for path, leaf in base.items()}
    return base, tuned


def rows(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        figures.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize("kind", MAGIC)
def test_numbers_are_those_of_the_models(rng, kind, tmp_path):
    base, tuned = models(rng)
    heat_map(diff(base, tuned), tmp_path / "new" / f"changes.{kind}")
    picture, table = sorted((tmp_path / "new").iterdir(), key=lambda file: file.suffix == ".csv")
    assert picture.read_bytes().startswith(MAGIC[kind])
    assert picture.stat().st_size > 5000
    moved = {path: tuned[path] != base[path] for path in SHAPES}
    expected = {("norm/scale", ""): moved["norm/scale"]}
    expected |= {(path, str(i)): own for path in SHAPES if "layers" in path for i, own in enumerate(moved[path])}
    found = {(row["tensor"], row["layer"]): row for row in rows(table)}
    assert found.keys() == expected.keys()
    for cell, own in expected.items():
        assert int(found[cell]["entries"]) == np.count_nonzero(own)
        assert int(found[cell]["weights"]) == own.size
        assert float(found[cell]["density"]) == np.count_nonzero(own) / own.size


def test_axes_scale_and_titles_have_words(rng, tmp_path, drawn):
    base, tuned = models(rng)
    heat_map(diff(base, tuned, method="gasdu"), tmp_path / "changes.png")
    panel, scale = drawn[0].axes
    assert panel.get_xlabel() == "tensor"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["q_proj", "k_proj", "down_proj", "norm"]
    assert panel.get_ylabel() == "layer"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1", "2", "3", "no layer"]
    assert "weights that change, in %" in scale.get_ylabel()
    assert all(label.get_text().endswith(" %") for label in scale.get_yticklabels())
    entries = sum(np.count_nonzero(tuned[path] != base[path]) for path in SHAPES)
    assert panel.get_title() == f"{entries:,} weights change\nmethod gasdu"
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["no weight changes"]


def test_colours_are_densities(rng, tmp_path, drawn):
    base, tuned = models(rng, list(SHAPES)[:2])
    tuned[next(iter(SHAPES))][2] = base[next(iter(SHAPES))][2]
    heat_map(diff(base, tuned), tmp_path / "changes.png")
    shown = np.ma.filled(drawn[0].axes[0].get_images()[1].get_array(), np.nan)
    for column, path in enumerate(list(SHAPES)[:2]):
        density = (tuned[path] != base[path]).mean(axis=(1, 2))
        np.testing.assert_allclose(shown[:, column], np.where(density == 0, np.nan, density))


def test_several_deltas_are_panels_on_one_scale(rng, tmp_path, drawn):
    pairs = {"math": models(rng), "code": models(rng, list(SHAPES)[:1])}
    deltas = {name: diff(*pair) for name, pair in pairs.items()}
    heat_map(deltas, tmp_path / "changes.png")
    *panels, _ = drawn[0].axes
    assert [panel.get_title().splitlines()[0] for panel in panels] == ["math", "code"]
    assert panels[0].get_images()[1].norm is panels[1].get_images()[1].norm
    found = rows(tmp_path / "changes.csv")
    for name, delta in deltas.items():
        assert sum(int(row["entries"]) for row in found if row["delta"] == name) == delta.entries


def test_layers_are_read_from_paths_too(rng, tmp_path, drawn):
    base = {"blocks": [{"up": np.ones((3, 4), np.float32)} for _ in range(60)]}
    tuned = {"blocks": [{"up": np.where(rng.random((3, 4)) < 0.9, i % 2, 1).astype(np.float32)} for i in range(60)]}
    heat_map(diff(base, tuned), tmp_path / "changes.png")
    panel, _ = drawn[0].axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["up"]
    assert [label.get_text() for label in panel.get_yticklabels()] == [str(layer) for layer in range(0, 59, 5)]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["layers/attn/kernel", "layers/mlp/kernel"], ["attn", "mlp"]),
        (["layers/attn/c_proj/kernel", "layers/mlp/c_proj/kernel"], ["attn/c_proj", "mlp/c_proj"]),
        (["layers/norm/scale", "norm/scale"], ["layers/norm/scale", "norm/scale"]),
        (["kernel"], ["kernel"]),
        (["embedding", "kernel"], ["embedding", "kernel"]),
    ],
)
def test_short_names_differ(paths, names):
    assert _short_names(paths) == names


def test_the_scale_has_round_numbers(rng):
    for _ in range(200):
        densities = 10.0 ** -(rng.uniform(0, 6) + rng.uniform(0, rng.choice([0.01, 3]), 10))
        lowest, highest = _limits(densities.tolist())
        assert lowest <= densities.min() * (1 + 1e-9)
        assert densities.max() <= highest * (1 + 1e-9) <= 1 + 1e-8
        assert highest / lowest >= _LEAST_SPAN * (1 - 1e-9)
        assert 3 <= len(_ticks(lowest, highest)) <= 12
    assert _limits([1.0, 1.0]) == (0.1, 1.0)


def test_what_cannot_be_drawn_is_refused(rng, tmp_path):
    base, tuned = models(rng)
    with pytest.raises(InputError, match=r"must end in \.png, \.pdf, \.svg"):
        heat_map(diff(base, tuned), tmp_path / "changes.jpg")
    with pytest.raises(InputError, match="no weight changes"):
        heat_map([diff(base, base)], tmp_path / "changes.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        heat_map(diff(base, tuned), tmp_path / "file" / "changes.png")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
