"""Every setting of a run, once: name, type, default, meaning.

A field `num_layers` is the flag `--num-layers` and the YAML key `num-layers`. Names are Megatron-LM's where it has
one, DeepSpeed's for ZeRO, and our own for Mixture-of-Recursions. This file only declares; `validate.py` checks how
fields fit together and `cli.py` reads them. A field's docstring is its `--help` text.

A field also says what its change means to a run that loads a checkpoint (`Change`), where that is not what its section
says (see `Config`). `checkpointing/compatibility.py` goes by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from functools import cached_property
from typing import Literal

from mor_megatron.recursion.methods import METHODS, method_of
from mor_megatron.recursion.plan import STRATEGIES, RecursionPlan, build_plan, effective_depth
from mor_megatron.recursion.routing import RoutingMethod
from mor_megatron.recursion.setting import Change, setting

CHANGE = "change"
"""Key of a section's metadata under which stands what most changes of its settings mean."""

_WITH_RECURSIONS = ("--num-recursions above 1", lambda sharing: sharing.num_recursions > 1)


@dataclass(frozen=True)
class ModelConfig:
    """Decoder shape (LLaMA family: RMSNorm, SwiGLU, RoPE; no biases but, as in Qwen2, those of q, k and v)."""

    num_layers: int = 8
    """Unrolled depth: virtual layers that a token of full depth passes."""
    hidden_size: int = setting(256, change=Change.WEIGHTS)
    """Width of the residual stream, H."""
    ffn_hidden_size: int = setting(704, change=Change.WEIGHTS)
    """Inner width of the SwiGLU feed-forward."""
    num_attention_heads: int = setting(4, change=Change.WEIGHTS)
    """Query heads."""
    group_query_attention: bool = setting(False, change=Change.WEIGHTS)
    """Use grouped-query attention with --num-query-groups key/value heads."""
    num_query_groups: int | None = setting(None, change=Change.WEIGHTS)
    """Key/value heads when --group-query-attention is set."""
    kv_channels: int | None = setting(None, change=Change.WEIGHTS)
    """Width of one head; default hidden-size / num-attention-heads."""
    max_position_embeddings: int = setting(2048, change=Change.TOLD)
    """Longest sequence the model may see."""
    norm_epsilon: float = 1e-5
    """RMSNorm epsilon."""
    rotary_base: float = 10000.0
    """RoPE theta."""
    use_rope_scaling: bool = False
    """Stretch the slow rotary frequencies as Llama 3.1 does, for sequences longer than its first 8192 positions."""
    rope_scaling_factor: float = 8.0
    """How far: 8 in Llama 3.1 and 3.3, 32 in Llama 3.2."""
    add_qkv_bias: bool = setting(False, change=Change.WEIGHTS)
    """Give the query, key and value projections a bias, as Qwen2 does; it starts at 0."""
    init_method_std: float = setting(0.02, change=Change.TOLD)
    """Every linear, embedding and router weight starts from N(0, std^2) (MoR: no depth scaling)."""
    untie_embeddings_and_output_weights: bool = setting(False, change=Change.WEIGHTS)
    """Give the LM head its own weight instead of the embedding's."""
    vocab_size: int | None = setting(None, change=Change.WEIGHTS)
    """Vocabulary before padding; default: the tokenizer's."""
    make_vocab_size_divisible_by: int = setting(128, change=Change.TOLD)
    """The embedding is padded to a multiple of this."""


@dataclass(frozen=True)
class SharingConfig:
    """What makes it Mixture-of-Recursions: sharing, key/value strategy, and which routing method there is."""

    num_recursions: int = setting(1, least=1)
    """Nr: applications of the shared block; 1 with routing none is a vanilla Transformer."""
    sharing_strategy: str = "middle_cycle"
    """Which virtual layers share a physical one (paper, table 1); middle_* keeps the first and last layer unique."""
    depth_rounding: Literal["error", "down", "up"] = setting("error", read_with=_WITH_RECURSIONS, change=Change.SILENT)
    """What to do when Nr does not divide the shared depth."""
    routing: str = "none"
    """expert_choice: each recursion picks tokens; token_choice: each token picks its depth; none: every token, every
    recursion."""
    kv_mode: Literal["caching", "sharing", "sharing_update"] = "caching"
    """caching: keys/values of a recursion's own tokens; sharing: those of recursion 0 for all; sharing_update: those
    of recursion 0 with the active rows replaced."""
    extension: str | None = setting(None, change=Change.SILENT)
    """Python file that registers further sharing strategies and routing methods (docs/extending.md)."""


