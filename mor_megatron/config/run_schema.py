"""Every setting of how a model is trained: data, optimizer, batches, layout, checkpoints, ends, reports.

What the model itself is stands in `schema.py`, which also says how all of it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mor_megatron.recursion.methods import method_of
from mor_megatron.recursion.setting import Change, setting

PATHS_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
"""Fields that name the corpora of one split: training, validation, test."""

# When settings are read: in words, and as a condition on the whole configuration.
_WITH_DATA_PATH = ("--data-path", lambda config: config.data.uses_split)
_WITH_DECAY = ("a --lr-decay-style other than constant", lambda config: config.optimizer.lr_decay_style != "constant")
_WITH_WSD = ("--lr-decay-style WSD", lambda config: config.optimizer.lr_decay_style == "WSD")
_WITH_ADAM = ("--optimizer adam", lambda config: config.optimizer.optimizer == "adam")
_WITH_SGD = ("--optimizer sgd", lambda config: config.optimizer.optimizer == "sgd")
_WITH_FP16 = ("--fp16", lambda config: config.training.fp16)
_WITH_FULL_RECOMPUTE = (
    "--recompute-granularity full",
    lambda config: config.training.recompute_granularity == "full",
)
_WITH_EVALUATION = ("--eval-iters above 0", lambda config: config.training.eval_iters > 0)
_WITH_SKIP_TRAIN = ("--skip-train", lambda config: config.training.skip_train)
_WITH_TRAINING = ("--skip-train false", lambda config: not config.training.skip_train)
_WITH_TENSOR_PARALLEL = (
    "--tensor-model-parallel-size above 1",
    lambda config: config.parallel.tensor_model_parallel_size > 1,
)
_WITH_PIPELINE = (
    "--pipeline-model-parallel-size above 1",
    lambda config: config.parallel.pipeline_model_parallel_size > 1,
)
_WITH_COPIES_OF_ROUTERS = (
    "a --routing other than none and --tensor-model-parallel-size above 1",
    lambda config: method_of(config.recursion.routing).routes and config.parallel.tensor_model_parallel_size > 1,
)
_WITH_LORA = ("--relaxation lora", lambda config: config.recursion.relaxation == "lora")
_WITH_LOAD = ("--load", lambda config: config.checkpoint.load is not None)
_WITH_CHECKPOINT = (
    "--load or --branch-from",
    lambda config: config.checkpoint.load is not None or config.checkpoint.branch_from is not None,
)
_WITH_RESUMED_STATE = (
    "--load or --branch-from, without --finetune",
    lambda config: _WITH_CHECKPOINT[1](config) and not config.checkpoint.finetune,
)
_WITH_SAVE = ("--save", lambda config: config.checkpoint.save is not None)
_WITH_KEEP_LAST = ("--keep-last", lambda config: config.checkpoint.keep_last is not None)
_WITH_SPIKES = ("--loss-spike-factor", lambda config: config.faults.loss_spike_factor is not None)
_WITH_TEACHER = ("--distill-from", lambda config: config.distillation.distill_from is not None)
_WITH_PROFILE = ("--profile", lambda config: config.logging.profile)
_WITH_WANDB = ("--wandb-project", lambda config: config.logging.wandb_project is not None)


@dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer and batches."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx files, or weight prefix weight prefix ... to blend; --split cuts each."""
    data_args_path: str | None = None
    """A file of what --data-path takes, separated by white space."""
    split: str = setting("969,30,1", read_with=_WITH_DATA_PATH)
    """Proportions of training, validation and test documents."""
    train_data_path: tuple[str, ...] = ()
    """Corpora for training alone, in the form of --data-path, whole."""
    valid_data_path: tuple[str, ...] = ()
    """Corpora for validation alone. Where there are several, each is reported by itself, too."""
    test_data_path: tuple[str, ...] = setting((), read_with=_WITH_SKIP_TRAIN)
    """Corpora for the test of --skip-train alone."""
    per_split_data_args_path: str | None = None
    """JSON file of the three: {"train": [...], "valid": [...], "test": [...]}."""
    data_cache_path: str | None = setting(None, change=Change.SILENT)
    """Directory of the sample indexes; default: beside the data."""
    seq_length: int = setting(1024, least=1)
    """Tokens of a training sample."""
    tokenizer_type: str | None = None
    """Megatron-LM's type (SentencePieceTokenizer, HuggingFaceTokenizer, ...); sets vocabulary and end of text."""
    tokenizer_model: str | None = None
    """Its file or directory."""
    reset_position_ids: bool = False
    """Restart positions after each end of document."""
    reset_attention_mask: bool = False
    """Attend inside one document only."""
    eod_mask_loss: bool = False
    """Leave predictions made at an end-of-document token out of the loss."""
    num_workers: int | None = setting(None, least=0, change=Change.SILENT)
    """Processes per rank that load batches ahead of the steps; default: 2 with CUDA, else 0."""

    @property
    def uses_split(self) -> bool:
        """Whether all splits are parts of the same corpora, by `split`; else each has its own."""
        return self.per_split_data_args_path is None and not any(getattr(self, name) for name in PATHS_PER_SPLIT)

    def proportions(self) -> tuple[float, float, float]:
        """`split` as numbers: training, validation, test.

        Raises:
            ValueError: it is not up to three numbers of 0 or more.
        """
        try:
            shares = [float(part) for part in self.split.split(",")]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or sum(shares) <= 0:
            raise ValueError(
                f"split={self.split!r} is not a division into training, validation and test: "
                "use up to three numbers of 0 or more, such as 969,30,1"
            )
        return (*shares, *[0.0] * (3 - len(shares)))


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "sgd"] = setting("adam", change=Change.STATE)
    """adam is AdamW (decoupled decay); sgd has momentum and serves tests of gradient scale."""
    lr: float = setting(3e-3, above=0)
    """Peak learning rate."""
    min_lr: float = setting(0.0, least=0, read_with=_WITH_DECAY)
    """Where the decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "WSD"
    """Schedule after warm-up; WSD holds the peak and decays at the end."""
    lr_decay_iters: int | None = setting(None, least=1)
    """Iteration at which the decay ends; default train-iters."""
    lr_decay_samples: int | None = setting(None, least=1)
    """The same in a run of --train-samples; default train-samples."""
    lr_warmup_iters: int = setting(0, least=0)
    """Linear warm-up from 0."""
    lr_warmup_samples: int = setting(0, least=0)
    """The same in a run of --train-samples."""
    lr_warmup_fraction: float | None = setting(None, least=0, most=1)
    """Warm-up as a fraction of lr-decay-iters or lr-decay-samples, in the place of its length."""
    lr_wsd_decay_iters: int | None = setting(None, least=0, read_with=_WITH_WSD)
    """WSD: length of the final decay; default a fifth of the run (paper)."""
    lr_wsd_decay_samples: int | None = setting(None, least=0)
    """The same in a run of --train-samples."""
    lr_wsd_decay_style: Literal["linear", "minus_sqrt"] = setting("linear", read_with=_WITH_WSD)
    """WSD: shape of the final decay, linear (paper) or 1-sqrt."""
    weight_decay: float = setting(0.1, least=0)
    """Decoupled decay; norms and biases are excluded."""
    lora_lr_mult: float = setting(1.0, least=0, read_with=_WITH_LORA)
    """Learning-rate multiplier of adapters."""
    lora_weight_decay: float | None = setting(None, least=0, read_with=_WITH_LORA)
    """Decay of adapters; default weight-decay."""
    adam_beta1: float = setting(0.9, least=0, below=1, read_with=_WITH_ADAM)
    """First-moment decay."""
    adam_beta2: float = setting(0.95, least=0, below=1, read_with=_WITH_ADAM)
    """Second-moment decay."""
    adam_eps: float = setting(1e-8, above=0, read_with=_WITH_ADAM)
    """Adam epsilon."""
    sgd_momentum: float = setting(0.9, least=0, below=1, read_with=_WITH_SGD)
    """Momentum of optimizer sgd."""
    freeze: Literal["none", "base", "all-but-routers"] = setting("none", change=Change.STATE)
    """Weights that stay as they are. base: all but routers and what relaxation adds; all-but-routers: all but routers.
    They have no gradients, hence no part in the norm, no optimizer state, and no fp32 copy in a 16-bit run."""
    clip_grad: float = setting(1.0, least=0)
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    fused_optimizer: Literal["auto", "on", "off"] = setting("auto", read_with=_WITH_ADAM)
    """PyTorch's fused AdamW, one kernel a step. auto: where this build of PyTorch has it."""


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from the predictions of another model, the teacher (docs/inference.md)."""

    distill_from: str | None = None
    """Teacher: an export, or a Llama, Mistral or Qwen2 directory, of this run's tokenizer. It runs beside the model."""
    distill_weight: float = setting(0.5, least=0, most=1, read_with=_WITH_TEACHER)
    """w in the loss (1 - w) * cross entropy + w * T^2 * KL(teacher || model)."""
    distill_temperature: float = setting(1.0, above=0, read_with=_WITH_TEACHER)
    """T, which divides the logits of both in the KL divergence."""


