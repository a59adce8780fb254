"""Outputs behind the S3 protocol, on a real server of it: what is there is whole, two runs never own one output, what
the server cannot do is refused, no secret is written. The laws of the store and the lease are in their own tests."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.fs as fs
import pytest
import yaml
from rows import RECORD as RUN
from rows import prompts, result, store, tables, write
from s3 import BUCKET, KEYS

from actors.counts import Counts
from aisp_dist.analysis import summary
from aisp_dist.config import ConfigError, StorageOptions, load
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease, LeaseLost, read_owners
from aisp_dist.output.verify import status, verify
from jobs import cli, prepare, settings
from jobs.progress import Progress

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(server):
    server.requests.clear()
    server.lost, server.deaf = (), False
    yield server.place()
    server.lost, server.deaf = (), False


def objects(server, place: Place) -> dict[str, bytes]:
    """Everything below a place, as the server has it."""
    prefix = place.uri.removeprefix(f"s3://{BUCKET}/") + "/"
    found = server.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): server.client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        for entry in found
    }


def test_an_output_is_the_local_one_object_for_file_and_is_read_verified_and_summed_up(server, place, tmp_path):
    local = Place.at(tmp_path)
    for where in (local, place):
        manifest.write_run(where, RUN)
        write(where, prompts(10))
    names = ("run.json", "config.yaml", "README.md")
    assert objects(server, place) == tables(local) | {name: local.read(name) for name in names}
    verdict = verify(place, prompts(10))
    assert (verdict.violations, verdict.done, verdict.failed) == ((), 8, 2)
    assert status(place) | {"owners": []} == status(local)
    files = fs.S3FileSystem(
        endpoint_override=server.address, scheme="http", region="us-east-1", anonymous=False, **KEYS
    )
    found = ds.dataset(f"{place.uri.removeprefix('s3://')}/data", filesystem=files)
    assert found.to_table().equals(ds.dataset(tmp_path / "data").to_table())
    rewards = {name: {"kind": "function", "function": "a.py:b"} for name in ("main", "words")}
    config = {"output": "o", "method": {"kind": "best_of_n"}, "generator": {"model": "m"}, "rewards": rewards}
    manifest.write_run(place, RUN | {"config": config})
    assert f"8 rows done, 2 failed, in {place}" in summary.text(summary.read(place), 1.0, 2)


def test_a_put_that_is_cut_in_half_leaves_the_old_object(server, place):
    place.write("name", b"old")
    host, port = server.address.split(":")
    key = place.uri.removeprefix(f"s3://{BUCKET}/") + "/name"
    url = server.client.generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": key})
    with socket.create_connection((host, int(port))) as line:
        path = url.split(server.address)[1]
        line.sendall(f"PUT {path} HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: 1000\r\n\r\n".encode())
        line.sendall(b"new" * 100)
    deadline = time.monotonic() + 20
    while not any(method == "PUT" and path in url for method, path, _ in server.requests[-1:]):
        assert time.monotonic() < deadline
    time.sleep(0.2)
    assert place.read("name") == b"old"


def test_lost_answers_are_asked_for_again_and_change_nothing(server, place):
    """Of three changes of a lease, and of the commit of a part, each is done and its answer lost, one after another."""
    server.requests.clear()
    server.lost = (1, 3, 5)
    lease = Lease.take(place)
    lease.renew()
    assert [owner.beat for owner in read_owners(place)] == [1]
    lease.release()
    assert read_owners(place) == []
    server.requests.clear()
    server.lost = (1, 3, 6)
    want = tables(write(server.place(), prompts(4)))
    server.lost = ()
    assert want == tables(write(server.place(), prompts(4)))


def test_many_that_change_one_object_lose_no_change(place):
    def add(name: str):
        for number in range(3):
            place.append("lines", f"{name}{number}\n".encode())

    threads = [threading.Thread(target=add, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(place.read("lines").split()) == [f"{name}{n}".encode() for name in "abc" for n in range(3)]


def test_of_many_that_take_a_lease_at_once_one_gets_it(place):
    won, lost = [], []

    def take():
        try:
            won.append(Lease.take(place))
        except ConfigError:
            lost.append(True)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 3 and won[0].held()


def test_an_orphan_finds_out_and_writes_nothing_more(server, place):
    """An orphan on a machine out of sight: its lease stood still, another has taken it and finished the work."""
    orphan = Lease.take(place, ttl=0.3)
    place.update(".staging/lease.json", lambda old: old.replace(socket.gethostname().encode(), b"elsewhere"))
    rows = store(place, still_owner=pickle.loads(pickle.dumps(orphan)).held)  # as an actor has it
    for line in rows.plan(prompts(4)):
        rows.add(result(line))
    owner = Lease.take(place)
    write(place, prompts(4), still_owner=owner.held)
    before = objects(server, place)
    with pytest.raises(LeaseLost):
        rows.flush()
    with pytest.raises(LeaseLost):
        orphan.renew()
    orphan.release()
    assert objects(server, place) == before


def test_a_store_that_ignores_conditions_is_refused(server, place):
    place.check()
    server.deaf = True
    with pytest.raises(ConfigError, match="ignores conditional writes .* two runs could own"):
        place.check()
    assert objects(server, place) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"uri": "s3://no-such-bucket/x"}, "NoSuchBucket"),
        ({"endpoint_override": "127.0.0.1:1"}, "Could not connect"),
        ({"endpoint_override": "no.such.host.invalid"}, "Could not connect"),
    ],
)
def test_a_bucket_that_is_not_there_is_refused_in_one_line(server, place, change, said):
    options = server.options.model_copy(update={k: v for k, v in change.items() if k != "uri"})
    there = Place(change.get("uri", place.uri), options)
    with pytest.raises(ConfigError, match=said) as refused:
        there.check()
    if "uri" not in change:
        with pytest.raises(ConfigError, match=r"cannot read s3://.*run\.json"):
            status(there)
    assert "\n" not in str(refused.value) and not any(secret in str(refused.value) for secret in KEYS.values())


def test_without_boto3_the_extra_is_named(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'aisp-dist\[s3\]'"):
        Place(place.uri, StorageOptions(region="nowhere")).check()


def test_metrics_keep_what_an_earlier_run_wrote(place, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    values = {"output": str(place), "prompts": {"source": str(tmp_path / "p.txt")}, "generator": {"model": "demo"}}
    rewards = {"r": {"kind": "function", "function": "a.py:b"}}
    run = load.check(values | {"rewards": rewards, "method": {"kind": "best_of_n"}})
    for _ in range(2):
        with Progress(place, run) as shown:
            for _ in range(3):  # a line a minute, and one at the end
                shown(Counts(done=1))
    assert len(place.read("metrics.jsonl").splitlines()) == 2


def test_the_commands_take_the_output_and_write_no_secret(server, place, tmp_path, monkeypatch, capsys):
    """prepare as align does it, rows, then verify and status with access from the environment alone."""
    (tmp_path / "rewards.py").write_text("def words(completions, **_):\n    return [1.0 for _ in completions]\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(3)))
    config = {
        "output": str(place),
        "prompts": {"source": "prompts.jsonl"},
        "generator": {"model": "demo"},
        "rewards": {"words": {"kind": "function", "function": "rewards.py:words"}},
        "method": {"kind": "best_of_n"},
        "save": {"rows_per_file": 2},
        "runtime": {"storage_options": {"endpoint_override": server.address, "scheme": "http", **KEYS}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    flags = ["run.yaml", "--runtime.storage_options.secret_key", KEYS["secret_key"]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aisp", "align", *flags])
    _, run, base_dir = settings.read(settings.parser("align", ""), flags)
    prepared = prepare.prepare(run, base_dir)
    assert objects(server, place) == {}, "prepare leaves nothing"
    with Lease.take(prepared.output).beating() as lease:
        manifest.write_run(prepared.output, prepared.record())
        table = pickle.loads(pickle.dumps(prepared.table()))
        rows = store(
            table.output, 2, columns={}, fingerprint=table.fingerprint, run_id=table.fingerprint[:12],
            still_owner=lease.held,
        )  # fmt: skip
        from aisp_dist.data import prompts as sources

        for line in rows.plan(sources.read(prepared.located.prompts)):
            rows.add(result(line, fails=False))
        rows.finish()
    written = b"".join(objects(server, place).values()).decode(errors="ignore") + repr(prepared)
    assert not any(secret in written for secret in KEYS.values())
    assert server.address in written, "what is no secret is recorded"
    env = os.environ | server.env | {"PYTHONPATH": str(ROOT)}
    code = f"from jobs import status, verify; verify.main([{str(place)!r}]); status.main([{str(place)!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    for said in (
        "every input is there exactly once",
        "3 done, 0 failed in 2 parts",
        "not running; `aisp verify",
    ):
        assert said in done.stdout, done.stdout + done.stderr
    with pytest.raises(SystemExit) as left:
        cli.run("align", ["run.yaml", "--output", "s3://no-such-bucket/x"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "NoSuchBucket" in said and said.count("\n") == 1
