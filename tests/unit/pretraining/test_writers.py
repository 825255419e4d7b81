"""metrics.jsonl and TensorBoard after a resume and on a full disk."""

import json
from pathlib import Path

from full_disk import room_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mor_megatron.config.schema import CheckpointConfig, Config, LoggingConfig
from mor_megatron.pretraining import writers
from mor_megatron.pretraining.writers import JsonLines, TensorBoard, open_writers


def test_jsonl_is_continued_after_the_checkpoint_it_starts_from(tmp_path, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    first = JsonLines(path, 0)
    for iteration in range(1, 6):
        first.write({"iteration": iteration, "attempt": 1})
    first.close()
    with path.open("a") as file:
        file.write('{"iteration": 6, "att')  # killed while writing
    second = JsonLines(path, 3)
    second.write({"iteration": 4, "attempt": 2})
    second.close()
    got = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["iteration"], line["attempt"]) for line in got] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert "3 lines after iteration 3 move to metrics.dropped.jsonl" in capsys.readouterr().out
    dropped = path.with_name("metrics.dropped.jsonl").read_text().splitlines()
    assert [line[:15] for line in dropped] == [f'{{"iteration": {i}' for i in (4, 5, 6)]


def scalars(directory: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    assert events.Tags()["scalars"] == ["lm_loss"]
    return [(event.step, event.value) for event in events.Scalars("lm_loss")]


def test_tensorboard_shows_each_iteration_of_a_resumed_run_once(tmp_path):
    """Killed at 5, resumed from 3; killed before the first checkpoint, begun again."""
    for begin, end, attempt in ((0, 2, 1), (0, 5, 2), (3, 6, 3)):
        writer = TensorBoard(str(tmp_path), begin)
        for iteration in range(begin + 1, end + 1):
            writer.write({"iteration": iteration, "lm_loss": attempt, "grad_norm": None})
        writer.close()
    assert scalars(tmp_path) == [(1, 2), (2, 2), (3, 2), (4, 3), (5, 3), (6, 3)]


def outputs(directory: Path) -> Config:
    checkpoint, logging = CheckpointConfig(save=str(directory)), LoggingConfig(tensorboard_dir=str(directory / "tb"))
    return Config(checkpoint=checkpoint, logging=logging)


def test_a_full_disk_stops_writers_but_not_the_run(tmp_path, monkeypatch, capsys):
    """Three lines find room; there is room again at the seventh."""
    monkeypatch.setattr(writers, "RETRY_SECONDS", 0.0)
    lines, events = open_writers(outputs(tmp_path), 0)
    with room_for(4000):
        for iteration in range(1, 7):
            lines.write({"iteration": iteration, "padding": "x" * 1000})
    for iteration in (7, 8):
        lines.write({"iteration": iteration})
    with room_for(10):
        events.write({"iteration": 1, "lm_loss": 1.0})
        events.close()
    lines.close()
    path = tmp_path / "metrics.jsonl"
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 7, 8]
    shown = capsys.readouterr()
    reason = "cannot be written (File too large); training goes on\n"
    assert shown.err == f"{path} {reason}{tmp_path}/tb {reason}"
    assert f"{path} is written again; 3 records are missing\n" in shown.out


def test_a_disk_that_is_full_at_the_start(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n')
    with room_for(10):
        for writer in open_writers(outputs(tmp_path), 2):
            writer.write({"iteration": 3, "lm_loss": 1.0})
            writer.close()
    assert capsys.readouterr().err.count("cannot be written (File too large); training goes on\n") == 2
