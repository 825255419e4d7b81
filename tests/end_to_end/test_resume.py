"""Stopping and resuming changes nothing, bit for bit; checkpoints that do not fit are refused."""

import math

import pytest
import torch
import wandb
from small_runs import MODES, assert_same_checkpoint, mode_name, read_metrics, read_weights, small_config

from mor_megatron.pretraining.pretrain import pretrain

SLOW_BUT_DEFAULT = [pytest.param(mode, marks=() if mode == (False, 1) else pytest.mark.slow) for mode in MODES]


@pytest.mark.parametrize("mode", SLOW_BUT_DEFAULT, ids=mode_name)
def test_ten_and_ten_is_twenty(process_group, corpus, tmp_path, mode):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    pretrain(small_config(corpus, mode=mode, save=whole, save_interval=5))
    pretrain(small_config(corpus, mode=mode, save=parts, load=parts, train_iters=10))
    torch.manual_seed(0)  # a resumed run must bring its own random state
    pretrain(small_config(corpus, mode=mode, save=parts, load=parts))
    assert read_metrics(parts) == read_metrics(whole)
    for iteration in (10, 20):
        assert_same_checkpoint(whole, parts, iteration)

    metrics = [line for line in read_metrics(whole) if "lm_loss" in line]
    assert [line["iteration"] for line in metrics] == list(range(1, 21))
    assert metrics[-1]["consumed_samples"] == 160
    assert metrics[-1]["consumed_tokens"] == 160 * 24
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"] - 0.5, "it should learn something"
    ten, twenty = (read_weights(whole, iteration) for iteration in (10, 20))
    assert any(not torch.equal(ten[name], twenty[name]) for name in ten)


def test_a_ramp_in_samples_goes_on_where_it_was_stopped(process_group, corpus, tmp_path):
    """The batch grows from 2 by 2 to 8 over 36 samples; the run is stopped after 7 of its 17 iterations."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    samples = {"train_iters": None, "train_samples": 91, "rampup_batch_size": (2, 2, 36), "eval_interval": 4}
    samples["micro_batch_size"] = 2
    rates = {"lr_warmup_iters": 0, "lr_decay_iters": None, "lr_wsd_decay_iters": None, "lr_warmup_fraction": 0.1}
    pretrain(small_config(corpus, save=whole, **samples, **rates))
    assert not pretrain(small_config(corpus, save=parts, exit_interval=7, **samples, **rates))
    assert pretrain(small_config(corpus, save=parts, load=parts, **samples, **rates))
    assert read_metrics(parts) == read_metrics(whole)
    assert_same_checkpoint(whole, parts, 17)

    lines = read_metrics(whole)
    assert [line["iteration"] for line in lines if "validation_loss_topk" in line] == [4, 8, 12, 16, 17]
    lines = [line for line in lines if "lm_loss" in line]
    assert [line["global_batch_size"] for line in lines] == [2] * 6 + [4] * 3 + [6] * 2 + [8] * 6
    assert lines[-1]["consumed_samples"] == 84, "another batch of 8 would exceed 91"
    assert lines[1]["learning_rate"] == 1e-2 * 2 / 9.1


def test_same_seed_same_run_and_another_seed_another(process_group, corpus, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        pretrain(small_config(corpus, save=str(tmp_path / name), train_iters=6, seed=seed))
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "again")
    assert_same_checkpoint(tmp_path / "one", tmp_path / "again", 6)
    assert read_metrics(tmp_path / "one") != read_metrics(tmp_path / "other")


def test_going_back_to_an_older_checkpoint_repeats_no_line(process_group, corpus, tmp_path, capsys):
    save = str(tmp_path)
    pretrain(small_config(corpus, save=save, train_iters=9, save_interval=3))
    before = read_metrics(save)
    (tmp_path / "latest").write_text("iter_0000003\n")
    pretrain(small_config(corpus, save=save, load=save, train_iters=9))
    assert read_metrics(save) == before
    assert "resuming from" in capsys.readouterr().out


def test_loss_free_bias_survives(process_group, corpus, tmp_path):
    """Token-choice with the loss-free bias: a buffer that no optimizer holds."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    routing = {"routing": "token_choice", "router_balance": "loss_free", "train_iters": 9, "eval_iters": 0}
    pretrain(small_config(corpus, save=whole, **routing))
    pretrain(small_config(corpus, save=parts, **{**routing, "train_iters": 4}))
    pretrain(small_config(corpus, save=parts, load=parts, **routing))
    assert read_metrics(parts) == read_metrics(whole)
    assert_same_checkpoint(whole, parts, 9)
    bias = read_weights(whole, 9)["router.balance_bias"]
    assert bias.dtype == torch.float32
    assert bias.abs().max() > 0  # an odd number of equal steps up and down cannot cancel


