"""Finds the checkpoint that a model's name stands for (embedded, a local directory or GGUF file, a hub id) and the
digest of its files. No torch, so that a configuration can be checked before anything heavy is imported."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from aisp_dist import demo
from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import gguf, intact

_IN_PACKAGE = re.compile(r"([A-Za-z_]\w*):([^:]+\.gguf)")  # package:file.gguf
Role = Literal["generator", "reward"]
EMBEDDED: dict[tuple[Role, str], str] = {
    ("generator", "demo"): "base",
    ("reward", "demo"): "reward",
    ("reward", "demo-judge"): "judge",
}


def locate(key: str, name: str, role: Role) -> str:
    """The absolute directory or GGUF file, or the hub id, that transformers loads for a configured model name.

    key: the configuration's, for messages. Raises ConfigError for what is missing, is no transformers checkpoint with
    all of its weights, or has pickled weights only; and for a GGUF file that is not whole or, in a reward, any.
    """
    if embedded := EMBEDDED.get((role, name)):
        return str(demo.path(embedded))
    path = Path(name).expanduser()
    if role == "generator" and not path.exists() and (inside := _IN_PACKAGE.fullmatch(name)):
        path = _in_package(key, name, *inside.groups())
    if path.is_file() or (path.suffix == ".gguf" and not path.exists()):  # no hub id with transformers' files ends so
        if path.suffix != ".gguf" or role != "generator":
            what = "a GGUF file, which rewards are not read from" if path.suffix == ".gguf" else "a file"
            raise ConfigError(f"{key}: {name!r} is {what}; {intact.CHECKPOINT}")
        if not path.exists():
            raise ConfigError(f"{key}: there is no file {name!r}; name a GGUF file that exists")
        if fault := gguf.fault(path):
            raise ConfigError(f"{key}: {name!r} {fault}")
        return str(path.resolve())
    if not path.is_dir():
        if path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ConfigError(f"{key}: {name!r} is not a directory; name one that holds a transformers checkpoint")
        return name
    if fault := intact.fault(path, adaptable=role == "generator"):
        raise ConfigError(f"{key}: {name!r} {fault}")
    return str(path.resolve())


def locate_adapter(settings: Generator) -> str | None:
    """The absolute directory of generator.adapter. Raises ConfigError for what is missing, is no LoRA adapter in
    safetensors or changes more than LoRA does, or more than vLLM can where that decodes, and where peft is missing."""
    if settings.adapter is None:
        return None
    path = Path(settings.adapter).expanduser()
    fault: str | None = f"is not a directory; {intact.NO_ADAPTER}"
    if path.is_dir():
        fault = intact.adapter_fault(path, merges=settings.engine != "vllm")
    if fault:
        raise ConfigError(f"generator.adapter: {settings.adapter!r} {fault}")
    return str(path.resolve())


def adapter_digest(place: str) -> str:
    """128 bits over the files that are read of an adapter. place: what `locate_adapter` answered."""
    whole = hashlib.blake2b(digest_size=16)
    for name in intact.ADAPTER:
        whole.update(f"{name}\0{(file := Path(place, name)).stat().st_size}\0".encode())
        _feed(whole, file)
    return whole.hexdigest()


def _in_package(key: str, name: str, package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: what its code needs may be missing."""
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    if not folders:
        raise ConfigError(
            f"{key}: {name!r} names a file of the package {package!r}, which is not installed here; install it (pip "
            "install --no-deps leaves out what only its code needs), or name the file by its path"
        )
    if found := next((folder / file for folder in folders if (folder / file).is_file()), None):
        return found
    there = sorted(str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf"))
    raise ConfigError(f"{key}: {name!r}: the package {package!r} has no such file; it has {', '.join(there) or 'none'}")


def is_embedded(place: str) -> bool:
    """Whether a model's name, or what `locate` answered for it, is one of the demo's; also where another process
    located it in another copy of this package."""
    of_demo = [name for _, name in EMBEDDED] + [demo.path(folder).parts[-3:] for folder in EMBEDDED.values()]
    return place in of_demo or Path(place).parts[-3:] in of_demo


def value_network(key: str, name: str) -> dict[str, Any]:
    """value.json of a directory that `aisp train-value` wrote. Raises ConfigError if there is none."""
    file = Path(name).expanduser() / "value.json"
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return about | {"published": about["published"], "digests": about["digests"], "model": about["model"]}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{key}: {name!r} holds no value network ({type(error).__name__}: {error}); name a directory that "
            "`aisp train-value` wrote"
        ) from None


def cached(place: str, revision: str | None) -> Path | None:
    """The directory or GGUF file of what `locate` answered. For a hub id, the directory in the local cache, None if it
    is not there. No network."""
    if Path(place).exists():
        return Path(place)
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(place, "config.json", revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


@functools.cache
def digest(key: str, place: str, revision: str | None) -> str:
    """128 bits over a GGUF file or every file of a local directory; for a hub checkpoint, and its snapshot in the hub's
    cache, the commit, which is a digest already.

    place: what `locate` answered. Raises ConfigError for a hub id that cannot be resolved.
    """
    whole = hashlib.blake2b(digest_size=16)
    if Path(place).is_file():
        _feed(whole, Path(place))
        return whole.hexdigest()
    if not Path(place).is_dir():
        return commit(key, place, revision)
    if (folder := Path(place)).parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.name
    for file in sorted(f for f in Path(place).iterdir() if f.is_file() and not f.name.startswith(".")):
        whole.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        _feed(whole, file)
    return whole.hexdigest()


def _feed(whole: hashlib.blake2b, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            whole.update(chunk)


def commit(key: str, repo: str, revision: str | None) -> str:
    """The commit that a hub id stands for, from the hub or, if that cannot be reached, from the local cache. Raises
    ConfigError if neither knows it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        config = hf_hub_download(repo, "config.json", revision=revision)
    except HFValidationError:
        raise ConfigError(f"{key}: {repo!r} is neither a directory nor a hub id; give one that exists") from None
    except Exception as error:
        raise ConfigError(
            f"{key}: {repo!r} is not a directory here, and as a hub id it could not be fetched "
            f"({type(error).__name__}); give a directory that exists, or a hub id that is reachable or cached"
        ) from None
    return Path(config).parent.name  # .../snapshots/<commit>/config.json
