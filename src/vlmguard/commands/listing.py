"""`vlmguard list`: the names that the other commands take."""

import inspect
from collections.abc import Mapping

from rich.table import Table

from vlmguard.commands.terminal import print_json, shown, stdout
from vlmguard.errors import MissingExtra

KINDS = ("guards", "vlms", "rewriters", "sources", "judges", "categories")
TITLES = {
    "guards": "guards (Python: vlmguard.load.guard)",
    "vlms": "VLMs (--target)",
    "rewriters": "rewriters (--rewriter)",
    "sources": "sources of samples (vlmguard synthesize)",
    "judges": "judges of answers (--judge)",
    "categories": "categories of risk",
}
SOURCES = {
    "spa-vl": "SPA-VL: a preferred and a rejected answer to each question about a picture",
    "vlguard": "VLGuard: safe and unsafe pictures, with safe and unsafe instructions",
    "vlsbench": "VLSBench: the harm is in the picture alone; no answers",
    "beavertails-v": "BeaverTails-V: several answers a prompt, labelled safe or not",
    "mis": "MIS: several pictures that are risky together",
    "NAME:PATH": "a local copy of one of these, as it is when downloaded",
    "FILE.jsonl": "your own: {id, image, prompt, safe, unsafe, history, benign, licence, source}",
    "FILE.py:NAME": "a layout of your own",
}
JUDGES = {
    "packaged": "offline: a list of refusals and the packaged gate; a rough measure",
    "http://HOST/v1#MODEL": "any model (as --target has it), asked for scores of safety and helpfulness",
    "FILE.py:NAME": "your own",
}
REWRITERS = {
    "packaged:rewriter": "the small rewriter that comes with VLMGuard",
    "http://HOST/v1#MODEL": "a model behind an OpenAI-compatible server, prompted or fine-tuned (https:// too)",
    "hf:BASE+ADAPTER": "a local model with an adapter that was trained to rewrite",
    "FILE.py:NAME": "your own",
}


def list_names(kind: str | None, *, as_json: bool) -> None:
    """Prints what there is of one kind, or of all."""
    found = {one: _entries(one) for one in ([kind] if kind else KINDS)}
    if as_json:
        print_json({one: [{"name": name, "what": what} for name, what in it.items()] for one, it in found.items()})
        return
    for number, (one, entries) in enumerate(found.items()):
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, what in entries.items():
            table.add_row(shown(f"  {name}"), shown(what))
        if not kind:
            stdout().print(shown(("\n" if number else "") + TITLES[one], "dim"))
        stdout().print(table)


def _entries(kind: str) -> Mapping[str, str]:
    if kind == "guards":
        from vlmguard.guards import GUARDS

        return {name: _summary(name) for name in GUARDS}
    if kind == "vlms":
        from vlmguard.vlms import VLMS

        return VLMS
    tables = {"rewriters": REWRITERS, "sources": SOURCES, "judges": JUDGES}
    if kind in tables:
        return tables[kind]
    from vlmguard.rewriter.protocol import CATEGORIES

    return {name: name.replace("_", " ") for name in CATEGORIES}


def _summary(guard: str) -> str:
    """The first sentence of the guard's file."""
    from vlmguard import load

    try:
        module = inspect.getmodule(load.guard(guard))
    except MissingExtra as error:
        return str(error)
    return (inspect.getdoc(module) or "").split("\n")[0]
