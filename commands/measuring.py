"""The options that say what both models are measured on, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llama4q.errors import UserError
from llama4q.ranks import ALONE

from .shared import budget_for

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from evals.questions import Questions
    from llama4q.config import ModelConfig
    from llama4q.hidden import Spool

Command = TypeVar("Command", bound=Callable[..., Any])


def evaluation_options(command: Command) -> Command:
    """The options that say what both models are measured on."""
    for option in reversed(
        (
            click.option(
                "--eval-text", metavar="TEXT", help="Text to measure on; one, as in --calibration."
            ),
            click.option(
                "--eval-windows",
                default=16,
                show_default=True,
                type=click.IntRange(1),
                help="Windows of that text.",
            ),
            click.option(
                "--eval-length",
                default=2048,
                show_default=True,
                type=click.IntRange(2),
                help="Tokens a window.",
            ),
            click.option(
                "--eval-stride",
                type=click.IntRange(1),
                help="Tokens from one window to the next; fewer than a window's: they overlap, and "
                "every token is scored with more before it.  [default: no overlap]",
            ),
            click.option(
                "--tasks",
                default="needle",
                show_default=True,
                help="Retrieval tasks: needle, RULER's by name, or ruler for all of them.",
            ),
            click.option(
                "--lengths",
                default="1024,4096",
                show_default=True,
                help="Lengths of the prompts in tokens, as 4k,8k or 4k..1M by doubling; '' for "
                "none.",
            ),
            click.option(
                "--depths",
                default="0,0.25,0.5,0.75,1",
                show_default=True,
                help="Where that stands which is asked for; 0 is the text's start, 1 its end.",
            ),
            click.option(
                "--prompts",
                default=2,
                show_default=True,
                type=click.IntRange(1),
                help="For each task, length and depth.",
            ),
            click.option(
                "--qa",
                metavar="FILE",
                type=click.Path(path_type=Path, dir_okay=False),
                help="A JSON file in SQuAD form, for the task qa.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["bfloat16", "float32"]),
                default="bfloat16",
                show_default=True,
                help="Arithmetic: bfloat16 as engines serve, float32 to compare methods.",
            ),
            click.option(
                "--device",
                metavar="NAME",
                help="Where to compute: cpu, cuda, or one of several GPUs as cuda:1.  "
                "[default: the GPU where there is one]",
            ),
            click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        )
    ):
        command = option(command)
    return command


def questions_of(
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    eval_text: str | None,
    eval_windows: int,
    eval_length: int,
    eval_stride: int | None,
    tasks: str,
    lengths: str,
    depths: str,
    prompts: int,
    qa: Path | None,
) -> Questions:
    """What both models are measured on, from the evaluation options."""
    from evals.answering import read_documents
    from evals.evaluation import refuse_long
    from evals.questions import ask
    from evals.tasks import Ladder, parse_depths, parse_lengths, parse_tasks

    ladder = Ladder(
        parse_lengths(lengths), parse_depths(depths), prompts, parse_tasks(tasks, qa is not None)
    )
    refuse_long(config, [eval_length, *ladder.lengths])  # before they are made
    return ask(
        tokenizer, eval_text, eval_windows, eval_length, ladder, eval_stride,
        config.chunk_size, read_documents(qa) if qa else None,
    )  # fmt: skip


def spool_for(
    config: ModelConfig, questions: Questions, memory: str | None, device: torch.device
) -> Spool:
    """Where an evaluation's hidden states lie, in what all else leaves of the memory."""
    from evals.footprint import held
    from llama4q.hidden import Spool

    budget, needed = budget_for(memory, device, ALONE), held(config, questions)
    if needed > budget.host:
        limit = "--memory gives it" if memory else "no more is free than"
        raise UserError(
            f"memory: the evaluation needs {needed / 1e9:.1f} GB beside hidden states, and {limit} "
            f"{budget.host / 1e9:.1f} GB; free some, or choose shorter windows and prompts"
        )
    return Spool(budget.host - needed, device=device)
