"""Where a recipe runs and how fast: no part of its identity."""

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kd_core.recipe.addresses import holds_password
from kd_core.recipe.fields import Fraction, Frozen

__all__ = ["Run", "S3Options"]


def _without_password(url: str | None, instead: str) -> str | None:
    """The address itself. Recipes are kept, printed and sent to an orchestrator: what is secret stays in the environment."""
    if url is not None and holds_password(url):
        raise ValueError(f"the address holds a password; {instead}")
    return url


class S3Options(Frozen):
    """How to reach an S3-compatible server. Credentials come from the environment or a role, never from here."""

    endpoint: str | None = None
    """http(s):// address without a password; None is AWS."""
    region: str = "us-east-1"
    """Region name."""
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """when_required for servers that refuse the default checksums."""

    @field_validator("endpoint")
    @classmethod
    def _holds_no_password(cls, url: str | None) -> str | None:
        return _without_password(url, "put it into the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


class Run(Frozen):
    """Where and how fast. Nothing here changes a result, so nothing here enters a fingerprint."""

    store: str = ".kd/store"
    """A local directory, or s3://bucket/prefix."""
    s3: S3Options = S3Options()
    """Options of an s3:// store and of s3:// sources."""
    tracking: str | None = None
    """MLflow tracking URI without a password; None: the environment's MLFLOW_TRACKING_URI, or else sqlite:///.kd/mlflow.db."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None leaves its default."""
    parallel: int | None = Field(default=None, ge=1)
    """Nodes of the graph that are computed side by side, each in a process of its own; None: one a GPU, and on CPUs as many as have
    `threads` cores each (one where `threads` is not set)."""
    micro_batch_tokens: int = Field(default=16_384, ge=64)
    """Tokens a forward pass, padding included, in training and scoring."""
    generate_rows: int = Field(default=256, ge=1)
    """Sequences decoded together."""
    shard_rows: int = Field(default=512, ge=1)
    """Rows a committed shard of answers or soft labels: what a kill can cost. A server's answers are committed by 64, or every 30 s."""
    num_workers: int = Field(default=1, ge=1)
    """Processes that run this recipe at the same time and share the teacher's work, each with its own `worker`."""
    worker: int = Field(default=0, ge=0)
    """Which of them this is, 0-based. Any of them can finish the work alone."""
    num_processes: int = Field(default=1, ge=1)
    """Processes on this machine that train a student together, each on a GPU of its own where there are any."""
    shard_weights: bool = False
    """Ranks of a training run hold slices of weights, gradients and optimiser state (FSDP2): memory for traffic. False: whole copies."""
    disk_cache: str = ".kd/cache"
    """Directory on this machine for parts of a remote store that training has read."""
    disk_cache_bytes: int = Field(default=20 * 2**30, ge=0)
    """Its largest size; 0 keeps none, so that every epoch reads from the store. Requests are fewer and larger where all of it fits."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; each holds the best weights so far as well."""
    activation_checkpointing: bool = False
    """Keep no activations inside blocks and compute them again for the gradient: less memory, a third more time."""
    compile: bool = False
    """Run the student's blocks through torch.compile; its first steps are slow."""
    teacher_url: str | None = None
    """Base URL of the server teacher without a password, for example http://127.0.0.1:8000/v1."""
    teacher_concurrency: int = Field(default=32, ge=1, le=1024)
    """Requests in flight to a server teacher."""
    max_failed_answers: Fraction = 0.05
    """Share of a server's answers that may fail (refused, or wrong in form); with more the run stops, and what was answered is kept."""
    score_tokens_per_second: float | None = Field(default=None, gt=0.0)
    """Rate of the scoring pass, tokens a second, prompts included, for the plan; None: as finished records measured it."""
    price_per_hour: float | None = Field(default=None, ge=0.0)
    """Price of this machine, for the plan and the report."""
    price_per_gb_month: float | None = Field(default=None, ge=0.0)
    """Price of 10^9 bytes kept in the store for a month, for the plan."""
    price_per_thousand_requests: float | None = Field(default=None, ge=0.0)
    """Price of a thousand requests to the store, for the plan: reads and writes alike, so state the dearer one."""

    @field_validator("store", "tracking", "teacher_url")
    @classmethod
    def _holds_no_password(cls, url: str | None, field: ValidationInfo) -> str | None:
        instead = {
            "store": "put it into the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            "tracking": "put the whole address into the environment variable MLFLOW_TRACKING_URI",
            "teacher_url": "put a bearer key into the environment variable KD_TEACHER_API_KEY",
        }
        return _without_password(url, instead[field.field_name or ""])

    @model_validator(mode="after")
    def _is_one_of_the_workers(self) -> Self:
        if self.worker >= self.num_workers:
            raise ValueError(f"worker {self.worker} is not one of num_workers {self.num_workers}; they are counted from 0")
        return self

    @model_validator(mode="after")
    def _slices_are_not_compiled(self) -> Self:
        if self.compile and self.shard_weights:
            raise ValueError("compile with shard_weights is not known to give the same numbers; use one of the two")
        return self
