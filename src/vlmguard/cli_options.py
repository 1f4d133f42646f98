"""Options that several commands have."""

from typing import Annotated

import typer


def _json(context: typer.Context, wanted: bool) -> bool:
    """Notes for the edge that errors go out as JSON too."""
    if isinstance(context.obj, dict):
        context.obj["json"] = wanted
    return wanted


Json = Annotated[bool, typer.Option("--json", callback=_json, help="Print one JSON object, errors too.")]