def recursion_config() -> type[SharingConfig]:
    """`SharingConfig` with the settings of all registered routing methods, each of which knows its own."""
    choices = [
        ("sharing_strategy", Literal[tuple(STRATEGIES)], setting("middle_cycle", read_with=_WITH_RECURSIONS)),
        ("routing", Literal[tuple(METHODS)], setting("none")),
    ]
    settings = dict.fromkeys(method.Settings for method in METHODS.values())
    bases = (*reversed(settings), SharingConfig)
    return make_dataclass("RecursionConfig", choices, bases=bases, frozen=True, namespace={"__module__": __name__})


RecursionConfig = recursion_config()


@dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer and batches."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx files, or weight prefix weight prefix ... to blend; --split cuts each."""
    data_args_path: str | None = None
    """A file of what --data-path takes, separated by white space."""
    split: str = "969,30,1"
    """Proportions of training, validation and test documents."""
    train_data_path: tuple[str, ...] = ()
    """Corpora for training alone, in the form of --data-path, whole."""
    valid_data_path: tuple[str, ...] = ()
    """Corpora for validation alone. Where there are several, each is reported by itself, too."""
    test_data_path: tuple[str, ...] = ()
    """Corpora for the test of --skip-train alone."""
    per_split_data_args_path: str | None = None
    """JSON file of the three: {"train": [...], "valid": [...], "test": [...]}."""
    data_cache_path: str | None = setting(None, change=Change.SILENT)
    """Directory of the sample indexes; default: beside the data."""
    seq_length: int = 1024
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
    num_workers: int = setting(0, change=Change.SILENT)
    """Loader processes per rank."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "sgd"] = setting("adam", change=Change.STATE)
    """adam is AdamW (decoupled decay); sgd has momentum and serves tests of gradient scale."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Where the decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "WSD"
    """Schedule after warm-up; WSD holds the peak and decays at the end."""
    lr_decay_iters: int | None = None
    """Iteration at which the decay ends; default train-iters."""
    lr_decay_samples: int | None = None
    """The same in a run of --train-samples; default train-samples."""
    lr_warmup_iters: int = 0
    """Linear warm-up from 0."""
    lr_warmup_samples: int = 0
    """The same in a run of --train-samples."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of lr-decay-iters or lr-decay-samples, in the place of its length."""
    lr_wsd_decay_iters: int | None = None
    """WSD: length of the final decay; default a fifth of the run (paper)."""
    lr_wsd_decay_samples: int | None = None
    """The same in a run of --train-samples."""
    lr_wsd_decay_style: Literal["linear", "minus_sqrt"] = "linear"
    """WSD: shape of the final decay, linear (paper) or 1-sqrt."""
    weight_decay: float = 0.1
    """Decoupled decay; norms and biases are excluded."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.95
    """Second-moment decay."""
    adam_eps: float = 1e-8
    """Adam epsilon."""
    sgd_momentum: float = 0.9
    """Momentum of optimizer sgd."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    fused_optimizer: Literal["auto", "on", "off"] = "auto"
    """PyTorch's fused AdamW, one kernel a step. auto: where this build of PyTorch has it."""


