"""Where input lines come from: files, a directory or a hub dataset, read one line at a time. Owns which files a source
names, the name and number of a line, and the shuffle; knows nothing of formats (files.py), prompts, ids or tokens.

No record is ever skipped: what cannot be read comes as Broken, in its place. Local files are read as they are at that
moment: nothing comes from the cache of `datasets`, which knows a directory by its name.
"""

from __future__ import annotations

import glob
import os
import pickle
import random
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aisp_dist import demo
from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data.encoding import NoText
from aisp_dist.data.files import READERS, Broken, Columns, Row, reader

# Ends of names of data that `datasets` reads and files.py does not.
_UNREAD = (".arrow", ".tsv", ".xml", ".orc", ".avro", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".7z", ".gz")


class Line(NamedTuple):
    """file indexes Source.names; number: files.Reader."""

    file: int
    number: int
    row: Row | Broken


@dataclass(frozen=True)
class Source:
    names: tuple[str, ...]  # of the files, short and distinct: they go into ids and must not depend on the machine
    lines: Iterator[Line]


def open_source(settings: Prompts) -> Source:
    """The lines of `settings.source`, shuffled if asked. ConfigError: nothing there, unreadable, or the first readable
    row of a file lacks the prompt's or the id's column; the latter only when that row is reached.

    A line (of Parquet 1024 rows, of a .json array the file) is in memory at a time. A shuffle reads all lines first,
    into a temporary file (TMPDIR) as large as the wanted columns, and holds 17 bytes a line."""
    source = _open(settings)
    if settings.shuffle_seed is None:
        return source
    return Source(source.names, _shuffled(source.lines, settings.shuffle_seed))


def check(settings: Prompts) -> None:
    """Raise ConfigError as `open_source` does, but for the first row of every file, and where none of the files has a
    kept column. Reads one row a file."""
    files = _local_files(settings)
    if files is None or len(files) == 1:
        next((line for line in _open(settings).lines if isinstance(line.row, dict)), None)
        return
    kept: set[str] = set()
    for file in files:
        rows = (row for _, row in _records(file, _columns(settings, several=True)) if isinstance(row, dict))
        kept |= next(rows, {}).keys()
    if missing := [name for name in settings.keep if name not in kept]:
        raise ConfigError(
            f"prompts.keep: none of the {len(files)} files of {settings.source!r} has a column "
            f"{', '.join(map(repr, missing))} in its first row; keep columns that are there"
        )


def is_local(name: str) -> bool:
    """Whether a source is a path or a pattern of this machine, and not a hub id."""
    path = Path(name)
    return path.exists() or glob.has_magic(name) or reader(path) is not None or name.startswith((".", "/", "~"))


def exists(name: str) -> bool:
    """Whether a path is there, or a pattern matches a file."""
    return Path(name).exists() or (glob.has_magic(name) and next(glob.iglob(name, recursive=True), None) is not None)


def _columns(settings: Prompts, several: bool = False) -> Columns:
    """Of several files, some may lack a kept column that others have."""
    required = dict.fromkeys([settings.column, *([settings.id_column] if settings.id_column else [])])
    return Columns((*required,), settings.keep) if several else Columns((*(required | dict.fromkeys(settings.keep)),))


def _open(settings: Prompts) -> Source:
    files = _local_files(settings)
    if files is None:
        name = os.path.expanduser(settings.source)
        return Source((_readable(Path(name).name) if is_local(name) else name,), _dataset(name, settings))
    root = _root(settings, files)
    names = tuple(_readable(Path(os.path.relpath(file, root)).as_posix()) for file in files)
    return Source(names, _lines(files, settings))


