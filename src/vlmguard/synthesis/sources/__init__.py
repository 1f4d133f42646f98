"""Sources of samples, one layout a file: what `vlmguard synthesize SOURCE` reads.

spec            read from
spa-vl          the hub: NAME's own data set there, at --revision, fetched as far as it is read
vlguard:DIR     a local copy, as NAME is laid out when downloaded: parquet, JSON, pictures in folders or archives
mine.jsonl      a JSONL file of your own (see jsonl.py)
my.py:mine      a layout of your own: a function from `Wanted` to `Source`; my.py:mine:DIR gives it a local copy

opened(spec) --> Source --iterate--> Sample | Malformed, one at a time, in the source's order
"""

from __future__ import annotations

from pathlib import Path

from vlmguard.errors import ConfigError
from vlmguard.synthesis.sources.source import Source, Wanted

__all__ = ["SOURCES", "Source", "Wanted", "opened"]

SOURCES: dict[str, str] = {
    "beavertails-v": "vlmguard.synthesis.sources.beavertails_v:beavertails_v",
    "jsonl": "vlmguard.synthesis.sources.jsonl:jsonl",
    "mis": "vlmguard.synthesis.sources.mis:mis",
    "spa-vl": "vlmguard.synthesis.sources.spa_vl:spa_vl",
    "vlguard": "vlmguard.synthesis.sources.vlguard:vlguard",
    "vlsbench": "vlmguard.synthesis.sources.vlsbench:vlsbench",
}


def opened(spec: str, *, split: str | None = None, revision: str | None = None, images: Path | None = None) -> Source:
    """The source that `spec` names; its first sample is read, so that what cannot be read says so here.

    Args:
        split: which part of the set; "train" where it has several and none is named.
        revision: a commit, branch or tag of the hub; of a local copy, what it is known as.
        images: the folder that pictures' paths are seen from, in place of where the layout has them.

    Raises:
        ConfigError: no such source, file, split or revision; no access to a gated set; nothing known in a folder.
        MissingExtra: it needs a package of the extra "synthesis".
    """
    from vlmguard import load

    if images is not None and not images.is_dir():
        raise ConfigError(f"there is no folder {images}", "Give the folder that the pictures' paths are seen from.")
    name, path = _parted(spec)
    if name not in SOURCES and ".py:" not in name:
        raise load.unknown("source", name, SOURCES)
    wanted = Wanted(name, Path(path) if path else None, split, revision, images)
    source: Source = load.entry(name, SOURCES, "source")(wanted)
    reading = iter(source)
    if next(reading, None) is None:
        raise ConfigError(f"{spec} holds no samples", "Check that it is whole.")
    reading.close()
    return source


def _parted(spec: str) -> tuple[str, str]:
    """The name of a layout, and the path that follows it or ""."""
    name, _, path = spec.partition(":")
    if name in SOURCES:
        return name, path
    if ".py:" in spec:
        file, _, rest = spec.partition(".py:")
        function, _, path = rest.partition(":")
        return f"{file}.py:{function}", path
    if Path(spec).suffix in (".jsonl", ".ndjson"):
        return "jsonl", spec
    if Path(spec).exists():
        raise ConfigError(f"{spec} does not say whose layout it has", f"Write NAME:{spec}; NAME: {', '.join(SOURCES)}.")
    return name, path
