"""The gateway's settings: one TOML file, checked whole before anything starts.

    file, options of the command line --load--> Settings --policy_for(route, key)--> Policy

No secret stands in the file: it names the environment variable that holds one, and callers' keys are hashes.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Self, get_args

from pydantic import Field, ValidationError, model_validator

from vlmguard.errors import ConfigError
from vlmguard.gateway.config_text import explained, table
from vlmguard.gateway.sections import (
    MODELS,
    OWN,
    Admission,
    AuditLog,
    Breaker,
    Guard,
    Images,
    Key,
    PolicySection,
    Routes,
    Section,
    Server,
    Target,
    Telemetry,
)
from vlmguard.guards.policy import Mode, Policy
from vlmguard.load import unknown

__all__ = ["Key", "Settings", "load"]

# What the file says of one server, a key among it, is not carried over to another that the command line names.
OF_ONE_TARGET: Final = ("spec", "url", "model", "api_key_env", "pass_key")


class Settings(Section):
    server: Server = Field(default_factory=Server)
    target: Target = Field(default_factory=Target)
    guard: Guard = Field(default_factory=Guard)
    policy: PolicySection = Field(default_factory=PolicySection)
    keys: Annotated[tuple[Key, ...], Field(strict=False)] = ()
    images: Images = Field(default_factory=Images)
    admission: Admission = Field(default_factory=Admission)
    breaker: Breaker = Field(default_factory=Breaker)
    audit_log: AuditLog = Field(default_factory=AuditLog)
    telemetry: Telemetry = Field(default_factory=Telemetry)
    routes: Routes = Field(default_factory=Routes)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for problem in (self._open(), self._unknown_routes(), self._same_keys(), self._allowed()):
            if problem:
                raise ValueError(problem)
        return self

    def _open(self) -> str | None:
        if self.server.open and self.keys:
            return "[server] open: expected false where there are [[keys]], got true"
        if self.keys or self.server.open or self.server.is_loopback:
            return None
        return (
            f"[server] host: {self.server.host or 'every address'} can be reached from other machines, and there are no "
            "[[keys]], so anybody could use the target; `vlmguard key` makes one, or let everybody in with open = true"
        )

    def _unknown_routes(self) -> str | None:
        served = (*OWN, MODELS, *self.routes.allow)
        named = [("[policy]", path, OWN) for path in self.policy.routes]
        named += [(f"[[keys]] {key.id}", path, served) for key in self.keys for path in key.routes or ()]
        wrong = (
            f"{place} routes: {unknown('route', path, known)}" for place, path, known in named if path not in known
        )
        return next(wrong, None)

    def _same_keys(self) -> str | None:
        for field in ("id", "sha256"):
            counts = Counter(getattr(key, field) for key in self.keys)
            twice = [key.id for key in self.keys if counts[getattr(key, field)] > 1]
            if twice:
                return f"[[keys]] {field}: expected one for each key, got the same for {' and '.join(twice)}"
        return None

    def _allowed(self) -> str | None:
        if self.routes.allow and self.target.url is None:
            return "[routes] allow: goes with [target] url: a model in this process has no other routes"
        return None

    @cached_property
    def policies(self) -> Mapping[Mode, Policy]:
        """The policy of each mode; they differ in nothing else."""
        return {mode: self.policy.policy(mode) for mode in get_args(Mode)}

    def policy_for(self, route: str, key: Key | None) -> Policy:
        """The policy of a request: the mode is the key's, else the route's, else the default; categories are kept."""
        return self.policies[(key.mode if key else None) or self.policy.routes.get(route, self.policy.mode)]

    def shown(self) -> str:
        """The settings in effect as TOML, without secrets."""
        tables = []
        for section in SECTIONS:
            value = getattr(self, section)
            if isinstance(value, Section):
                tables.append(table(f"[{section}]", value))
            else:
                tables += [table(f"[[{section}]]", key) for key in value]
        return "\n".join(tables)


SECTIONS: Final[Mapping[str, type[Section]]] = {
    "server": Server,
    "target": Target,
    "guard": Guard,
    "policy": PolicySection,
    "keys": Key,
    "images": Images,
    "admission": Admission,
    "breaker": Breaker,
    "audit_log": AuditLog,
    "telemetry": Telemetry,
    "routes": Routes,
}


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings in a file, in which the options of a command line are set.

    Args:
        path: TOML; None for the defaults.
        overrides: from "section.key" to a value; None stands for an option that was not given. Another target
            ("target.spec" or "target.url") replaces all that the file says of which server it is and of its key.

    Raises:
        ConfigError: the file cannot be read, or something in it is unknown, wrong or does not fit together.
    """
    raw = _read(path) if path is not None else {}
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    if given.keys() & {"target.spec", "target.url"} and isinstance(raw.get("target"), dict):
        raw["target"] = {name: value for name, value in raw["target"].items() if name not in OF_ONE_TARGET}
    for name, value in given.items():
        section, _, key = name.partition(".")
        if isinstance(table := raw.setdefault(section, {}), dict):
            table[key] = value
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explained(error, SECTIONS)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}", "Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", "docs/vlmguard.example.toml shows every key.") from None
