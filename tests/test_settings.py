"""Configuration: every key by file and by flag, merging, and what a mistake is answered with."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from aisp_dist import config
from aisp_dist.config import ConfigError, Run, load
from jobs import settings

BASE = {
    "output": "out",
    "generator": {"model": "demo"},
    "rewards": {
        "main": {"kind": "model", "model": "demo"},
        "words": {"kind": "function", "function": "r.py:f"},
        "held": {"kind": "function", "function": "r.py:g", "use": "report"},
        "judge": {
            "kind": "http",
            "url": "http://h:1/v1",
            "model": "m",
            "rubric": "{prompt} {response}",
        },
    },
    "method": {"kind": "aisp", "num_samples": 16, "num_iterations": 8, "lambda": {"ess": 0.1}},
    "runtime": {"rewards": {"main": {"replicas": 1}}},
}


def read(tmp_path, *args, values=None, more=()):
    files = []
    for i, part in enumerate([values or BASE, *more]):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(part))
        files += [str(tmp_path / f"{i}.yaml")] if i == 0 else ["--config", str(tmp_path / f"{i}.yaml")]
    return settings.read(settings.parser("align", "test"), [*files, *args])[1]


def scalars(model: type[BaseModel], prefix: str = "") -> list[tuple[str, object]]:
    """Every scalar key of a section with its default."""
    found = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += scalars(kind, key + ".")
        else:
            found.append((key, field.default))
    return found


VALUES = {  # a value other than the default for every scalar key; a key that is missing here fails the test below
    "output": "elsewhere",
    "seed": 3,
    "combine": "standardized",
    "prompts.source": "x.jsonl",
    "prompts.subset": "s",
    "prompts.revision": "r",
    "prompts.split": "test",
    "prompts.streaming": True,
    "prompts.column": "q",
    "prompts.id_column": "id",
    "prompts.shuffle_seed": 4,
    "prompts.skip": 2,
    "prompts.limit": 7,
    "prompts.format": "raw",
    "prompts.drop_last_answer": True,
    "prompts.special_tokens": True,
    "prompts.begin": "Human:",
    "prompts.system": "be brief",
    "prompts.max_tokens": 9,
    "prompts.overlong": "left",
    "prompts.keep": ["a"],
    "prompts.template_kwargs": {"x": 1},
    "generator.model": "m",
    "generator.revision": "r",
    "generator.adapter": "a",
    "generator.dtype": "float32",
    "generator.chat_template": "t",
    "generator.quantization": "nf4",
    "generator.engine": "vllm",
    "generator.tensor_parallel": 2,
    "generator.pipeline_parallel": 2,
    "generator.vllm": {"max_num_seqs": 8},
    "generator.fp32_head": True,
    "generator.batch_rows": 8,
    "generator.max_new_tokens": 9,
    "generator.stop": ["x"],
    "generator.thinking": "strip",
    "generator.thinking_tags": ["[", "]"],
    "generator.trust_remote_code": True,
    "save.trace": False,
    "save.rows_per_file": 5,
    "save.flush_seconds": 1.5,
    "save.candidates": "all",
    "guard.max_truncated": 0.1,
    "guard.max_repetition": 0.2,
    "guard.max_length_correlation": 0.3,
    "guard.held_out_gain": 0.0,
    "runtime.retries": 1,
    "runtime.max_failed": 0.5,
    "runtime.shards": 4,
    "runtime.autoscaling": True,
    "runtime.storage_options.endpoint_override": "minio:9000",
    "runtime.storage_options.scheme": "http",
    "runtime.storage_options.region": "eu-north-1",
    "runtime.timeouts.startup": 1.0,
    "runtime.timeouts.round": 2.0,
    "runtime.timeouts.reward": 3.0,
    "runtime.timeouts.stall": 4.0,
    "runtime.generators.replicas": 2,
    "runtime.generators.at_least": 1,
    "runtime.generators.num_gpus": 1.0,
    "runtime.generators.num_cpus": 2.0,
    "runtime.generators.accelerator": "H100",
    "compare.prompts": 5,
    "compare.seeds": 3,
    "compare.arms": {"one": None},
    "compare.cases": {"small": {"prompts": {"limit": 3}}},
    "tune.prompts": 3,
    "tune.trials": 2,
    "tune.search": "tpe",
    "tune.nll_weight": 0.5,
    "tune.max_nll": 0.2,
    "tune.grids": {"aisp": {"sigma2": [0.2, 0.5]}},
    "method.num_samples": 4,
    "method.num_iterations": 3,
    "method.sigma2": 0.1,
    "method.lambda": 0.3,
    "method.alpha": 0.5,
    "method.noise": "shared",
    "method.after_eos": "marginal",
    "method.shuffle_rewards": True,
    "rewards.main.weight": 2.0,
    "rewards.main.use": "report",
    "rewards.main.model": "m2",
    "rewards.main.revision": "r",
    "rewards.main.engine": "vllm",
    "rewards.main.dtype": "float32",
    "rewards.main.max_tokens": 5,
    "rewards.main.batch_rows": 6,
    "rewards.main.trust_remote_code": True,
    "rewards.main.chat_template": "eurus",
    "rewards.main.system": "drop",
    "rewards.main.self_test": False,
    "rewards.judge.weight": 0.5,
    "rewards.judge.url": "https://host/v2",
    "rewards.judge.model": "m3",
    "rewards.judge.protocol": "classify",
    "rewards.judge.rubric": "{response} to {prompt}?",
    "rewards.judge.scale": [0.0, 1.0],
    "rewards.judge.api_key_env": "KEY",
    "rewards.judge.max_tokens": 9,
    "rewards.judge.body": {"seed": 1},
    "rewards.judge.timeout": 7.0,
    "rewards.judge.retries": 2,
    "rewards.judge.max_parallel": 3,
    "rewards.judge.requests_per_minute": 30.0,
    "rewards.words.function": "other.py:g",
    "rewards.words.weight": 0.5,
    "runtime.rewards.main.replicas": 2,
    "runtime.rewards.main.num_cpus": 0.25,
    "runtime.rewards.main.num_gpus": 0.5,
    "runtime.rewards.main.accelerator": "L4",
}
SECRET = {f"runtime.storage_options.{key}" for key in ("access_key", "secret_key", "session_token")}  # all, or none
WHOLE = {
    "rewards",
    "method",
    "runtime.rewards",
    "method.spend",
    "method.limit",
    "generator.endpoint",
    "guard.action",  # goes with a bound
}  # unions, mappings and what is not given alone: tests of their own


FREE_REWARD = {"self_test", "api_key_env", "timeout", "retries", "max_parallel", "requests_per_minute"}


def dig(run: Run, key: str):
    value = run.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        value = value[part]
    return value


def test_every_key_of_the_schema_is_covered():
    keys = {key for key, _ in scalars(Run)} | {f"method.{key}" for key, _ in scalars(config.Aisp)}
    keys |= {f"rewards.main.{key}" for key, _ in scalars(config.ModelReward) if key != "kind"}
    keys |= {f"rewards.judge.{key}" for key, _ in scalars(config.HttpReward) if key not in ("kind", "use")}
    assert keys - set(VALUES) - SECRET - WHOLE - {"method.kind"} == set()


@pytest.mark.parametrize("key", VALUES)
def test_every_key_is_overridden_by_a_flag_and_by_a_later_file(key, tmp_path):
    value = VALUES[key]
    assert dig(read(tmp_path), key) != value
    flag = value if isinstance(value, str) else json.dumps(value)
    assert dig(read(tmp_path, f"--{key}", flag), key) == value
    if key.startswith(("rewards.", "method.")):
        return  # unions are replaced whole by a file: below
    nested: object = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    assert dig(read(tmp_path, more=[nested]), key) == value


def test_secrets_are_taken_from_files_and_flags_and_never_shown(tmp_path):
    options = {"access_key": "ID", "secret_key": 12345, "session_token": "T"}
    run = read(
        tmp_path, "--runtime.storage_options.access_key", "ID2", values=BASE | {"runtime": {"storage_options": options}}
    )
    found = run.runtime.storage_options
    assert [getattr(found, key).get_secret_value() for key in options] == ["ID2", "12345", "T"]
    shown = repr(run) + str(run.model_dump()) + run.model_dump_json()
    assert not any(value in shown for value in ("ID2", "12345", "'T'"))
    assert "storage_options" not in str(run.row_settings())
    assert read(tmp_path, values=run.model_dump(mode="json", by_alias=True)).runtime.storage_options.region is None


def test_unions_are_replaced_whole_by_a_file_and_by_a_whole_flag(tmp_path):
    aisp = {"kind": "aisp", "num_samples": 16, "num_iterations": 8, "sigma2": 0.1, "lambda": {"ess": 0.3}}
    values = BASE | {"method": aisp}
    other = {"method": {"kind": "best_of_n", "num_samples": 3}}
    run = read(tmp_path, values=values, more=[other])
    assert run.method == config.BestOfN(num_samples=3)
    assert read(tmp_path, "--method", '{"kind": "best_of_n"}', values=values).method == config.BestOfN()
    assert read(tmp_path, "--method.lambda", "0.7", values=values).method.lambda_ == 0.7
    assert read(tmp_path, "--method.lambda.ess", "0.7", values=values).method.lambda_ == config.Ess(ess=0.7)
    run = read(tmp_path, "--guard.action", "stop", more=[{"guard": {"max_truncated": 0.1}}])
    assert (
        run.guard == config.Guard(max_truncated=0.1, action="stop")
        and run.row_settings() == read(tmp_path).row_settings()
    )
    assert read(tmp_path, "--save.candidates.top", "3").save.keep == (3, 0)
    assert read(tmp_path, "--save.candidates.top_bottom", "3").save.keep == (3, 3)
    assert read(tmp_path, "--method.num_samples", "5", values=values).method.sigma2 == 0.1
    assert read(tmp_path, "--method.spend.plateau", "2", values=values).method.spend == config.Spend(plateau=2)
    run = read(tmp_path, more=[{"rewards": {"main": {"kind": "function", "function": "a.py:b"}}}])
    assert run.rewards["main"] == config.FunctionReward(function="a.py:b") and "words" in run.rewards


def test_later_files_win_and_flags_win_over_files(tmp_path):
    more = [{"seed": 1, "prompts": {"limit": 5}}, {"seed": 2}]
    run = read(tmp_path, "--prompts.limit", "9", more=more)
    assert (run.seed, run.prompts.limit) == (2, 9)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method.sigma2", "-1"], "method.sigma2: sigma2 is -1; it must be above 0 and at most 1e12"),
        (["--method.sigma2", "0"], "method.sigma2: sigma2 is 0; it must be above 0"),
        (["--method.num_samples", "0"], "method.num_samples: .*it is .*; it must be at least 1"),
        (["--method.lambda", "-2"], "method.lambda: lambda is -2; it must be above 0"),
        (["--method.lambda.ess", "1.5"], "method.lambda.ess: .*it must be below 1"),
        (["--tune.grids", '{"aisp": {"sigma2": []}}'], r"tune.grids: aisp: sigma2 is \[\]; give at least one value"),
        (["--tune.grids", '{"sigma2": [0.1]}'], "tune.grids: sigma2: name the arm first"),
        (["--compare.arms", '{"a": {"kind": "beam"}}'], "compare.arms.a: kind is 'beam'"),
        (["--method.spend.min_gain", "1"], "method.spend: target, plateau and expected_gain are null"),
        (
            ["--method.spend", '{"target": 1, "max_iterations": 9}'],
            "9 without plateau or expected_gain",
        ),
        (["--method.spend", '{"target": 1, "min_gain": 0.5}'], "min_gain is 0.5 without plateau"),
        (["--method.limit", "{}"], "method.limit: nll and diversity are null, so nothing is limited"),
        (["--method.sigma2.flip_rate", "1.5"], "method.sigma2.flip_rate: .*it must be below 1"),
        (["--method.noise", "pink"], "method.noise: .*'pink'"),
        (["--output", "gs://bucket/x"], "output: gs:// is not implemented; give a local directory, or s3://bucket"),
        (["--output", "s3://id:key@bucket/x"], "^output: not of the form s3://bucket/path; credentials go into"),
        (
            ["--runtime.generators.num_gpus", "2"],
            "runtime.generators.num_gpus: .*it is at most 1, a GPU or a part of one",
        ),
        (["--runtime.shards", "0"], "runtime.shards: .*it is .*; it must be at least 1"),
        (["--runtime.storage_options.secret_key", "x"], "access_key and secret_key come together"),
        (
            ["--runtime.storage_options.endpoint_override", "http://id:x@host"],
            "endpoint_override: .*match pattern [^:]*$",
        ),
        (["--runtime.storage_options", '{"access_key": "a", "secret_key": 1.5}'], "secret_key: [^.]*$"),
        (["--generator.tensor_parallel", "0"], "generator.tensor_parallel: .*it is .*; it must be at least 1"),
        (
            ["--generator.engine", "local", "--generator.tensor_parallel", "2"],
            "generator: tensor_parallel: 2 has no effect with engine: local; leave it out, or give engine: vllm",
        ),
        (["--generator.engine", "local", "--generator.quantization", "awq"], "generator: quantization: awq has no"),
        (["--generator.engine", "vllm", "--generator.batch_rows", "8"], "generator: batch_rows: 8 has no effect"),
        (["--generator.engine", "vllm", "--generator.fp32_head", "true"], "generator: fp32_head: true has no effect"),
        (
            ["--generator.quantization", "int8", "--generator.tensor_parallel", "2"],
            "generator: quantization: int8 needs engine: local and tensor_parallel: 2 engine: vllm; leave one",
        ),
        (["--generator.vllm", '{"tensor_parallel_size": 2}'], "vllm.tensor_parallel_size: it is set by the other keys"),
        (["--generator.vllm", '{"speculative_config": {}}'], "speculative decoding checks tokens against logits"),
        (
            ["--generator.engine", "vllm", "--method", '{"kind": "args"}'],
            "args changes every step inside the local engine, which generator.engine: vllm excludes",
        ),
        (
            ["--generator.tensor_parallel", "2", "--runtime.generators.num_gpus", "0.5"],
            "runtime.generators.num_gpus: 0.5, but generator.tensor_parallel x pipeline_parallel takes 2 whole GPUs",
        ),
        (["more", "words"], "^unexpected argument: more; give one configuration file, and others .* by --config$"),
        (["--generator.stop", "{a: 1}"], "generator.stop.0: it is a section; it must be a text"),
        (["--rewards", "[a]"], "rewards: it is a list; it must be a mapping of keys to values"),
        (["--runtime.storage_options", '["hidden"]'], "runtime.storage_options: it must be a section of keys"),
        (["--save", "{trace: "], "save: it must be a section, as {key: value}"),
        (["--method.sigma2", "{flip_rate: 0.1, flip_rate: 0.2}"], "method.sigma2: it is '{flip_rate: 0.1, flip_rate"),
        (["--xyzzy", "1"], "unknown flag: --xyzzy 1; every key is listed by --help"),
        (["--method.num_sample=1"], "unknown flag: --method.num_sample=1; did you mean 'num_samples'?"),
        (["--method.num_samples", "many"], "method.num_samples: it is 'many'; it must be a whole number"),
        (["--prompts.limit", "1.5"], "prompts.limit: it is '1.5'; it must be a whole number"),
        (["--save.trace", "maybe"], "save.trace: it is 'maybe'; it must be true or false"),
        (["--generator.dtype", "half"], "generator.dtype: it is 'half'; it must be 'auto', 'float32', .* or 'float16'"),
        (
            ["--rewards.new.kind", "function"],
            """no reward 'new' in the files .*--rewards '{"new": """,
        ),
        (["--runtime.rewards.new.replicas=2"], "--runtime.rewards.new: there is no reward 'new'"),
        (["--method", "null"], "method: "),
        (
            ["--rewards.main.use", "report", "--rewards.words.use", "report", "--rewards.judge.use", "report"],
            "none has use: select",
        ),
        (["--rewards.main.use", "report", "--rewards.main.weight", "2"], "rewards.main: weight is 2, .* no effect"),
        (["--rewards.judge.protocol", "classify", "--rewards.judge.max_tokens", "9"], "max_tokens is 9, .* no effect"),
        (["--rewards.judge.protocol", "classify", "--rewards.judge.scale", "[0, 1]"], "scale is .* no effect"),
        (["--guard.action", "stop"], "guard: action is stop, but every bound is null"),
        (["--guard.max_truncated", "0", "--guard.action", "halt"], "guard.action: .*'warn' or 'stop'"),
        (["--guard.max_truncated", "1.5"], "guard.max_truncated: .*it must be below 1"),
        (["--guard.max_length_correlation", "-2"], "max_length_correlation: .*it must be at least -1"),
        (["--save.candidates", '{"top": 0}'], "save.candidates.*top: .*it is .*; it must be at least 1"),
        (["--runtime.rewards", '{"nobody": {"replicas": 2}}'], "nobody is not among rewards"),
    ],
)
def test_a_bad_value_names_key_value_and_rule(args, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as error:
        read(tmp_path, *args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": True}, "seed: it is True; it must be a whole number"),
        ({"method": BASE["method"] | {"num_samples": True}}, "num_samples: it is True; it must be a whole number"),
        ({"prompts": {"limit": False}}, "prompts.limit: it is False; it must be a whole number"),
        ({"method": BASE["method"] | {"lambda": True}}, "method.lambda: it is True; it must be a number"),
        ({"method": BASE["method"] | {"lambda": {"ess": True}}}, "lambda.ess: it is True; it must be a number"),
        ({"tune": {"grids": {"aisp": {"alpha": [0.9, True]}}}}, "alpha.1: it is True; it must be a number"),
        ({"runtime": {"generators": {"replicas": True}}}, "replicas: it is True; .* a whole number, or 'auto'"),
    ],
)
def test_a_bool_is_no_number(values, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, values=BASE | values)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("method.sigma2", "{flip_rate: 0.1}", {"flip_rate": 0.1}),
        ("method", "{kind: best_of_n, num_samples: 2}", {"kind": "best_of_n", "num_samples": 2}),
        ("save", "{trace: false}", {"trace": False}),
        ("save.candidates", '{"top": 3}', {"top": 3}),
        ("tune.grids", "{aisp: {sigma2: [0.1, 0.3]}}", {"aisp": {"sigma2": [0.1, 0.3]}}),
        ("prompts.template_kwargs", "{thinking: no, effort: low}", {"thinking": False, "effort": "low"}),
        ("generator.stop", "['a, b', c]", ["a, b", "c"]),
        ("generator.stop", "a: b", ["a: b"]),
        ("prompts.system", "{prompt}", "{prompt}"),  # a text stays one
        ("prompts.begin", "[INST]", "[INST]"),
    ],
)
def test_sections_and_lists_are_written_on_the_command_line_as_in_a_file(key, text, value, tmp_path):
    run = read(tmp_path, f"--{key}", text)
    found = run.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        found = found[part]
    assert {name: found[name] for name in value} == value if key in ("method", "save") else found == value


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"rewards": {True: BASE["rewards"]["main"]}},
            "^rewards: the name True is not a text; put it in .*, since",
        ),
        ({"rewards": {1: BASE["rewards"]["main"]}}, "^rewards: the name 1 is not a text; put it in quotes$"),
        ({"prompts": {2: "a"}}, "^prompts: the name 2 is not a text; put it in quotes$"),
        ({"rewards": {"": BASE["rewards"]["main"]}}, "rewards: one has an empty name; give it a name"),
        ({"output": date(2026, 1, 2)}, "^output: it is 2026-01-02 of type date; it must be a text$"),
    ],
)
def test_names_are_texts(values, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, values={**BASE, "runtime": {}, **values})


