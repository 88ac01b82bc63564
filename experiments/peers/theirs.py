"""Their side: PEFT's method of the same name in torch, trained as users of transformers do."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from experiments.peers.setting import Arrays, Setting, Start, size_on_disk

# A model in a folder needs no network, and a look at the hub would only wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers

__all__ = ["Theirs"]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""The attention projections, which our methods train by default."""
NAME = "default"
"""PEFT's name of an adapter that has none."""


def _peft_config(setting: Setting) -> Any:
    shared: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    low_rank: dict[str, Any] = {"r": setting.rank, "lora_alpha": setting.alpha, "lora_dropout": 0.0}
    made = {
        "lora": lambda: peft.LoraConfig(**low_rank, **shared),
        "dora": lambda: peft.LoraConfig(use_dora=True, **low_rank, **shared),
        "shira": lambda: peft.ShiraConfig(r=setting.rank, random_seed=0, **shared),
        "super_tuning": lambda: peft.SupertuningConfig(sparsity=1 - setting.density, **shared),
    }
    return made[setting.method]()


def _adapted(model: Any, setting: Setting) -> Any:
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that is about to change, which is no concern of who runs this.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, _peft_config(setting))


class Theirs:
    """A model that trains by PEFT, or in full by torch alone.

    AdamW is torch's fused one, transformers' own default; attention is `sdpa`; the cross-entropy is over the same
    tokens as on our side.

    Args:
        setting: the method.
        folder: the model, as Hugging Face lays it out; read as float32.
        start: factors and places to begin with, instead of what PEFT draws.
    """

    def __init__(self, setting: Setting, folder: Path, start: Start | None = None) -> None:
        transformers.logging.disable_progress_bar()
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default, which PEFT's SHiRA is else warned of
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", use_cache=False
        )
        self.is_adapter = setting.method != "full"
        self.model: Any = _adapted(model, setting) if self.is_adapter else model
        if self.is_adapter and start:
            _begin(self.model, start)
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        betas = setting.beta1, setting.beta2
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=setting.lr, betas=betas, eps=setting.eps, weight_decay=0.0, fused=True
        )

    def step(self, batch: Arrays) -> float:
        """Trains one step and returns the loss before it."""
        tokens, targets, weights, segments = (
            torch.as_tensor(batch[name]) for name in ("tokens", "targets", "weights", "segments")
        )
        labels = torch.where(weights > 0, targets, -100).long()
        logits = self.model(input_ids=tokens.long(), attention_mask=(segments > 0).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state_bytes(self) -> int:
        """Returns the bytes of what trains, unless that is the model itself, of its places, and of the moments."""
        held = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        if self.is_adapter:
            held += self.trained + [index for layer in _layers(self.model) for index in _places(layer)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def save(self, folder: Path) -> int:
        """Saves the adapter, or in full fine-tuning the model, and returns its bytes."""
        with tempfile.TemporaryDirectory(dir=folder) as own:
            self.model.save_pretrained(own)
            return size_on_disk(file for file in Path(own).rglob("*") if file.name != "README.md")

    def close(self) -> None:
        """Gives the memory back."""
        self.model = self.optimizer = self.trained = None  # type: ignore[assignment]


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def _places(layer: Any) -> list[Any]:
    """The places of a layer's entries, where it has any."""
    for name in ("shira_indices", "supertuning_indices"):
        if hasattr(layer, name):
            return [getattr(layer, name)[NAME]]
    return []


def _begin(model: Any, start: Start) -> None:
    """Gives every adapted layer the factors, or the places, that our side has."""
    modules = dict(model.get_base_model().named_modules())
    adapted = {name for name, module in modules.items() if hasattr(module, "base_layer")}
    if adapted != set(start):
        raise ValueError(f"both sides must adapt the same modules; only one does {sorted(adapted ^ set(start))[:4]}")
    for name, arrays in start.items():
        layer = modules[name]
        if "index" in arrays:
            _place(layer, arrays["index"])
        else:
            with torch.no_grad():
                layer.lora_A[NAME].weight.copy_(torch.tensor(arrays["a"].T))


def _place(layer: Any, places: np.ndarray) -> None:
    """Moves the entries of a sparse layer to flat places in its (out, in) weight; they start at 0."""
    index = torch.tensor(places)
    if hasattr(layer, "shira_indices"):
        width = layer.base_layer.weight.shape[1]
        layer.shira_indices[NAME] = torch.stack((index // width, index % width)).int()
        layer.shira_weight[NAME] = torch.nn.Parameter(torch.zeros(index.numel()))
    else:
        layer.supertuning_indices[NAME] = index.int()
        layer.supertuning_values[NAME] = torch.nn.Parameter(torch.zeros(index.numel()))
