"""Judges of answers, one a file. A name here is one that the command line knows."""

from __future__ import annotations

import re
from pathlib import Path

from vlmguard import load
from vlmguard.evaluation.judges.protocol import Judge, Judgement

__all__ = ["JUDGES", "Judge", "Judgement", "judge"]

JUDGES: dict[str, str] = {
    "packaged": "vlmguard.evaluation.judges.packaged:Packaged.load",
}


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
        found = load.named(spec)
        if isinstance(found, Judge) or (isinstance(found, type) and issubclass(found, Judge)):
            return load.made(spec, Judge)  # type: ignore[no-any-return]
    elif re.fullmatch(r"[\w-]+", spec) and not Path(spec).exists():
        raise load.unknown("judge", spec, (*JUDGES, "FILE.py:NAME", "or a VLM, such as http://HOST/v1#MODEL"))
    return Scores(load.vlm(spec))
