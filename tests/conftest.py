"""Every test starts from the same environment: no addresses, no credentials, no network; real servers once a session.

``finished`` is one whole run of a shrunken quickstart recipe, shared; tests that change a store take ``copy``.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from infra.stack import StackInfo, object_store

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from kd_core.teacher.models import LoadedModel

_FOREIGN = ("AWS_", "HF_", "KD_FAILPOINT", "MLFLOW_", "PREFECT_")
_CLEAN = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "COLUMNS": "80",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--pretended``: a session of the pretended device (``devices/pretended.py``)."""
    parser.addoption("--pretended", action="store_true", help="only the tests that take `device`, on a device pretended on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Libraries that read the environment when they are imported must find the clean one; a pretended device is for a whole session.

    A shell ignores SIGINT for what it runs in the background, and the processes that tests start and interrupt would inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ.update(_CLEAN)
    if config.getoption("pretended"):
        from tests.devices import pretended

        pretended.register()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A session has the pretended device, or all else: torch knows a device for a whole process."""
    wanted: bool = config.getoption("pretended")
    mine = [item for item in items if (item.get_closest_marker("pretended") is not None) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


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


@pytest.fixture(params=["cpu", pytest.param("pretended", marks=pytest.mark.pretended), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> "Iterator[torch.device]":
    """Every device that numbers must agree on; the pretended one needs a session of its own, cuda is skipped where there is none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param != "pretended":
        yield torch.device(request.param)
        return
    from tests.devices import pretended

    with pretended.pretending():
        yield torch.device(request.param)


@pytest.fixture
def tiny_model() -> "Callable[..., LoadedModel]":
    """Makes small random Llamas with a character tokenizer of 17 tokens, more logit columns than that, and opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd_core.recipe import CharacterTokenizer
    from kd_core.teacher.models import LoadedModel
    from kd_core.tokens.encoding import character_tokenizer, num_columns

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


@pytest.fixture(scope="session")
def bpe_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of some hundred tokens, trained on sums in words, with a chat template and three special tokens."""
    import random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["electromagnetic", "running", "together", "because", "therefore", "counting", "seven", "eight", "plus", "minus", "apples"]
    texts = [" ".join([*rng.choices(words, k=8), f"{rng.randint(0, 99)}+{rng.randint(0, 99)}="]) for _ in range(400)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


# ---------------------------------------------------------------------------------------------- the running product

_ROOT = Path(__file__).parents[1]
_ARCHITECTURE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
_SHRUNKEN: dict[str, Any] = {
    "name": "small",
    "seeds": [0],
    "prompts.sources.0.num": 300,
    "teacher.sources.0.num": 600,
    "teacher.architecture": _ARCHITECTURE,
    "teacher.training": {"steps": 30, "batch_rows": 16, "learning_rate": 0.003, "warmup_steps": 5},
    "answers.max_tokens": 20,
    "curate": {"gold_rows": 60, "verify": False, "keep_truncated": True},
    "student.architecture": {**_ARCHITECTURE, "hidden_size": 16, "num_layers": 1, "intermediate_size": 32},
    "training": {"steps": 25, "batch_rows": 8, "learning_rate": 0.003, "warmup_steps": 5},
    "evaluation.suites.0.limit": 20,
    "evaluation.generate.max_tokens": 20,
    "gate.rules": [{"kind": "ceiling", "metric": "parameter_ratio", "maximum": 0.5}],
    "publish": "small-student",
    "run": {"threads": 1, "parallel": 1, "device": "cpu", "shard_rows": 64, "checkpoint_every_steps": 10},
}
"""The quickstart in seconds: 300 prompts, 4 shards of answers, 2 checkpoints a model, a gate that any student passes."""


@dataclass(frozen=True)
class Called:
    """What a command line left: exit code, standard output, standard error, and the lines in which it told there what it was doing."""

    code: int
    out: str
    err: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """A run that went to its end.

    Attributes:
        recipe_file: its recipe, absolute.
        home: the directory it ran in; .kd is there.
        store: .kd/store below it.
        tracking: MLflow's address.
        said: what ``kd run --json`` printed.
    """

    recipe_file: Path
    home: Path
    store: Path
    tracking: str
    said: dict[str, Any]


def _call(*words: object) -> Called:
    """The command line in this process: the code of the console script, without its two seconds of imports."""
    from flows.cli import main

    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(sys, "argv", ["kd", *map(str, words)]), mock.patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    assert isinstance(code, int)
    lines = err.getvalue().splitlines(keepends=True)
    steps = tuple(line.strip() for line in lines if line.startswith("  ") and line.endswith(" ...\n"))
    return Called(code, out.getvalue(), "".join(line for line in lines if line.strip() not in steps), steps)


@pytest.fixture
def kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Called]:
    """``kd(*words)``: the command line in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return _call


@pytest.fixture
def kd_process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``kd_process(*words, **environment)``: the real console script in the test's directory; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object, **environment: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).parent / "kd"), *map(str, words)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart recipe, shrunk to seconds."""
    from kd_core.recipe.files import dump_recipe, load_recipe

    overrides = [f"{path}={json.dumps(value)}" for path, value in _SHRUNKEN.items()]
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(dump_recipe(load_recipe(_ROOT / "recipes" / "quickstart.yaml", overrides)))
    return path


@contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def finished(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One whole local run, read-only: ``kd run --local --json`` in a directory of its own."""
    home = tmp_path_factory.mktemp("finished")
    with _inside(home):
        called = _call("run", "--local", "--json", small_recipe)
    assert called.code == 0, called.err
    return Finished(small_recipe, home, home / ".kd/store", f"sqlite:///{home}/.kd/mlflow.db", json.loads(called.out))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """The finished run in the test's own directory, to change; its publication is another, as its address is."""
    shutil.copytree(finished.home / ".kd", tmp_path / ".kd")
    monkeypatch.chdir(tmp_path)
    return Finished(finished.recipe_file, tmp_path, tmp_path / ".kd/store", f"sqlite:///{tmp_path}/.kd/mlflow.db", finished.said)
