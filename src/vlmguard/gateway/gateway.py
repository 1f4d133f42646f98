"""What the requests of one process share: the settings and all that was made of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, get_args

import structlog

from vlmguard import load
from vlmguard.commands.doctor import version
from vlmguard.errors import AuditLogError, ConfigError
from vlmguard.gateway.admission import Admission
from vlmguard.gateway.audit_log import AuditLog
from vlmguard.gateway.breaker import Breaker, GuardedRewriter
from vlmguard.gateway.config import Settings
from vlmguard.gateway.facts import Facts
from vlmguard.gateway.fetch import Fetcher, Sources
from vlmguard.gateway.guarding import Guard, Holding, Plain, Screening
from vlmguard.gateway.keys import Keys
from vlmguard.gateway.sections import MODELS, OWN
from vlmguard.gateway.telemetry import Load, Telemetry, Tracing
from vlmguard.gateway.upstream import InProcess, Server, Target
from vlmguard.guards.policy import Mode
from vlmguard.guards.vlmguard_r1 import VLMGuardR1
from vlmguard.vlms.endpoint import Endpoint
from vlmguard.vlms.protocol import VLM
from vlmguard.vlms.transport import Patience

LOG: Final = structlog.get_logger("vlmguard.gateway")
EXPIRY_SECONDS: Final = 3600.0  # between two removals of texts past their retention
CUT_OFF_SECONDS: Final = 3.0  # for the records of requests that didn't end in time


@dataclass(eq=False)
class Gateway:
    """
    Args:
        guards: one for each mode of the policy.
        versions: of vlmguard, and which guard and rewriter: in every record.
    """

    settings: Settings
    target: Target
    rewriter: GuardedRewriter
    guards: Mapping[Mode, Guard]
    keys: Keys
    admission: Admission
    fetcher: Fetcher
    audit_log: AuditLog | None
    telemetry: Telemetry
    versions: Mapping[str, str]

    def not_ready(self) -> str | None:
        """What it waits for before it can serve."""
        if self.admission.draining:
            return "the requests that have begun: the gateway is shutting down"
        healthy = self.audit_log is None or self.audit_log.healthy
        return None if healthy else "the audit log"

    def observe(self, facts: Facts) -> None:
        """A request has ended."""
        self.telemetry.observe(facts)
        if facts.action == "error":
            LOG.info("request failed", request_id=facts.request_id, status=facts.status, kind=facts.note)

    def log_fault(self, error: Exception, request_id: str) -> None:
        """A fault of ours, or of the audit log: the operator's to see, with nothing that a caller wrote."""
        LOG.error("fault", request_id=request_id, error=error)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Gateway]:
    """A gateway with its models loaded and its audit log open; both are closed at the end of the block.

    Raises:
        ConfigError: the settings name what there is not. ModelError: a model cannot be loaded.
        AuditLogError: the log cannot be opened.
    """
    async with AsyncExitStack() as stack:
        log = await _opened_log(settings, stack)
        loaded = await asyncio.to_thread(load.rewriter, settings.guard.rewriter)
        breaker = Breaker(settings.breaker.failures, settings.breaker.seconds)
        rewriter = GuardedRewriter(loaded, breaker, settings.guard.seconds)
        stack.push_async_callback(rewriter.aclose)
        target = await asyncio.to_thread(target_of, settings)
        stack.push_async_callback(target.aclose)
        admission = Admission(**settings.admission.model_dump())
        telemetry = _telemetry(settings, admission, breaker, log)
        stack.push_async_callback(telemetry.aclose)
        fresh = asyncio.create_task(telemetry.keep_fresh())
        stack.callback(fresh.cancel)
        guards = guards_of(settings, rewriter, target, telemetry.tracing)
        if isinstance(holding := guards["rewrite"], Holding):
            stack.push_async_callback(holding.aclose)
        stack.push_async_callback(_ended, admission)
        yield Gateway(
            settings,
            target,
            rewriter,
            guards,
            Keys.of(settings),
            admission,
            Fetcher(Sources(**settings.images.model_dump())),
            log,
            telemetry,
            {"vlmguard": version(), "guard": settings.guard.name, "rewriter": rewriter.name},
        )


async def _ended(admission: Admission) -> None:
    """Waits for requests that the server has cut off, so that they are recorded and told of it."""
    with suppress(TimeoutError):
        await asyncio.wait_for(admission.drain(), CUT_OFF_SECONDS)


def _telemetry(settings: Settings, admission: Admission, breaker: Breaker, log: AuditLog | None) -> Telemetry:
    def load_now() -> Load:
        records = log.waiting if log else 0
        return Load(admission.running, admission.waiting, breaker.state != "closed", records)

    routes = (*OWN, MODELS, *settings.routes.allow)
    return Telemetry.of(settings.telemetry, routes, load_now, version())


async def _opened_log(settings: Settings, stack: AsyncExitStack) -> AuditLog | None:
    told = settings.audit_log
    if not told.enabled:
        return None
    log = await AuditLog.open(told.url, retention_days=told.retention_days)
    stack.push_async_callback(log.aclose)
    expiring = asyncio.create_task(_expire(log))
    stack.callback(expiring.cancel)
    return log


async def _expire(log: AuditLog) -> None:
    while True:
        try:
            await log.expire_texts()
        except AuditLogError as error:
            LOG.warning("texts could not be expired", error=error)
        await asyncio.sleep(EXPIRY_SECONDS)


def target_of(settings: Settings) -> Target:
    told = settings.target
    if told.url is None:
        assert told.spec is not None
        return InProcess(load.vlm(told.spec))
    patience = Patience(told.connect_seconds, told.first_byte_seconds, told.total_seconds)
    return Server(told.url, told.model, told.api_key, told.pass_key, patience)


def guards_of(settings: Settings, rewriter: GuardedRewriter, target: Target, tracing: Tracing) -> Mapping[Mode, Guard]:
    """Raises ConfigError for a mode that the guard does not know."""
    make = load.guard(settings.guard.name)
    if make is VLMGuardR1:
        told = settings.guard
        return {
            mode: Screening(VLMGuardR1(None, rewriter, policy, told.threshold), target, told.seconds, tracing)
            for mode, policy in settings.policies.items()
        }
    wanted = {settings.policy.mode, *settings.policy.routes.values(), *(key.mode for key in settings.keys if key.mode)}
    if wanted - {"off", "rewrite"} or settings.policy.categories:
        raise ConfigError(
            f"{settings.guard.name} knows no modes but off and rewrite", "Change [policy], or use vlmguard-r1."
        )
    vlm = vlm_of(settings, target)
    holding = Holding(make(vlm), vlm)
    return {mode: Plain(target, tracing) if mode == "off" else holding for mode in get_args(Mode)}


def vlm_of(settings: Settings, target: Target) -> VLM:
    """The target as a VLM, for a guard that has to see its answers."""
    if isinstance(target, InProcess):
        return target.vlm
    told = settings.target
    if told.url is None or told.model is None:
        raise ConfigError(f"{settings.guard.name} asks the target itself and needs its name", "Set [target] model.")
    return Endpoint(
        told.url, told.model, told.api_key, told.connect_seconds, told.first_byte_seconds, told.total_seconds, retries=0
    )
