"""What a fine-tuning run is told: the one source of flags, config files and defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

__all__ = ["ClusterConfig", "DataConfig", "Engine", "FinetuneConfig", "ModelConfig", "OptimizerConfig", "RunConfig"]

Options = TypeVar("Options")
DType = Literal["float32", "bfloat16"]
Engine = Literal["fused", "reference"]


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from."""

    model: str
    """A folder (ours or Hugging Face's), a .gguf or llama2.c file, or a known name such as smollm2-135m, which
    is fetched and cached."""
    dtype: DType = "float32"
    """Dtype of the weights. Slots and their masters are float32 either way."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping it: trades time for memory."""
    mesh: str | None = None
    """How the model is divided between all devices, such as data=2,fsdp=2,tensor=2. data: rows of a batch; fsdp: rows
    too, and weights, which are gathered for each product; tensor: the products themselves. None: one device."""
    selection: Literal["per_shard", "global"] = "per_shard"
    """Who picks entries by the gradient. per_shard: every tensor shard its own part, and tells nobody; global: all
    together, the support that one device would pick."""


@dataclass(frozen=True)
class DataConfig:
    """The rows to train on."""

    data: Path
    """Instruction rows: .json or .jsonl, .gz too, of {"instruction", "input", "output", "answer"}."""
    eval_data: Path | None = None
    """Held-out rows, measured before and after."""
    eval_rows: int | None = None
    """Measure on so many of the first held-out rows only; None: all."""
    batch: int = 8
    """Rows per optimizer step (GASDU, appendix C: 4 or 8)."""
    micro_batches: int = 1
    """Split every batch into so many parts, whose gradients are averaged: less memory, same step."""
    max_length: int = 512
    """Longest row in tokens, prompt and answer; longer prompts lose their start, answers never."""
    batching: Literal["bucketed", "packed"] = "bucketed"
    """Pad rows of like length together, or pack several rows into one."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How a row becomes a prompt; auto: the tokenizer's chat template where it has one."""
    train_on: Literal["answer", "output"] = "answer"
    """The field that the model learns to write."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with rows whose answer leaves no room for a prompt in max_length."""
    max_new_tokens: int = 24
    """Longest answer that is generated to be scored, in tokens."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The inner optimizer, which sees the slots alone."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam: betas 0.9 and 0.999, as GASDU's released code."""
    lr: float = 1e-4
    """Peak learning rate (GASDU's grid: 1e-6, 5e-6, 1e-5, 5e-5, 1e-4)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls to zero after the warm-up; constant: it does not."""
    warmup_steps: int = 0
    """Steps over which the rate rises from zero."""
    clip: float = 1.0
    """Largest global norm of the slots' gradient; 0 switches clipping off."""
    weight_decay: float = 0.0
    """For adamw; it acts on the slots."""


@dataclass(frozen=True)
class RunConfig:
    """How long, where to, and how to go on."""

    out: Path
    """Output folder: report.json, delta, metrics.jsonl, checkpoints, config.yaml."""
    steps: int | None = None
    """Optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the data; 3 if neither is given (GASDU, section 5)."""
    checkpoint_every: int | None = None
    """Steps between checkpoints to resume from; None: by time alone."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints; None: by steps alone."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder; starts anew where there is none."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too (needs the extra: pip install jaxsparse[tensorboard])."""
    seed: int = 0
    """The only source of randomness: order of the rows and whatever the method draws."""


@dataclass(frozen=True)
class ClusterConfig:
    """Several processes, on one machine or many, that train one model together on the devices of all of them."""

    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Join the other processes that JAX finds by itself: on TPU pods, Slurm, Open MPI, Kubernetes."""
    coordinator: str | None = None
    """Elsewhere: HOST:PORT of process 0, the same for all."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """The number of this one, from 0."""
    heartbeat_seconds: int = 60
    """A process that is silent for so long is taken for lost, and the others end."""
    wait_seconds: int = 300
    """How long to wait for the others at the start."""


@dataclass(frozen=True)
class FinetuneConfig(Generic[Options]):
    """Fine-tunes a language model by a sparse method and saves what changed as a delta.

    Measures loss and exact match on held-out rows before and after, saves the sparse delta, and checks that base
    and delta together are the tuned model, bit for bit.

    Example: jaxsparse finetune --model smollm2-135m --data train.json --eval-data test.json --method gasdu
    --density 1e-4 --lr 1e-3 --steps 100 --out runs/first
    """

    base: ModelConfig
    rows: DataConfig
    run: RunConfig
    chosen_method: Options
    inner: OptimizerConfig = field(default_factory=OptimizerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    method: str = "gasdu"
    """The method; its own options are listed below. `--method NAME --help` shows another method's."""
    engine: Engine = "fused"
    """What runs the method. fused: the slots' gradients come straight out of the backward pass, dense gradients never
    exist. reference: dense gradients of the targets, masked; slower and larger, the definition of every method.
    Methods that pick by a mean gradient see as many of the run's first batches as their calibration_steps (one where
    the first gradient picks) before the fused engine begins, and then train on them; the reference engine spends steps
    on it. What the fused engine cannot run goes to the reference engine, with a notice; the report names the engine."""
    targets: str | None = None
    """Weights that may move: a regular expression for the whole path, such as 'layers/.*/(q|v)_proj/kernel';
    None: the attention projections."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the report as JSON instead of a table."""
