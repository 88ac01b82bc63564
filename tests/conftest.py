"""Fixtures that all tests share."""

import dataclasses
import gc
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.tiny import make_tiny_model
from jaxsparse.data.arithmetic import generate_problems

# What takes most of the suite's time is compiling, and what is compiled runs for moments: LLVM need not try hard, and
# XLA's older emitters, of one operation at a time, are three times as quick as its MLIR pipelines. Code in parts, for
# several threads to compile, costs a quarter more where each core has a worker. The flags are read when the first array
# is made, here or in a process that a test starts.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # XLA of JAX 0.11 has no other emitters, and ends a process that gives it a flag it does not know.
        "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else "",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
).strip()

# Tracing makes millions of objects that live on in caches; looking through them for garbage is rarely worth it.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models, which lies beside the checkout and is never part of it."""
    folder = Path(os.environ.get("JAXSPARSE_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set JAXSPARSE_SHARED")
    return folder


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers for every test, printed on failure so that it can be run again."""
    seed = int(os.environ.get("JAXSPARSE_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    request.node.user_properties.append(("seed", seed))
    print(f"JAXSPARSE_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA of random weights (2 layers, grouped queries) and a tokenizer of words."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of arithmetic problems: 48 to train on, 8 held out."""
    folder, files = tmp_path_factory.mktemp("problems"), {}
    for split, count in (("train", 48), ("held_out", 8)):
        files[split] = folder / f"{split}.json"
        rows = [dataclasses.asdict(row) for row in generate_problems(count, split=split, seed=1)]
        files[split].write_text(json.dumps(rows, indent=1))
    return files
