"""Deltas and Hugging Face's own peft and transformers in torch: adapters go out and in, and the logits agree."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsparse import deltas
from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.merge import factor_delta
from jaxsparse.deltas.peft_layout import CONFIG, WEIGHTS
from jaxsparse.models import checkpoints
from jaxsparse.models.functional import LanguageModel
from tests.deltas.adapters import adapter, kernels
from tests.deltas.models import assert_same_bits, tuned_slightly, with_factors
from tests.models.small import GPT2, LLAMA, random_params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

# What transformers deprecates in itself, and how peft tells that it sets an option of GPT-2's layers.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

VOCABULARY = LLAMA.vocab_size
CONFIGS = {"grouped": LLAMA, "biases": dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True)}
CONFIGS["gpt2"] = GPT2
CONFIGS["gpt2_untied"] = dataclasses.replace(GPT2, tie_word_embeddings=False)
UP = "layers/mlp/up_proj/kernel"
LOW_RANK = ("input slices", "output slices", "factors", "gain", "several of low rank")


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def base(request, tmp_path_factory):
    """A model of random weights, large enough that each matters, in a Hugging Face folder."""
    config = request.param
    params = random_params(LanguageModel(config), np.random.default_rng())
    folder = tmp_path_factory.mktemp("base")
    made = checkpoints.save(folder / "ours", config, params, None, "tiny")
    return checkpoints.export_hugging_face(folder / "theirs", made)


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()


def our_logits(checkpoint: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(LanguageModel(checkpoint.config).logits)(params, tokens))


def some_tokens(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, VOCABULARY, (2, 30), dtype=np.int32)


def low_rank_adapter(rng: np.random.Generator, kind: str, checkpoint: Any) -> tuple[deltas.Delta, Any]:
    """An adapter that PEFT can hold: of one kind, or of slices and factors of several ranks, and the untied head."""
    if kind != "several of low rank":
        return adapter(rng, kind, checkpoint.params)
    views, tensors = kernels(checkpoint.params), dict(flatten_with_paths(checkpoint.params)[0])
    tuned, slices, factors = dict(tensors), {}, {}
    for number, (path, view) in enumerate(views.items()):
        if number % 3 == 0:
            rows = rng.choice(view.in_size, 2 + number % 4, replace=False)
            tuned[path] = tensors[path].at[:, rows].add(rng.normal(size=(view.stack, rows.size, view.out_size)))
            slices[path] = view
        else:
            factors[path] = with_factors(rng, tensors[path], view, rank=1 + number % 3, gain=number % 3 == 2)
    structure = flatten_with_paths(checkpoint.params)[1]
    if "lm_head/kernel" in tensors:
        # Entries in three inputs only, as coordinates.
        tuned["lm_head/kernel"] = tensors["lm_head/kernel"].at[jnp.array([1, 5, 6]), jnp.array([7, 7, 9])].add(1.0)
    delta = deltas.diff(
        checkpoint.params, jax.tree.unflatten(structure, tuned.values()), slices=slices, factors=factors
    )
    return delta, deltas.apply(checkpoint.params, delta)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_peft_computes_what_an_exported_delta_does(kind: str, base: Any, rng: Any, tmp_path: Path) -> None:
    delta, tuned = low_rank_adapter(rng, kind, base)
    deltas.export_peft(tmp_path / "adapter", delta, base=base.params, config=base.config, base_name=str(base.folder))
    tokens = some_tokens(rng)
    model = peft.PeftModel.from_pretrained(theirs(base.folder), tmp_path / "adapter")
    expected = our_logits(base, tuned, tokens)
    assert np.abs(expected - our_logits(base, base.params, tokens)).max() > 0.1
    np.testing.assert_allclose(their_logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(their_logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_an_exported_delta_comes_back(kind: str, base: Any, rng: Any, tmp_path: Path) -> None:
    delta, tuned = low_rank_adapter(rng, kind, base)
    deltas.export_peft(tmp_path / "adapter", delta, base=base.params, config=base.config, base_name="tiny")
    again = deltas.import_peft(tmp_path / "adapter", base=base.params, config=base.config)
    assert again.metadata.base_name == "tiny"
    assert again.metadata.base_fingerprint == base.fingerprint
    assert again.tensors.keys() == delta.tensors.keys()
    if kind.endswith("slices"):
        assert {tensor.kind for tensor in again.tensors.values()} == {"slices"}
        for path, tensor in again.tensors.items():
            assert (tensor.axis, tensor.stored) == (delta.tensors[path].axis, delta.tensors[path].stored)
            np.testing.assert_array_equal(tensor.slices, delta.tensors[path].slices)
    for (path, ours), (_, other) in zip(
        *(flatten_with_paths(tree)[0] for tree in (deltas.apply(base.params, again), tuned)), strict=True
    ):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5, err_msg=path)


# What peft is asked for; every target of ours under the name that it has there.
THEIR_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True},
    "patterns": {"r": 2, "lora_alpha": 3, "rank_pattern": {"SECOND": 4}, "alpha_pattern": {"FIRST": 9}},
    "some_layers": {"r": 2, "lora_alpha": 3, "layers_to_transform": [1]},
    "all_linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "dora_of_a_layer": {"r": 2, "lora_alpha": 3, "use_dora": True, "layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("settings", THEIR_SETTINGS.values(), ids=THEIR_SETTINGS.keys())
def test_an_adapter_of_pefts_own_computes_the_same_here(settings: Any, base: Any, rng: Any, tmp_path: Path) -> None:
    model = theirs(base.folder)
    names = ["mlp.c_proj", "attn.c_attn"] if isinstance(base.config, type(GPT2)) else ["v_proj", "mlp.down_proj"]
    text = json.dumps({"target_modules": names, **settings}).replace("FIRST", names[0]).replace("SECOND", names[1])
    torch.manual_seed(int(rng.integers(2**31)))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **json.loads(text))).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = some_tokens(rng)
    expected = their_logits(adapted, tokens)
    delta = deltas.import_peft(tmp_path / "adapter", base=base.params, config=base.config)
    assert delta.metadata.base_name == str(base.folder)
    assert np.abs(expected - our_logits(base, base.params, tokens)).max() > 0.1
    found = our_logits(base, deltas.apply(base.params, delta), tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # And out again, as peft reads it.
    deltas.export_peft(tmp_path / "again", delta, base=base.params, config=base.config)
    again = peft.PeftModel.from_pretrained(theirs(base.folder), tmp_path / "again")
    np.testing.assert_allclose(their_logits(again, tokens), expected, rtol=1e-4, atol=1e-4)


def readme_snippet() -> str:
    """The lines of torch in the README that apply and revert entries."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    return next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if ".index" in block)


