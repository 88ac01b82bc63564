"""Damage, and what is no model at all, is one clear line."""

import json
import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy

from jaxsparse.common.errors import InputError
from jaxsparse.models import checkpoints, store
from tests.models.formats import write_gguf, write_llama2c
from tests.models.small import LLAMA
from tests.models.stored import CONFIG, METADATA, checkpoint_of


def test_a_tokenizer_that_does_not_fit(tmp_path, rng, tokenizer):
    made = checkpoint_of(LLAMA, rng, tokenizer=tokenizer)
    checkpoints.export_hugging_face(tmp_path / "out", made)
    with pytest.raises(InputError, match="tokenizer does not fit the model"):
        checkpoints.load(tmp_path / "out")


def test_disk_full_leaves_nothing(stored, tmp_path, monkeypatch):
    """Both libraries spell an OSError in their own way."""

    def tensorstore_fails(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: writing\nNo space left on device")

    monkeypatch.setattr(store.ocp.Checkpointer, "save", tensorstore_fails)
    with pytest.raises(InputError, match=r"cannot write .*new.*: No space left on device"):
        checkpoints.convert(stored.folder, tmp_path / "new")

    def safetensors_fails(*_, **__):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("jaxsparse.models.hugging_face.save_file", safetensors_fails)
    with pytest.raises(InputError, match=r"cannot write .*new.*: No space left on device"):
        checkpoints.convert(stored.folder, tmp_path / "new", to="hugging_face")
    assert [path.name for path in tmp_path.iterdir()] == ["stored"]


def _edit(path, change) -> None:
    """Rewrites a safetensors or JSON file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = safetensors.numpy.load_file(path)
        change(content)
        safetensors.numpy.save_file(content, path)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), r"tensor model\.norm\.weight is missing$"),
        (lambda t: [t.pop(k) for k in list(t) if ".mlp." in k], r"mlp\.gate_proj\.weight is missing \(and 8 more\)"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), r"tensor model\.extra has no place in this model"),
        (
            lambda t: t.update({NORM: np.ones(7, np.float32)}),
            r"tensor model\.norm\.weight should have shape \(24,\), has \(7,\)",
        ),
        (
            lambda t: t.update({NORM: np.ones(24, np.int32)}),
            r"tensor model\.norm\.weight has dtype I32; supported: float32",
        ),
    ],
)
def test_wrong_tensors(change, message, stored, tmp_path):
    folder = checkpoints.export_hugging_face(tmp_path / "one", stored).folder
    _edit(folder / "model.safetensors", change)
    with pytest.raises(InputError, match=message):
        checkpoints.load(folder)


def test_a_head_where_the_configuration_ties_none(exported):
    _edit(exported.folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        checkpoints.load(exported.folder)


def test_missing_shard(exported):
    shard = sorted(exported.folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=rf"shard {shard.name} is missing"):
        checkpoints.load(exported.folder)


def test_damaged_hugging_face_folders(exported):
    folder = exported.folder
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shard.name} is not a safetensors file, or truncated"):
        checkpoints.load(folder)
    _edit(folder / "model.safetensors.index.json", lambda index: index.pop("weight_map"))
    with pytest.raises(InputError, match="has no weight_map"):
        checkpoints.load(folder)
    (folder / "model.safetensors.index.json").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor .*pickled weights are never read"):
        checkpoints.load(folder)
    _edit(folder / "config.json", lambda config: config.update(model_type="bert"))
    with pytest.raises(InputError, match="'bert' is not supported"):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", ["small.bin", "small.gguf"])
def test_truncated_files(name, stored, tmp_path):
    write = write_llama2c if name.endswith(".bin") else write_gguf
    write(tmp_path / name, CONFIG, stored.params)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 3, 11, 28, 200, len(whole) // 2, len(whole) - 4):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(InputError, match="truncated"):
            checkpoints.load(tmp_path / name)


def test_a_llama2c_file_with_more_at_the_end(stored, tmp_path):
    write_llama2c(tmp_path / "a.bin", CONFIG, stored.params)
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(InputError, match="its header stands for"):
        checkpoints.load(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "bert"}, "architecture 'bert' is not supported"),
        ({"metadata": {"llama.expert_count": 8}}, "mixtures of experts"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(6)}}, "attn_q_norm.weight has no place"),
    ],
)
def test_gguf_errors(options, message, stored, tmp_path):
    metadata = METADATA | options.pop("metadata", {})
    write_gguf(tmp_path / "a.gguf", CONFIG, stored.params, metadata=metadata, **options)
    with pytest.raises(InputError, match=message):
        checkpoints.load(tmp_path / "a.gguf")


def test_gguf_with_a_quantisation_that_the_library_cannot_undo(stored, tmp_path, monkeypatch):
    write_gguf(tmp_path / "a.gguf", CONFIG, stored.params, metadata=METADATA)
    types = {gguf.GGMLQuantizationType.F16: "float16"}
    monkeypatch.setattr("jaxsparse.models.gguf_reader._PLAIN", types)

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(InputError, match=r"tensor .* is quantised as F32, which is not supported"):
        checkpoints.load(tmp_path / "a.gguf")


def test_altered_weights_are_noticed(stored, rng, tmp_path):
    other = checkpoint_of(CONFIG, rng)
    elsewhere = checkpoints.save(tmp_path / "other", CONFIG, other.params, None, "other").folder
    shutil.rmtree(stored.folder / "params")
    shutil.copytree(elsewhere / "params", stored.folder / "params")
    with pytest.raises(InputError, match="is not what was saved: its checksum differs"):
        checkpoints.load(stored.folder)
    shutil.rmtree(stored.folder / "params")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.load(stored.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=99), "format version 99; this jaxsparse reads 1"),
        (lambda d: d.update(fingerprint="0"), "is damaged"),
        (lambda d: d.pop("tensors"), "is damaged"),
    ],
)
def test_altered_descriptions_are_noticed(stored, change, message):
    _edit(stored.folder / "metadata.json", change)
    with pytest.raises(InputError, match=message):
        checkpoints.load(stored.folder)


def test_configuration_of_another_model(stored):
    _edit(stored.folder / "config.json", lambda config: config.update(intermediate_size=41))
    with pytest.raises(InputError, match=r"gate_proj/kernel should have shape \(3, 24, 41\), has \(3, 24, 40\)"):
        checkpoints.load(stored.folder)


def test_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no file or folder smollm9.*known: smollm2-135m"):
        checkpoints.load("smollm9")
    with pytest.raises(InputError, match="is no model folder"):
        checkpoints.load(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"is no model; give .*\.gguf"):
        checkpoints.load(tmp_path / "a.txt")
