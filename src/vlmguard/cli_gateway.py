"""The gateway's part of the command line: serve, key, audit-log."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmguard.cli_options import Json

SettingsFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE.toml", help="The gateway's settings.", show_default=False),
]
Log = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The log: sqlite:///FILE or postgresql://USER@HOST/NAME."),
]
Since = Annotated[
    str | None, typer.Option(metavar="TIME", help="Only from then on: 24h ago, or 2026-01-31T12:00 (UTC).")
]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Only before then.")]
Action = Annotated[
    Literal["passed", "rewrote", "refused", "flagged", "error", "unguarded", "begun"] | None,
    typer.Option(help="Only what ended so. begun: has not ended, or its process was killed."),
]
Category = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only this category of risk; see: vlmguard list categories.")
]
KeyId = Annotated[str | None, typer.Option("--key", metavar="ID", help="Only requests with this key.")]
Route = Annotated[str | None, typer.Option(metavar="PATH", help="Only this route, as /v1/chat/completions.")]
RequestId = Annotated[str | None, typer.Option("--request", metavar="ID", help="Only this x-request-id.")]

audit_log = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


def serve(
    config: SettingsFile = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="SPEC", help="The server or model to protect.")
    ] = None,
    rewriter: Annotated[
        str | None, typer.Option("--rewriter", "-r", metavar="SPEC", help="What judges and rewrites.")
    ] = None,
    policy: Annotated[
        Literal["off", "shadow", "rewrite", "block"] | None, typer.Option(help="What to do with a risky request.")
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Where to listen.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    check: Annotated[
        bool, typer.Option("--check-config", help="Only check the settings, and print those in effect.")
    ] = False,
) -> None:
    """Guard a VLM server: put this between it and its clients.

    Clients change their base URL and nothing else; OpenAI's chat completions
    and responses and Anthropic's messages are guarded, streams included. What
    is not given here or in the settings has its default: the packaged
    assistant, guarded by the packaged rewriter, at http://127.0.0.1:8080/v1.

    \b
      vlmguard serve
      vlmguard serve --target http://localhost:8000/v1 --port 9000
      vlmguard serve --config vlmguard.toml --check-config
    """
    from vlmguard.commands.serve import serve as run

    options = {
        "target.spec": target,
        "guard.rewriter": rewriter,
        "policy.mode": policy,
        "server.host": host,
        "server.port": port,
        "server.workers": workers,
    }
    run(config, options, check=check)


def key(as_json: Json = False) -> None:
    """Make a key for a caller of the gateway, and the hash for its settings.

    The key is shown once and kept nowhere: the settings hold its hash.
    """
    from vlmguard.commands.terminal import print_json
    from vlmguard.gateway.keys import new_key

    made, digest = new_key()
    if as_json:
        print_json({"key": made, "sha256": digest})
        return
    typer.echo(
        f'The key, for the caller:\n  {made}\nFor the settings:\n  [[keys]]\n  id = "a-name"\n  sha256 = "{digest}"'
    )


@audit_log.callback()
def _audit_log() -> None:
    """Look into the gateway's audit log, copy it, and delete what is old.

    It has a record for each request: when, which key, route and model, hashes
    and sizes of its pictures, the risk and what was done, and how long it
    took. What users wrote is in it only where the settings say so.
    """


@audit_log.command("query")
def query(
    since: Since = None,
    until: Until = None,
    action: Action = None,
    category: Category = None,
    key: KeyId = None,
    route: Route = None,
    request: RequestId = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many records.")] = 50,
    url: Log = None,
    config: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Show records, the newest first; times are in UTC.

    \b
      vlmguard audit-log query --since 24h --action refused
      vlmguard audit-log query --request req_5f0c6e... --json
    """
    from vlmguard.commands.audit_log import Filter, Where, query_log

    chosen = Filter(since, until, action, category, key, route, request)
    query_log(Where(url, config), chosen, limit=limit, as_json=as_json)


@audit_log.command("export")
def export(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; else to standard output.")] = None,
    format: Annotated[  # noqa: A002 the option's name
        Literal["jsonl", "csv"] | None, typer.Option(help="By default as FILE is called, else jsonl.")
    ] = None,
    texts: Annotated[bool, typer.Option("--texts", help="With the texts that were recorded.")] = False,
    since: Since = None,
    until: Until = None,
    action: Action = None,
    category: Category = None,
    key: KeyId = None,
    route: Route = None,
    request: RequestId = None,
    url: Log = None,
    config: SettingsFile = None,
) -> None:
    """Copy records, the oldest first: a line of JSON each, or CSV.

    \b
      vlmguard audit-log export --since 7d --out week.csv
      vlmguard audit-log export | jq -c 'select(.risk > 0.9)'
    """
    from vlmguard.commands.audit_log import Filter, Where, export_log

    chosen = Filter(since, until, action, category, key, route, request)
    export_log(Where(url, config), chosen, out=out, format=format, texts=texts)


@audit_log.command("purge")
def purge(
    before: Annotated[str, typer.Option(metavar="TIME", help="Delete what is older: 90d, or 2026-01-31.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Log = None,
    config: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Delete records for good, with their texts. The gateway may run on.

    \b
      vlmguard audit-log purge --before 90d
    """
    from vlmguard.commands.audit_log import Where, purge_log

    purge_log(Where(url, config), before=before, sure=yes, as_json=as_json)