def test_an_empty_directory_starts_from_scratch_with_a_notice(process_group, corpus, tmp_path, capsys):
    save = str(tmp_path / "new")
    pretrain(small_config(corpus, save=save, load=save, train_iters=2))
    out = capsys.readouterr().out
    assert f"no checkpoint in {save}: starting from scratch" in out
    assert "iteration        2/       2" in out


@pytest.fixture(scope="module")
def validations(process_group, corpus, tmp_path_factory):
    """Routing -> what a run of twelve iterations reported of its validations."""
    found = {}
    for routing in ("expert_choice", "token_choice", "none"):
        save = tmp_path_factory.mktemp(routing)
        pretrain(small_config(corpus, save=str(save), train_iters=12, routing=routing, eval_fixed_depths=True))
        found[routing] = [line for line in read_metrics(save) if "validation_loss_topk" in line]
    return found


def test_validation_losses_of_both_modes(validations):
    for routing, lines in validations.items():
        assert [line["iteration"] for line in lines] == [10, 12]
        topk, threshold = (lines[-1][f"validation_loss_{kind}"] for kind in ("topk", "threshold"))
        assert 0 < topk < math.log(64) + 0.5
        assert (topk == threshold) == (routing != "expert_choice")


def test_validation_losses_at_fixed_depths(validations):
    for routing, lines in validations.items():
        depths = [lines[-1][f"validation_loss_depth_{depth}"] for depth in (1, 2, 3)]
        assert len(set(depths)) == 3
        assert (depths[-1] == lines[-1]["validation_loss_topk"]) == (routing == "none")


def test_reports_to_wandb_offline_and_tensorboard(process_group, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    reports = {"wandb_project": "test", "tensorboard_dir": str(tmp_path / "tb")}
    save = str(tmp_path / "run")
    for end in (3, 4):
        pretrain(small_config(corpus, save=save, load=save, train_iters=end, **reports))
    wandb.teardown()  # waits for W&B's own process, which may write the file after the run's finish() has returned
    first, second = sorted(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name, "two starts are one run"
    written = first.read_bytes()
    for name in (b"lm_loss", b"grad_norm", b"mean_depth", b"validation_loss_threshold"):
        assert name in written
    assert list((tmp_path / "tb").glob("events*"))

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"^wandb-project=test cannot be reported to \(No API key .*\): log in by .*$"):
        pretrain(small_config(corpus, wandb_project="test"))
    wandb.teardown()


def test_evaluation_can_be_switched_off(process_group, corpus, tmp_path):
    pretrain(small_config(corpus, save=str(tmp_path), train_iters=2, eval_iters=0, split="1,0,0"))
    assert all("validation_loss_topk" not in line for line in read_metrics(tmp_path))


REFUSALS = [
    ({"hidden_size": 64}, r"hidden-size=64 does not fit .*hidden-size=32: give the model the same settings"),
    ({"num_recursions": 2}, r"num-recursions=2 does not fit .*num-recursions=3"),
    ({"routing": "none"}, r"routing=none does not fit .*routing=expert_choice"),
    ({"sharing_strategy": "cycle", "num_layers": 6}, r"num-layers=6 does not fit .*num-layers=8"),
    ({"kv_mode": "sharing"}, r"kv-mode=sharing does not fit .*kv-mode=caching"),
    ({"optimizer": "sgd"}, r"optimizer=sgd does not fit .*optimizer=adam: use the same, or .*--finetune"),
]


@pytest.fixture(scope="module")
def saved(process_group, corpus, tmp_path_factory):
    save = str(tmp_path_factory.mktemp("saved"))
    pretrain(small_config(corpus, save=save, train_iters=1))
    return save


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=lambda value: str(value)[:30])
def test_another_model_is_refused(saved, corpus, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain(small_config(corpus, load=saved, **change))
