"""The fused engine beside PEFT: losses agree, states have the size that theory says, bad input is said at once."""

import csv
import json
import warnings
from importlib.metadata import PackageNotFoundError

import jax
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if not hasattr(pytest.importorskip("peft"), "SupertuningConfig"):
        pytest.skip("this peft has no Super-Tuning", allow_module_level=True)

    from experiments.peers import __main__ as peers
    from experiments.peers import comparison
    from experiments.peers.comparison import Comparison, Trained, compare
    from experiments.peers.memory import Memory, measure
    from experiments.peers.ours import Ours
    from experiments.peers.setting import PARTNERS, Setting, same_method
    from experiments.peers.theirs import Theirs

from jaxsparse.common.errors import InputError
from jaxsparse.models import checkpoints
from jaxsparse.models.functional import LanguageModel
from tests.models.small import GPT2, LLAMA, random_params

RANK, DENSITY, STEPS = 4, 0.05, 4
# Steps large enough that a side which did not learn would be far off.
RATES = {"lora": 3e-2, "dora": 3e-2, "shira": 3e-2, "super_tuning": 3e-2, "gasdu": 3e-2, "full": 3e-3}
SAME = [name for name in PARTNERS if same_method(name)]
SCALARS = 256
"""Bytes enough for every counter of steps, of which torch keeps one for each tensor."""


def setting(method: str) -> Setting:
    return Setting(method, RATES[method], RANK, 2.0 * RANK, DENSITY)


