"""One output directory, local or behind the S3 protocol, and the changes that may be made to it. Each change is atomic,
whenever the process is killed. Does not know what the files hold.

Locally, and on shared POSIX file systems, a write goes to a file in .staging/ that is forced to disk and then renamed.
On S3 an object appears when its upload is complete, so a write is one PUT. Reads go through pyarrow's file systems.
Changes of an object go through boto3 (the optional extra `s3`), since pyarrow's S3 has no conditional PUT.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs

from aisp_dist.config import ConfigError, StorageOptions, known_place

PART = re.compile(r"part-\d{6,}\.parquet")  # name of a part file
_CONNECT, _REQUEST = 5.0, 30.0  # seconds; three attempts each
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict")  # answers of a conditional request
_MISSING = ("NoSuchKey", "404")  # the second where an answer has no body
_IGNORED = (
    "ignores conditional writes (If-None-Match, If-Match), so that two runs could own one output; give an output in a "
    "store that honours them"
)
Fence = Callable[[], None]  # raises where a change may not be made any more


@dataclass(frozen=True)
class Place:
    """uri: an absolute path, or s3://bucket/path. Names of files and folders in it are relative, with forward slashes.
    Pickles with its secrets; its repr shows none."""

    uri: str
    options: StorageOptions = field(default=StorageOptions(), repr=False)

    @classmethod
    def at(cls, output: str | Path, options: StorageOptions | None = None) -> Place:
        """The place that a user names; a local path may be relative to the current directory. Raises ConfigError."""
        try:
            text = known_place(str(output))
        except ValueError as error:
            raise ConfigError(f"output: {error}") from None
        uri = text.rstrip("/") if text.startswith("s3://") else str(Path(output).absolute())
        return cls(uri, options or StorageOptions())

    @property
    def remote(self) -> bool:
        return self.uri.startswith("s3://")

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, folder: str) -> Place:
        return Place(f"{self.uri}/{folder}", self.options)

    def open(self, name: str) -> pa.NativeFile | None:
        """A file for random access; None if it does not exist."""
        files, base = self._files()
        try:
            return files.open_input_file(f"{base}/{name}")
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        file = self.open(name)
        if file is None:
            return None
        with file:
            return bytes(file.read())

    def names(self, folder: str) -> list[str]:
        """Files and folders directly in a folder, sorted; empty if it does not exist."""
        return sorted(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file directly in a folder, by name; 0 for folders."""
        files, base = self._files()
        found = files.get_file_info(fs.FileSelector(f"{base}/{folder}", allow_not_found=True))
        return {info.base_name: info.size or 0 for info in found if info.type != fs.FileType.NotFound}

    def parts(self, folder: str) -> list[str]:
        """Names of a table's part files, sorted. Whatever else lies in the folder is not the run's: no reader opens it,
        `verify` names it."""
        return [name for name in self.names(folder) if PART.fullmatch(name)]

    def dataset(self, folder: str) -> ds.Dataset:
        """The rows of a table's part files. Raises FileNotFoundError where there is none."""
        files, base = self._files()
        names = [f"{base}/{folder}/{name}" for name in self.parts(folder)]
        if not names:
            raise FileNotFoundError(f"{self}/{folder} holds no part file")
        return ds.dataset(names, filesystem=files, format="parquet")

    def write(self, name: str, data: bytes, fence: Fence | None = None) -> None:
        """Replace a file's content. Raises OSError; then the file has the old content, or rarely the new one.

        fence: called at the last moment; what it raises prevents the write. Locally no `update` comes between it and
        the write. On S3 the write fails where the object has changed since, and the fence is asked again.
        """
        if self.remote:
            if fence is None:
                self._s3("put_object", name, Body=data)
            else:
                self._fenced(name, fence, lambda version: self._put_if(name, data, version))
            return
        path, temporary = Path(self.uri, name), Path(self.uri, ".staging", f"{secrets.token_hex(8)}.tmp")
        for folder in (path.parent, temporary.parent):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            with self._locked() if fence else nullcontext():
                if fence:
                    fence()
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_dir(path.parent)

    def remove(self, name: str, fence: Fence | None = None) -> None:
        """Remove a file, if it exists. fence: as in `write`."""
        if self.remote:
            if fence is None:
                self._s3("delete_object", name)
            else:
                self._fenced(name, fence, lambda version: self._delete_if(name, version))
        elif (path := Path(self.uri, name)).exists():
            with self._locked() if fence else nullcontext():
                if fence:
                    fence()
                path.unlink(missing_ok=True)
            _sync_dir(path.parent)

    def clear(self, folder: str, names: Collection[str]) -> None:
        """Remove these files of a folder; and the folder, if nothing else is in it."""
        for name in names:
            self.remove(f"{folder}/{name}")
        if not self.remote:
            with suppress(OSError):  # it is gone, or another process has put a file there
                Path(self.uri, folder).rmdir()

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a file's content (None: there is no file) by change(content), with no other process's change in
        between. `change` is called again where another process was faster, and an error that it raises ends the
        update. Two processes must not make the same change of the same content."""
        if not self.remote:
            with self._locked():
                old = self.read(name)
                if (new := change(old)) != old:
                    self.write(name, new)
            return

        def changed() -> bool:
            old, version = self._read_version(name)
            return (new := change(old)) == old or self._put_if(name, new, version)

        self._again(name, changed)

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of a file. On S3 this writes the whole object again."""
        if self.remote:
            self.update(name, lambda old: (old or b"") + data)
        else:
            with Path(self.uri, name).open("ab") as stream:
                stream.write(data)

    def collect(self) -> None:
        """Remove the temporary files of killed writers. Only for a caller who knows that nobody else writes here."""
        if not self.remote:  # on S3 an incomplete upload leaves nothing
            for temporary in Path(self.uri, ".staging").glob("*.tmp"):
                temporary.unlink()

    def check(self) -> None:
        """Raise ConfigError where nothing can be written, or where two runs could own the place. Leaves no files."""
        if self.remote:
            self._check_bucket()
            return
        path = Path(self.uri)
        parent = next(p for p in (path, *path.parents) if p.exists())
        if not parent.is_dir():
            raise ConfigError(f"output: {str(parent)!r} is a file; give a directory")
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".aisp-", dir=parent))  # permissions alone do not tell, least of all root
        except OSError as error:
            raise ConfigError(
                f"output: nothing can be written into {str(parent)!r} ({error.strerror}); give a directory where it can"
            ) from None

    def _check_bucket(self) -> None:
        probe = f".staging/probe-{secrets.token_hex(8)}"
        try:
            if not self._put_if(probe, b"1", {"IfNoneMatch": "*"}):
                raise OSError(f"{self}/{probe}: a new object is said to be there already")
            try:
                if self.read(probe) != b"1":  # by pyarrow
                    raise OSError(f"{self}/{probe}: what was written cannot be read")
                for number, wrong in enumerate(({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'}), 2):
                    if self._put_if(probe, str(number).encode(), wrong):
                        raise ConfigError(f"output: the store of {self} {_IGNORED}")
            finally:
                self.remove(probe)
        except OSError as error:
            raise ConfigError(
                f"output: cannot write to {self}: {error}; give a bucket that is there and that your credentials may "
                "write to (runtime.storage_options, or AWS's environment variables)"
            ) from None

    def _files(self) -> tuple[fs.FileSystem, str]:
        if self.remote:
            return _filesystem(self.options), self.uri.removeprefix("s3://")
        return fs.LocalFileSystem(), self.uri

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A lock for one read and one write. Its file stays, since a lock on a removed file protects nothing."""
        path = Path(self.uri, ".staging", "lock")
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _REQUEST
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:  # its holder is frozen
                        raise OSError(errno.EAGAIN, f"{path} has been locked for {_REQUEST:g} s") from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(handle)

    def _read_version(self, name: str) -> tuple[bytes | None, dict[str, str]]:
        """An object's content, and the condition under which a PUT replaces exactly this version."""
        try:
            found = self._s3("get_object", name)
        except FileNotFoundError:
            return None, {"IfNoneMatch": "*"}
        return found["Body"], {"IfMatch": found["ETag"]}

    def _fenced(self, name: str, fence: Fence, change: Callable[[dict[str, str]], bool]) -> None:
        """Make a change of exactly the version of an object that was there when the fence was asked."""

        def changed() -> bool:
            try:
                version = {"IfMatch": self._s3("head_object", name)["ETag"]}
            except FileNotFoundError:
                version = {"IfNoneMatch": "*"}
            fence()
            return change(version)

        self._again(name, changed)

    def _again(self, name: str, changed: Callable[[], bool]) -> None:
        for _ in range(50):
            if changed():
                return
            time.sleep(random.uniform(0, 0.2))
        raise OSError(errno.EAGAIN, f"{self}/{name}: others changed it 50 times while this process tried to")

    def _delete_if(self, name: str, version: dict[str, str]) -> bool:
        """DELETE of a version, where the store knows conditional deletes; False where another version is there."""
        if "IfMatch" not in version:
            return True  # there is none
        try:
            self._s3("delete_object", name, **version)
        except FileNotFoundError:
            pass  # another removed it, or our own first request did
        except FileExistsError:
            return False
        except OSError as error:
            if "NotImplemented" not in str(error):
                raise
            self._s3("delete_object", name)
        return True

    def _put_if(self, name: str, data: bytes, condition: dict[str, str]) -> bool:
        """PUT under a condition; False where it fails. If an answer was lost and the request repeated, the condition
        fails because of our own first request, which the content then shows."""
        try:
            self._s3("put_object", name, Body=data, **condition)
        except (FileExistsError, FileNotFoundError):
            return self.read(name) == data
        return True

    def _s3(self, operation: str, name: str, **parameters: Any) -> Any:
        """One request. Raises FileExistsError where a condition fails, FileNotFoundError where the object does not
        exist, else OSError with the reason in one line."""
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self.uri.removeprefix("s3://").partition("/")
        try:
            answer = getattr(_client(self.options), operation)(Bucket=bucket, Key=f"{key}/{name}", **parameters)
            return answer | {"Body": answer["Body"].read()} if "Body" in answer else answer
        except ClientError as error:
            code = error.response["Error"]["Code"]
            kind = FileNotFoundError if code in _MISSING else FileExistsError if code in _CONFLICTS else OSError
            raise kind(f"{self}/{name}: {' '.join(str(error).split())}") from None
        except BotoCoreError as error:
            raise OSError(f"{self}/{name}: {' '.join(str(error).split())}") from None


def _sync_dir(path: Path) -> None:
    """Force a directory to disk: only then is a rename in it on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such call for directories
            raise
    finally:
        os.close(handle)


def _settings(options: StorageOptions) -> dict[str, str]:
    """The options that are given, in clear; the endpoint from AWS's environment variables where it is not, since
    pyarrow does not look there."""
    found = {
        name: value if isinstance(value, str) else value.get_secret_value()
        for name, value in options
        if value is not None
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if "endpoint_override" not in found and endpoint:
        found["scheme"], _, found["endpoint_override"] = endpoint.rstrip("/").rpartition("://")
    return found


@cache
def _filesystem(options: StorageOptions) -> fs.FileSystem:
    return fs.S3FileSystem(**_settings(options), connect_timeout=_CONNECT, request_timeout=_REQUEST)


@cache
def _client(options: StorageOptions) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigError(
            "output: writing to S3 needs boto3, which is not installed; pip install 'aisp-dist[s3]'"
        ) from None
    given = _settings(options)
    endpoint = given.get("endpoint_override")
    plain = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = Config(
        connect_timeout=_CONNECT,
        read_timeout=_REQUEST,
        retries={"mode": "standard", "total_max_attempts": 3},
        **({"s3": {"addressing_style": "path"}, **plain} if endpoint else {}),  # what every store of the protocol knows
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=f"{given.get('scheme', 'https')}://{endpoint}" if endpoint else None,
        region_name=given.get("region"),
        aws_access_key_id=given.get("access_key"),
        aws_secret_access_key=given.get("secret_key"),
        aws_session_token=given.get("session_token"),
        config=config,
    )
