"""The benches: what they report, and that their checks of agreement can fail. No speed is asserted."""

from __future__ import annotations

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from aisp_dist.bench import paired, peers, workload
from aisp_dist.bench.decode import SUITE, workloads
from jobs import bench, cli
from tests.bench import pipeline, score

DECODE = ["decode", "--prompt-tokens", "20", "--new-tokens", "6", "--samples", "3", "--repeat", "1"]


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(capsys, *args):
    """Exit code and document of `aisp bench ARGS`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *args])
    return ended.value.code, json.loads(capsys.readouterr().out)


def program(capsys, module, *args):
    """Exit code and document of `python -m tests.bench.MODULE ARGS`."""
    code = module.main(args)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", workload.FAMILIES)
def test_all_ways_decode_the_same_tokens_in_fp32(family, capsys):
    code, found = run(capsys, *DECODE, "--shape", f"{family}:64/2/1k", "--prompts", "2")
    (one,) = found["configurations"]
    assert code == 0 and found["agrees"] and one["checked"]
    assert one["vllm"] == "not measured: vllm is not installed"
    for name in ("generate", "repeated_static"):
        assert one[name]["agreement"] == 1
        assert set(one[name]["ratio"]) == set(one[name]["cpu_ratio"]) == {"median", "min", "max"}
    ours = one["ours"]
    assert ours["tokens_per_second"] == pytest.approx(6 * ours["trajectories_per_second"])


def test_a_peer_that_decodes_something_else_is_found_out(capsys, monkeypatch):
    true = peers.generate
    monkeypatch.setattr(peers, "generate", lambda model, prompts, v: true(model, prompts, torch.roll(v, 1, dims=1)))
    code, found = run(capsys, *DECODE, "--shape", "llama:64/2/1k", "--peers", "generate,repeated_static")
    (one,) = found["configurations"]
    assert one["generate"]["agreement"] < 0.9 and one["repeated_static"]["agreement"] == 1
    assert code == 1 and not found["agrees"]


def test_other_dtypes_are_measured_and_not_checked(capsys):
    code, found = run(capsys, *DECODE, "--shape", "llama:64/2/1k", "--dtype", "bfloat16", "--peers", "generate")
    assert code == 0 and not found["configurations"][0]["checked"]


def options(*args):
    return bench.parser().parse_args(args)


def test_lists_are_swept_and_the_suite_has_the_named_configurations():
    swept = workloads(options("--prompt-tokens", "8,16", "--samples", "4,8", "--prompts", "1,2"))
    sizes = [(work.prompt_tokens, work.samples, work.prompts, work.batch_rows) for work in swept]
    assert sizes == [(length, n, p, n * p) for length in (8, 16) for n in (4, 8) for p in (1, 2)]
    works = list(workloads(options("--suite", "cpu")))
    assert [(w.model, w.prompt_tokens, w.new_tokens) for w in works] == SUITE
    assert {(w.dtype, w.samples, w.prompts, w.batch_rows) for w in works} == {("float32", 32, 1, 32)}


def test_equal_share_counts_places():
    assert paired.equal_share([[1, 2], [3]], [[1, 2], [3]]) == 1
    assert paired.equal_share([[1, 2], [3]], [[1, 9], [3]]) == pytest.approx(2 / 3)
    assert paired.equal_share([[1, 2, 3, 4]], [[1, 2]]) == 0.5


def test_scores_equal_those_of_the_padded_batch(capsys):
    sizes = ["--prompt-tokens", "20", "--new-tokens", "5", "--samples", "4", "--repeat", "2"]
    code, found = program(capsys, score, "--shape", "llama:64/2/1k", *sizes)
    assert code == 0 and found["reward_range"] > 0.1
    for part in ("first", "next"):
        assert found[part]["max_difference"] < 1e-4 and set(found[part]["ratio"]) == {"median", "min", "max"}


def test_scores_that_differ_are_found_out(capsys, monkeypatch):
    monkeypatch.setattr(score, "forward", lambda twin, tokenizer, prompt, responses: [0.0] * len(responses))
    code, found = program(capsys, score, "--shape", "llama:64/2/1k", "--samples", "2", "--repeat", "1")
    assert code == 1 and not found["agrees"]


class Threads(ThreadPoolExecutor):
    """A process pool without processes, which are slow to start. Like a process pool it takes and returns only what can
    be pickled."""

    def __init__(self, max_workers, mp_context):
        super().__init__(max_workers)

    def submit(self, work, *args):
        work, args = pickle.loads(pickle.dumps((work, args)))
        return super().submit(lambda: pickle.loads(pickle.dumps(work(*args))))


def test_pipeline(capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", Threads)
    sizes = ["--prompt-tokens", "20", "--new-tokens", "5", "--samples", "4", "--prompts", "3", "--iterations", "2"]
    code, found = program(capsys, pipeline, "--shape", "llama:64/2/1k", *sizes, "--repeat", "1")
    assert code == 0 and found["agreement"]["min"] == 1
    slower = max(found["decode_alone_seconds"]["median"], found["score_alone_seconds"]["median"])
    assert found["ratio"]["median"] == pytest.approx(found["together_seconds"]["median"] / slower)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "required: what"),
        (["everything"], "invalid choice: 'everything'"),
        (["simulate"], "invalid choice: 'simulate'"),
        (["decode", "--samples", "0"], "'0' must be a whole number of at least 1"),
        (["decode", "--samples", "4,x"], "'x' must be a whole number"),
        (["decode", "--peers", "generate,magic"], "'magic' must be one of generate"),
        (["decode", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["decode", "--colour"], "unrecognized arguments: --colour"),
        (["decode", "--shape", "llama:100/2/1k"], "--shape: 'llama:100/2/1k' must be"),
        (["decode", "--shape", "falcon:64/2/1k"], "--shape: 'falcon:64/2/1k' must be"),
        (["decode", "--suite", "cpu", "--new-tokens", "8"], "--suite cpu excludes --new-tokens"),
        (["decode", "--device", "nonsense"], "--device: 'nonsense' cannot be used here"),
    ],
)
def test_bad_usage_ends_with_code_2_and_says_why(args, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *args])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and says in shown.err and shown.out == ""


def test_it_runs_without_ray(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "aisp_dist.bench.decode")
    code, found = run(capsys, *DECODE, "--shape", "llama:64/2/1k", "--peers", "generate")
    assert code == 0 and found["bench"] == "decode"
