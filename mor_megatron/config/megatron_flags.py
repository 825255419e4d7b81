"""Flags of Megatron-LM and Megatron-DeepSpeed that are no settings here, and what to write in their place.

Only for the answer to someone who brings a working command line along; nothing here is accepted.
"""

from __future__ import annotations

ALWAYS = "always so here, leave it out"
NEVER = "not there, leave it out"

_GROUPS: tuple[tuple[str, str], ...] = (
    (
        ALWAYS,
        """swiglu disable-bias-linear use-rotary-position-embeddings no-position-embedding use-mcore-models
        attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32 calculate-per-token-loss use-cpu-initialization
        check-for-nan-in-loss-and-grad no-create-attention-mask-in-dataloader deepspeed log-throughput
        log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard log-batch-size-to-tensorboard
        ckpt-fully-parallel-save ckpt-fully-parallel-load use-dist-ckpt auto-detect-ckpt-format
        override-opt-param-scheduler""",
    ),
    ("always RMSNorm, leave it out", "normalization apply-layernorm-1p"),
    ("always rope, leave it out", "position-embedding-type"),
    ("always the whole head, leave it out", "rotary-percent"),
    ("always 0, leave it out", "attention-dropout hidden-dropout lr-warmup-init"),
    ("always mmap, leave it out", "data-impl mmap-warmup no-mmap-bin-files"),
    ("samples have one order (docs/data.md), leave it out", "dataloader-type no-data-sharding"),
    ("a format of its own (docs/reliability.md), leave it out", "ckpt-format dist-ckpt-format ckpt-convert-format"),
    ("ranks are numbered TP, DP, PP, leave it out", "use-tp-pp-dp-mapping"),
    (
        NEVER,
        """no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion
        apply-rope-fusion no-persist-layer-norm no-gradient-accumulation-fusion cross-entropy-loss-fusion
        cross-entropy-fusion-impl tp-comm-overlap use-ring-exchange-p2p ddp-average-in-collective
        empty-unused-memory-level manual-gc manual-gc-interval no-manual-gc-eval cuda-graph-scope
        te-rng-tracker rerun-mode fp32-residual-connection fp16-lm-cross-entropy apply-query-key-layer-scaling
        apply-residual-connection-post-layernorm data-parallel-random-init grad-reduce-in-bf16 log-progress
        log-num-zeros-in-grad log-memory-to-tensorboard log-world-size-to-tensorboard tensorboard-queue-size
        distribute-saved-activations align-grad-reduce no-delay-grad-reduce num-dataset-builder-threads
        lazy-mpu-init nccl-communicator-config-path barrier-with-L1-time no-barrier-with-level-1-timing
        use-checkpoint-args use-checkpoint-opt-param-scheduler ckpt-assume-constant-structure
        use-legacy-models spec DDP-impl no-contiguous-buffers-in-local-ddp no-scatter-gather-tensors-in-pipeline
        no-async-tensor-model-parallel-allreduce no-clone-scatter-output-in-embedding standalone-embedding-stage
        defer-embedding-wgrad-compute overlap-p2p-communication-warmup-flush delay-grad-reduce delay-param-gather
        enable-one-logger no-one-logger enable-experimental enable-ft-package config-logger-dir nccl-ub
        high-priority-stream-groups enable-gloo-process-groups disable-gloo-process-groups
        use-precision-aware-optimizer train-sync-interval iterations-to-skip legacy-tokenizer vocab-extra-ids
        partition-activations contigious-checkpointing synchronize-each-layer curriculum-learning""",
    ),
    (
        "no such layer here (LLaMA's, docs/design.md), use a model without it",
        """qk-layernorm squared-relu openai-gelu onnx-safe bert-no-binary-head add-position-embedding
        multi-latent-attention init-method-xavier-uniform window-size mtp-num-layers is-hybrid-model
        hybrid-override-pattern rotary-interleaved""",
    ),
    ("no mixture of experts here, --routing divides depth", "num-experts expert-model-parallel-size expert-parallel"),
    ("no FP8 here, --bf16", "fp8-format fp8 fp8-hybrid fp8-e4m3"),
    ("--attention-backend flash", "use-flash-attn use-flash-attn-v2 use-flash-attn-triton"),
    ("--norm-epsilon", "layernorm-epsilon"),
    ("--num-layers", "encoder-num-layers decoder-num-layers"),
    ("--seq-length", "encoder-seq-length decoder-seq-length"),
    ("--zero-stage 1, which is the default", "use-distributed-optimizer"),
    (
        "--zero-stage 3",
        """use-torch-fsdp2 use-custom-fsdp use-megatron-fsdp data-parallel-sharding-strategy
        overlap-param-gather overlap-param-gather-with-optimizer-step""",
    ),
    ("reduce_bucket_size in --deepspeed-config", "ddp-bucket-size ddp-num-buckets zero-reduce-bucket-size"),
    ("--optimizer-cpu-offload", "cpu-optimizer optimizer-offload-fraction use-torch-optimizer-for-cpu-offload"),
    ("--enable-cuda-graph", "cuda-graph-impl external-cuda-graph"),
    ("--recompute-granularity selective", "recompute-activations"),
    (
        "--recompute-granularity full",
        "checkpoint-activations checkpoint-num-layers deepspeed-activation-checkpointing",
    ),
    ("--recompute-unit", "recompute-method recompute-num-layers recompute-modules"),
    ("--tensor-model-parallel-size", "model-parallel-size"),
    ("--sequence-parallel", "context-parallel-size cp-comm-type ds-sequence-parallel-size"),
    ("--pipeline-model-parallel-size 1", "no-pipeline-parallel"),
    (
        "in a ring every recursion is a virtual stage (docs/parallelism.md), leave it out",
        "num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank",
    ),
    (
        "--pipeline-layers",
        """decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split pipeline-model-parallel-layout""",
    ),
    ("--overlap-p2p-comm off", "no-overlap-p2p-communication"),
    ("--micro-batch-size", "batch-size"),
    ("a --global-batch-size that its ranks divide", "decrease-batch-size-if-needed"),
    ("--train-samples", "train-tokens"),
    ("--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction", "warmup lr-warmup-tokens"),
    ("--lr-decay-samples", "lr-decay-tokens"),
    ("--lr-wsd-decay-iters", "lr-wsd-decay-tokens"),
    ("--weight-decay, which is constant", "start-weight-decay end-weight-decay weight-decay-incr-style"),
    ("--lr, one rate for all weights", "decoupled-lr decoupled-min-lr"),
    ("--initial-loss-scale, the scale is dynamic", "loss-scale"),
    ("--max-skipped-steps", "no-check-for-nan-in-loss-and-grad"),
    ("--loss-spike-factor", "check-for-spiky-loss check-for-large-grads"),
    ("--tokenizer-model", "vocab-file merge-file tiktoken-pattern"),
    ("a corpus, which `python tools/collect_corpus.py` makes", "mock-data"),
    (
        "several corpora of --valid-data-path are reported one by one, leave it out",
        "multiple-validation-sets",
    ),
    ("--eval-iters", "full-validation"),
    ("optimizer and random state are always saved, leave it out", "no-save-optim no-save-rng"),
    ("--load with --finetune", "pretrained-checkpoint"),
    ("--keep-every", "save-retain-interval"),
    ("--async-save", "use-persistent-ckpt-worker non-persistent-save-interval non-persistent-ckpt-type"),
    ("--load-strict", "dist-ckpt-strictness"),
    ("every iteration is written, leave it out", "tensorboard-log-interval"),
    ("perplexity is exp of the loss that is written, leave it out", "log-validation-ppl-to-tensorboard"),
    ("--log-timers", "timing-log-level timing-log-option log-timers-to-tensorboard log-straggler"),
    ("--skip-train", "eval-only"),
    ("--init-method-std, one for all weights", "embedding-init-method-std"),
    ("--profile is PyTorch's, leave it out", "use-pytorch-profiler"),
    ("W&B writes below --save", "wandb-save-dir"),
    ("the variable WANDB_ENTITY", "wandb-entity"),
    ("--exit-signal-handler, which is on", "adlr-autoresume adlr-autoresume-interval"),
)
ANSWERS: dict[str, str] = {name: answer for answer, names in _GROUPS for name in names.split()}
"""Flag without dashes in front -> what to say about it."""
_FAMILIES = {
    "moe-": "num-experts",
    "fp8-": "fp8",
    "ckpt-": "ckpt-format",
    "dist-ckpt-": "dist-ckpt-format",
    "tp-comm-": "tp-comm-overlap",
    "one-logger-": "no-one-logger",
}
"""Beginning of a flag -> the one whose answer is its own."""


def answer(name: str) -> str | None:
    """What to write in the place of `--name`; None if Megatron-LM has no such flag, as far as is known here."""
    family = next((known for begin, known in _FAMILIES.items() if name.startswith(begin)), None)
    return ANSWERS.get(name) or ANSWERS.get(family)
