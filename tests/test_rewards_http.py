"""HTTP rewards against a real server: scores in the order of responses, faults that are never scores, garbage that is
quarantined."""

import math
import pickle
import re
import time

import pytest
from judge_server import chat, serving
from pydantic import ValidationError

from aisp_dist.config import ConfigError, HttpReward
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards import RewardError, load
from aisp_dist.rewards.client import Limited, Unavailable, _retry_after, is_loopback
from aisp_dist.rewards.http import LIMITS, Partly

PROMPT = Prompt("p", 0, (("system", "S"), ("user", "Hi {response}")))
RESPONSES = ["a", "bbb", "", "a", "{prompt}"]
RUBRIC = "Q: {prompt} A: {response}"


@pytest.fixture
def server():
    with serving() as told:
        yield told


def settings(told, **more):
    return HttpReward(**{"url": told.url, "model": "rm", "rubric": RUBRIC, "retries": 2} | more)


def made(told, **more):
    score = load("http", settings(told, **more))
    told.seen.clear(), told.headers.clear()
    return score


def text_of(body):
    return body["messages"][0]["content"]


def vllm(logit, activation=lambda x: 1 / (1 + math.exp(-x))):
    def answer(path, body):
        text = body["input"][0] if "input" in body else body["messages"][-1]["content"]
        x = logit(text)
        probs = [x if body.get("use_activation") is False else activation(x)]
        return {"object": "list", "data": [{"index": 0, "label": "LABEL_0", "probs": probs, "num_classes": 1}]}

    return answer


def test_scores_come_in_the_order_of_the_responses_and_equal_ones_are_asked_once(server):
    server.answer = lambda path, body: chat(str(1 + len(text_of(body).partition(" A: ")[2])))
    server.delay = lambda body: 0.2 if text_of(body).endswith("A: a") else 0.0
    score = made(server)
    assert score(PROMPT, RESPONSES) == [Score(2.0), Score(4.0), Score(1.0), Score(2.0), Score(9.0)]
    assert len(server.seen) == 4 and {path for path, _ in server.seen} == {"/v1/chat/completions"}
    assert "Q: system: S\n\nuser: Hi {response} A: {prompt}" in [text_of(body) for _, body in server.seen]
    assert score(PROMPT, []) == []


@pytest.mark.parametrize("reply", ["7", " 7.0\n", "Score: 7", "**7**", "7/10", "Rating = 7 / 10."])
def test_one_number_is_a_score(server, reply):
    server.answer = lambda path, body: chat(reply)
    assert made(server)(PROMPT, ["x"]) == [Score(7.0)]


@pytest.mark.parametrize("reply", ["", "seven", "7 or 8", "0", "11", "7/5", "nan", "-7", "1. It is bad"])
def test_what_is_not_one_number_on_the_scale_is_quarantined(server, reply):
    server.answer = lambda path, body: chat(reply if text_of(body).endswith("bad") else "7")
    good, bad = made(server)(PROMPT, ["good", "bad"])
    assert good == Score(7.0) and bad.value is None and "the server's" in bad.reason


@pytest.mark.parametrize(
    "answer", [b"not json", b"[]", b"{}", {"choices": []}, {"choices": [{"message": {"content": None}}]}]
)
def test_garbage_is_quarantined(server, answer):
    score = made(server)
    server.answer = lambda path, body: answer
    (found,) = score(PROMPT, ["x"])
    assert found.value is None and "the answer is no" in found.reason


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "0"}), (500, {}), (503, {}), "close"])
def test_a_fault_that_passes_is_not_seen(server, fault):
    score = made(server)
    server.faults = [fault]
    assert score(PROMPT, ["x"]) == [Score(5.0)] and len(server.seen) == 2


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "0"}), (500, {"Retry-After": "0"}), (401, {}), (404, {})])
def test_a_fault_that_stays_is_the_infrastructures_and_never_a_score(server, fault):
    score = made(server, retries=1)
    server.faults = [fault] * 99
    with pytest.raises(Unavailable, match=f"^{server.url}/chat/completions.* {fault[0]}") as error:
        score(PROMPT, ["x", "y"])
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value), "it crosses processes"


def test_a_server_that_is_gone_or_too_slow_is_infrastructure(server):
    score = made(server, retries=0, timeout=0.2)
    server.delay = lambda body: 1.0
    with pytest.raises(Unavailable, match="ReadTimeout"):
        score(PROMPT, ["x"])
    with pytest.raises(Unavailable, match="ConnectError"):
        load("http", settings(server, url="http://127.0.0.1:9/v1", retries=0))


@pytest.mark.parametrize("fault", ["slow", (429, {"Retry-After": "60"}), (503, {})])
def test_a_call_ends_before_its_limit_whatever_the_server_does(server, fault):
    score = load("http", settings(server, retries=99), seconds=0.3)
    if fault == "slow":
        server.delay = lambda body: 1.0
    else:
        server.faults = [fault] * 99
    began = time.monotonic()
    with pytest.raises(Unavailable, match=f"^{server.url}/chat/completions: "):
        score(PROMPT, [str(i) for i in range(20)])
    assert time.monotonic() - began < 5


