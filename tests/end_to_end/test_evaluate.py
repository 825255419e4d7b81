"""`tools/evaluate.py` on a run, on its export, and on several ranks; lm-eval beside it."""

from __future__ import annotations

import json
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import ROOT, load_tool, read_metrics, run_program, small_config
from transformers import AutoTokenizer

from mor_megatron.config.schema import Config
from mor_megatron.data.tokenizer_training import train_tokenizer
from mor_megatron.distributed.initialize import initialize_distributed
from mor_megatron.evaluation import harness
from mor_megatron.huggingface.configuration_mor import MoRConfig
from mor_megatron.huggingface.modeling_mor import MoRForCausalLM
from mor_megatron.huggingface.tokenizer import SAMPLE
from mor_megatron.inference.loading import load_model
from mor_megatron.pretraining.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("modules_of_exports")

evaluate = load_tool("evaluate")
FP32_TOL = 2e-6  # relative; other products, the same sums in another order


def evaluate_here(*words) -> dict:
    """What the tool would write; the process group is left as it is."""
    args = evaluate.parse(list(map(str, words)))
    evaluate.run(args)
    return json.loads(args.output.read_text()) if args.output.exists() else {}


@pytest.fixture(scope="module")
def run(process_group, corpus, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated")
    changes = {"eval_fixed_depths": True, "train_iters": 10, "eval_interval": 10, "router_aux_loss_coeff": 0.1}
    pretrain(small_config(corpus, save=str(directory), **changes))
    return directory


def test_a_checkpoint_gets_the_losses_that_its_run_reported(run: Path, tmp_path: Path):
    facts = evaluate_here("--model", run, "--sequences", 16, "--batch-size", 5, "--output", tmp_path / "facts.json")
    reported = read_metrics(run)[-1]
    for name, mode in facts["ways"].items():
        expected = reported[f"validation_loss_{name.replace(' ', '_')}"]
        assert mode["nll"] == pytest.approx(expected, rel=FP32_TOL), name
    assert len({mode["nll"] for mode in facts["ways"].values()}) == 5
    assert facts["sequences"] == 16
    assert facts["bytes"] is None  # a run without tokenizer
    assert facts["parameters"]["unique"] == sum(p.numel() for p in load_model(run)[0].parameters())


def evaluate_on_a_rank(words: list[str]) -> None:
    initialize_distributed(Config())
    evaluate.run(evaluate.parse(words))


def test_ranks_share_the_work_and_agree(workers, run: Path, corpus: str, tmp_path: Path):
    """Three ranks, eleven sequences: not all ranks have equally many."""
    words = ["--sequences", "11", "--batch-size", "2"]
    alone = evaluate_here("--model", run, *words, "--output", tmp_path / "one.json")
    output = ["--data-path", corpus, "--output", str(tmp_path / "three.json")]
    workers.run(3, ("evaluate", 3), evaluate_on_a_rank, ["--model", str(run), *words, *output])
    together = json.loads((tmp_path / "three.json").read_text())
    assert together["sequences"] == 11
    for name, mode in alone["ways"].items():
        other = together["ways"][name]
        assert other["nll"] == pytest.approx(mode["nll"], rel=FP32_TOL), name
        assert other["fractions"] == pytest.approx(mode["fractions"]), name
        assert other["losses"] == pytest.approx(mode["losses"], rel=FP32_TOL), name
    assert together["same_depth"] == pytest.approx(alone["same_depth"])
    for one, three in zip(alone["calibration"], together["calibration"], strict=True):
        assert three["candidates"] == one["candidates"]
        assert three["calibration_error"] == pytest.approx(one["calibration_error"], rel=1e-4)


def test_refusals(run: Path, export: Path, tmp_path: Path, capsys):
    for words, message in [
        (["--model", tmp_path], "has no checkpoint"),
        (["--model", export], "give --data-path, --text or --tasks"),
        (["--model", run, "--text", tmp_path / "nothing.txt"], "does not exist"),
        (["--model", run, "--router-threshold", 2], "must be between 0 and 1"),
        (["--model", run, "--tasks", "piqa"], "this model has no tokenizer"),
    ]:
        args = evaluate.parse(list(map(str, words)))
        assert evaluate.exit_status(partial(evaluate.run, args)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for words in (["--limit", 3], ["--text", "a.txt", "--seed", 1], ["--sequences", 0]):
        with pytest.raises(SystemExit):
            evaluate.parse(["--model", str(run), *map(str, words)])


# lm-eval ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """An untrained model whose routers disagree about tokens, with a tokenizer."""
    directory = tmp_path_factory.mktemp("export")
    (directory / "text.txt").write_text("\n".join(SAMPLE[:20]))
    train_tokenizer([str(directory / "text.txt")], 400, "hf-bpe", str(directory / "model"))
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_recursions=3,
        routing="expert_choice",
        router_alpha=1.0,
        initializer_range=0.2,
        eos_token_id=0,
    )
    model = MoRForCausalLM(config)
    for parameter in model.model.router.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory / "model")
    return directory / "model"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A question with four endings of unequal lengths, and a text."""
    directory = tmp_path_factory.mktemp("tasks")
    words = [line.split() for text in SAMPLE[:12] for line in text.splitlines() if len(line.split()) > 8][:24]
    questions = [
        {"question": " ".join(w[: 3 + i % 4]), "choices": [" ".join(w[k:8]) for k in range(3, 7)], "label": i % 4}
        for i, w in enumerate(words)
    ]
    for name, records in (("choice", questions), ("text", [{"text": text[:400]} for text in SAMPLE[:5]])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = (
        "dataset_path: json\ntest_split: test\n"
        "dataset_kwargs:\n  cache_dir: {0}/cache\n  data_files: {{test: {0}/{1}}}\n"
    )
    (directory / "choice.yaml").write_text(
        "task: mor_choice\noutput_type: multiple_choice\n"
        + data.format(directory, "choice.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (directory / "text.yaml").write_text(
        "task: mor_text\noutput_type: loglikelihood_rolling\n"
        + data.format(directory, "text.jsonl")
        + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (directory / "answer.yaml").write_text(
        "task: mor_answer\noutput_type: generate_until\n"
        + data.format(directory, "choice.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return directory


def values(results: dict) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, entry in results["results"].items()
        for name, value in entry.items()
        if isinstance(value, float)
    }


def test_tasks_are_those_of_lm_eval(export: Path, tasks: Path, tmp_path: Path):
    """Ours in batches of four, the harness's own loading one by one; and nothing depends on the batch."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    words = ("--tasks", "mor_choice", "mor_text", "--include-path", tasks, "--batch-size", 4, "--device", "cpu")
    facts = evaluate_here("--model", export, *words, "--output", tmp_path / "facts.json")
    arguments = {"pretrained": str(export), "trust_remote_code": True, "dtype": "float32"}
    manager = TaskManager(include_path=tasks, include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        "hf", arguments, ["mor_choice", "mor_text"], batch_size=1, device="cpu", task_manager=manager
    )
    ours = values(facts["tasks"])
    assert ours == pytest.approx(values(theirs), rel=1e-5)
    assert {"mor_choice acc,none", "mor_choice acc_norm,none", "mor_text bits_per_byte,none"} <= ours.keys()
    assert 0.0 < ours["mor_choice acc,none"] < 1.0
    assert "ways" not in facts  # no data was asked for