@dataclass(frozen=True)
class TrainingConfig:
    """Batch sizes, length, precision, evaluation."""

    micro_batch_size: int = setting(4, least=1)
    """Sequences a rank processes at once."""
    global_batch_size: int | None = setting(None, least=1)
    """Sequences per iteration over all ranks; default micro-batch-size x data-parallel size, in a ring x its ranks."""
    rampup_batch_size: tuple[int, ...] | None = None
    """START INCREMENT SAMPLES: the global batch grows from START sequences to global-batch-size by INCREMENT, in equal
    parts of the first SAMPLES; with --train-samples."""
    train_iters: int | None = setting(None, least=1)
    """Optimizer steps of the whole run; default 100 without --train-samples."""
    train_samples: int | None = setting(None, least=1)
    """Sequences of the whole run, in the place of --train-iters; a last batch that would exceed it is left out."""
    seed: int = setting(1234, least=0)
    """Seeds weights, data order and everything else."""
    bf16: bool = False
    """bf16 compute with fp32 master weights and fp32 gradient accumulation; default fp32."""
    fp16: bool = False
    """fp16 compute with fp32 master weights and dynamic loss scaling; without pipeline parallelism."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers and norms: Megatron-core's own, or Transformer Engine's. auto: the latter where it is installed,
    with CUDA, bf16 or fp16, and zero-stage below 3."""
    attention_backend: Literal["auto", "cudnn", "flash", "sdpa"] = "auto"
    """Attention on a GPU. cudnn, flash: this kernel for regular rows, and our own for ragged rows and under masks.
    auto: cudnn from Hopper on, else flash. sdpa: scaled-dot-product attention for all."""
    deterministic_mode: bool = False
    """Only kernels that give the same bits every time: on a GPU, some of those that PyTorch, cuBLAS and NCCL would
    choose do not. Slower there; CPUs need it for nothing."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again: full: all of a recompute-unit; selective: core attention."""
    recompute_unit: Literal["layer", "recursion"] = setting("layer", read_with=_WITH_FULL_RECOMPUTE)
    """full: keep the input of every layer, or only that of every pass over the layers that a rank holds."""
    loss_chunk_rows: int | None = setting(None, least=0)
    """Tokens whose logits are computed at once in head and loss, so that those of a micro-batch are never in memory as
    a whole; 0: all. Default: as many as make 8 million logits on a CPU, 268 million with CUDA."""
    initial_loss_scale: float = setting(65536.0, least=1, read_with=_WITH_FP16)
    """fp16: loss scale of the first iteration, a power of two."""
    loss_scale_window: int = setting(1000, least=1, read_with=_WITH_FP16)
    """fp16: iterations without overflow after which the loss scale doubles."""
    min_loss_scale: int = setting(1, least=1, read_with=_WITH_FP16)
    """fp16: the loss scale does not fall below this."""
    hysteresis: int = setting(2, least=1, read_with=_WITH_FP16)
    """fp16: overflows before the loss scale is halved."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 replicates, 1 shards the optimizer, 2 also gradients, 3 also weights."""
    optimizer_cpu_offload: bool = False
    """Keep and update optimizer state and fp32 masters in CPU memory (DeepSpeed's offload_optimizer)."""
    overlap_grad_reduce: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients while the backward pass goes on; ZeRO 2 and 3. auto: with CUDA."""
    enable_cuda_graph: bool = setting(False, change=Change.SILENT)
    """Run the forward and backward pass of a micro-batch as one CUDA graph; for small models on fast GPUs. Needs bf16,
    zero-stage 1, and shapes that do not change: routing expert_choice or none, no pipeline or tensor parallelism."""
    deepspeed_config: str | None = None
    """JSON file of more DeepSpeed settings; one that contradicts a flag is refused."""
    eval_interval: int = setting(100, least=1, change=Change.SILENT)
    """Iterations between evaluations."""
    eval_iters: int = setting(10, least=0)
    """Global batches per evaluation; 0 switches evaluation off."""
    skip_train: bool = setting(False, change=Change.SILENT)
    """Only evaluate the checkpoint of --load, on the validation split and on the test split, if there is one."""
    eval_fixed_depths: bool = setting(False, read_with=_WITH_EVALUATION)
    """Evaluate also with every token sent to each fixed depth 1..Nr (test-time scaling)."""
    max_skipped_steps: int = setting(10, least=0)
    """Stop after more than this many non-finite steps in a row."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl with CUDA, else gloo."""
    distributed_timeout_minutes: float = setting(10.0, above=0, change=Change.SILENT)
    """Limit of one collective; a rank that dies or hangs stops the others within it."""

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """What the model computes in. Master weights, sums of gradients and optimizer are fp32 in any case."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as PyTorch's type."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and its state are divided among ranks; what remains of the world is data parallel."""

    tensor_model_parallel_size: int = setting(1, least=1)
    """Ranks that share every layer (heads, feed-forward width, vocabulary)."""
    sequence_parallel: bool = setting(False, read_with=_WITH_TENSOR_PARALLEL)
    """Divide the residual stream by sequence among tensor-parallel ranks."""
    pipeline_model_parallel_size: int = setting(1, least=1)
    """Ranks that share the depth. With cycle sharing they form the ring: a recursion is one turn round it."""
    pipeline_layers: tuple[int, ...] | None = setting(None, read_with=_WITH_PIPELINE)
    """Layers of the shared block on each pipeline rank (of the whole model where nothing is shared); default:
    balanced by FLOPs, the head counted."""
    overlap_p2p_comm: Literal["auto", "on", "off"] = setting("auto", read_with=_WITH_PIPELINE)
    """Send and receive between the ranks of the ring while they compute. auto: in every ring."""
    check_routing_consistency: int | None = setting(
        None, least=1, read_with=_WITH_COPIES_OF_ROUTERS, change=Change.SILENT
    )
    """Every so many iterations, compare routing decisions over tensor-parallel ranks, and stop if they differ."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str | None = setting(None, read_with=_WITH_TRAINING)
    """Directory of checkpoints, metrics.jsonl and the resolved config."""
    load: str | None = None
    """Directory to resume from, or one checkpoint, in any layout; one without checkpoints starts from scratch with a
    notice."""
    branch_from: str | None = None
    """Checkpoint of another run to go on from as long as --load has none: one iteration, or a run's newest. Steps,
    optimizer and data go on as well; the schedule is this run's own."""
    load_strict: bool = setting(False, read_with=_WITH_CHECKPOINT)
    """Stop if the newest checkpoint is damaged, instead of resuming from the newest intact one. Stop also if there is
    none, unless --load is --save."""
    finetune: bool = setting(False, read_with=_WITH_CHECKPOINT)
    """Load weights only and start at iteration 0. Optimizer, tokenizer, routing and what else the model computes from
    the stored layers may be new; a router of another kind starts untrained. With --branch-from, only what is loaded
    from there is fine-tuned, and the run's own checkpoints of --load resume."""
    ckpt_step: int | None = setting(None, least=0, read_with=_WITH_LOAD)
    """Load the checkpoint of this iteration, instead of the newest of --load."""
    exit_on_missing_checkpoint: bool = setting(False, read_with=_WITH_LOAD)
    """Stop if --load has no checkpoint, instead of starting from scratch."""
    no_load_optim: bool = setting(False, read_with=_WITH_RESUMED_STATE)
    """Load no state of the optimizer, nor the loss scale of fp16; iterations, data and schedule go on."""
    no_load_rng: bool = setting(False, read_with=_WITH_RESUMED_STATE)
    """Do not restore the state of the random generators."""
    save_interval: int | None = setting(None, least=1, read_with=_WITH_SAVE)
    """Iterations between checkpoints; the last iteration is always saved when --save is given."""
    async_save: bool = setting(False, read_with=_WITH_SAVE)
    """Train on while a checkpoint is written, from a copy of the state in CPU memory."""
    on_save_failure: Literal["continue", "stop"] = setting("continue", read_with=_WITH_SAVE)
    """What a checkpoint that cannot be written does to the run; one of the last iteration always fails it."""
    keep_last: int | None = setting(None, least=1, read_with=_WITH_SAVE)
    """Keep this many newest checkpoints and delete older ones; default: keep all."""
    keep_every: int | None = setting(None, least=1, read_with=_WITH_KEEP_LAST)
    """Keep also those whose iteration is a multiple of this."""


