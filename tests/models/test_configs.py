"""Configurations in JSON and in Hugging Face's spelling."""

import dataclasses
import json

import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.models.configs import (
    RopeScaling,
    config_from_hugging_face,
    config_from_json,
    config_to_hugging_face,
)
from tests.models.small import CONFIGS, LLAMA

LLAMA_FILE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
GPT2_FILE = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_survive_json_and_hugging_face(config):
    assert config_from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert config_from_hugging_face(json.loads(json.dumps(config_to_hugging_face(config)))) == config


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 100000}, 1e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4}}, 1e5, ("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1e4, ("linear", 4.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            ("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            ("llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rotary_settings_are_read_in_both_spellings(rope, theta, scaling):
    config = config_from_hugging_face({**LLAMA_FILE, **rope})
    assert config.rope_theta == theta
    assert config.rope_scaling == (None if scaling is None else RopeScaling(*scaling))


def test_absent_fields_take_the_defaults_of_transformers():
    llama = config_from_hugging_face({k: v for k, v in LLAMA_FILE.items() if k != "num_key_value_heads"})
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (9, 64, 1e-6)
    assert (llama.tie_word_embeddings, llama.max_position_embeddings) == (False, 2048)
    mistral = {
        **LLAMA_FILE,
        "model_type": "mistral",
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    assert config_from_hugging_face(mistral).sliding_window == 4096
    assert config_from_hugging_face({**mistral, "sliding_window": None}).sliding_window is None
    assert config_from_hugging_face({**mistral, "num_key_value_heads": None}).num_kv_heads == 16
    del mistral["num_key_value_heads"]
    assert config_from_hugging_face(mistral).num_kv_heads == 8
    gpt2 = config_from_hugging_face(GPT2_FILE)
    assert (gpt2.intermediate_size, gpt2.max_position_embeddings) == (3072, 1024)
    assert gpt2.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; use llama, mistral or gpt2"),
        ({}, "model_type None is not supported"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        ({**LLAMA_FILE, "hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; use 'silu'"),
        ({**LLAMA_FILE, "hidden_size": "576"}, "hidden_size must be a number .int., not '576'"),
        ({**LLAMA_FILE, "hidden_size": 500}, "hidden_size 500 is not a multiple of num_attention_heads 9"),
        ({**LLAMA_FILE, "num_attention_heads": 0}, "num_attention_heads 0"),
        ({**LLAMA_FILE, "num_hidden_layers": 0}, "num_layers must be a positive integer, not 0"),
        ({**LLAMA_FILE, "num_key_value_heads": 2}, "num_heads 9 is not a multiple of num_kv_heads 2"),
        ({**LLAMA_FILE, "head_dim": 63}, "head_dim must be even"),
        ({**LLAMA_FILE, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn' is not"),
        ({**LLAMA_FILE, "rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({**LLAMA_FILE, "rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
        ({**LLAMA_FILE, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (
            {**LLAMA_FILE, "rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "low_freq_factor < high_freq_factor",
        ),
        ({**GPT2_FILE, "activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ({**GPT2_FILE, "n_head": 7}, "hidden_size 768 is not a multiple of num_heads 7"),
        ({**GPT2_FILE, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        config_from_hugging_face(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "bert"}, "family 'bert' is unknown; known: llama, gpt2"),
        ({"family": "llama", "vocab_size": 5}, "missing"),
        ({**dataclasses.asdict(LLAMA), "width": 3}, "width"),
    ],
)
def test_damaged_stored_configurations_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        config_from_json(fields)


def test_a_window_with_biases_has_no_hugging_face_class():
    config = dataclasses.replace(LLAMA, sliding_window=4, attention_bias=True)
    with pytest.raises(InputError, match="sliding window together with biases"):
        config_to_hugging_face(config)


def test_shapes_have_to_be_positive():
    with pytest.raises(InputError, match="LlamaConfig: sliding_window must be a positive integer, not 0"):
        dataclasses.replace(LLAMA, sliding_window=0)
    with pytest.raises(InputError, match="RopeScaling: original_max_position_embeddings"):
        RopeScaling("llama3", 8.0, 1.0, 4.0, 0)
