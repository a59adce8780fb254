"""The memory of ids: what a dict of all ids would answer, at a fifth of its size."""

import hashlib
import random
import tracemalloc

import pytest

from aisp_dist.data import seen


class Plain:
    """The same by a dict of every id."""

    def __init__(self):
        self.taken = {}

    def conflict(self, id, digest):
        first, other = self.taken.get(id, (None, digest))
        return None if digest == other else first

    def claim(self, id, source_index, digest):
        names = [id, *(f"{id}#{i}" for i in range(2, len(self.taken) + 2))]
        unique = next(name for name in names if name not in self.taken)
        self.taken[unique] = (source_index, digest)
        return unique


def digest(content):
    return hashlib.blake2b(str(content).encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize("fill", [1, 3, 64])
@pytest.mark.parametrize("names", [3, 40, 10**6])
def test_it_answers_as_a_dict_does(fill, names, monkeypatch):
    monkeypatch.setattr(seen, "_FILL", fill)
    draw, ids, plain = random.Random(names), seen.Ids(), Plain()
    for at in range(700):
        id = str(draw.randrange(names)) + "#2" * (draw.random() < 0.3)  # which may be one that a repeat took
        content = draw.choice(["", digest(draw.randrange(2))])
        assert (id in ids) == (id in plain.taken)
        assert ids.conflict(id, content) == plain.conflict(id, content)
        assert ids.claim(id, at, content) == plain.claim(id, at, content)
    assert all(ids.conflict(id, digest("new")) == first for id, (first, _) in plain.taken.items())


def test_bytes_of_a_record_that_look_like_a_hash_are_not_one(monkeypatch):
    ids = seen.Ids()
    monkeypatch.setattr(seen, "_key", lambda id: bytes.fromhex(id))
    ids.claim("ff" * 8, 0x1122334455, "66778899aa" * 4)
    for start in range(1, 15):
        look = bytes(ids._buckets[0])[start : start + 8]
        assert ids.conflict(look.hex(), "") is None
        ids.claim(look.hex(), 0, "")
    assert ids.conflict("ff" * 8, "") == 0x1122334455


def test_a_repeat_is_numbered_without_counting_the_others(monkeypatch):
    hashed, plain = [], seen._key
    monkeypatch.setattr(seen, "_key", lambda id: hashed.append(id) or plain(id))
    ids = seen.Ids()
    got = [ids.claim("a", i, digest(0)) for i in range(1000)]
    assert len(set(got)) == 1000 and got[-1] == "a#1000"
    assert len(hashed) <= 5 * 1000


@pytest.mark.parametrize("repeats", [1, 2])
def test_an_id_costs_at_most_32_bytes_at_any_moment(repeats):
    tracemalloc.start()
    try:
        ids, start = seen.Ids(), 0
        for at in range(15_000):
            ids.claim(f"prompt-{at // repeats}", at, "0" * 32)
            if at % 1000 == 0:
                held, peak = tracemalloc.get_traced_memory()
                start = held if at == 1000 else start
                assert at <= 1000 or peak - start <= 32 * at, at
    finally:
        tracemalloc.stop()
