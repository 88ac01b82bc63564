"""Programs run against their tests: right ones pass, and wrong ones do no harm."""

import json
import os
import time
from pathlib import Path

import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.human_eval import Problem, load_problems, measure_human_eval, pass_at_k, passes
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel

HUMAN_EVAL = Path(__file__).parents[2].parent / "shared/data/HumanEval.jsonl"
DOUBLE = Problem("t/0", "def double(x):\n", "double", "    return 2 * x\n", "def check(f):\n    assert f(3) == 6\n")


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (DOUBLE.canonical_solution, True),
        ("    return 2 * x\n\ndef more():\n    raise SystemExit(1)\nthis is no Python", True),
        ("    return 3 * x\n", False),
        ("    return 2 *\n", False),
        ("    raise SystemExit(1)\n", False),
        ("    raise SystemExit(0)\n", False),
        ("    import os; os._exit(0)\n", False),
        ("    import sys; sys.path.append('a'); return x + x", True),
        ("    return bytearray(2 ** 34)\n", False),
        ("    with open('large', 'wb') as file:\n        file.write(bytes(2 ** 24))\n    return 2 * x", False),
        ("    import os\n    return 2 * x if 'PATH' not in os.environ else 0", True),
    ],
)
def test_what_computes_the_right_thing_within_its_limits_passes(completion, right):
    assert passes(DOUBLE, completion) is right


def test_a_program_without_end_is_stopped():
    begun = time.monotonic()
    assert not passes(DOUBLE, "    while True:\n        pass\n", seconds=1.0)
    assert time.monotonic() - begun < 30


def test_files_stay_in_a_folder_that_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert passes(DOUBLE, "    open('here', 'w').write('x')\n    return 2 * x")
    assert os.listdir(tmp_path) == []


def test_the_estimate_is_the_share_of_choices_with_a_right_one():
    from itertools import combinations

    for samples, right, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 5, 2)]:
        choices = list(combinations(range(samples), k))
        share = sum(any(each < right for each in choice) for choice in choices) / len(choices)
        assert pass_at_k(samples, right, k) == pytest.approx(share)
    with pytest.raises(InputError, match="k=3 must lie between 1 and samples=2"):
        pass_at_k(2, 1, 3)


def test_a_model_is_measured_on_every_problem(tiny_model):
    model = load(tiny_model)
    problems = [Problem(f"t/{n}", DOUBLE.prompt, "double", "", DOUBLE.test) for n in range(3)]
    functions = LanguageModel(model.config)
    found = measure_human_eval(functions, model.params, model.tokenizer, problems, max_new_tokens=4, batch=2)
    assert found == {"t/0": False, "t/1": False, "t/2": False}


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load_problems(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps({"task_id": 1}) + "\n")
    with pytest.raises(InputError, match=r"is no HumanEval.jsonl: 'prompt'"):
        load_problems(tmp_path / "other.jsonl")


@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="shared/data/HumanEval.jsonl is not here")
def test_the_solutions_of_human_eval_pass():
    problems = load_problems(HUMAN_EVAL)
    assert len(problems) == 164
    for problem in problems[::20]:
        assert passes(problem, problem.canonical_solution), problem.task_id
        assert not passes(problem, "    pass\n"), problem.task_id