@pytest.mark.slow
def test_tasks_through_the_server(export: Path, tasks: Path, monkeypatch):
    """lm-eval's client of OpenAI's protocol gets the scores that the model has."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from mor_megatron.serving.engine import Engine, EngineOptions
    from mor_megatron.serving.http.options import ServerOptions
    from mor_megatron.serving.http.run import Server, bind

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    names, options = ["mor_choice", "mor_text"], ServerOptions(port=0)
    model, tokenizer = load_model(export, device="cpu")
    server = Server(Engine(model, tokenizer, EngineOptions(lanes=4, kv_bytes=16 << 20)), options)
    with bind(options) as bound:
        bound.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            theirs = lm_eval.simple_evaluate(
                "local-completions",
                {
                    "model": options.name,
                    "base_url": f"http://127.0.0.1:{bound.getsockname()[1]}/v1/completions",
                    "tokenizer_backend": "huggingface",
                    "tokenizer": str(export),
                    "trust_remote_code": True,
                },
                names,
                batch_size=4,
                task_manager=TaskManager(include_path=tasks, include_defaults=False),
            )
        finally:
            server.should_exit = True
            thread.join()
    ours = harness.run_tasks(model, tokenizer, names, harness.Options(include_path=tasks))
    assert values(theirs) == pytest.approx(values(ours), rel=1e-5)


def test_generative_tasks_on_the_engine(export: Path, tasks: Path, monkeypatch):
    """Texts are those that the harness gets from transformers: cut at stop strings, with prompts cut on the left."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(export, device="cpu")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=60)
    settings = [{"until": ["e", " the"], "max_gen_toks": 12}, {"max_gen_toks": 7, "do_sample": False}]
    requests = [Instance("generate_until", {}, (text[:200], settings[i % 2]), i) for i, text in enumerate(SAMPLE[:6])]
    wanted = lm.generate_until(requests, disable_tqdm=True)
    assert harness.generate_greedily(lm, requests, 3, False) == wanted
    assert len(set(map(len, wanted))) > 2
    sampled = [Instance("generate_until", {}, ("a", {"do_sample": True, "temperature": 0.5}), 0)]
    assert harness.generate_greedily(lm, sampled, 3, False) is None

    calls = []
    monkeypatch.setattr(harness, "generate_greedily", lambda lm, requests, *_: calls.append(0) or ["a"] * len(requests))
    found = harness.run_tasks(model, tokenizer, ["mor_answer"], harness.Options(include_path=tasks, limit=2))
    assert (calls, found["results"]["mor_answer"]["exact_match,none"]) == ([0], 0.0)