POISON = [(500, {}), (503, {}), (403, {}), (404, {}), (451, {}), "close", "slow"]


def poison(told, fault):
    """The server never answers what has `poison` in it."""
    if fault == "slow":
        told.delay = lambda body: 2.0 if "poison" in text_of(body) else 0.0
    else:
        told.fault = lambda body: fault if "poison" in text_of(body) else None


@pytest.mark.parametrize("seconds", [math.inf, 20.0])
@pytest.mark.parametrize("fault", POISON, ids=str)
def test_a_text_that_the_server_never_answers_is_about_its_prompt(server, fault, seconds):
    """Asked twice or more, the last time alone, between requests that are answered; and nothing else is lost."""
    score = load("http", settings(server, retries=0, timeout=0.3), seconds=seconds)
    server.seen.clear()
    poison(server, fault)
    with pytest.raises(RewardError, match=r"^http: the server answers others, but not this prompt's: ") as error:
        score(PROMPT, ["poison", "poison too"])
    assert server.url not in str(error.value) and "127.0.0.1" not in str(error.value), "rows hold no host"
    asked = [text_of(body) for _, body in server.seen]
    assert asked[2:] == [asked[2], asked[0] if asked[0].endswith("poison") else asked[1], asked[2]]
    assert "spider" in asked[2] and score(PROMPT, ["a", "b"]) == [Score(5.0)] * 2


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c"]])
def test_a_server_that_is_down_for_everybody_is_about_no_prompt(server, texts, count):
    """However many requests it leaves without an answer before it comes back."""
    score = load("http", settings(server, retries=0, max_parallel=2), seconds=20.0)
    server.faults = [(503, {})] * count
    found = {}
    while left := [text for text in texts if text not in found]:
        try:
            scores = score(PROMPT, left)
        except Partly as error:
            scores = error.scores
        except Unavailable:
            continue
        found |= {text: s for text, s in zip(left, scores, strict=True) if s}
    assert list(found.values()) == [Score(5.0)] * len(texts) and not server.faults


def test_a_server_that_is_down_is_not_waited_for_once_a_response(server):
    score = made(server, retries=0, max_parallel=2)
    server.faults = [(503, {})] * 99
    with pytest.raises(Unavailable):
        score(PROMPT, [str(i) for i in range(30)])
    assert len(server.seen) <= 5


def test_too_many_requests_are_about_no_prompt(server):
    score = made(server, retries=1)
    poison(server, (429, {"Retry-After": "0"}))
    with pytest.raises(Limited, match="it answers 429, 2 times"):
        score(PROMPT, ["poison"])


def test_what_came_within_the_limit_is_kept(server):
    score = load("http", settings(server, retries=0), seconds=0.5)
    server.answer = lambda path, body: chat(str(len(text_of(body).partition(" A: ")[2])))
    server.delay = lambda body: 1.0 if text_of(body).endswith("bb") else 0.0
    with pytest.raises(Partly) as error:
        score(PROMPT, ["a", "bb", "ccc", "a", "bb"])
    assert error.value.scores == [Score(1.0), None, Score(3.0), Score(1.0), None]


def test_a_turn_is_not_waited_for_past_the_limit_and_not_used_up(server):
    score = load("http", settings(server, retries=0, requests_per_minute=120), seconds=0.8)
    began = time.monotonic()
    for _ in range(3):  # one every half second; what does not come out keeps nobody waiting
        with pytest.raises(Partly) as error:
            score(PROMPT, [str(i) for i in range(30)])
        assert 1 <= sum(s is not None for s in error.value.scores) <= 2
    assert time.monotonic() - began < 3


def test_a_call_takes_no_longer_than_its_limits_together(server):
    score = load("http", settings(server, retries=9), seconds=0.4)
    poison(server, "slow")
    began = time.monotonic()
    with pytest.raises(RewardError, match="ReadTimeout"):
        score(PROMPT, [f"poison {i}" for i in range(20)])
    assert time.monotonic() - began < 0.4 * LIMITS


def test_retry_after_is_waited_for(server):
    score = made(server)
    server.faults = [(429, {"Retry-After": "1"})]
    began = time.monotonic()
    score(PROMPT, ["x"])
    assert time.monotonic() - began >= 1
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and _retry_after("soon") is None
    assert _retry_after("Wed, 21 Oct 2215 07:28:00 GMT") > 1e9


def test_a_request_that_is_refused_is_quarantined(server):
    score = made(server)
    server.faults = [(400, {})]
    (found,) = score(PROMPT, ["x"])
    assert found.value is None and "answers 400" in found.reason


