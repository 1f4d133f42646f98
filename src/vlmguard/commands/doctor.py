"""`vlmguard doctor`: what is installed, cached and reachable, and what to do where something lacks."""

import asyncio
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal, TypeAlias

from rich.table import Table
from rich.text import Text

from vlmguard.commands.terminal import busy, print_json, quietly, shown, stdout

State: TypeAlias = Literal["ok", "note", "broken"]

DISTRIBUTION = "vlmguard-r1"
KEYS = {
    "VLMGUARD_API_KEY": "endpoints that ask for a key",
    "OPENAI_API_KEY": "api.openai.com, where VLMGUARD_API_KEY is not set",
    "HF_TOKEN": "gated models of the Hugging Face hub",
}
SPACE_TO_BUILD_BYTES = 700 * 10**6  # what assembling the base takes: wheels, both models, the result
REACH_SECONDS = 5.0
STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}
IN_PROCESS = ("packaged:", "hf:")  # specs of models that need the extra "local"


@dataclass(frozen=True)
class Check:
    """One line. `broken` is what the models asked about cannot do without; `note` is what one may want to know."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def run_doctor(rewriter: str, target: str | None, *, as_json: bool) -> int:
    """Prints every check; 1 if something is broken that `rewriter` or `target` needs."""
    with busy("Looking"), quietly():
        checks = list(examine(rewriter, target))
    broken = any(check.state == "broken" for check in checks)
    if as_json:
        print_json({"ok": not broken, "checks": [vars(check) for check in checks]})
    else:
        stdout().print(_table(checks))
    return int(broken)


def examine(rewriter: str, target: str | None) -> Iterator[Check]:
    """The checks for the models that the two specs name."""
    specs = [spec for spec in (rewriter, target) if spec]
    yield _python()
    yield Check(DISTRIBUTION, "ok", version())
    in_process = any(spec.startswith(IN_PROCESS) or Path(spec, "config.json").is_file() for spec in specs)
    yield from packages("local", needed=in_process)
    yield from packages("train", needed=False, without="local")
    if any(spec.startswith("packaged:") for spec in specs):
        yield _cache()
        yield _disk()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU", "ok", f"{threads} threads")
    for key, use in KEYS.items():
        is_set = bool(os.environ.get(key))
        yield Check(key, "ok" if is_set else "note", "set" if is_set else f"not set; only for {use}")
    for spec in dict.fromkeys(specs):
        if spec.startswith(("http://", "https://")):
            yield asyncio.run(reach(spec))


def version() -> str:
    """Our own version; where only the source tree is on the path there is none."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "not installed (run from source)"


def packages(extra: str, *, needed: bool, without: str = "") -> Iterator[Check]:
    """The packages of one of our extras, less those of another; one line for all where none is there."""
    absent: State = "broken" if needed else "note"
    install = f'pip install "{DISTRIBUTION}[{extra}]"'
    others = requirements(without) if without else []
    found = {name: _installed(name) for name in requirements(extra) if name not in others}
    if found and not any(found.values()):
        yield Check(f"[{extra}]", absent, "not installed", install)
        return
    for name, installed in found.items():
        yield Check(name, "ok", installed) if installed else Check(name, absent, "not installed", install)
    if extra == "local":
        yield from _fit(needed)


def requirements(extra: str) -> list[str]:
    """The packages that the extra adds, by the metadata of our own distribution."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    names = [re.split(r"[\s<>=!~;\[]", line)[0] for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    return [name for name in names if name != DISTRIBUTION]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fit(needed: bool) -> Iterator[Check]:
    """Faults that only show when the packages are used together."""
    bad: State = "broken" if needed else "note"
    torch, torchvision = _installed("torch"), _installed("torchvision")
    if torch and torchvision:
        pins = [line for line in metadata.requires("torchvision") or () if re.match(r"torch\s*\(?==", line)]
        wanted = re.sub(r"[^\d.].*", "", pins[0].split("==")[1]) if pins else torch
        if torch.split("+")[0] != wanted:
            both = f"pip install torch=={wanted} torchvision=={torchvision.split('+')[0]}"
            yield Check("torch + torchvision", bad, f"torchvision {torchvision} was built for torch {wanted}", both)
    if _installed("rapidocr-onnxruntime"):
        try:
            import_module("cv2")
        except ImportError as error:
            remedy = "pip install --force-reinstall --no-deps opencv-python-headless"
            yield Check("OpenCV", bad, f"cannot be imported ({error})", remedy)


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    remedy = "" if good else "install Python 3.11 or newer"
    return Check("Python", "ok" if good else "broken", platform.python_version(), remedy)


def _cache() -> Check:
    from vlmguard.vlms import assemble

    state, folder = assemble.state(), assemble.base_folder()
    if state == "ready":
        return Check("packaged base", "ok", f"ready in {folder}")
    if state == "absent":
        return Check("packaged base", "note", f"not in {folder} yet", "run: vlmguard pull")
    return Check("packaged base", "broken", f"damaged in {folder}", "run: vlmguard pull, which builds it again")


def _disk() -> Check:
    from vlmguard.vlms import assemble

    place = assemble.cache_root().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {place}"
    if free >= SPACE_TO_BUILD_BYTES:
        return Check("disk", "ok", detail)
    needed = assemble.state() != "ready"
    remedy = f"free {SPACE_TO_BUILD_BYTES // 10**6} MB there, or set VLMGUARD_CACHE to another folder"
    return Check("disk", "broken" if needed else "note", detail, remedy)


async def reach(spec: str) -> Check:
    """Whether the server of an endpoint answers, takes the key and has the model."""
    import aiohttp
    from yarl import URL

    from vlmguard.errors import ConfigError
    from vlmguard.vlms.endpoint import Endpoint

    try:
        endpoint = Endpoint.from_spec(spec)
    except ConfigError as error:
        return Check("endpoint", "broken", error.message, error.remedy)
    key = endpoint._key  # its own choice among the environment's, never shown
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limit = aiohttp.ClientTimeout(total=REACH_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=limit) as session:
            answer = await session.get(URL(endpoint.address) / "models", headers=headers, allow_redirects=False)
            return _answered(endpoint.name, answer.status, await answer.text(errors="replace"), endpoint.model)
    except (aiohttp.ClientError, TimeoutError) as error:
        detail = f"cannot be reached ({type(error).__name__})"
        return Check(endpoint.name, "broken", detail, "start the server, or mend the address in the spec")


def _answered(name: str, status: int, body: str, model: str) -> Check:
    if status in (401, 403):
        return Check(name, "broken", f"refused the key (HTTP {status})", "set VLMGUARD_API_KEY")
    if status != 200:
        return Check(name, "note", f"answers, but lists no models (HTTP {status})")
    if f'"{model}"' not in body:
        return Check(name, "broken", f"answers, but has no model {model}", "take a name that its /models lists")
    return Check(name, "ok", "answers and has the model")


def _table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2))
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap, overflow="fold")
    for check in checks:
        detail = shown(check.detail)
        if check.remedy:
            detail += Text("  -> ", "dim") + shown(check.remedy, "bold")
        table.add_row(Text(check.state, STYLES[check.state]), shown(check.name), detail)
    return table
