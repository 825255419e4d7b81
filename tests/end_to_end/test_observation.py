"""Optional output of a run (timers, profiles, ...), and the evaluation of a checkpoint without training."""

import json
import math
import re

import pytest
from small_runs import read_metrics, read_weights, small_config, write_corpus

from mor_megatron.pretraining.pretrain import pretrain
from mor_megatron.training.sections import IN_AN_ITERATION

ITERATIONS = 6
TIMES = [f"{name.replace('-', '_')}_time_ms" for name in IN_AN_ITERATION]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second corpus, of the same texts in another order."""
    return write_corpus(tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def settings(corpus, other):
    blend = ("1", corpus, "1", other)
    own = {"data_path": (), "split": "969,30,1", "train_data_path": (corpus,), "valid_data_path": blend}
    return own | {"train_iters": ITERATIONS, "eval_interval": 4, "log_interval": 3}


@pytest.fixture(scope="module")
def observed(process_group, corpus, settings, tmp_path_factory):
    """The directory of a run with everything switched on."""
    save = str(tmp_path_factory.mktemp("observed"))
    on = {"log_params_norm": True, "log_timers": True, "profile": True, "profile_step_start": 2, "profile_step_end": 4}
    assert pretrain(small_config(corpus, save=save, **on, **settings))
    return save


def test_observing_changes_nothing_and_adds_up(observed, process_group, corpus, settings, tmp_path):
    pretrain(small_config(corpus, save=str(tmp_path), **settings))
    lines = read_metrics(observed)
    added = {"params_norm", "eval_time_ms", *TIMES}
    plain = [{name: value for name, value in line.items() if name not in added} for line in lines]
    assert plain == read_metrics(tmp_path)

    with open(f"{observed}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        if "lm_loss" in line:
            assert all(line[name] > 0 for name in TIMES)
            assert sum(line[name] for name in TIMES) < 1.01 * line["iteration_time_ms"]
        else:
            assert line["eval_time_ms"] > 0
    squares = sum(weight.double().square().sum().item() for weight in read_weights(observed, ITERATIONS).values())
    assert [line for line in lines if "lm_loss" in line][-1]["params_norm"] == pytest.approx(math.sqrt(squares), 1e-7)


def test_a_profile_has_the_iterations_that_were_asked_for(observed):
    with open(f"{observed}/rank0-iterations-3-4.pt.trace.json") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "autograd::engine::evaluate_function: MulBackward0"} & names
    steps = [name for name in names if name and name.startswith("Optimizer.step")]
    assert steps


def test_a_checkpoint_alone_on_validation_and_test(observed, process_group, corpus, other, settings, tmp_path, capsys):
    """A corpus of a blend has the loss that it has alone: its first samples are the same ones."""
    last = [line for line in read_metrics(observed) if "validation_loss_topk" in line][-1]
    save = str(tmp_path / "run")
    own = settings | {"valid_data_path": (corpus,), "test_data_path": (other,), "eval_iters": 1}
    assert pretrain(small_config(corpus, save=save, load=observed, skip_train=True, **own))
    found = re.findall(
        r"iteration 6 on (\w+) set \| lm loss topk: (\S+) .* lm loss threshold: (\S+) ", capsys.readouterr().out
    )
    names = {"validation": corpus, "test": other}
    assert [split for split, *_ in found] == ["validation", "test"]
    for split, *losses in found:
        name = names[split].rpartition("/")[2]
        for kind, loss in zip(("topk", "threshold"), losses, strict=True):
            assert float(loss) == pytest.approx(last[f"validation_loss_{kind}/{name}"], rel=1e-6)
    assert not (tmp_path / "run").exists()
    mean = sum(last[f"validation_loss_topk/{path.rpartition('/')[2]}"] for path in names.values()) / 2
    assert last["validation_loss_topk"] == pytest.approx(mean, rel=1e-12)


def test_a_checkpoint_alone_without_test_data(observed, process_group, corpus, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no checkpoint, and skip-train needs one"):
        pretrain(small_config(corpus, load=str(tmp_path), skip_train=True))
    assert pretrain(small_config(corpus, load=observed, skip_train=True, train_iters=3))
    output = capsys.readouterr().out
    assert "no test data (--split" in output
    assert "iteration 6 on validation set" in output
    assert "on test set" not in output
