"""metrics.jsonl: what the lines of several commands say together."""

from __future__ import annotations

import json
import random

import pytest

from aisp_dist.output import log
from aisp_dist.output.filesystem import Place

T0 = 1_700_000_000.0


def command(began: float, seconds: float, name: str | None, shard=(0, 1), every: float = 5.0, **counts) -> list[dict]:
    """The lines of a command that began at T0 + began."""
    ends = [*(k * every for k in range(1, int(seconds // every))), seconds]
    named = {} if name is None else {"command": name, "shard": list(shard)}
    return [{"time": T0 + began + end, "seconds": end, **named, **counts} for end in ends]


def place(folder, *commands: list[dict]) -> Place:
    lines = sorted((line for lines in commands for line in lines), key=lambda line: line["time"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Place.at(folder)


@pytest.mark.parametrize("names", [("a", "b"), (None, None)], ids=["named", "0.1.0"])
def test_commands_at_the_same_time_take_the_time_once(tmp_path, names):
    jobs = [command(began, 900.0, name) for began, name in zip((0.0, 12.0), names, strict=True)]
    where = place(tmp_path, *jobs)
    assert log.seconds(where) == pytest.approx(912.0)
    assert [line["seconds"] for line in log.commands(where)] == [900.0, 900.0]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_seconds_is_the_time_during_which_a_command_ran(tmp_path, seed, named):
    """By brute force over tenths of seconds, for commands that overlap, follow each other or leave gaps."""
    draw = random.Random(seed)
    spans = [(draw.randrange(0, 3000) / 10, draw.randrange(10, 900) / 10) for _ in range(draw.randrange(1, 6))]
    jobs = [command(began, seconds, f"c{k}" if named else None) for k, (began, seconds) in enumerate(spans)]
    tenths = {at for began, seconds in spans for at in range(round(10 * began), round(10 * (began + seconds)))}
    assert log.seconds(place(tmp_path, *jobs)) == pytest.approx(len(tenths) / 10, abs=0.1 + log._DRIFT * (not named))


def test_resumed_commands_add_up_and_a_torn_line_is_passed_over(tmp_path):
    where = place(tmp_path, command(0.0, 60.0, "a"), command(1000.0, 40.0, "b"))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"time": 17')
    assert log.seconds(where) == pytest.approx(100.0) and len(log.commands(where)) == 2
    assert log.seconds(Place.at(tmp_path / "none")) is None and log.latest(Place.at(tmp_path / "none")) is None


def test_a_clock_that_is_set_while_a_command_of_0_1_0_runs_begins_no_other(tmp_path):
    lines = command(0.0, 600.0, None)
    for k, line in enumerate(lines):
        line["time"] += 0.1 * k  # 12 s in all
    assert len(log.commands(place(tmp_path, lines))) == 1


def test_the_shards_of_an_output_add_up(tmp_path):
    done = {"total": 8, "done": 7, "failed": 1, "in_flight": 0}
    ahead = command(0.0, 60.0, "a", (0, 2), **done)
    where = place(tmp_path, ahead, command(1.0, 90.0, "b", (1, 2), **done | {"done": 5, "in_flight": 2}))
    found = log.latest(where)
    assert [found[name] for name in ("total", "done", "failed", "in_flight")] == [16, 12, 2, 2]
    assert found["time"] == T0 + 91.0
    waiting = place(tmp_path, ahead, command(1.0, 90.0, "b", (1, 2), **done | {"total": None}))
    assert log.latest(waiting)["total"] is None
    alone = log.latest(place(tmp_path, ahead))
    assert (alone["total"], alone["done"], alone["shards"]) == (None, 7, [0]), "the other has not begun"
    again = place(tmp_path, ahead, command(200.0, 10.0, "c", **done | {"total": 16, "done": 15}))
    assert log.latest(again) == log.read(again)[-1], "a command over the whole output speaks for all of it"
