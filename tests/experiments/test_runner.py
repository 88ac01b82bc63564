"""The papers' experiments: trials are kept and reproduced, what fails fails alone, pictures can be read."""

import json
import warnings

import numpy as np
import pytest
import yaml

from experiments.catalogue import EXPERIMENTS
from experiments.list import main as list_experiments
from experiments.run import main
from experiments.runner.comparison import compared
from experiments.runner.figures import band, panels, save_picture
from experiments.runner.settings import SCALES, load_settings
from experiments.runner.training import parts_of
from jaxsparse.common.errors import InputError
from jaxsparse.data.arithmetic import generate_problems
from jaxsparse.data.rows import Row
from jaxsparse.evaluate.suites import TASKS, TaskRows, question_of
from jaxsparse.methods.registry import METHODS


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Arithmetic problems in the place of NumGLUE's first type; the second is missing."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "numglue/type1"
    folder.mkdir(parents=True)
    for number, part in enumerate(("train", "dev", "test")):
        problems = generate_problems(24, split="held_out" if part == "test" else "train", seed=number)
        rows = [{"instruction": row.instruction, "answer": row.answer} for row in problems]
        (folder / f"{part}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def short(monkeypatch):
    """Trials of five steps."""
    from experiments import run

    def settings(file, scale):
        given = load_settings(file, scale)
        return run.dataclasses.replace(given, steps=5, test_rows=8, max_length=96)

    monkeypatch.setattr(run, "load_settings", settings)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_settings_of_all_scales_whose_methods_exist(name):
    for scale in SCALES:
        settings = load_settings(EXPERIMENTS[name].config, scale)
        assert settings.model
        assert settings.seeds >= 1
        for label, options in settings.methods.items():
            assert options.get("method", label) in METHODS, (scale, label)


def test_they_are_listed(capsys):
    assert list_experiments(["--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(EXPERIMENTS)
    with pytest.raises(InputError, match="no experiment 'nothing'; there are all, "):
        list_experiments(["--of", "nothing"])


@pytest.mark.slow
def test_trials_are_kept_and_reproduced_and_a_missing_task_costs_only_itself(
    tiny_model, data_root, tmp_path, short, capsys
):
    def run(out, *methods):
        flags = ["--data-root", str(data_root), "--model", str(tiny_model), "--out", str(out), "--seeds", "1"]
        status = main(["gasdu/refresh_interval", *flags, "--methods", *methods])
        folder = out / "tiny"
        return status, folder, [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, folder, rows = run(tmp_path / "one", "M=50", "fixed mask")
        again, _, same = run(tmp_path / "one", "M=50", "fixed mask")
        _, _, others = run(tmp_path / "two", "M=50")
    assert status == again == 1  # a task is missing
    good = [row for row in rows if "error" not in row]
    assert {(row["label"], row["task"]) for row in good} == {
        (label, "numglue/type1") for label in ("M=50", "fixed mask")
    }
    assert all("numglue/type2" in row["error"] for row in rows if "error" in row)
    # What went well is not run again; elsewhere it comes out the same to the bit.
    assert [row for row in same if "error" not in row] == good
    assert [(row["key"], row["loss"]) for row in others if "error" not in row] == [
        (row["key"], row["loss"]) for row in good[:1]
    ]
    # Other rows under the same name are another trial.
    file = data_root / "numglue/type1/train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, changed = run(tmp_path / "two", "M=50")
    good_ones = [row for row in changed if "error" not in row]
    assert good_ones[0]["key"] == good_ones[1]["key"]
    assert good_ones[0]["made_of"] != good_ones[1]["made_of"]
    report = (folder / "gasdu/refresh_interval/report.md").read_text()
    for part in ("at this scale: periodic refresh beats a fixed mask", "## What failed", "The paper printed: table 3"):
        assert part in report
    assert (folder / "gasdu/refresh_interval/bars.csv").read_text().count("\n") == 3
    assert (folder / "gasdu/refresh_interval/bars.png").stat().st_size > 5000
    assert "gasdu/refresh_interval/report.md" in (folder / "index.md").read_text()
    assert "gasdu/refresh_interval/report.html" in (folder / "index.html").read_text()
    assert "failed: M=50 on numglue/type2" in capsys.readouterr().out


@pytest.mark.slow
def test_what_an_experiment_trains_in_its_own_way_is_kept_too(tiny_model, data_root, tmp_path, short):
    flags = ["--data-root", str(data_root), "--model", str(tiny_model), "--out", str(tmp_path), "--seeds", "1"]
    told = []
    for _ in range(2):
        assert main(["gasdu/pl", *flags]) == 1  # a task is missing
        told.append([json.loads(line) for line in (tmp_path / "tiny/trials.jsonl").read_text().splitlines()])
    good = [[row for row in rows if "error" not in row] for rows in told]
    assert good[0] == good[1]
    assert [(row["label"], row["task"], row["seed"]) for row in good[0]] == [("full", "numglue/type1", 0)]
    assert {len(values) for values in good[0][0]["trajectory"].values()} == {5}
    assert all("numglue/type2" in row["error"] for rows in told for row in rows if "error" in row)


def test_what_cannot_start_is_said(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        main(["gasdu", "--data-root", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no experiment 'gasdu/nothing'"):
        main(["gasdu/nothing", "--data-root", str(tmp_path)])
    with pytest.raises(InputError, match="gasdu/refresh_interval has no method M=7; it has M=1, "):
        main(["gasdu/refresh_interval", "--methods", "M=7", "--data-root", str(tmp_path)])
    with pytest.raises(InputError, match="seeds must be at least 1, got 0"):
        main(["gasdu/refresh_interval", "--seeds", "0", "--data-root", str(tmp_path)])


def test_settings_are_checked(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"all": {"model": "m", "lr": "1e-3"}, "tiny": {"more": {"a": 1}}}))
    assert load_settings(file, "tiny").lr == (1e-3,)
    with pytest.raises(InputError, match="has no part 'small'"):
        load_settings(file, "small")
    file.write_text(yaml.safe_dump({"tiny": {"model": "m", "learning": 1}}))
    with pytest.raises(InputError, match="unknown options learning"):
        load_settings(file, "tiny")


def rows_of(label, losses):
    return [{"label": label, "task": "t", "seed": seed, "loss": loss} for seed, loss in enumerate(losses)]


def test_methods_are_compared_pair_by_pair_against_what_seeds_do():
    rng = np.random.default_rng()
    seeds = rng.normal(size=5)
    verdict = compared([*rows_of("a", seeds - 10), *rows_of("b", seeds)], "a", "b")
    assert verdict.difference == pytest.approx(-10)
    assert verdict.noise == pytest.approx(np.ptp(seeds) / 2)
    assert (verdict.lower, verdict.within, verdict.higher, verdict.not_higher) == (True, False, False, True)
    assert compared([*rows_of("a", seeds[:1] - 10), *rows_of("b", seeds[:1])], "a", "b").lower is None  # one seed
    failed = {"label": "a", "task": "t", "seed": 9, "error": "diverged"}
    assert compared([failed, *rows_of("b", seeds)], "a", "b").lower is None


def test_pictures_that_say_nothing_are_refused(tmp_path):
    figure, drawn = panels(title="Loss")
    with pytest.raises(ValueError, match="shows no data"):
        save_picture(figure, tmp_path / "p.png")
    band(drawn[0, 0], [0, 1, 2], [[1.0, np.nan, 2.0], [2.0, np.nan, 1.0]], "a")
    with pytest.raises(ValueError, match="an axis has no label"):
        save_picture(figure, tmp_path / "p.png")
    drawn[0, 0].set(xlabel="step", ylabel="nats")
    nothing, only = panels(title="Points")
    only[0, 0].scatter([0.0, 1.0], [np.nan, np.nan])
    only[0, 0].set(xlabel="step", ylabel="nats")
    with pytest.raises(ValueError, match="shows no data"):
        save_picture(nothing, tmp_path / "p.png")
    band(drawn[0, 0], [0, 1, 2], [[1.0, 1.0, 2.0]], "b")
    with pytest.raises(ValueError, match="several lines and no legend"):
        save_picture(figure, tmp_path / "p.png")
    drawn[0, 0].legend()
    save_picture(figure, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_dev_rows_are_not_trained_on_and_suites_are_mixed(rng):
    asked = [Row(f"question {number}", "", "", "1") for number in rng.integers(0, 60, 200)]
    task = TaskRows(TASKS["math/gsm8k"], tuple(asked), (), (Row("another", "", "", "1"),), ())
    for train_from in ("own", "suite"):
        parts = parts_of(task, train_from)
        assert not {question_of(row) for row in parts["train"]} & {question_of(row) for row in parts["dev"]}
        assert len(parts["dev"]) == 20
        assert {question_of(row) for row in parts["train"] + parts["dev"]} == {question_of(row) for row in asked}
    assert parts["dev"] != asked[::10]
    assert parts_of(task, "suite") == parts
