"""The command `check`: a report against a policy, an exit code for CI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shared import as_text, write_text

if TYPE_CHECKING:
    pass


def _show_policy(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from evals.policy import default_policy

        click.echo(default_policy(), nl=False)
        context.exit()


@click.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option(
    "--policy", type=click.Path(path_type=Path),
    help="A TOML file that says which figures are limited, and how.  [default: --show-policy]",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Path(path_type=Path),
    help="An earlier report on the same tokens, for the policy's limits that are relative to it.",
)  # fmt: skip
@click.option(
    "--limit", "changes", multiple=True, metavar="LINE",
    help="Puts a line of the policy differently, as likelihood.kl_mean.max=0.03; may be repeated.",
)  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here.")
@click.option(
    "--markdown", type=click.Path(path_type=Path),
    help="Also write Markdown here; it is added to GitHub's job summary in any case.",
)  # fmt: skip
@click.option(
    "--show-policy", is_flag=True, is_eager=True, expose_value=False, callback=_show_policy,
    help="Print the default policy, to start one's own from, and stop.",
)  # fmt: skip
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the report as a page, with this verdict.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    report: Path,
    policy: Path | None,
    baseline: Path | None,
    changes: tuple[str, ...],
    junit: Path | None,
    markdown: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Hold REPORT against a policy, and against the BASELINE that it is named.

    Exit code 0 when every limit holds, 1 when a figure is beyond its limit at 95 %, 2 for wrong
    use, 3 when nothing is beyond, but a figure is missing or from too small a sample.
    """
    import os

    from evals import verdict as words
    from evals.gate import check as judge
    from evals.gate import load_report
    from evals.html.page import page
    from evals.policy import load_policy
    from evals.report import render_verdict

    limits, held = load_policy(policy, changes), load_report(report)
    verdict = judge(held, limits, load_report(baseline) if baseline else None)
    if junit is not None:
        write_text(junit, words.junit(verdict))
    if markdown is not None:
        write_text(markdown, words.markdown(verdict))
    if html is not None:
        write_text(html, page(held, verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        write_text(Path(summary), words.markdown(verdict), "a")
    click.echo(as_text(words.to_json(verdict)) if as_json else render_verdict(verdict))
    sys.exit(verdict.answer.value)
