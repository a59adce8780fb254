"""Function rewards: TRL's call, one value for each completion or an error, and a digest that follows the source."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from trl.rewards import think_format_reward

from actors.scorer import Scorer
from aisp_dist.config import ConfigError, FunctionReward
from aisp_dist.placement import Group
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards import RewardError, load
from aisp_dist.rewards.function import check, digest

DATA = Path(__file__).parent / "data"
CHAT = Prompt("p", 0, (("user", "Hi"),), (("topic", "rain"), ("notes", ["n"])))
COLUMNS = ("topic", "notes")


def named(function):
    return FunctionReward(kind="function", function=function)


def scorer(function, base_dir=DATA):
    return load("words", named(function if ":" in function else f"my_rewards.py:{function}"), base_dir, columns=COLUMNS)


def written(tmp_path, source):
    (tmp_path / "f.py").write_text(source)
    return load("words", named("f.py:f"), tmp_path)


def test_chats_and_texts_arrive_as_trl_hands_them():
    assert scorer("length")(CHAT, ["ab", "", "ab"]) == [Score(2.0), Score(0.0), Score(2.0)]
    assert scorer("raw_length")(Prompt("p", 0, "abc"), ["d", ""]) == [Score(4.0), Score(3.0)]
    thought = scorer("trl.rewards:think_format_reward")(CHAT, ["<think>a</think>b", "b"])
    assert [score.value for score in thought] == think_format_reward(
        [[{"role": "assistant", "content": c}] for c in ("<think>a</think>b", "b")]
    )


def test_arguments_as_they_arrive(tmp_path):
    score = written(tmp_path, "seen = []\ndef f(**kwargs):\n    seen.append(kwargs)\n    return [0, 0]\n")
    score(CHAT, ["a", "b"])
    (seen,) = sys.modules[next(name for name in sys.modules if name.startswith("f_"))].seen
    assert {name for name in seen if callable(seen[name])} == {"log_extra", "log_metric"}  # TRL's, for **kwargs too
    assert {name: value for name, value in seen.items() if not callable(value)} == {
        "prompts": [[{"role": "user", "content": "Hi"}]] * 2,
        "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
        "topic": ["rain"] * 2,
        "notes": [["n"]] * 2,
    }


def test_async_functions_and_columns():
    assert scorer("mentions")(CHAT, ["rain falls", "sun"]) == [Score(1.0), Score(0.0)]


def test_none_does_not_apply_and_what_is_not_finite_is_quarantined():
    none, nan, inf, one = scorer("sometimes")(CHAT, ["none", "", "inf", "x"])
    assert none == Score(None) and one == Score(1.0)
    assert nan == Score(None, "the reward is nan; return a finite number")
    assert inf == Score(None, "the reward is inf; return a finite number")


def test_an_argument_that_nobody_hands_over_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"rewards.words.function: .*needs colour.*prompts.keep \(topic, notes\)"):
        scorer("needs_colour")


def test_a_function_cannot_change_the_prompt():
    score = scorer("vandal")
    before = repr(CHAT)
    assert score(CHAT, ["a", "b"]) == score(CHAT, ["a", "b"]) == [Score(2.0)] * 2
    assert repr(CHAT) == before


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("too_few", "1 values for 2 completions"),
        (
            "raises",
            "words: my_rewards.py:raises raised ZeroDivisionError in line 27 of my_rewards.py: division by zero",
        ),
        ("leaves", "raised SystemExit in line 31 of my_rewards.py: 3"),
        ("texts", "'1.0', of type str"),
    ],
)
def test_errors_name_reward_and_cause(function, words):
    with pytest.raises(RewardError, match="words: ") as error:
        scorer(function)(CHAT, ["a", "b"])
    assert words in str(error.value) and str(error.value).count("words") == 1


def test_an_interrupt_is_the_users_in_the_main_thread_alone(tmp_path):
    score = written(tmp_path, "def f(completions):\n    raise KeyboardInterrupt\n")
    said = r"^words: f.py:f raised KeyboardInterrupt in line 2 of f.py"
    with ThreadPoolExecutor(1) as thread, pytest.raises(RewardError, match=said):
        thread.submit(score, CHAT, ["a"]).result()
    with pytest.raises(KeyboardInterrupt, match=said):
        score(CHAT, ["a"])
    actor = Scorer("words", named("f.py:f"), tmp_path, (), "words-0", Group("words", 1, 1, 1.0, 0.0, None), 60.0)
    actor.load()
    with pytest.raises(RewardError, match=said):  # no Ctrl-C reaches an actor
        actor.score(CHAT, ["a"])


def test_an_error_names_the_users_line_and_no_librarys(tmp_path):
    (tmp_path / "near.py").write_text("import json\n\n\ndef parsed(text):\n    return json.loads(text)\n")
    score = written(tmp_path, "import near\ndef f(completions):\n    return [near.parsed('{')]\n")
    with pytest.raises(RewardError, match=r"^words: f.py:f raised JSONDecodeError in line 5 of near.py: Expecting"):
        score(CHAT, ["a"])


@pytest.mark.parametrize(
    "answer", ["numpy.array([1, 2])", "torch.tensor([1, 2])", "[torch.tensor(1), numpy.float32(2)]", "(1, 2)"]
)
def test_arrays_are_numbers(tmp_path, answer):
    score = written(tmp_path, f"import numpy, torch\ndef f(completions): return {answer}\n")
    assert score(CHAT, ["a", "b"]) == [Score(1.0), Score(2.0)]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("absent.py:f", "no file"),
        ("my_rewards.py:absent", "nothing called 'absent'"),
        ("my_rewards.py:NOT_A_FUNCTION", "no function"),
        ("my_rewards.py", "names a file but no function in it; give my_rewards.py:NAME"),
        ("my_rewards", "is no entry point"),
        ("beside:f", "name beside.py:function"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("no_such.module:f", "no module 'no_such.module'"),
        ("broken.py:f", "SyntaxError"),
        ("exits.py:f", "SystemExit"),
    ],
)
def test_what_cannot_be_imported_is_refused(tmp_path, function, words):
    (tmp_path / "my_rewards.py").write_text((DATA / "my_rewards.py").read_text())
    (tmp_path / "broken.py").write_text("def f(:")
    if function.startswith("beside"):  # else those that were loaded before have left its folder in sys.path
        (tmp_path / "beside.py").write_text("def f(): ...")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    with pytest.raises(ConfigError) as error:
        load("words", named(function), tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("absent.py:f", "no file"),
        ("r.py:brief", "r.py has no function 'brief' (it has one, two); name one that is there"),
        ("empty.py:f", "(it has none)"),
        ("broken.py:f", "broken.py, line 2: "),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("trl.rewards.other_rewards:absent", "(it has get_repetition_penalty_reward"),
    ],
)
def test_a_name_that_is_not_there_is_found_without_running_the_file(tmp_path, function, words):
    (tmp_path / "r.py").write_text("raise SystemExit\nX = 1\ndef one(): ...\nif X:\n    async def two(): ...\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("\ndef f(:")
    with pytest.raises(ConfigError, match=r"^rewards.r.function: ") as error:
        check("rewards.r.function", named(function), tmp_path)
    assert words in str(error.value)


BINDINGS = """def f(): ... | f = print | from m import g as f | import f.g | class f: ... | f: object = 1 | (f := 1)
for f in (): ... | with a as (f, b): ... | from m import * | def __getattr__(name): ... | globals()['f'] = 1"""


@pytest.mark.parametrize("source", [source.strip() for line in BINDINGS.splitlines() for source in line.split("|")])
def test_every_way_to_bind_a_name_is_known(tmp_path, source):
    (tmp_path / "r.py").write_text(source)
    check("key", named("r.py:f"), tmp_path)
    check("key", named("r.py:f.method"), tmp_path)


def test_files_of_one_name_are_two_modules_and_find_their_neighbours(tmp_path):
    found = []
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"near_{folder}.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "r.py").write_text(f"import near_{folder} as n\ndef f(completions): return [n.VALUE]\n")
        found.append(load("r", named("r.py:f"), tmp_path / folder))
    assert [score(CHAT, ["a"])[0].value for score in found] == [1.0, 2.0]


def test_the_digest_is_of_source_and_name(tmp_path):
    seen = set()
    for source, name in (("def f(): 1\ndef g(): 1\n", "f"), ("def f(): 1\ndef g(): 1\n", "g"), ("def f(): 2\n", "f")):
        (tmp_path / "r.py").write_text(source)
        seen.add(digest(named(f"r.py:{name}"), tmp_path))
    assert len(seen) == 3 and all(len(d) == 32 for d in seen)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "r.py").write_text("def f(): 2\n")
    assert digest(named("r.py:f"), tmp_path / "else") in seen  # of the source, not of its place
    assert digest(named("trl.rewards:think_format_reward")) == digest(named("trl.rewards:think_format_reward"))
    with pytest.raises(ConfigError):
        digest(named("absent.py:f"), tmp_path)


def test_the_digest_runs_nothing(tmp_path):
    (tmp_path / "r.py").write_text("raise SystemExit('run')\n")
    digest(named("r.py:f"), tmp_path)
    code = (
        "import sys; from aisp_dist.rewards.function import digest; from aisp_dist.config import FunctionReward as F;"
    )
    code += "digest(F(kind='function', function='json.tool:main')); assert 'json.tool' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trls_other_arguments(tmp_path, caplog):
    source = "def f(completions, log_extra, log_metric, trainer_state=None, **kwargs):\n"
    source += (
        "    log_extra('parsed', completions); log_metric('mean', 0.5)\n    return [float(trainer_state is None)] * 2\n"
    )
    with caplog.at_level("DEBUG", "aisp"):
        assert written(tmp_path, source)(CHAT, ["a", "b"]) == [Score(1.0)] * 2
    assert "reward column parsed" in caplog.text and "reward metric mean: 0.5" in caplog.text
    for argument, words in (
        ("completion_ids", "text alone"),
        ("trainer_state", "no trainer"),
        ("environments", "no env"),
    ):
        with pytest.raises(ConfigError, match=f"needs {argument}, .*{words}.*give it a default"):
            written(tmp_path, f"def f(completions, {argument}): return [0.0]\n")


def test_columns_that_would_hide_an_argument_are_refused():
    with pytest.raises(ConfigError, match="prompts.keep has completions, prompts, .*rename"):
        load("words", named("my_rewards.py:length"), DATA, columns=("prompts", "topic", "completions"))


def test_trls_own_rewards(tmp_path):
    source = "from trl.rewards.other_rewards import get_repetition_penalty_reward as g\nf = g(2, -1.0)\n"
    with pytest.raises(ConfigError, match="needs completion_ids, the base model's tokens"):
        written(tmp_path, source)


def test_async_calls_share_a_loop(tmp_path):
    source = "import asyncio\nseen = set()\nasync def f(completions):\n"
    source += "    seen.add(asyncio.get_running_loop())\n    return [len(seen)] * len(completions)\n"
    score = written(tmp_path, source)
    assert [score(CHAT, ["a"]) for _ in range(3)] == [[Score(1.0)]] * 3


def test_an_entry_point_names_a_function(tmp_path, monkeypatch):
    def install(folder, package, value):
        info = tmp_path / folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[aisp_dist.rewards]\nshortness = {value}\n")
        (tmp_path / folder / f"{package}.py").write_text(
            "class R:\n    def f(completions): return [-len(completions)]\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / folder))

    install("site", "pkg_short", "pkg_short:R.f")
    score = load("short", named("shortness"))
    assert score(CHAT, ["a"]) == [Score(-1.0)]
    assert digest(named("shortness")) == digest(named("pkg_short:R.f"))
    with pytest.raises(ConfigError, match=r"'longness' is no entry point \(.*shortness.*\)"):
        digest(named("longness"))
    install("other", "pkg_other", "pkg_other:R.f")
    with pytest.raises(ConfigError, match="declared by several packages"):
        load("short", named("shortness"))