@dataclass(frozen=True)
class FaultConfig:
    """When a run ends early, and what it does about loss spikes."""

    exit_signal_handler: bool = True
    """On SIGTERM, SIGUSR1 or SIGINT to any rank: finish the iteration, save, exit with status 85."""
    exit_duration_in_mins: float | None = setting(None, above=0)
    """Save and exit with status 85 after the first iteration that ends later than this."""
    exit_interval: int | None = setting(None, least=1)
    """Save and exit with status 85 after iterations that this divides."""
    loss_spike_factor: float | None = setting(None, above=1, change=Change.REPORTED)
    """Report a loss above this many times its moving average; above 1. Default: none is looked for."""
    max_rollbacks: int = setting(0, least=0, read_with=_WITH_SPIKES, change=Change.REPORTED)
    """After so many loss spikes, go back to the last checkpoint of --save and leave out the samples since."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported and where."""

    log_interval: int = setting(10, least=1)
    """Iterations between log lines."""
    log_params_norm: bool = setting(False, read_with=_WITH_TRAINING)
    """Report the L2 norm of all weights."""
    log_timers: bool = setting(False, read_with=_WITH_TRAINING)
    """Report where the time of an iteration goes: data, forward-backward, gradient reduction, optimizer; evaluation and
    checkpoints. On a GPU, waits for it once an iteration."""
    profile: bool = setting(False, read_with=_WITH_TRAINING)
    """Write a trace of PyTorch's profiler to --tensorboard-dir, or else to --save."""
    profile_step_start: int = setting(10, least=0, read_with=_WITH_PROFILE)
    """Profiling begins after this iteration."""
    profile_step_end: int = setting(12, read_with=_WITH_PROFILE)
    """It ends after this iteration."""
    profile_ranks: tuple[int, ...] = setting((0,), read_with=_WITH_PROFILE)
    """Global ranks that are profiled, each in a file of its own."""
    tensorboard_dir: str | None = setting(None, read_with=_WITH_TRAINING)
    """Write TensorBoard scalars here."""
    wandb_project: str | None = setting(None, read_with=_WITH_TRAINING)
    """Report to this Weights & Biases project (WANDB_MODE=offline works)."""
    wandb_exp_name: str | None = setting(None, read_with=_WITH_WANDB)
    """Run name in Weights & Biases."""
    peak_tflops: float | None = setting(None, above=0)
    """Peak TFLOP/s of one rank's device for the utilisation; default: known GPUs by name, else a measured GEMM."""
