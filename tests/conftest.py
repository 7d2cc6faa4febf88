"""Every test starts from the same environment: no addresses, no credentials, no network; real servers once a session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infra.stack import StackInfo, object_store

if TYPE_CHECKING:
    import torch

    from kd_core.teacher.models import LoadedModel

_FOREIGN = ("AWS_", "HF_", "KD_FAILPOINT", "MLFLOW_", "PREFECT_")
_CLEAN = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def pytest_configure() -> None:
    """Libraries that read the environment when they are imported must find the clean one."""
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ.update(_CLEAN)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one test sets is seen by the next."""
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        monkeypatch.delenv(name)
    for name, value in _CLEAN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackInfo]:
    """A real S3 server on drawn ports, with one bucket; for tests marked `stack`."""
    home: Path = tmp_path_factory.mktemp("seaweed")
    with object_store(home) as info:
        yield info


@pytest.fixture
def s3_environment(seaweed: StackInfo, monkeypatch: pytest.MonkeyPatch) -> StackInfo:
    """The session's S3 server, with its address and credentials in this test's environment."""
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    return seaweed


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """Every device that numbers must agree on; cuda is skipped where there is none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def tiny_model() -> "Callable[..., LoadedModel]":
    """Makes small random Llamas with a character tokenizer of 17 tokens, more logit columns than that, and opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd_core.recipe import CharacterTokenizer
    from kd_core.teacher.models import LoadedModel
    from kd_core.tokens import character_tokenizer, num_columns

    tokenizer = character_tokenizer(CharacterTokenizer(kind="characters", alphabet="0123456789+-=,#"))

    def make(*, seed: int = 0, num_layers: int = 2, vocab_size: int = 24) -> LoadedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        return LoadedModel(model, tokenizer, num_columns(tokenizer))

    return make