@dataclass(frozen=True)
class TrainingConfig:
    """Batch sizes, length, precision, evaluation."""

    micro_batch_size: int = 4
    """Sequences a rank processes at once."""
    global_batch_size: int | None = None
    """Sequences per iteration over all ranks; default micro-batch-size x data-parallel size, in a ring x its ranks."""
    rampup_batch_size: tuple[int, ...] | None = None
    """START INCREMENT SAMPLES: the global batch grows from START sequences to global-batch-size by INCREMENT, in equal
    parts of the first SAMPLES; with --train-samples."""
    train_iters: int | None = None
    """Optimizer steps of the whole run; default 100 without --train-samples."""
    train_samples: int | None = None
    """Sequences of the whole run, in the place of --train-iters; a last batch that would exceed it is left out."""
    seed: int = 1234
    """Seeds weights, data order and everything else."""
    bf16: bool = False
    """bf16 compute with fp32 master weights and fp32 gradient accumulation; default fp32."""
    fp16: bool = False
    """fp16 compute with fp32 master weights and dynamic loss scaling; without pipeline parallelism."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers and norms: Megatron-core's own, or Transformer Engine's. auto: the latter where it is installed,
    with CUDA, bf16 or fp16, and zero-stage below 3."""
    attention_backend: Literal["auto", "flash", "sdpa"] = "auto"
    """flash-attn where attention is plainly causal, or PyTorch's fused attention everywhere. auto: flash where it is
    installed and the GPU, the precision and the head width allow it."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again: full: all of a recompute-unit; selective: core attention."""
    recompute_unit: Literal["layer", "recursion"] = "layer"
    """full: keep the input of every layer, or only that of every pass over the layers that a rank holds."""
    initial_loss_scale: float = 65536.0
    """fp16: loss scale of the first iteration, a power of two."""
    loss_scale_window: int = 1000
    """fp16: iterations without overflow after which the loss scale doubles."""
    min_loss_scale: int = 1
    """fp16: the loss scale does not fall below this."""
    hysteresis: int = 2
    """fp16: overflows before the loss scale is halved."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 replicates, 1 shards the optimizer, 2 also gradients, 3 also weights."""
    optimizer_cpu_offload: bool = False
    """Keep and update optimizer state and fp32 masters in CPU memory (DeepSpeed's offload_optimizer)."""
    overlap_grad_reduce: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients while the backward pass goes on; ZeRO 2 and 3. auto: with CUDA."""
    deepspeed_config: str | None = None
    """JSON file of more DeepSpeed settings; one that contradicts a flag is refused."""
    eval_interval: int = setting(100, change=Change.SILENT)
    """Iterations between evaluations."""
    eval_iters: int = 10
    """Global batches per evaluation; 0 switches evaluation off."""
    skip_train: bool = setting(False, change=Change.SILENT)
    """Only evaluate the checkpoint of --load, on the validation split and on the test split, if there is one."""
    eval_fixed_depths: bool = False
    """Evaluate also with every token sent to each fixed depth 1..Nr (test-time scaling)."""
    max_skipped_steps: int = 10
    """Stop after more than this many non-finite steps in a row."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl with CUDA, else gloo."""
    distributed_timeout_minutes: float = setting(10.0, change=Change.SILENT)
    """Limit of one collective; a rank that dies or hangs stops the others within it."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and its state are divided among ranks; what remains of the world is data parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer (heads, feed-forward width, vocabulary)."""
    sequence_parallel: bool = False
    """Divide the residual stream by sequence among tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the depth. With cycle sharing they form the ring: a recursion is one turn round it."""
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of the shared block on each pipeline rank (of the whole model where nothing is shared); default:
    balanced by FLOPs, the head counted."""
    overlap_p2p_comm: Literal["auto", "on", "off"] = "auto"
    """Send and receive between the ranks of the ring while they compute. auto: in every ring."""
    check_routing_consistency: int | None = setting(None, change=Change.SILENT)
    """Every so many iterations, compare routing decisions over tensor-parallel ranks, and stop if they differ."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str | None = None
    """Directory of checkpoints, metrics.jsonl and the resolved config."""
    load: str | None = None
    """Directory to resume from, or one checkpoint, in any layout; one without checkpoints starts from scratch with a
    notice."""
    branch_from: str | None = None
    """Checkpoint of another run to go on from as long as --load has none: one iteration, or a run's newest. Steps,
    optimizer and data go on as well; the schedule is this run's own."""
    load_strict: bool = False
    """Stop if the newest checkpoint is damaged, instead of resuming from the newest intact one. Stop also if there is
    none, unless --load is --save."""
    finetune: bool = False
    """Load weights only and start at iteration 0. Optimizer, tokenizer, routing and what else the model computes from
    the stored layers may be new; a router of another kind starts untrained. With --branch-from, only what is loaded
    from there is fine-tuned, and the run's own checkpoints of --load resume."""
    ckpt_step: int | None = None
    """Load the checkpoint of this iteration, instead of the newest of --load."""
    exit_on_missing_checkpoint: bool = False
    """Stop if --load has no checkpoint, instead of starting from scratch."""
    no_load_optim: bool = False
    """Load no state of the optimizer, nor the loss scale of fp16; iterations, data and schedule go on."""
    no_load_rng: bool = False
    """Do not restore the state of the random generators."""
    save_interval: int | None = None
    """Iterations between checkpoints; the last iteration is always saved when --save is given."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy of the state in CPU memory."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be written does to the run; one of the last iteration always fails it."""
    keep_last: int | None = None
    """Keep this many newest checkpoints and delete older ones; default: keep all."""
    keep_every: int | None = None
    """Keep also those whose iteration is a multiple of this."""


