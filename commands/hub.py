"""The commands `pull`, `card` and `push`: from the Hub and to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shared import nbytes, tell

if TYPE_CHECKING:
    from evals.figures import Report
    from evals.model_card import Subject

BASE_MODEL = "The original's Hub id, where it was quantized from a folder."


@click.command()
@click.argument("source", metavar="HUB_ID")
def pull(source: str) -> None:
    """Download HUB_ID into the Hub's cache: what a checkpoint needs of it, and no more.

    Every file is held to the digest that the Hub has of it, also those that were there; wrong bytes
    are fetched again once. A download that was cut goes on when the command is repeated. Prints the
    folder. Other commands download by themselves; they check what they fetch.

    \b
    llama4q pull meta-llama/Llama-4-Scout-17B-16E-Instruct
    """
    from llama4q.hub import pull as run

    found = run(source, tell)
    tell(f"{found.name} at {found.revision}: {nbytes(found) / 1e9:.2f} GB of tensors, all right")
    click.echo(found.folder)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--repo", metavar="OWNER/NAME", help="The repository that it will be in.")
@click.option("--base-model", metavar="OWNER/NAME", help=BASE_MODEL)
def card(checkpoint: Path, repo: str | None, base_model: str | None) -> None:
    """Print the model card of the folder CHECKPOINT, a README.md, made from its report.

    \b
    llama4q card scout-int4 --repo me/Llama-4-Scout-17B-16E-Instruct-int4 > scout-int4/README.md
    """
    from evals.model_card import model_card

    report, subject = _subject(checkpoint, repo, base_model)
    click.echo(model_card(report, subject), nl=False)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="When it is created, show it to nobody else.")
@click.option(
    "--revision", metavar="BRANCH", help="Where to; created when needed.  [default: main]"
)
@click.option("--create-pr", is_flag=True, help="Propose the commit to REPO instead of making it.")
@click.option("--dry-run", is_flag=True, help="Check everything here, and send nothing.")
@click.option(
    "--accept-license", is_flag=True,
    help="You have read the Llama 4 Community License in FOLDER, and agree to it.",
)  # fmt: skip
@click.option("--base-model", metavar="OWNER/NAME", help=BASE_MODEL)
def push(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    accept_license: bool,
    base_model: str | None,
) -> None:
    """Publish the checkpoint in FOLDER as REPO on the Hub, as its licence demands.

    Prints every duty of the licence with its state, and stops when one is missing. README.md is
    made from the report where there is none. All of it is one commit; a push that was cut changed
    nothing, and goes on when the command is repeated.

    \b
    llama4q push scout-int4 me/Llama-4-Scout-17B-16E-Instruct-int4 --dry-run
    """
    from evals.model_card import model_card
    from llama4q.licence import Card, Publication, State, duties, licence_files
    from llama4q.publish import Order, check_token, list_too, publish, read_card, sent

    order = Order(folder, repo, private, revision, create_pr)
    list_too(folder, licence_files(folder))  # those that its publisher has added
    report, subject = _subject(folder, repo, base_model)
    there = read_card(folder)
    shown = Card(model_card(report, subject), there=False) if there is None else Card(there)
    owed = duties(
        Publication(
            folder, repo, subject.licence, subject.base_model, subject.multimodal, shown,
            accept_license,
        )
    )  # fmt: skip
    for duty in owed:
        click.echo(f"{duty.state:<16} {duty.name:<21} {duty.what}")
    missing = [duty for duty in owed if duty.state is State.MISSING]
    for duty in missing:
        click.echo(f"Error: {duty.name}: {duty.todo}", err=True)
    if missing:
        sys.exit(1)
    files = _checked(folder)
    if dry_run:
        click.echo(f"Nothing was sent: {len(sent(files))} files would go to {repo}.")
        return
    check_token()
    click.echo(publish(order, files, shown.text, tell))


def _subject(folder: Path, repo: str | None, base_model: str | None) -> tuple[Report, Subject]:
    """What a card of the checkpoint in `folder` is made from."""
    from evals.gate import load_report
    from evals.model_card import Subject
    from llama4q.config import read_config
    from llama4q.licence import base_model_of, licence_of

    report = load_report(folder / "report.json")
    source = report.get("source") or {}
    return report, Subject(
        repo,
        licence_of(source, folder),
        base_model_of(source, base_model),
        read_config(folder).has_vision,
    )


def _checked(folder: Path) -> dict[str, str]:
    """The SHA-256 of its files, each as it was written."""
    from tqdm import tqdm

    from llama4q.manifest import check_manifest, read_manifest

    total = sum(entry.size for entry in read_manifest(folder).values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=None) as bar:
        return check_manifest(folder, bar.update)