def everywhere(rng: np.random.Generator, params: Any) -> Any:
    """A copy in which entries of every tensor moved: embeddings, norms and biases too."""
    return jax.tree.map(lambda leaf: jnp.asarray(tuned_slightly(rng, np.asarray(leaf), 3 + leaf.size // 9)), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_readmes_lines_of_torch_apply_and_revert_entries(dtype: str, base: Any, rng: Any, tmp_path: Path) -> None:
    snippet = readme_snippet()
    assert len(snippet.strip().splitlines()) <= 15
    written = {"__name__": "snippet"}
    exec(snippet, written)
    ours = checkpoints.load(base.folder, dtype=dtype)
    tuned = everywhere(rng, ours.params)
    deltas.export_entries(
        tmp_path / "d.safetensors", deltas.diff(ours.params, tuned), base=ours.params, config=ours.config
    )
    model = theirs(base.folder).to(getattr(torch, dtype))
    untouched = {name: parameter.clone() for name, parameter in model.named_parameters()}
    written["apply_entries"](model, tmp_path / "d.safetensors")
    made = checkpoints.save(tmp_path / "tuned", ours.config, tuned, None, "tuned")
    checkpoints.export_hugging_face(tmp_path / "theirs", made)
    wanted = dict(theirs(tmp_path / "theirs").to(getattr(torch, dtype)).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    if dtype == "float32":
        tokens = some_tokens(rng)
        np.testing.assert_allclose(their_logits(model, tokens), our_logits(ours, tuned, tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="another base"):
        written["apply_entries"](model, tmp_path / "d.safetensors")
    written["apply_entries"](model, tmp_path / "d.safetensors", revert=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[name]), name


@pytest.mark.parametrize("kind", ["coordinates", "input slices", "gain", "several"])
def test_a_merged_checkpoint_of_any_delta_runs_in_transformers(kind: str, base: Any, rng: Any, tmp_path: Path) -> None:
    delta, tuned = adapter(rng, kind, base.params)
    deltas.export_merged(tmp_path / "merged", delta, base, name="tuned")
    tokens = some_tokens(rng)
    found = their_logits(theirs(tmp_path / "merged"), tokens)
    np.testing.assert_allclose(found, our_logits(base, tuned, tokens), rtol=1e-4, atol=1e-4)
    assert_same_bits(checkpoints.load(tmp_path / "merged").params, tuned)


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model and an adapter of it, as others wrote it."""
    rng = np.random.default_rng()
    params = random_params(LanguageModel(LLAMA), rng)
    delta, _ = adapter(rng, "factors", params)
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    deltas.export_peft(folder, delta, base=params, config=LLAMA, base_name="tiny")
    return params, folder


def copied(folder: Path, target: Path, settings: Any = None, arrays: Any = None) -> Path:
    """A copy of an adapter with other settings or arrays."""
    target.mkdir()
    content = json.loads((folder / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps(content | (settings or {})))
    held = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(held if arrays is None else arrays(held), target / WEIGHTS)
    return target


WRONG_SETTINGS = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ({"use_qalora": True}, "use_qalora is 'True'"),
    ({"something_of_the_future": 3}, "something_of_the_future is '3'"),
    ({"r": "8"}, "r and lora_alpha"),
    ({"r": 0}, "r and lora_alpha"),
    ({"lora_alpha": float("nan")}, "r and lora_alpha"),
    ({"lora_alpha": 0}, "r and lora_alpha"),
    ({"lora_alpha": 10**400}, "r and lora_alpha"),
    ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern has the key '\(a\+\)\+\$'"),
    ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern is"),
    ({"alpha_pattern": [3]}, "alpha_pattern is"),
    ({"r": 200_000_000_000, "rank_pattern": {}}, "has shape"),
    ({"use_dora": True}, "lora_magnitude_vector of module .* is missing"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_settings_that_cannot_be_imported(settings: Any, message: str, plain: Any, tmp_path: Path) -> None:
    params, folder = plain
    with pytest.raises(InputError, match=message):
        deltas.import_peft(copied(folder, tmp_path / "x", settings), base=params, config=LLAMA)


def test_what_peft_writes_of_keys_and_signs_comes_in(plain: Any, tmp_path: Path) -> None:
    params, folder = plain
    content = json.loads((folder / CONFIG).read_text())
    end = content["target_modules"][0]
    settings = {
        name: {"alpha_pattern": {key: -4}} for name, key in (("a", f"1.{end}"), ("b", f"1.{end}".replace(".", r"\.")))
    }
    one, other = (
        deltas.import_peft(copied(folder, tmp_path / name, own), base=params, config=LLAMA)
        for name, own in settings.items()
    )
    assert_same_bits(deltas.apply(params, one), deltas.apply(params, other))
    plainly = deltas.import_peft(folder, base=params, config=LLAMA)
    negative = copied(folder, tmp_path / "c", {"lora_alpha": -content["lora_alpha"]})
    assert all(
        tensor.scale == -plainly.tensors[path].scale or content["alpha_pattern"]
        for path, tensor in deltas.import_peft(negative, base=params, config=LLAMA).tensors.items()
    )


def test_an_adapted_head_that_peft_saves_along_is_compared(base: Any, rng: Any, tmp_path: Path) -> None:
    if base.config.tie_word_embeddings:
        pytest.skip("there is no head")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    adapted = peft.get_peft_model(theirs(base.folder), settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that it saves the head too
        adapted.save_pretrained(tmp_path / "adapter")
    tokens = some_tokens(rng)
    delta = deltas.import_peft(tmp_path / "adapter", base=base.params, config=base.config)
    found = our_logits(base, deltas.apply(base.params, delta), tokens)
    np.testing.assert_allclose(found, their_logits(adapted, tokens), rtol=1e-4, atol=1e-4)
    held = safetensors.numpy.load_file(tmp_path / "adapter" / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in held
    safetensors.numpy.save_file(held | {key: held[key] + 1}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(InputError, match="the adapter comes with another head"):
        deltas.import_peft(tmp_path / "adapter", base=base.params, config=base.config)


def first(arrays: dict[str, np.ndarray]) -> str:
    return next(iter(arrays))


WRONG_ARRAYS = [
    (lambda held: {}, "holds no tensors"),
    (lambda held: held | {"base_model.model.lm_head.lora_embedding_A": np.ones(3)}, "lora_embedding_A"),
    (lambda held: held | {"../../x.lora_A.weight": np.ones(3)}, "not LoRA's of a linear module"),
    (lambda held: {name: held[name] for name in list(held)[1:]}, "is missing"),
    (lambda held: held | {first(held): held[first(held)][:, :-1].copy()}, "has shape"),
    (lambda held: held | {first(held): held[first(held)].astype(np.int32)}, "is of dtype I32"),
    (lambda held: held | {first(held): held[first(held)] * np.float32(np.nan)}, "not finite"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG_ARRAYS)
def test_tensors_that_cannot_be_imported(arrays: Any, message: str, plain: Any, tmp_path: Path) -> None:
    params, folder = plain
    with pytest.raises(InputError, match=message):
        deltas.import_peft(copied(folder, tmp_path / "x", arrays=arrays), base=params, config=LLAMA)


def test_files_that_cannot_be_imported(plain: Any, tmp_path: Path) -> None:
    params, folder = plain
    damaged = copied(folder, tmp_path / "x")
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="truncated"):
        deltas.import_peft(damaged, base=params, config=LLAMA)
    (damaged / WEIGHTS).rename(damaged / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled weights are never read"):
        deltas.import_peft(damaged, base=params, config=LLAMA)
    for text in ("[", "[" * 100_000):
        (damaged / CONFIG).write_text(text)
        with pytest.raises(InputError, match="not readable as JSON"):
            deltas.import_peft(damaged, base=params, config=LLAMA)
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        deltas.import_peft(tmp_path / "nowhere", base=params, config=LLAMA)
    with pytest.raises(InputError, match="as config says"):
        deltas.import_peft(folder, base=params, config=GPT2)


def test_deltas_that_cannot_be_exported(plain: Any, rng: Any, tmp_path: Path) -> None:
    params, _ = plain
    given: dict[str, Any] = {"base": params, "config": LLAMA}
    norms = deltas.diff(params, {**params, "norm": {"scale": params["norm"]["scale"] + 1}})
    scattered, tuned = adapter(rng, "neurons", params)
    low_rank, _ = adapter(rng, "factors", params)
    for message, delta, how in (
        ("norm/scale is not the weight of a linear module", norms, deltas.export_peft),
        ("a LoRA adapter of that rank is larger than the weight", scattered, deltas.export_peft),
        ("changes nothing", deltas.diff(params, params), deltas.export_peft),
        ("changes by factors", low_rank, deltas.export_entries),
    ):
        with pytest.raises(InputError, match=message):
            how(tmp_path / "x", delta, **given)
    for how in (deltas.export_peft, deltas.export_entries):
        with pytest.raises(InputError, match=r"another base|applied already"):
            how(tmp_path / "x", scattered, base=tuned, config=LLAMA)
    dead = jax.tree.map(lambda leaf: leaf, params)
    dead["layers"]["mlp"]["up_proj"]["kernel"] = params["layers"]["mlp"]["up_proj"]["kernel"].at[:, :, 3].set(0)
    leaf, view = dead["layers"]["mlp"]["up_proj"]["kernel"], kernels(params)[UP]
    factors = with_factors(rng, leaf, view, gain=True)
    still = np.where(np.arange(view.out_size) == 3, 0, factors.b).astype(np.float32)
    dora = deltas.diff(dead, dead, factors={UP: factor_delta(leaf, view, factors.a, still, 0.5, factors.gain)})
    with pytest.raises(InputError, match="has an output of zeros, by whose norm PEFT's DoRA divides"):
        deltas.export_peft(tmp_path / "x", dora, base=dead, config=LLAMA)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        deltas.export_entries(tmp_path / "there", scattered, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"
