"""The judge: both orders, strict replies, a cache that survives a kill, and shares that sum to one."""

import re

import pytest
from judge_server import chat, serving

from aisp_dist.analysis.judge import Pair, Verdict, compare_answers, messages, win_rate
from aisp_dist.config import ConfigError, JudgeSettings
from aisp_dist.rewards.client import Unavailable

PAIRS = [
    Pair("w", "q {a}", "good {b}", "bad"),
    Pair("l", "q", "bad", "good"),
    Pair("t", "q", "same", "same "),
    Pair("b", "q", "first", "biased"),
]


@pytest.fixture
def server():
    with serving() as told:
        told.answer = by_text
        yield told


def settings(told, **more):
    return JudgeSettings(url=told.url, model="judge", **{"retries": 0} | more)


def by_text(path, body):
    """Good beats bad, equals are equal, and of `biased` the first wins."""
    a, b = re.search(
        r"\[Answer A\]\n(.*)\n\[End.*\[Answer B\]\n(.*)\n\[End", body["messages"][1]["content"], re.S
    ).groups()
    scores = [9 if text.startswith("good") else 5 for text in (a, b)]
    if "biased" in (a, b):
        scores = [7, 6]
    return chat(f"A: {scores[0]}\nB: {scores[1]}")


def test_a_verdict_needs_both_orders(server):
    verdicts = compare_answers(settings(server), PAIRS)
    assert [(v.id, v.outcome) for v in verdicts] == [("w", "win"), ("l", "loss"), ("t", "tie"), ("b", "tie")]
    assert verdicts[0] == Verdict("w", "win", (9, 9), (5, 5)) and verdicts[3] == Verdict("b", "tie", (7, 6), (6, 7))
    assert len(server.seen) == 2 * len(PAIRS)
    assert {path for path, _ in server.seen} == {"/v1/chat/completions"}


def test_swapping_the_answers_swaps_wins_and_losses(server):
    swapped = [Pair(p.id, p.prompt, p.theirs, p.ours) for p in PAIRS]
    names = {"win": "loss", "loss": "win", "tie": "tie"}
    there, back = (compare_answers(settings(server), pairs) for pairs in (PAIRS, swapped))
    assert [names[v.outcome] for v in there] == [v.outcome for v in back]


def test_texts_arrive_whole_and_braces_are_text():
    content = messages("a {b} {prompt}", "{b}", "{a}\\1")[1]["content"]
    assert "\na {b} {prompt}\n" in content and "\n{b}\n" in content and "\n{a}\\1\n" in content


@pytest.mark.parametrize(
    "reply", ["", "A: 11\nB: 3", "A: 5", "A: 5 B: 6 or so", "A: 5\nB: 6\nbecause", "A: 0\nB: 2", "5 6"]
)
def test_what_is_not_of_the_form_is_unparsed_and_counted_apart(server, reply):
    server.answer = lambda path, body: chat(reply) if "good {b}" in str(body) else by_text(path, body)
    verdicts = compare_answers(settings(server), PAIRS)
    assert verdicts[0].outcome == "unparsed" and verdicts[0].ours == (None, None) and "ours first" in verdicts[0].reason
    rate = win_rate(verdicts)
    assert (rate.judged, rate.unparsed) == (3, 1) and rate.loss.mean == pytest.approx(1 / 3)


def test_answers_come_back_in_order_whatever_order_they_take(server):
    server.delay = lambda body: 0.2 if "good {b}" in str(body) else 0.0
    assert [v.id for v in compare_answers(settings(server, max_parallel=8), PAIRS)] == [p.id for p in PAIRS]


def test_a_cached_answer_is_not_asked_again_and_a_torn_line_is_as_if_it_were_not_there(server, tmp_path):
    cache = tmp_path / "answers.jsonl"
    want = compare_answers(settings(server), PAIRS, cache)
    whole = cache.read_bytes()
    asked = len(server.seen)
    assert compare_answers(settings(server), PAIRS, cache) == want and len(server.seen) == asked
    for size in (len(whole) - 1, len(whole) - 20):  # the newline alone, and more
        cache.write_bytes(whole[:size])
        before = len(server.seen)
        assert compare_answers(settings(server), PAIRS, cache) == want
        assert len(server.seen) - before == (size != len(whole) - 1)
        assert compare_answers(settings(server), PAIRS, cache) == want  # what was added after it can be read
        assert len(server.seen) - before <= 1
    compare_answers(settings(server).model_copy(update={"model": "other"}), PAIRS, cache)
    assert len(server.seen) - before == 1 + 2 * len(PAIRS)


def test_what_was_answered_before_the_server_died_is_kept(server, tmp_path):
    cache = tmp_path / "answers.jsonl"
    server.faults = [None] * 3 + [(500, {})] * 50
    with pytest.raises(Unavailable, match="it answers 500, 1 time"):
        compare_answers(settings(server, max_parallel=1), PAIRS, cache)
    assert len(cache.read_text().splitlines()) == 3
    server.faults, server.seen = [], []
    compare_answers(settings(server), PAIRS, cache)
    assert len(server.seen) == 2 * len(PAIRS) - 3


def test_shares_sum_to_one_within_their_intervals():
    verdicts = [Verdict(str(i), o, (1, 1), (1, 1)) for i, o in enumerate(["win"] * 60 + ["tie"] * 10 + ["loss"] * 30)]
    rate = win_rate(verdicts)
    assert rate.win.mean + rate.tie.mean + rate.loss.mean == pytest.approx(1)
    assert rate.win.low < 0.6 < rate.win.high and rate.win.low > 0.45 and rate.judged == 100
    with pytest.raises(ValueError, match="none of 0"):
        win_rate([])


def test_the_key_is_sent_and_shown_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "hunter2")
    with_key = settings(server, api_key_env="JUDGE_KEY")
    compare_answers(with_key, PAIRS[:1], tmp_path / "c")
    assert server.headers[0]["Authorization"] == "Bearer hunter2"
    server.faults = [(401, {})] * 9
    with pytest.raises(Unavailable) as error:
        compare_answers(with_key, PAIRS[:1])
    assert "401" in str(error.value)
    assert "hunter2" not in str(error.value) + (tmp_path / "c").read_text() + with_key.model_dump_json()
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="judge.api_key_env: JUDGE_KEY is not set"):
        compare_answers(with_key, PAIRS)
