"""Speed of our engine and of OpenVINO GenAI's continuous batching, on the same vanilla weights in fp32.

Both get the same requests, as many lanes, as many rows of prompts a step and one thread; both keep keys and values in
fp32, decode greedily and share no prefixes. They take turns within a round. OpenVINO reads a converted Llama:

    python benchmarks/serve_peer.py --write llama
    optimum-cli export openvino --model llama --task text-generation-with-past --weight-format fp32 llama-openvino
    OMP_NUM_THREADS=1 python benchmarks/serve_peer.py --openvino llama-openvino --output serve_peer.json

The second line needs the package optimum-intel, which may want another version of transformers and so an environment
of its own; the last one needs openvino-genai. Weights are untrained and large, and the head is its own, so that greedy
decoding does not repeat one token.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from pathlib import Path

import torch
import transformers
from generate import CLOCKS
from processor import processor
from serve import Work, requests
from transformers import LlamaConfig, LlamaForCausalLM

from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.serving import Engine, EngineOptions, SamplingParams

OURS, PEER = "this engine", "OpenVINO GenAI"


def build(args: argparse.Namespace) -> MoRForCausalLM:
    """A vanilla model; the same with every call."""
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=args.prompt[1] + args.new[1],
        tie_word_embeddings=False,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    return MoRForCausalLM(config).eval()


def write_llama(model: MoRForCausalLM, path: Path) -> None:
    """The same weights as a Llama: a vanilla model has its names."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings tie_word_embeddings rms_norm_eps rope_theta"
    )
    config = LlamaConfig(**{name: getattr(model.config, name) for name in names.split()}, eos_token_id=None)
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.state_dict())
    llama.save_pretrained(path)


class Ours:
    """Our engine, made once."""

    def __init__(self, model: MoRForCausalLM, lanes: int, args: argparse.Namespace):
        options = EngineOptions(lanes=lanes, chunk=args.chunk, page_size=args.page_size, prefix_cache=False)
        self.engine = Engine(model, None, options)

    def run(self, works: list[Work]) -> list[list[int]]:
        """The tokens of each request."""
        added = [
            self.engine.add(work.prompt, SamplingParams(max_tokens=len(work.new), ignore_eos=True)) for work in works
        ]
        self.engine.drain()
        return [request.generated for request in added]


class Peer:
    """OpenVINO GenAI, made once."""

    def __init__(self, path: Path, lanes: int, args: argparse.Namespace):
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = lanes, args.chunk + lanes
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching, scheduler.cache_size = True, False, 1  # GB
        properties = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)

    def run(self, works: list[Work]) -> list[list[int]]:
        """The tokens of each request."""
        prompts = [self.openvino.Tensor(torch.tensor([work.prompt]).numpy()) for work in works]
        done = self.pipeline.generate(prompts, [self._config(len(work.new)) for work in works])
        return [result.m_generation_ids[0] for result in done]

    def _config(self, new: int):
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        config.set_eos_token_id(0)  # it must have one
        return config


def measure(args: argparse.Namespace) -> list[dict]:
    """Two rows for each number of lanes."""
    model, clock, rows = build(args), CLOCKS[args.clock], []
    gc.freeze()
    for lanes in args.lanes:
        contenders = {OURS: Ours(model, lanes, args), PEER: Peer(args.openvino, lanes, args)}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():
            contender.run(requests(2, 0, args))
        equal = total = 0
        for number in range(args.rounds):
            works = requests(args.waves * lanes, number + 1, args)
            tokens, results = sum(len(work.new) for work in works), []
            for name, contender in contenders.items():
                start = clock()
                results.append(contender.run(works))
                seconds[name].append((clock() - start) / tokens)
            equal, total = equal + sum(a == b for a, b in zip(*results, strict=True)), total + len(works)
        for name, own in seconds.items():
            row = {
                "lanes": lanes,
                "engine": name,
                "tokens_per_second": 1.0 / statistics.median(own),
                "spread": (max(own) - min(own)) / statistics.median(own),
                "over_peer": statistics.median(a / b for a, b in zip(seconds[PEER], own, strict=True)),
                "equal_answers": equal / total,
            }
            rows.append(row)
            print(
                f"{lanes:3} lanes  {name:15} {row['tokens_per_second']:8.1f} tok/s, spread {row['spread']:.0%}, "
                f"{row['over_peer']:.2f} of the peer's speed, {equal} of {total} answers equal",
                flush=True,
            )
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, help="write the weights as a Llama, and end")
    parser.add_argument("--openvino", type=Path, help="the converted Llama")
    parser.add_argument("--lanes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--waves", type=int, default=2, help="requests for each lane")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", nargs=2, type=int, default=[64, 256], help="fewest and most tokens")
    parser.add_argument("--new", nargs=2, type=int, default=[32, 128], help="fewest and most tokens")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--ffn-hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(argv)
    if (args.write is None) == (args.openvino is None):
        parser.error("give either --write or --openvino")
    return args


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    transformers.utils.logging.set_verbosity_error()
    if args.write is not None:
        return write_llama(build(args), args.write)
    from openvino_genai import __version__

    machine = (
        f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}, OpenVINO GenAI {__version__}; "
        f"hidden {args.hidden_size}, ffn {args.ffn_hidden_size}, {args.num_layers} layers, vocabulary "
        f"{args.vocab_size}, prompts {args.prompt}, new {args.new}, {args.waves} requests a lane; {args.rounds} "
        f"interleaved rounds, medians of {args.clock} time"
    )
    print(machine, flush=True)
    rows = measure(args)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
