#!/bin/bash
# From a dense model to a Mixture-of-Recursions model, a command a step, in the root of the repository:
#
#   examples/uptraining/uptrain.sh start DENSE DIR [flags of tools/import_hf.py]
#   examples/uptraining/uptrain.sh recursive DENSE DIR --data-path PREFIX [flags of pretrain_mor.py]
#   examples/uptraining/uptrain.sh routed DENSE DIR --data-path PREFIX [flags of pretrain_mor.py]
#
# DENSE is a Llama, Mistral or Qwen2 directory of transformers, and the teacher of the second step. PREFIX is a corpus
# of its tokenizer (tools/preprocess_data.py). Results go to DIR/start, DIR/recursive and DIR/routed. A step that was
# stopped goes on where it was when it is called again. --dry-run behind a training step shows what each GPU would hold.
# LAUNCH is what stands before the flags of pretrain_mor.py: by default torchrun with a process for each GPU. On a Slurm
# cluster, for example:
#
#   LAUNCH="python tools/launch_slurm.py --nodes 4 --gpus-per-node 8 --time 24:00:00 --" examples/uptraining/...
#
# docs/inference.md explains the steps.

set -e
usage() {
    sed -n '4,6s/^#  *//p' "$0" >&2
    exit 2
}

[ $# -ge 3 ] || usage
step=$1 dense=$2 dir=$3
shift 3
launch=${LAUNCH:-torchrun --nproc-per-node auto pretrain_mor.py}

# The settings of the model are those of its import.
phase() { # BEFORE [FLAGS]
    local before=$1
    shift
    # shellcheck disable=SC2086  # several words
    exec $launch --config "$dir/start/iter_0000000/config.yaml" examples/uptraining/{common,"$step"}.yaml \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$dense" \
        --branch-from "$dir/$before" --finetune --load "$dir/$step" --save "$dir/$step" "$@"
}

case $step in
    start)
        exec "${PYTHON:-python}" tools/import_hf.py --model "$dense" --output "$dir/start" --num-recursions 3 \
            --initialization average --relaxation lora --lora-rank 64 --recursion-norms "$@"
        ;;
    recursive) phase start --distill-from "$dense" "$@" ;;
    routed) phase recursive "$@" ;;
    *) usage ;;
esac
