"""Defences, one a file, each a VLM round a VLM. A name here is one that the command line knows."""

GUARDS: dict[str, str] = {
    "vlmguard-r1": "vlmguard.guards.vlmguard_r1:VLMGuardR1",
}
