"""Which ids are taken, at about 25 bytes an id whatever its length. Knows nothing of prompts."""

from __future__ import annotations

import hashlib

# A record: 8 bytes of the id's hash; of the input that took the id source_index (5), the content's digest (5) and the
# last occurrence number (4).
# Among 10M ids the chance that two share their hash is 3e-6. The later one would count as a repeat (`id#2`, or a failed
# row); ids stay unique and the same in every run. One in 1e12 conflicts is not seen and counts as a repeat.
_HASH, _DIGEST, _NUMBER, _WIDTH = 8, 13, 18, 22
_FILL = 64  # records of a bucket, on average: few enough to search, enough to make its own overhead small


class Ids:
    """Linear hashing (Litwin 1980): an id's hash names the bucket of its record, and one bucket is split in two after
    every _FILL ids. So memory grows evenly, and no more than one bucket is copied at a time."""

    def __init__(self) -> None:
        self._buckets = [bytearray()]
        self._count = 0

    def __contains__(self, id: str) -> bool:
        return self._find(_key(id))[1] >= 0

    def conflict(self, id: str, digest: str) -> int | None:
        """The source_index of the input that took this id, if its content differs (`digest`, in hex); else None."""
        bucket, at = self._find(_key(id))
        if at < 0 or bucket[at + _DIGEST : at + _NUMBER] == _bits(digest):
            return None
        return int.from_bytes(bucket[at + _HASH : at + _DIGEST])

    def claim(self, id: str, source_index: int, digest: str) -> str:
        """Take an id: `id` itself, or `id#2`, `id#3`, ... where that is taken."""
        key, unique = _key(id), id
        bucket, at = self._find(key)
        if at >= 0:
            first, number_at = bucket, slice(at + _NUMBER, at + _WIDTH)
            number = int.from_bytes(first[number_at])
            while at >= 0:
                number += 1
                unique = f"{id}#{number}"
                key = _key(unique)
                bucket, at = self._find(key)
            first[number_at] = number.to_bytes(_WIDTH - _NUMBER)
        bucket += key + source_index.to_bytes(_DIGEST - _HASH) + _bits(digest) + b"\0\0\0\1"
        self._count += 1
        if self._count > _FILL * len(self._buckets):
            self._split()
        return unique

    def _find(self, key: bytes) -> tuple[bytearray, int]:
        """The bucket of a hash, and where in it its record begins; -1: nowhere."""
        last = len(self._buckets) - 1
        bits = last.bit_length()
        place = int.from_bytes(key) & (1 << bits) - 1
        bucket = self._buckets[place if place <= last else place ^ 1 << bits - 1]
        at = bucket.find(key)
        while at > 0 and at % _WIDTH:  # bytes of two fields, or of two records, that happen to look like it
            at = bucket.find(key, at + 1)
        return bucket, at

    def _split(self) -> None:
        """Moves from the next bucket in turn what one more bit of the hash tells apart, into a new last one."""
        bit = len(self._buckets).bit_length() - 1
        byte, mask = _HASH - 1 - bit // 8, 1 << bit % 8
        place = len(self._buckets) - (1 << bit)
        old = bytes(self._buckets[place])
        records = [old[i : i + _WIDTH] for i in range(0, len(old), _WIDTH)]
        self._buckets[place] = bytearray(b"".join([r for r in records if not r[byte] & mask]))
        self._buckets.append(bytearray(b"".join([r for r in records if r[byte] & mask])))


def _key(id: str) -> bytes:
    return hashlib.blake2b(id.encode("utf-8"), digest_size=_HASH).digest()


def _bits(digest: str) -> bytes:
    return bytes.fromhex(digest[: 2 * (_NUMBER - _DIGEST)]).ljust(_NUMBER - _DIGEST, b"\0")
