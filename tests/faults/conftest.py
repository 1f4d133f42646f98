"""Faults are looked for in a gateway that serves, too: see tests/gateway/conftest.py."""

from tests.gateway.conftest import gateway, shared_gateway, shared_upstream, upstream

__all__ = ["gateway", "shared_gateway", "shared_upstream", "upstream"]
