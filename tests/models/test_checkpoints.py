"""Every format loads to the same tree, bit for bit."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.models import checkpoints, sources, store
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.layouts import parameters_of
from tests.models.formats import llama2c_tokenizer, write_gguf, write_llama2c
from tests.models.small import CONFIGS, GPT2, LLAMA
from tests.models.stored import CONFIG, METADATA, assert_same, checkpoint_of

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_are_the_models_own_trees(name):
    config = CONFIGS[name]
    abstract = LanguageModel(config).abstract()
    expected = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
    }
    assert {parameter.path: parameter.shape for parameter in parameters_of(config)} == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_our_format_and_hugging_face_s_round_trip(name, dtype, rng, tmp_path):
    made = checkpoint_of(CONFIGS[name], rng, dtype)
    if name == "sliding_window":  # Mistral has a default for each of these that LLaMA lacks
        made = dataclasses.replace(made, config=dataclasses.replace(made.config, max_position_embeddings=64))
    checkpoints.export_hugging_face(tmp_path / "theirs", made)
    checkpoints.convert(tmp_path / "theirs", tmp_path / "ours")
    checkpoints.convert(tmp_path / "ours", tmp_path / "again", to="hugging_face")
    ours, again = checkpoints.load(tmp_path / "ours"), checkpoints.load(tmp_path / "again")
    for loaded in (ours, again):
        assert loaded.config == made.config
        assert_same(loaded.params, made.params)
        assert loaded.fingerprint == made.fingerprint
    weights = [tmp_path / folder / "model.safetensors" for folder in ("theirs", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_shards_hold_the_same_as_one_file(exported, stored, tmp_path):
    shards = sorted(path.name for path in exported.folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max((exported.folder / shard).stat().st_size for shard in shards[1:])
    assert largest < 20_000 + 4_000  # and the header
    loaded = checkpoints.load(exported.folder)
    assert_same(loaded.params, stored.params)
    single = checkpoints.export_hugging_face(tmp_path / "single", loaded)
    whole = safetensors.numpy.load_file(single.folder / "model.safetensors")
    index = json.loads((exported.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_hugging_face_names_and_orientation(rng, tmp_path):
    config = dataclasses.replace(LLAMA, num_layers=1, attention_bias=True)
    made = checkpoint_of(config, rng)
    checkpoints.export_hugging_face(tmp_path / "llama", made)
    tensors = safetensors.numpy.load_file(tmp_path / "llama" / "model.safetensors")
    layer = {key.removeprefix("model.layers.0."): value for key, value in tensors.items()}
    attention = made.params["layers"]["self_attn"]
    for name in "qkvo":
        np.testing.assert_array_equal(layer[f"self_attn.{name}_proj.weight"], attention[f"{name}_proj"]["kernel"][0].T)
        np.testing.assert_array_equal(layer[f"self_attn.{name}_proj.bias"], attention[f"{name}_proj"]["bias"][0])
    np.testing.assert_array_equal(tensors["lm_head.weight"], made.params["lm_head"]["kernel"].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], made.params["embed_tokens"]["embedding"])
    assert {"model.norm.weight", "input_layernorm.weight", "mlp.down_proj.weight"} < set(tensors) | set(layer)

    made = checkpoint_of(GPT2, rng)
    checkpoints.export_hugging_face(tmp_path / "gpt2", made)
    tensors = safetensors.numpy.load_file(tmp_path / "gpt2" / "model.safetensors")
    kernel = made.params["layers"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_array_equal(tensors["transformer.h.2.attn.c_attn.weight"], kernel[2])
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} < set(tensors)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_as_old_files_hold_it(prefix, rng, tmp_path):
    made = checkpoint_of(GPT2, rng)
    folder = checkpoints.export_hugging_face(tmp_path / "out", made).folder
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {prefix + key.removeprefix("transformer."): value for key, value in tensors.items()}
    tensors[f"{prefix}h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
    tensors[f"{prefix}h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert_same(checkpoints.load(folder).params, made.params)


def test_llama_with_frequencies_as_buffers(exported, stored, tmp_path):
    folder = checkpoints.export_hugging_face(tmp_path / "one", stored).folder
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert_same(checkpoints.load(folder).params, stored.params)


@pytest.mark.parametrize("name", ["grouped", "tied", "wide_heads"])
def test_llama2c_and_gguf_load_to_the_same_tree(name, rng, tmp_path):
    config = dataclasses.replace(CONFIGS[name], head_dim=6, max_position_embeddings=32)
    made = checkpoint_of(config, rng)
    write_llama2c(tmp_path / "small.bin", config, made.params)
    write_gguf(tmp_path / "small.gguf", config, made.params, metadata=METADATA)
    from_llama2c = checkpoints.load(tmp_path / "small.bin")
    assert from_llama2c.config == config
    assert_same(from_llama2c.params, made.params)
    source = checkpoints.GGUFSource(tmp_path / "small.gguf")
    assert source.config == config
    assert_same(checkpoints.load_params(source), made.params)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_gguf_quantisations(kind, rng, tmp_path):
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
    made = checkpoint_of(config, rng)
    kind = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "q.gguf", config, made.params, kind=kind, metadata=METADATA)
    loaded = checkpoints.load(tmp_path / "q.gguf")
    up, embedding = loaded.params["layers"]["mlp"]["up_proj"]["kernel"], loaded.params["embed_tokens"]["embedding"]
    plain = {"F16": jnp.float16, "BF16": jnp.bfloat16}
    assert up.dtype == plain.get(kind.name, jnp.float32)
    assert loaded.params["norm"]["scale"].dtype == jnp.float32

    def quantised(matrix):
        return gguf.quants.dequantize(gguf.quants.quantize(np.asarray(matrix), kind), kind)

    np.testing.assert_array_equal(embedding.astype(jnp.float32), quantised(made.params["embed_tokens"]["embedding"]))
    kernel = made.params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(up[1].astype(jnp.float32), quantised(np.ascontiguousarray(kernel[1].T)).T)


def test_gguf_with_llama3_rope(rng, tmp_path):
    config = dataclasses.replace(CONFIGS["llama3_rope"], vocab_size=300, head_dim=64)
    scaling = dataclasses.replace(config.rope_scaling, original_max_position_embeddings=8192)
    config = dataclasses.replace(config, rope_scaling=scaling)
    made = checkpoint_of(config, rng)
    # The converter's loop in llama.cpp.
    factors = []
    for frequency in 1.0 / config.rope_theta ** (np.arange(0, 64, 2) / 64):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if wavelength < 8192 / 4.0 else 8.0 if wavelength > 8192 / 1.0 else between)
    write = {"metadata": METADATA, "extra": {"rope_freqs.weight": np.float32(factors)}}
    write_gguf(tmp_path / "a.gguf", config, made.params, **write)
    loaded = checkpoints.load(tmp_path / "a.gguf")
    assert loaded.config == config
    assert_same(loaded.params, made.params)
    write["extra"] = {"rope_freqs.weight": np.float32(factors) ** 2}
    write_gguf(tmp_path / "b.gguf", config, made.params, **write)
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not the RoPE scaling"):
        checkpoints.load(tmp_path / "b.gguf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["stored", "exported"])
def test_dtype_on_loading(dtype, kind, stored, exported):
    folder = {"stored": stored, "exported": exported}[kind].folder
    loaded = checkpoints.load(folder, dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), stored.params)
    assert_same(loaded.params, expected)
    assert loaded.fingerprint == fingerprint(expected)


def test_tensors_larger_than_a_block(stored, tmp_path, monkeypatch):
    for name in ("float32", "bfloat16"):
        write_gguf(tmp_path / "a.gguf", CONFIG, stored.params, metadata=METADATA)
        write_llama2c(tmp_path / "a.bin", CONFIG, stored.params)
        checkpoints.convert(stored.folder, tmp_path / name, dtype=name, to="hugging_face")
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 500)
    for place in (stored.folder, tmp_path / "float32", tmp_path / "a.gguf", tmp_path / "a.bin"):
        assert checkpoints.load(place).fingerprint == stored.fingerprint
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stored.params)
    assert_same(checkpoints.load(tmp_path / "bfloat16").params, half)


def test_loaded_weights_can_be_donated(stored):
    params = checkpoints.load(stored.folder).params
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.at[0].add(1.0), tree), donate_argnums=0)
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(step(params))]
    assert after == before


def test_tokenizer_travels_along(stored, exported, tokenizer):
    for folder in (stored.folder, exported.folder):
        loaded = checkpoints.load(folder).tokenizer
        assert loaded.encode("the t") == tokenizer.encode("the t")
        assert loaded.stop_ids == tokenizer.stop_ids


def test_tokenizer_beside_a_llama2c_file(stored, tmp_path):
    write_llama2c(tmp_path / "small.bin", CONFIG, stored.params)
    assert checkpoints.load(tmp_path / "small.bin").tokenizer is None
    llama2c_tokenizer(tmp_path / "tok300.bin", ["a"], [-1.0])
    assert checkpoints.load(tmp_path / "small.bin").tokenizer.vocab_size == 260
    (tmp_path / "tok300.bin").rename(tmp_path / "elsewhere.bin")
    given = checkpoints.load(tmp_path / "small.bin", tokenizer=tmp_path / "elsewhere.bin")
    assert given.tokenizer.vocab_size == 260
    given = checkpoints.load(tmp_path / "small.bin", tokenizer=stored.folder)
    assert given.tokenizer.vocab_size == stored.tokenizer.vocab_size


def test_description_of_our_format(stored):
    description = json.loads((stored.folder / "metadata.json").read_text())
    assert description["format_version"] == store.FORMAT_VERSION
    assert description["fingerprint"] == stored.fingerprint == fingerprint(stored.params)
    assert description["name"] == checkpoints.load(stored.folder).name == "small"
    assert set(description["versions"]) == {"jaxsparse", "jax", "orbax-checkpoint"}


def test_convert_names_and_refuses(stored, tmp_path):
    converted = checkpoints.convert(stored.folder, tmp_path / "new", name="other")
    assert (converted.name, checkpoints.load(tmp_path / "new").name) == ("other", "other")
    with pytest.raises(InputError, match="is not empty"):
        checkpoints.convert(stored.folder, tmp_path / "new")
    with pytest.raises(InputError, match="to must be 'jaxsparse' or 'hugging_face', not 'torch'"):
        checkpoints.convert(stored.folder, tmp_path / "x", to="torch")
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16, not 'int8'"):
        checkpoints.convert(stored.folder, tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()


def test_known_models_are_converted_once(stored, tmp_path, monkeypatch):
    write_gguf(tmp_path / "file.gguf", CONFIG, stored.params, metadata=METADATA)
    fetched = []

    def fetch():
        fetched.append(1)
        return tmp_path / "file.gguf"

    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(checkpoints.KNOWN_MODELS, "small", fetch)
    for _ in range(2):
        loaded = checkpoints.load("small")
        assert (loaded.name, loaded.fingerprint) == ("small", stored.fingerprint)
    assert fetched == [1]
    assert loaded.folder == tmp_path / "cache" / "small"
