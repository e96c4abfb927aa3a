"""The command line: what all commands have in common. Each of them is in commands/."""

from __future__ import annotations

import tempfile
from typing import Any

import click

from commands.custody import reproduce, verify
from commands.evaluate import evaluate, harness
from commands.gate import check
from commands.hub import card, pull, push
from commands.quantize import quantize
from commands.sizes import fit, inspect
from llama4q import __version__
from llama4q.errors import UserError
from llama4q.ranks import leave_at_once, speaker
from llama4q.stopping import Stopped, stoppable


class Commands(click.Group):
    """Shows a user's mistake as one line with exit code 1 (`check`: 2), and a signal with what a
    shell expects; anything else keeps its traceback."""

    def main(self, *args: Any, **more: Any) -> Any:
        try:
            return super().main(*args, **more)
        except SystemExit as end:
            leave_at_once(end)
            raise

    def invoke(self, context: click.Context) -> Any:
        try:
            with stoppable():
                _check_temporary_folder()
                return super().invoke(context)
        except UserError as error:
            click.echo(f"Error: {speaker()}{error}", err=True)
            code = 2 if context.invoked_subcommand == "check" else 1  # there 1 is an answer
        except Stopped as stop:
            [advice] = getattr(stop, "__notes__", ["repeat the command to start again"])
            click.echo(f"\n{speaker()}Stopped by {stop.signal.name}: {advice}.", err=True)
            code = 128 + stop.signal
        raise SystemExit(code)


def _check_temporary_folder() -> None:
    """torch and datasets write to it when they are imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.strerror}; free some space there, or set TMPDIR to a folder that has some"
        ) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llama4q")
def main() -> None:
    """Quantize Llama 4 expert by expert on a small host, and measure what it cost.

    \b
    llama4q inspect SOURCE              what it is and where its bytes are
    llama4q pull HUB_ID                 download it, and check every byte
    llama4q quantize SOURCE DEST        write a quantized checkpoint with its evidence
    llama4q fit DEST --gpu h100-80gb    will it fit, and up to which context
    llama4q eval DEST --against SOURCE  measure the loss of any checkpoint
    llama4q lm-eval --model llama4q ... lm-evaluation-harness on a streamed checkpoint
    llama4q check DEST/report.json      a verdict for CI: exit code 0 to 3
    llama4q verify DEST                 is it whole, unharmed and fit to be served
    llama4q reproduce DEST              make it again: the same bytes?
    llama4q card DEST                   its model card
    llama4q push DEST REPO              publish it on the Hub, as its licence demands

    SOURCE is a folder, a Hub id such as meta-llama/Llama-4-Scout-17B-16E-Instruct[@revision], or
    'pocket', a small trained Llama 4 that comes with llama4q.
    """


for command in (
    inspect,
    pull,
    quantize,
    evaluate,
    harness,
    fit,
    check,
    verify,
    reproduce,
    card,
    push,
):
    main.add_command(command)