def test_limits_hold(server):
    server.delay = lambda body: 0.05
    score = made(server, max_parallel=2)
    score(PROMPT, [str(i) for i in range(8)])
    assert server.most == 2
    slow = made(server, requests_per_minute=600)
    began = time.monotonic()
    slow(PROMPT, [str(i) for i in range(6)])
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("rubric", [RUBRIC, None])
def test_classify_gives_raw_logits(server, rubric):
    server.answer = vllm(lambda text: len(text) - 3.5)
    score = made(server, protocol="classify", rubric=rubric)
    extra = len("Q: system: S\n\nuser: Hi {response} A: ") if rubric else 0
    assert [s.value for s in score(PROMPT, RESPONSES)] == [len(r) + extra - 3.5 for r in RESPONSES]
    path, body = server.seen[0]
    assert path == "/classify" and body["use_activation"] is False and ("input" in body) == bool(rubric)
    if not rubric:
        assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("squash", [lambda x: 1.0, lambda x: 1 / (1 + math.exp(-x))])
def test_probabilities_are_refused(server, squash):
    server.answer = vllm(lambda text: squash(len(text) / 50), lambda x: x)  # whatever is asked
    with pytest.raises(ConfigError, match="rewards.http: .* answers probabilities"):
        load("http", settings(server, protocol="classify"))


def test_a_raw_logit_between_zero_and_one_is_none(server):
    server.answer = vllm(lambda text: 0.25)
    assert made(server, protocol="classify")(PROMPT, ["x"]) == [Score(0.25)]


def test_sglang(server):
    server.answer = lambda path, body: [{"embedding": [len(body["text"][0]) / 2], "meta_info": {}}]
    (found,) = made(server, protocol="classify_sglang")(Prompt("p", 0, "q"), ["abc"])
    assert found == Score(len("Q: q A: abc") / 2) and server.seen[0][0] == "/classify"


@pytest.mark.parametrize("probs", [[0.5, 2.0], [], ["x"], [None], [float("nan")], "x"])
def test_what_is_no_single_logit_is_quarantined(server, probs):
    server.answer = vllm(lambda text: 3.0)
    score = made(server, protocol="classify")
    server.answer = lambda path, body: {"data": [{"probs": probs}]}
    (found,) = score(PROMPT, ["x"])
    assert found.value is None and found.reason


def test_a_wrong_address_or_model_is_said_before_the_run(server):
    server.faults = [(404, {})]
    with pytest.raises(ConfigError, match="rewards.http: .*404"):
        load("http", settings(server))
    server.answer = lambda path, body: {"data": [{"probs": [0.1, 0.9]}]}
    with pytest.raises(ConfigError, match="2 outputs"):
        load("http", settings(server, protocol="classify"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"url": "host:8000"}, "not of the form http"),
        ({"url": "http://me:hunter2@h/v1"}, "not of the form http"),
        ({"url": "http://h:99999/v1"}, "not of the form http"),
        ({"rubric": "{prompt}"}, r"has no \{response\}"),
        ({"rubric": "{response}"}, r"has no \{prompt\}"),
        ({"rubric": None}, "rubric: missing"),
        ({"scale": (3, 3)}, "not below"),
        ({"api_key_env": "sk-hunter2"}, "not the name of an environment variable"),
        ({"body": {"messages": []}}, "may not be set"),
    ],
)
def test_static_faults(more, words):
    with pytest.raises(ValidationError, match=words):
        HttpReward(**{"url": "http://h/v1", "model": "m", "rubric": RUBRIC} | more)


@pytest.mark.parametrize("seconds", [1.0, 30.0, 120.0, 1000.0])
@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0, 1.25, 7.0, 1000.0])
def test_a_rate_is_refused_where_a_call_may_pass_without_an_answer(rate, seconds):
    """And what the refusal asks for is enough."""

    def refused(rate, seconds):
        return HttpReward(url="http://h/v1", model="m", rubric=RUBRIC, requests_per_minute=rate).refuses(seconds)

    said = refused(rate, seconds)
    assert (said is not None) == (60 / rate > seconds / 2.5)
    if said:
        least, longer = re.search(r"at least (\d+), or runtime.timeouts.reward: (\d+)$", said).groups()
        assert refused(float(least), seconds) is None and refused(rate, float(longer)) is None


PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


@pytest.mark.parametrize("name", PROXIES)
def test_a_server_on_this_machine_is_asked_directly(server, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert made(server)(PROMPT, ["x"]) == [Score(5.0)] and len(server.seen) == 1


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_that_fails_is_named(server, monkeypatch, name):
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    with pytest.raises(Unavailable, match=f"by way of the proxy in {name}; list the host in NO_PROXY") as error:
        load("http", settings(server, url="http://judge.invalid/v1", retries=0))
    assert "secret" not in str(error.value)
    monkeypatch.setenv("NO_PROXY", "judge.invalid")
    with pytest.raises(Unavailable, match=r"no answer \(ConnectError\), 1 time$"):
        load("http", settings(server, url="http://judge.invalid/v1", retries=0))


HERE = ("http://localhost:1/v1", "https://127.0.0.2/v1", "http://[::1]:8000", "127.0.0.1:8265")
ELSEWHERE = ("http://10.0.0.1/v1", "http://localhost.example.com", "auto")


@pytest.mark.parametrize("url", [*HERE, *ELSEWHERE])
def test_which_servers_are_on_this_machine(url):
    assert is_loopback(url) is (url in HERE)
