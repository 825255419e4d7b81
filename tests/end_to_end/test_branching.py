"""A decay that branches off a trunk equals a run that had its schedule from the beginning."""

import pytest
from small_runs import assert_same_checkpoint, read_metrics, small_config

from mor_megatron.pretraining.pretrain import pretrain


def test_trunk_and_decay_are_one_run(process_group, corpus, tmp_path, capsys):
    whole, trunk, decay = (str(tmp_path / name) for name in ("whole", "trunk", "decay"))
    pretrain(small_config(corpus, save=whole, train_iters=10, lr_decay_iters=10, lr_wsd_decay_iters=3))
    constant = {"lr_decay_style": "constant", "lr_decay_iters": None, "lr_wsd_decay_iters": None, "eval_iters": 0}
    for end in (7, 10):  # the trunk has gone on when the decay begins
        pretrain(small_config(corpus, save=trunk, load=trunk, train_iters=end, **constant))
    branch = {"save": decay, "load": decay, "branch_from": f"{trunk}/iter_0000007"}
    schedule = {"lr_decay_iters": 10, "lr_wsd_decay_iters": 3}
    pretrain(small_config(corpus, train_iters=8, **branch, **schedule))
    assert f"resuming from {trunk}/iter_0000007" in capsys.readouterr().out
    pretrain(small_config(corpus, train_iters=10, **branch, **schedule))  # interrupted: goes on from its own
    assert f"resuming from {decay}/iter_0000008" in capsys.readouterr().out
    assert_same_checkpoint(whole, decay, 10)
    losses = {line["iteration"]: line["lm_loss"] for line in read_metrics(whole) if "lm_loss" in line}
    decayed = {line["iteration"]: line["lm_loss"] for line in read_metrics(decay) if "lm_loss" in line}
    assert decayed == {iteration: losses[iteration] for iteration in (8, 9, 10)}
    undecayed = [line["lm_loss"] for line in read_metrics(trunk) if line["iteration"] == 10]
    assert undecayed != [losses[10]], "the schedule made no difference"


def test_a_branch_needs_its_checkpoint(process_group, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"branch-from=.*nothing has no checkpoint: name one"):
        pretrain(small_config(corpus, save=str(tmp_path), branch_from=str(tmp_path / "nothing"), train_iters=1))