def batch(rng: np.random.Generator, rows: int = 2, length: int = 12) -> dict[str, np.ndarray]:
    """Random rows, each with padding behind it, and random places that count."""
    tokens, targets = (rng.integers(0, LLAMA.vocab_size, (rows, length), dtype=np.int32) for _ in range(2))
    there = np.arange(length) < rng.integers(length // 2, length + 1, (rows, 1))
    weights = there & (rng.random((rows, length)) < 0.7)
    weights[:, 0] = True
    return {"tokens": tokens * there, "targets": targets} | {
        "weights": weights.astype(np.float32),
        "segments": there.astype(np.int32),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A LLaMA of random weights as Hugging Face lays it out."""
    folder = tmp_path_factory.mktemp("peers")
    params = random_params(LanguageModel(LLAMA), np.random.default_rng())
    made = checkpoints.save(folder / "ours", LLAMA, params, None, "tiny")
    return checkpoints.export_hugging_face(folder / "theirs", made).folder


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """Compares a method on one batch again and again, once for all tests."""
    found: dict[str, Comparison] = {}
    scratch = tmp_path_factory.mktemp("scratch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another wherever tests run side by side

    def compared(method: str) -> Comparison:
        if method not in found:
            batches = [batch(np.random.default_rng())] * STEPS
            found[method] = compare(setting(method), model, batches, scratch=scratch)
            assert not list(scratch.iterdir())
        return found[method]

    yield compared
    torch.set_num_threads(threads)


def trained_values(method: str) -> int:
    """How many numbers a method trains on the attention projections of the model, or of all of it."""
    if method == "full":
        return sum(leaf.size for leaf in jax.tree.leaves(LanguageModel(LLAMA).abstract(np.float32)))
    width, own, shared = LLAMA.hidden_size, LLAMA.num_heads * LLAMA.head_dim, LLAMA.num_kv_heads * LLAMA.head_dim
    shapes = [(width, own), (width, shared), (width, shared), (own, width)]
    of_one = {
        "lora": lambda rows, columns: RANK * (rows + columns),
        "dora": lambda rows, columns: RANK * (rows + columns) + columns,
        "shira": lambda rows, columns: RANK * (rows + columns),
        "super_tuning": lambda rows, columns: round(DENSITY * rows * columns),
        "gasdu": lambda rows, columns: round(DENSITY * rows * columns),
    }[method]
    return LLAMA.num_layers * sum(of_one(*shape) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("method", SAME)
def test_losses_of_both_sides_agree_while_they_fall(compared, method):
    found = compared(method)
    assert found.difference < peers.PeersConfig.tolerance / 10
    assert found.ours.losses[0] - found.ours.losses[-1] > 100 * found.difference


@pytest.mark.slow
def test_gasdu_runs_beside_lora_and_is_not_held_to_its_losses(compared):
    found = compared("gasdu")
    assert found.difference is None
    assert found.theirs.name == "PEFT lora"
    assert found.ours.losses[0] == pytest.approx(found.theirs.losses[0], abs=1e-4)
    assert found.ours.losses[-1] < found.ours.losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", PARTNERS)
def test_states_are_as_large_as_theory_says(compared, method):
    found, count = compared(method), trained_values(method)
    # Numbers of four bytes for each value: two moments, and what each side keeps besides.
    ours = {"lora": 3, "dora": 3, "shira": 3, "super_tuning": 3, "gasdu": 3, "full": 2}[method]
    theirs = {"lora": 3, "dora": 3, "shira": 5, "super_tuning": 4, "full": 2}[PARTNERS[method]]
    magnitudes = trained_values("dora") - trained_values("lora") if method == "dora" else 0
    assert 0 <= found.ours.state_bytes - 4 * (ours * count + magnitudes) <= SCALARS
    their_bytes = found.theirs.state_bytes - 4 * theirs * trained_values(PARTNERS[method])
    assert 0 <= their_bytes <= SCALARS
    assert min(found.ours.adapter_bytes, found.theirs.adapter_bytes) > 0


@pytest.mark.slow
def test_both_sides_pick_the_largest_weights_for_super_tuning(model):
    ours = Ours(setting("super_tuning"), model).start()
    theirs = Theirs(setting("super_tuning"), model)
    modules = dict(theirs.model.get_base_model().named_modules())
    for name, arrays in ours.items():
        picked = set(modules[name].supertuning_indices["default"].tolist())
        assert len(picked ^ set(arrays["index"].tolist())) <= 1  # PEFT rounds down


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(model, tmp_path):
    batches = [batch(np.random.default_rng())] * 2
    found = measure("ours", setting("lora"), model, batches, cores=2, scratch=tmp_path)
    assert 0 < found.library_bytes < found.peak_bytes
    with pytest.raises(RuntimeError, match=r"the process that measures memory failed: .*KeyError: 'nothing'"):
        measure("ours", Setting("nothing", 1e-3), model, batches, cores=2, scratch=tmp_path)


@pytest.fixture
def here(monkeypatch):
    """Leaves the cores and the device of this process as they are."""
    monkeypatch.setattr(peers, "use_cores", lambda count: None)
    monkeypatch.setattr(peers, "use_cpu", lambda: None)


def test_a_failure_and_a_difference_cost_only_themselves(tiny_model, tmp_path, here, monkeypatch, capsys):
    def invented(own, folder, batches, **rest):
        if own.method == "shira":
            raise ValueError("no such thing")
        losses, seconds = tuple(range(len(batches))), tuple(1.0 + i for i in range(len(batches)))
        off = tuple(loss + (own.method == "dora") for loss in losses)
        memory = Memory(2 * 10**9, 10**9)
        return Comparison(
            own,
            Trained("jaxsparse", losses, seconds, 1000, 10, memory),
            Trained("PEFT", off, tuple(3 * each for each in seconds), 3000, 20, memory),
        )

    monkeypatch.setattr(comparison, "compare", invented)
    sizes = ["--steps", "5", "--batch", "2", "--max-length", "96", "--warm-up", "2", "--no-memory"]
    flags = ["--model", str(tiny_model), *sizes, "--out", str(tmp_path)]
    assert peers.main([*flags, "--methods", "lora", "dora", "shira"]) == 1
    printed = capsys.readouterr()
    assert "dora: losses differ by 1.0e+00, more than 0.001" in printed.err
    assert "shira: ValueError: no such thing" in printed.err
    assert "lora:" not in printed.err
    found = json.loads((tmp_path / "peers.json").read_text())
    assert [row["setting"]["method"] for row in found["comparisons"]] == ["lora", "dora"]
    assert len(found["failures"]) == 2
    first = found["comparisons"][0]
    assert (first["ratio"], first["ours"]["median_s"]) == (pytest.approx(3), 4)
    assert first["ours"]["tokens_per_second"] == 2 * 96 / 4
    with (tmp_path / "peers.csv").open() as file:
        assert [(row["method"], row["step"]) for row in csv.DictReader(file)] == [
            (method, str(step)) for method in ("lora", "dora") for step in range(1, 6)
        ]
    assert (tmp_path / "peers.png").stat().st_size > 5000
    assert peers.main([*flags, "--methods", "lora"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "a.json", "--data-root", "b"], "give data or data_root, not both: data=a.json, data_root=b"),
        (["--steps", "2", "--warm-up", "2"], "warm_up=2 must leave a step to time: at least 0, below steps=2"),
        (["--warm-up", "-1"], "warm_up=-1 must leave a step"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--max-length", "257"], "max_length=257 is more than the 256 positions of the model"),
    ],
)
def test_settings_that_cannot_be_run_are_said(tiny_model, tmp_path, here, flags, message):
    with pytest.raises(InputError) as caught:
        peers.main(["--model", str(tiny_model), "--out", str(tmp_path), *flags])
    assert message in str(caught.value)


@pytest.mark.parametrize(("config", "message"), [(GPT2, "is no LLaMA"), (LLAMA, "has no tokenizer")])
def test_models_that_cannot_be_compared_are_said(tmp_path, here, config, message):
    params = random_params(LanguageModel(config), np.random.default_rng())
    checkpoints.save(tmp_path / "model", config, params, None, "tiny")
    with pytest.raises(InputError, match=message):
        peers.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])


def test_a_missing_or_old_package_is_said_with_what_to_do(tmp_path, here, monkeypatch):
    def missing(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(peers, "version", missing)
    with pytest.raises(InputError, match=r"peft is not installed, .*: pip install jaxsparse\[torch\]"):
        peers.main(["--out", str(tmp_path)])
    monkeypatch.setattr(peers, "version", lambda name: "0.15.0")
    monkeypatch.delattr("peft.SupertuningConfig")
    with pytest.raises(InputError, match=r"peft 0\.15\.0 has no Super-Tuning: it needs 0\.21 or newer"):
        peers.main(["--out", str(tmp_path)])