def test_bools_stay_where_they_mean_something(tmp_path):
    told = {"enforce_eager": True}, {"enable_thinking": False}
    values = BASE | {
        "generator": {"model": "demo", "vllm": told[0]},
        "prompts": {"template_kwargs": told[1]},
        "compare": {"arms": {"noise": BASE["method"] | {"shuffle_rewards": True}}},
    }
    run = read(tmp_path, values=values)
    assert (run.generator.vllm, run.prompts.template_kwargs) == told
    assert run.compare.arms["noise"].shuffle_rewards


def test_the_help_has_no_names_of_python(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        read(tmp_path, "--help")
    said = capsys.readouterr().out
    assert left.value.code == 0 and "--prompts.limit integer" in said and "--prompts.streaming {true,false}" in said
    for python in ("tuple[", "dict[", "SecretStr", " str\n", "None)", "()", "JSON"):
        assert python not in said, said[said.index(python) - 80 :][:160]


NUCLEUS = "method.sampling.top_p: it is 1.5; it must be at most 1.0"
ONE_SHAPE = "method.sampling.gaussian: unknown key; .*; method.sampling.top_p: unknown key; see `aisp schema`"


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"top_p": 1.5}, NUCLEUS),
        ({"topp": 0.5}, "method.sampling.topp: unknown key; did you mean 'top_p'?"),
        ({"top_p": 1.5, "temprature": 1}, NUCLEUS + "; method.sampling.temprature: unknown key; did you mean .*"),
        ({"top_p": 0.5, "gaussian": 1.0}, ONE_SHAPE),
        ({}, "method.sampling.top_p: missing; it has no default; method.sampling.gaussian: missing; .*"),
    ],
)
def test_of_several_shapes_the_nearest_is_told(sampling, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, values=BASE | {"method": {"kind": "best_of_n", "sampling": sampling}})
    assert re.fullmatch(said.replace("?", r"\?"), str(error.value))