def test_right_padding_changes_no_score(export: Path):
    """Every request of a batch of four gets the score that it gets alone; so it does with other tokens as padding."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(export, device="cpu")
    endings = [" " + " ".join(text.split()[5 : 8 + 3 * i]) for i, text in enumerate(SAMPLE[:8])]
    contexts = [" ".join(text.split()[: 2 + 5 * (i % 3)]) for i, text in enumerate(SAMPLE[:8])]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(zip(contexts, endings, strict=True))]
    scores = [
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size).loglikelihood(requests, disable_tqdm=True)
        for size in (1, 4)
    ]
    for (alone, greedy), (together, also) in zip(*scores, strict=True):
        assert together == pytest.approx(alone, rel=1e-6)
        assert greedy == also
    depths = model(tokenizer(SAMPLE[0][:300], return_tensors="pt")["input_ids"]).depths
    assert len(depths.unique()) == 3, "the routers of this case decide nothing"


def test_text_bits_per_byte(export: Path, tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text("".join(SAMPLE[-3:]))
    words = (
        "--text",
        tmp_path / "text.txt",
        "--seq-length",
        64,
        "--device",
        "cpu",
        "--output",
        tmp_path / "facts.json",
    )
    facts = evaluate_here("--model", export, *words)
    assert facts["bytes"] == (tmp_path / "text.txt").stat().st_size
    printed = capsys.readouterr().out
    for mode in facts["ways"].values():
        assert mode["bits_per_byte"] == pytest.approx(
            mode["nll"] * facts["tokens"] / facts["bytes"] / 0.693147, rel=1e-5
        )
        assert f"{mode['bits_per_byte']:.4f}" in printed
    lengths = AutoTokenizer.from_pretrained(export, trust_remote_code=True)((tmp_path / "text.txt").read_text())
    assert facts["tokens"] == len(lengths["input_ids"]) + 1  # and the end of the document


def test_missing_lm_eval_is_told(export: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model, tokenizer = load_model(export, device="cpu")
    with pytest.raises(ValueError, match="pip install -r requirements-eval"):
        harness.run_tasks(model, tokenizer, ["piqa"], harness.Options())


@pytest.mark.slow  # reading the names of all tasks takes the harness eight seconds
def test_preset_of_the_paper():
    from lm_eval.tasks import TaskManager

    chosen = harness.chosen_tasks(["paper", "boolq"])
    assert chosen["mmlu"] == 5
    assert chosen["boolq"] is None
    assert sum(shots == 0 for shots in chosen.values()) == 8
    assert not set(chosen) - set(TaskManager().all_tasks)


@pytest.mark.slow
def test_command_lines(export: Path, tasks: Path, tmp_path: Path, monkeypatch):
    """torchrun with two ranks, and lm_eval's own command, each as a user would call it."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # this process has it for DeepSpeed
    python, launcher = sys.executable, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "text.txt").write_text("".join(SAMPLE[:6]))
    words = ["--model", export, "--text", tmp_path / "text.txt", "--seq-length", 128, "--device", "cpu"]
    words += ["--tasks", "mor_choice", "mor_text", "--include-path", tasks, "--output"]
    results = []
    for name, start in (("one", [python]), ("two", [python, *launcher])):
        done = run_program(
            [*start, str(ROOT / "tools/evaluate.py"), *map(str, words), str(tmp_path / name)], timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("negative log-likelihood") == 1
        results.append(json.loads((tmp_path / name).read_text()))
    one, two = results
    for name, mode in one["ways"].items():
        assert two["ways"][name]["nll"] == pytest.approx(mode["nll"], rel=FP32_TOL)
    assert values(two["tasks"]) == pytest.approx(values(one["tasks"]), rel=1e-5)
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={export},trust_remote_code=True,dtype=float32", "--tasks", "mor_choice,mor_text"]
    command += [
        "--include_path",
        str(tasks),
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "lm"),
    ]
    done = run_program(command, timeout=300)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "lm").rglob("results_*.json")
    assert values(json.loads(written.read_text())) == pytest.approx(values(one["tasks"]), rel=1e-5)
