"""Names and specs -> objects. Nothing is imported before it is asked for.

vlm("http://127.0.0.1:8000/v1#qwen")      the forms are listed in vlmguard.vlms.VLMS
guard("vlmguard-r1"), guard("my.py:Mine")  the names are listed in vlmguard.guards.GUARDS
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlmguard.errors import ConfigError, missing_extra
from vlmguard.guards import GUARDS
from vlmguard.vlms import VLMS
from vlmguard.vlms.protocol import VLM

if TYPE_CHECKING:
    from vlmguard.rewriter.rewriter import Rewriter

PACKAGED = ("assistant", "rewriter")
TRAINED_FORMAT = 1  # of a trained rewriter's rewriter.json
# Packages that an extra of ours brings: absent ones are named with the line that installs them.
EXTRAS = {"torch": "local", "transformers": "local", "peft": "local", "timm": "local", "trl": "train"}


def vlm(spec: str) -> VLM:
    """The VLM that `spec` names; see `VLMS` for its forms.

    Raises:
        ConfigError: no such form, file or name. ModelError: the model cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if spec.startswith(("http://", "https://")):
        from vlmguard.vlms.endpoint import Endpoint

        return Endpoint.from_spec(spec)
    if kind == "scripted":
        from vlmguard.vlms.scripted import Scripted

        return Scripted(rest)
    if kind == "hf" and rest:
        return _local(*_with_adapter(rest))
    if (Path(spec) / "config.json").is_file():
        return _local(spec, None)
    if kind == "packaged" and rest not in PACKAGED:
        raise unknown("packaged model", rest, PACKAGED)
    if ":" in spec and (kind == "packaged" or "." in kind or (kind and importlib.util.find_spec(kind))):
        found: VLM = made(f"vlmguard.vlms.packaged:{rest}" if kind == "packaged" else spec, VLM)
        return found
    kinds = "\n".join(f"  {form}: {what}" for form, what in VLMS.items())
    near = difflib.get_close_matches(spec, VLMS, n=1)
    raise ConfigError(f"no VLM is named {spec!r}{_or(near)}", f"Write one of:\n{kinds}")


def guard(name: str) -> Callable[..., VLM]:
    """What makes the guard `name`: one of `GUARDS`, FILE.py:NAME or PACKAGE.MODULE:NAME."""
    factory: Callable[..., VLM] = entry(name, GUARDS, "guard")
    return factory


def rewriter(spec: str) -> Rewriter:
    """The rewriter that `spec` names: packaged:rewriter, a folder that `vlmguard train` made, one of your own (FILE.py:NAME),
    or any VLM, prompted."""
    from vlmguard.rewriter.rewriter import Prompted, Rewriter

    if spec == "packaged:rewriter":
        from vlmguard.rewriter.packaged import PackagedRewriter

        return PackagedRewriter.load()
    if ".py:" in spec:
        found = named(spec)
        found = found() if isinstance(found, type) else found
        if isinstance(found, Rewriter):
            return found
        return Prompted(made(spec, VLM))
    trained = _trained(spec)
    return Prompted(vlm(spec)) if trained is None else trained


def _trained(spec: str) -> Rewriter | None:
    """A rewriter that was trained here, as its rewriter.json says: "OUT", or "hf:BASE+OUT" to name its base anew."""
    from vlmguard.rewriter.rewriter import Prompted

    base, _, adapter = spec.removeprefix("hf:").rpartition("+") if spec.startswith("hf:") else ("", "", spec)
    note = Path(adapter) / "rewriter.json"
    if not note.is_file():
        if (Path(adapter) / "run.json").is_file():
            raise ConfigError(
                f"the training in {adapter} has not ended", "Go on with it: the same command and --resume."
            )
        return None
    try:
        told = json.loads(note.read_text("utf-8"))
        threshold, instructed, version = float(told["threshold"]), bool(told["instructed"]), told["format"]
        base = base or str(told["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{note} is damaged: {error!r}", "Train the rewriter again, or mend the file.") from None
    if version != TRAINED_FORMAT:
        raise ConfigError(
            f"{note} has format {version!r}, this is {TRAINED_FORMAT}", "Use the version that trained it."
        )
    if not 0 <= threshold <= 1:
        raise ConfigError.wrong(f"threshold in {note}", expected="a probability", got=threshold)
    if base == "packaged:base":
        from vlmguard.vlms import assemble

        base = str(assemble.ensure(lambda line: None))
    alone = not (Path(adapter) / "adapter_config.json").is_file()
    return Prompted(
        _local(adapter, None) if alone else _local(base.removeprefix("hf:"), adapter), threshold, instructed
    )


def entry(name: str, known: Mapping[str, str], kind: str) -> Any:
    """What `name` stands for in a folder's dict of "module:name" strings; else as in `named`.

    Args:
        kind: what the dict holds, for the error: "guard", "attack", ...

    Raises:
        ConfigError: there is none; it names the nearest.
    """
    if name in known:
        return named(known[name])
    if ":" in name:
        return named(name)
    raise unknown(kind, name, known)


def named(reference: str) -> Any:
    """The object that FILE.py:NAME or PACKAGE.MODULE:NAME names.

    Raises:
        ConfigError: no such file, module or name. MissingExtra: it needs a package of an extra.
    """
    place, _, name = reference.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else _module(place, reference)
    found: Any = module
    for step in name.split("."):
        if not hasattr(found, step):
            public = [known for known in vars(found) if not known.startswith("_")]
            raise unknown(f"name in {place}", name, public)
        found = getattr(found, step)
    return found


def made(reference: str, protocol: type) -> Any:
    """What `reference` names if it is of `protocol`, else what that gives when called without arguments.

    Raises:
        ConfigError: it is neither.
    """
    found = named(reference)
    if isinstance(found, type) or (callable(found) and not isinstance(found, protocol)):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise ConfigError(f"{reference} cannot be called without arguments: {error}", "Give defaults.") from error
        found = found()
    if not isinstance(found, protocol):
        raise ConfigError.wrong(reference, expected=f"a {protocol.__name__}", got=type(found).__name__)
    return found


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of `known`: it names the nearest, then all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    return ConfigError(f"no {kind} is named {name!r}{_or(near)}", f"Known: {', '.join(known) or 'none'}.")


def _or(near: list[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _local(path_or_id: str, adapter: str | None) -> VLM:
    from vlmguard.vlms.local import Local

    return Local.load(path_or_id, adapter)


def _with_adapter(rest: str) -> tuple[str, str | None]:
    """BASE+ADAPTER; a folder whose own name has a plus is a base."""
    if "+" not in rest or Path(rest).exists():
        return rest, None
    base, _, adapter = rest.partition("+")
    return base, adapter


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        raise ConfigError(f"there is no file {path}{_or(near)}", "Check the path.")
    name = f"vlmguard_file_{path.stem}_{abs(hash(path.resolve())):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with _importing(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(name: str, reference: str) -> ModuleType:
    with _importing(reference):
        return importlib.import_module(name)


@contextmanager
def _importing(reference: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            raise missing_extra(package, EXTRAS[package]) from error
        raise ConfigError(f"{reference}: {error}", "Install it, or write FILE.py:NAME.") from error
    except (ImportError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{reference} cannot be imported: {error}", "Write PACKAGE.MODULE:NAME.") from error