def test_a_value_of_several_shapes_is_shown_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "--runtime.generators.replicas", "0")
    assert str(error.value) == "runtime.generators.replicas: it is '0'; it must be at least 1, or 'auto'"
    with pytest.raises(ConfigError, match=r"^save.candidates.top: it is -1; it must be at least 1$"):
        read(tmp_path, values=BASE | {"save": {"candidates": {"top": -1}}})


def test_a_held_out_bound_needs_a_held_out_reward(tmp_path):
    alone = BASE | {"rewards": {"main": {"kind": "model", "model": "demo"}}}
    with pytest.raises(ConfigError, match=r"guard.held_out_gain: no reward has use: report"):
        read(tmp_path, "--guard.held_out_gain", "0", values=alone)


def test_unknown_keys_are_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts.lmit: unknown key; did you mean 'limit'"):
        read(tmp_path, values=BASE | {"prompts": {"lmit": 3}})
    with pytest.raises(ConfigError, match="generator: missing"):
        read(tmp_path, values={k: v for k, v in BASE.items() if k != "generator"})
    with pytest.raises(ConfigError, match="^method: missing; it has no default; give one, as {kind: best_of_n, "):
        read(tmp_path, values={k: v for k, v in BASE.items() if k != "method"})


def test_a_wrong_kind_names_those_that_exist(tmp_path):
    with pytest.raises(
        ConfigError,
        match="method: kind is 'beam'; it must be 'aisp', 'batched_aisp', 'population', 'qalign', 'best_of_n'",
    ):
        read(tmp_path, values=BASE | {"method": {"kind": "beam"}})
    with pytest.raises(ConfigError, match="rewards.main: kind is missing; it must be"):
        read(tmp_path, values=BASE | {"rewards": {"main": {"model": "demo"}}})


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.yaml.*No such file"):
        load.read_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load.read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "tag.yaml").write_text("a: !!python/object/apply:os.system [echo]")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load.read_yaml(tmp_path / "tag.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    """YAML itself would keep the last one: with two sections `rewards` the first would be lost without a word."""
    (tmp_path / "twice.yaml").write_text("a: {b: 1}\nc: {b: 2}\na: {d: 3}\n")
    with pytest.raises(ConfigError, match="the key 'a' stands twice in one section; keep one of them.*line 3"):
        load.read_yaml(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\ne: {<<: *a}\n")
    assert load.read_yaml(tmp_path / "merged.yaml")["d"] == {"b": 3, "c": 2}


def test_what_cannot_change_a_row_is_not_in_the_fingerprint(tmp_path):
    before = read(tmp_path).row_settings()
    for key in VALUES:
        free = key.startswith(("save.", "guard.", "runtime.", "compare.", "tune.")) or key in (
            "output",
            "prompts.limit",
        )
        free |= key.startswith("rewards.") and key.rpartition(".")[2] in FREE_REWARD
        value = VALUES[key]
        flag = value if isinstance(value, str) else json.dumps(value)
        assert (read(tmp_path, f"--{key}", flag).row_settings() == before) is free, key


@pytest.mark.parametrize(
    "path",
    sorted(
        path for glob in ("*.yaml", "smollm2/*.yaml") for path in (Path(__file__).parents[1] / "configs").glob(glob)
    ),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_every_shipped_configuration_is_valid(path):
    load.check(load.read_yaml(path))