@dataclass(frozen=True)
class FaultConfig:
    """When a run ends early, and what it does about loss spikes."""

    exit_signal_handler: bool = True
    """On SIGTERM, SIGUSR1 or SIGINT to any rank: finish the iteration, save, exit with status 85."""
    exit_duration_in_mins: float | None = None
    """Save and exit with status 85 after the first iteration that ends later than this."""
    exit_interval: int | None = None
    """Save and exit with status 85 after iterations that this divides."""
    loss_spike_factor: float | None = setting(None, change=Change.TOLD)
    """Report a loss above this many times its moving average; above 1. Default: none is looked for."""
    max_rollbacks: int = setting(0, change=Change.TOLD)
    """After so many loss spikes, go back to the last checkpoint of --save and leave out the samples since."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported and where."""

    log_interval: int = 10
    """Iterations between log lines."""
    log_params_norm: bool = False
    """Report the L2 norm of all weights."""
    log_timers: bool = False
    """Report where the time of an iteration goes: data, forward-backward, gradient reduction, optimizer; evaluation and
    checkpoints. On a GPU, waits for it between these."""
    profile: bool = False
    """Write a trace of PyTorch's profiler to --tensorboard-dir, or else to --save."""
    profile_step_start: int = 10
    """Profiling begins after this iteration."""
    profile_step_end: int = 12
    """It ends after this iteration."""
    profile_ranks: tuple[int, ...] = (0,)
    """Global ranks that are profiled, each in a file of its own."""
    tensorboard_dir: str | None = None
    """Write TensorBoard scalars here."""
    wandb_project: str | None = None
    """Report to this Weights & Biases project (WANDB_MODE=offline works)."""
    wandb_exp_name: str | None = None
    """Run name in Weights & Biases."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank's device for the utilisation; default: known GPUs by name, else a measured GEMM."""


@dataclass(frozen=True)
class Config:
    """A whole run. Sections group the fields, and say what most of their changes mean; flags and YAML keys are flat."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={CHANGE: Change.FUNCTION})
    recursion: RecursionConfig = field(default_factory=lambda: RecursionConfig(), metadata={CHANGE: Change.FUNCTION})
    data: DataConfig = field(default_factory=DataConfig, metadata={CHANGE: Change.TOLD})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata={CHANGE: Change.TOLD})
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={CHANGE: Change.TOLD})
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={CHANGE: Change.TOLD})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={CHANGE: Change.SILENT})
    faults: FaultConfig = field(default_factory=FaultConfig, metadata={CHANGE: Change.SILENT})
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={CHANGE: Change.SILENT})

    @cached_property
    def plan(self) -> RecursionPlan:
        """Which layer runs where, how often and for how many tokens.

        Raises:
            ValueError: depth, number of recursions and sharing strategy do not fit.
        """
        recursion = self.recursion
        count, strategy = recursion.num_recursions, recursion.sharing_strategy
        depth = effective_depth(self.model.num_layers, count, strategy, recursion.depth_rounding)
        capacities = method_of(recursion.routing).capacities(recursion, count)
        return build_plan(depth, count, strategy, recursion.kv_mode, capacities)

    @property
    def routing_method(self) -> RoutingMethod:
        """The routing method without weights: what can be said of it from the settings alone."""
        return method_of(self.recursion.routing)(self.recursion, self.plan)
