"""Judges of answers, one a file. A name here is one that the command line knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlmguard import load
from vlmguard.evaluation.judges.protocol import Judge, Judgement
from vlmguard.vlms.protocol import VLM

__all__ = ["JUDGES", "Judge", "Judgement", "judge"]

JUDGES: dict[str, str] = {
    "packaged": "vlmguard.evaluation.judges.packaged:Packaged.load",
}


@runtime_checkable
class JudgeOrVLM(Protocol):
    """What both have: a VLM has all that a judge has, and `stream`."""

    name: str

    async def aclose(self) -> None: ...


def judge(spec: str) -> Judge:
    """The judge that `spec` names: one of `JUDGES`, one of your own (FILE.py:NAME), or any VLM, prompted.

    Raises:
        ConfigError: there is no such judge or VLM. ModelError: its model cannot be loaded.
    """
    from vlmguard.evaluation.judges.scores import Scores

    if spec in JUDGES:
        made: Judge = load.made(JUDGES[spec], Judge)
        return made
    if ".py:" in spec:
        found = load.made(spec, JudgeOrVLM)
        return Scores(found) if isinstance(found, VLM) else found
    if re.fullmatch(r"[\w-]+", spec) and not Path(spec).exists():
        raise load.unknown("judge", spec, (*JUDGES, "FILE.py:NAME", "or a VLM, such as http://HOST/v1#MODEL"))
    return Scores(load.vlm(spec))
