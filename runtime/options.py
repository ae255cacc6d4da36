"""The options that scripts share: of a run, of its training data and validation, of evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from base.knobs import knob
from base.limits import WORKERS
from runtime.config.old_names import TRAINER

COMPILE_MODES = ("default", "blocks", "reduce-overhead", "max-autotune")


def starts_over(resume: str) -> bool:
    """Whether `--resume` says that nothing in the output folder is continued."""
    return resume.lower() in ("no", "none", "false")


@dataclass
class RunConfig:
    """The run."""

    NEW_NAMES = TRAINER
    given: ClassVar[frozenset[str]] = frozenset()  # paths of what files and flags set, by `parse`

    output_dir: Path = knob(
        Path("output"), "folder of this run: config.yaml, log.jsonl, checkpoints, result/"
    )
    scratch: Path = knob(
        Path("output/scratch"),
        "with --output_dir s3://… or gs://…: where the run writes; its threads bring it to the bucket",
        rare=True,
    )
    bucket_seconds: float = knob(
        10.0, "seconds between two looks for files to bring to the bucket", low=0.1, rare=True
    )
    bucket_patience: float = knob(
        300.0,
        "seconds without progress after which a run ends without its bucket",
        low=0,
        rare=True,
    )
    resume: str = knob(
        "auto",
        "'auto': resume from the newest checkpoint in output_dir; 'yes': also with other data, weights, "
        "sizes, learning rates or lengths; 'no': start from scratch",
        bare="auto",
    )
    checkpoint: Path | None = knob(
        None, "weights to start from; the originals' files load unchanged"
    )
    seed: int = knob(42, "one seed for weights, data order and augmentation")
    device: str = knob("auto", "'auto' (CUDA where present), 'cuda' or 'cpu'")
    precision: str = knob(
        "fp32", "type of the forward pass; parameters stay fp32", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = knob(
        False, "torch.compile the network; the first steps take minutes, the others less"
    )
    compile_mode: str = knob(
        "default",
        "blocks: every transformer block by itself, which compiles faster; reduce-overhead: CUDA graphs "
        "of the whole, for a host that cannot launch kernels fast enough; max-autotune: as in torch",
        choices=COMPILE_MODES,
        only_with=("compile", True),
        rare=True,
    )
    parallel: str = knob(
        "ddp", "over several processes: replicate (ddp) or shard (fsdp)", choices=("ddp", "fsdp")
    )
    shard_group: int = knob(
        0,
        "fsdp: processes that share one copy of the weights; 0 = all; fewer, such as a node's GPUs: "
        "HSDP",
        low=0,
        only_with=("parallel", "fsdp"),
        rare=True,
    )
    offload: bool = knob(
        False,
        "fsdp: parameters and optimizer state in host memory; slower",
        only_with=("parallel", "fsdp"),
        rare=True,
    )
    activation_checkpointing: bool = knob(
        False, "recompute transformer blocks in the backward pass to save memory"
    )
    accumulate: int = knob(
        1, "micro-batches per update; each has batch_size samples per process", low=1
    )
    workers: int = knob(4, "loader processes per training process", low=0, high=WORKERS)
    check_data: bool = knob(
        True, "before the first update look at a few samples, for 2 seconds at most", rare=True
    )
    exif: bool = knob(
        False, "turn images by their EXIF orientation; the originals do not", rare=True
    )
    log_every: int = knob(
        50, "updates between two log lines; the only points where the host waits for the GPU", low=1
    )
    save_every: str = knob(
        "1 epochs", "between two checkpoints: a number of 'steps', 'epochs', 'samples' or '%'"
    )
    keep: int = knob(2, "newest checkpoints kept", low=1, rare=True)
    checkpoint_format: str = knob(
        "auto",
        "'single': rank 0 writes one file; 'sharded': every process its part of a folder; 'auto': sharded "
        "on several processes with fsdp, or above 2 GB",
        choices=("auto", "single", "sharded"),
        rare=True,
    )
    async_save: bool | None = knob(
        None,
        "training waits only until a checkpoint is copied to host memory; none = where it is sharded",
        rare=True,
    )
    tensorboard: bool = knob(True, "write TensorBoard events", rare=True)
    wandb: str = knob("off", "Weights & Biases", choices=("off", "online", "offline"))
    peak_tflops: float | None = knob(
        None, "peak of the GPU in TFLOP/s for the MFU; none = known by its name", rare=True, low=0
    )
    deterministic: bool = knob(
        False, "the same numbers in every run, on CUDA too; slower there", rare=True
    )
    profile: int = knob(
        0,
        "updates that torch's profiler traces, after a few; trace_rank0.json.gz",
        low=0,
        rare=True,
    )
    stall_minutes: float = knob(
        10.0, "minutes without progress after which several processes end; 0 = never", low=0
    )
    max_steps: int | None = knob(
        None, "stop after this many updates, with a checkpoint (schedules are not changed)", low=0
    )


@dataclass
class StreamConfig:
    """Training data."""

    shuffle_buffer: int = knob(
        1000, "samples of a shard that a worker permutes at a time", low=1, rare=True
    )
    samples: list[int] = knob(
        [],
        "samples of each entry of shards; none = from *_stats.json, else counted once",
        low=1,
        rare=True,
    )
    weights: list[float] = knob(
        [],
        "ratios in which the sources are sampled, lists before shards; none = by size",
        low=0,
        rare=True,
    )
    error_budget: float = knob(
        0.01, "fraction of unreadable samples at which the run stops", low=0, high=1, rare=True
    )


@dataclass
class ValidationConfig:
    """Validation."""

    eval_every: str = knob(
        "1 epochs", "between two validations: a number of 'steps', 'epochs', 'samples' or '%'"
    )


@dataclass
class EvaluationConfig:
    """Evaluation without training."""

    random_weights: bool = knob(False, "random weights of the model that --model names")
    batch_size: int = knob(256, "images or texts per forward pass and process", low=1)
    workers: int = knob(4, "loader processes per process", low=0, high=WORKERS)
    exif: bool = knob(False, "turn images by their EXIF orientation; the originals do not")
    error_budget: float = knob(
        0.01, "fraction of unreadable images at which it stops", low=0, high=1
    )
    device: str = knob("auto", "'auto' (CUDA where present), 'cuda' or 'cpu'")
    precision: str = knob("fp32", "type of the forward pass", choices=("fp32", "bf16", "fp16"))