def _readable(name: str) -> str:
    """A file's name for ids, which are UTF-8: bytes of it that are not are spelled out, as in `caf\\xe9.jsonl`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _local_files(settings: Prompts) -> list[Path] | None:
    """The files of a local source, in name order; None for what `datasets` reads: hub ids, and what its save_to_disk
    wrote. Raises ConfigError."""
    name = str(demo.path("prompts")) if settings.source == "demo" else os.path.expanduser(settings.source)
    path = Path(name)
    if not is_local(name) or (path.is_dir() and _is_saved(path)):
        return None
    if settings.revision is not None or (settings.subset is not None and not path.is_dir()):
        raise ConfigError(
            f"prompts.subset and prompts.revision belong to hub datasets, not to {name!r}: leave them null"
        )
    if path.is_dir():
        return _directory(path, settings)
    files = [path] if path.exists() or not glob.has_magic(name) else sorted(map(Path, glob.glob(name, recursive=True)))
    if not files:
        raise ConfigError(f"prompts.source: {name!r} matches no file; give a path or pattern that does")
    for file in files:
        if not reader(file):
            raise ConfigError(f"prompts.source: {str(file)!r} is not one of {', '.join(READERS)} (or these with .gz)")
        if not file.is_file():
            raise ConfigError(f"prompts.source: {str(file)!r} is not there or is not a file; give one that exists")
    return files


def _root(settings: Prompts, files: Sequence[Path]) -> str:
    source = Path(os.path.expanduser(settings.source))
    return str(source) if source.is_dir() else os.path.commonpath([file.parent for file in files])


def _is_saved(folder: Path) -> bool:
    """Whether Dataset.save_to_disk or DatasetDict.save_to_disk wrote the directory."""
    return any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json"))


def _directory(folder: Path, settings: Prompts) -> list[Path]:
    """The files that a directory holds of `settings.split`, as `datasets` finds them: by `configs` in the README.md, or
    by split names in file names (https://huggingface.co/docs/datasets/repository_structure). Raises ConfigError, for
    files of data that cannot be read too: none is left out without a word."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    card = folder / "README.md"
    try:
        header = DatasetCard.load(card).data if card.is_file() else DatasetCardData()
        configs = MetadataConfigs.from_dataset_card_data(header)
    except Exception as error:  # YAML of any kind
        raise ConfigError(f"prompts.source: the YAML of {str(card)!r} cannot be read ({error}); fix it") from None
    chosen = settings.subset
    if chosen is None and configs:
        chosen = configs.get_default_config_name()
        if chosen is None:
            raise ConfigError(f"prompts.subset: {str(folder)!r} holds several tables; name one of {', '.join(configs)}")
    if chosen is not None and chosen not in configs:
        there = ", ".join(configs) or "no `configs` in a README.md"
        raise ConfigError(f"prompts.subset: {chosen!r} is not in {str(folder)!r}, which has {there}")
    about = configs[chosen] if chosen is not None else {}
    base = (folder / about.get("data_dir", "")).resolve()
    given = about.get("data_files")
    try:
        patterns = sanitize_patterns(given) if given is not None else get_data_patterns(base.as_posix())
        known = [*READERS, *_UNREAD]
        found = DataFilesDict.from_patterns(patterns, base_path=base.as_posix(), allowed_extensions=known)
    except FileNotFoundError:
        found = {}
    if settings.split not in found:
        there = f"it has {', '.join(map(str, found))}" if found else f"it has no {', '.join(READERS)} file"
        raise ConfigError(f"prompts.source: {str(folder)!r} has no split {settings.split}: {there}")
    files = [folder / os.path.relpath(name, folder.resolve()) for name in sorted(set(found[settings.split]))]
    if unread := [file for file in files if reader(file) is None and file.suffix in _UNREAD]:
        raise ConfigError(
            f"prompts.source: {str(unread[0])!r} is not one of {', '.join(READERS)} (or these with .gz); convert it, "
            "or move it out of the directory"
        )
    return [file for file in files if reader(file)]


def _records(file: Path, columns: Columns) -> Iterator[tuple[int, Row | Broken]]:
    """The records of a file with those of the columns that they have. Raises ConfigError where the first row lacks a
    required one, or where the file cannot be read on."""
    wanted, number, checked = (*columns.required, *columns.optional), 0, False
    read = reader(file)
    assert read
    try:
        for number, row in read(file, columns):
            if isinstance(row, dict):
                if not checked:
                    columns.check(row, f"{str(file)!r}, line {number}")
                    checked = True
                row = {name: row[name] for name in wanted if name in row}
            yield number, row
    except ConfigError:
        raise
    except NoText as error:
        raise ConfigError(f"prompts.source: {str(file)!r} is not text: {error}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(
            f"prompts.source: {str(file)!r} cannot be read after line {number} ({type(error).__name__}: {error}); "
            "repair or replace it"
        ) from error


def _lines(files: Sequence[Path], settings: Prompts) -> Iterator[Line]:
    columns = _columns(settings, several=len(files) > 1)
    for index, file in enumerate(files):
        for number, row in _records(file, columns):
            yield Line(index, number, row)


def _dataset(name: str, settings: Prompts) -> Iterator[Line]:
    """A hub id, or a directory that save_to_disk made, through `datasets`."""
    import datasets

    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
            data = data[settings.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            _check_on_hub(name, settings)
            how = {"split": settings.split, "revision": settings.revision, "streaming": settings.streaming}
            data = datasets.load_dataset(name, settings.subset, **how)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub, the network or a foreign file says
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(
            f"prompts.source: {name!r} (subset {settings.subset}, split {settings.split}) is no file here and cannot "
            f"be loaded as a dataset ({what}); give an existing path, or a hub id that is reachable or cached"
        ) from error
    columns = _columns(settings)
    columns.check(data.column_names or list(next(iter(data), {})), repr(name))  # a stream may not know them before
    rows = data.select_columns(list(columns.required))
    return (Line(0, number, row) for number, row in enumerate(rows, 1))


def _check_on_hub(name: str, settings: Prompts) -> None:
    """Raise ConfigError for a name without an owner that the hub does not answer for: `datasets` would give what it has
    cached under that name, of whatever directory was once called so."""
    import datasets

    if "/" not in name:
        builder = datasets.load_dataset_builder(name, settings.subset, revision=settings.revision)
        if type(builder).__module__.startswith("datasets.packaged_modules.cache"):
            raise ConfigError(
                f"prompts.source: {name!r} is no file or directory here, and the hub cannot be asked for it; give an "
                "existing path, or a hub id with its owner, as in owner/name"
            )


def _shuffled(lines: Iterator[Line], seed: int) -> Iterator[Line]:
    """A permutation of all lines: sorted by a random key each. They wait in a nameless file, gone with this process."""
    with tempfile.TemporaryFile() as spool:
        parts = [(array("d"), array("q")) for _ in range(256)]  # by key: only one at a time is sorted
        draw = random.Random(seed).random  # the one stream that Python promises never to change
        for line in lines:
            key = draw()
            keys, offsets = parts[int(key * len(parts))]
            keys.append(key)
            offsets.append(spool.tell())
            pickle.dump(tuple(line), spool)  # JSON has no dates, decimals and bytes; none but us can write the file
        for keys, offsets in parts:
            for i in sorted(range(len(keys)), key=keys.__getitem__):
                spool.seek(offsets[i])
                yield Line(*pickle.load(spool))
