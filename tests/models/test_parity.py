"""Hugging Face's own models in torch, saved by them, loaded by our converter: the logits agree."""

import warnings

import jax
import numpy as np
import pytest

from jaxsparse.models import checkpoints
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate

with warnings.catch_warnings():
    # What these two warn of while they are imported (their own dependencies) is not ours to mend.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2_SHAPE = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128}
MODELS = {
    "llama_multi_head": ("Llama", SHAPE),
    "llama_grouped": ("Llama", {**SHAPE, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "llama_tied": ("Llama", {**SHAPE, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "llama_wide_heads": ("Llama", {**SHAPE, "head_dim": 12, "num_key_value_heads": 1}),
    "llama_biases": ("Llama", {**SHAPE, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("Llama", {**SHAPE, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}),
    "linear_rope": (
        "Llama",
        {**SHAPE, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    ),
    "mistral": ("Mistral", {**SHAPE, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral_window": ("Mistral", {**SHAPE, "num_key_value_heads": 2, "sliding_window": 7}),
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2_untied": ("GPT2", {**GPT2_SHAPE, "n_inner": 70, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def peers(request, tmp_path_factory):
    """A random Hugging Face model, and ours as loaded from the folder it was saved to."""
    family, fields = request.param
    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    config = getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager")
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The initial 0.02, zeros and ones would hide what a wrong norm, bias or angle does.
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    folder = tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder)
    return model, checkpoints.load(folder)


def test_logits_agree(peers, rng):
    theirs, checkpoint = peers
    tokens = rng.integers(0, 97, (2, 120), dtype=np.int32)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()
    model = LanguageModel(checkpoint.config)
    found = np.asarray(jax.jit(model.logits)(checkpoint.params, tokens))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_round_trip_gives_hugging_face_the_same_model(peers, rng, tmp_path):
    theirs, checkpoint = peers
    checkpoints.export_hugging_face(tmp_path / "back", checkpoint)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    tokens = torch.as_tensor(rng.integers(0, 97, (2, 120)))
    with torch.no_grad():
        np.testing.assert_array_equal(back(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("peers", [MODELS["mistral_window"], MODELS["gpt2"]], indirect=True)
def test_greedy_generation_agrees(peers, rng):
    theirs, checkpoint = peers
    prompts = [rng.integers(1, 97, length).tolist() for length in (9, 4, 15)]
    with torch.no_grad():
        expected = [
            theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    model = LanguageModel(checkpoint.config)
    assert generate(model, checkpoint.params, prompts, max_new_tokens=12, stop_ids=[]) == expected
