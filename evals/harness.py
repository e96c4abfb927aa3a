"""lm-evaluation-harness's log-likelihood tasks on a checkpoint of any size.

All requests that the harness asks together travel through the model together, layer by layer, so
that a model is read once for as many as fit the memory and the disk. Importing this registers the
model `llama4q`. Knows nothing of tasks.

Needs lm_eval 0.4: the extra `[harness]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import _add_special_kwargs, has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn import functional
from tqdm import tqdm

from llama4q.checkpoint import Checkpoint
from llama4q.config import read_config
from llama4q.device import use_device
from llama4q.errors import UserError
from llama4q.hub import resolve
from llama4q.model import Head, logits
from llama4q.prefetch import prefetched
from llama4q.stream import TOKENS_AT_ONCE, advance, embed
from llama4q.tokens import load_tokenizer
from llama4q.weights import LayerReader

# both texts (None for a window of a longer one), the context's tokens and the continuation's
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]  # log-likelihood in nats, and whether it is what greedy decoding says

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PADDING = 0  # stands behind the tokens of a sequence, where no position looks at it


@register_model("llama4q")
class StreamedModel(TemplateLM):  # type: ignore[misc]  # it has no types
    """A checkpoint of Llama 4, quantized or not, streamed from its files."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "bfloat16",
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        tokens: int = 2_000_000,
        **ignored: Any,
    ) -> None:
        """`pretrained` is a folder, a Hub id or pocket; `tokens` travel through the model together,
        10 KB of memory each for Scout. The harness's batch size has no meaning here.

        Raises UserError for a checkpoint that cannot be read, or a dtype that is not known.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r}: choose {' or '.join(DTYPES)}")
        if unknown := set(ignored) - {"batch_size", "max_batch_size"}:
            raise UserError(
                f"--model_args {min(unknown)}: not known; choose pretrained, dtype, device, "
                f"max_length, add_bos_token or tokens"
            )
        folder = resolve(pretrained).folder
        self.config = read_config(folder)
        where = use_device(None if device == "cpu" and not torch.cuda.is_available() else device)
        self.reader = LayerReader(Checkpoint(folder, where), self.config, DTYPES[dtype])
        self.tokenizer = load_tokenizer(folder)
        self.add_bos_token = add_bos_token
        self.max_length = max_length or self.config.max_positions
        self.tokens = int(tokens)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        written: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return written

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """As the harness's own `hf` model does it."""
        del ignored
        special = _add_special_kwargs(add_special_tokens, self.add_bos_token)
        begins = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is None and begins:
            special["add_special_tokens"] = False
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (total, _) in zip(owners, found, strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        del requests, disable_tqdm
        raise UserError(
            "generation needs a pass through the whole model for each token, and llama4q streams "
            "it from files; choose log-likelihood tasks, as leaderboard_mmlu_pro or arc_challenge"
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **ignored: Any
    ) -> list[Answer]:
        """Requests that differ in their last token alone are one sequence."""
        del ignored
        inputs = [_inputs(request, self.max_length) for request in requests]
        sequences = sorted(set(inputs), key=lambda ids: (len(ids), ids))
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, ids in enumerate(inputs):
            wanted.setdefault(ids, []).append(number)
        answers: dict[int, Answer] = {}
        rounds = _rounds(sequences, self.tokens)
        layers = self.config.num_layers
        with tqdm(total=layers * len(rounds), unit="layer", disable=disable_tqdm) as bar:
            for batches in rounds:
                for ids, hidden in self._through(batches, bar):
                    for number in wanted[ids]:
                        answers[number] = self._answer(hidden, requests[number][2])
        for request, answer in zip(requests, _in_order(answers), strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return _in_order(answers)

    def _through(self, batches: list[list[tuple[int, ...]]], bar: Any) -> Any:
        """Each sequence with its hidden states `[T, D]` behind the last layer."""
        padded = [
            torch.tensor([[*ids, *[PADDING] * (len(batch[-1]) - len(ids))] for ids in batch])
            for batch in batches
        ]
        store = embed(self.reader.embedding(), padded)
        for layer in prefetched(self.reader.layer, range(self.config.num_layers)):
            advance(self.config, layer, store)
            bar.update()
        self.head: Head = self.reader.head()
        sequences = (ids for batch in batches for ids in batch)
        rows = (row for batch in store for row in batch)
        for ids, row in zip(sequences, rows, strict=True):
            yield ids, row[: len(ids)]

    def _answer(self, hidden: torch.Tensor, continuation: list[int]) -> Answer:
        tokens = torch.tensor(continuation, device=hidden.device)
        scores = logits(self.config, self.head, hidden[-len(tokens) :]).float()
        found = functional.log_softmax(scores, dim=-1).gather(1, tokens[:, None])
        return float(found.sum()), bool((scores.argmax(-1) == tokens).all())


def _inputs(request: Request, most: int) -> tuple[int, ...]:
    """What the model reads: all tokens but the last, and no more than it may."""
    _, context, continuation = request
    if len(continuation) > most:
        raise UserError(
            f"a continuation of {len(continuation)} tokens, but the model reads at most {most}; "
            f"choose another task"
        )
    return tuple((context + continuation)[-(most + 1) : -1])


def _rounds(sequences: Sequence[tuple[int, ...]], most: int) -> list[list[list[tuple[int, ...]]]]:
    """Batches of neighbours in length of up to TOKENS_AT_ONCE, and of these up to `most` tokens
    that travel together."""
    rounds: list[list[list[tuple[int, ...]]]] = []
    held = 0
    for ids in sequences:
        batch = rounds[-1][-1] if rounds else None
        size = len(ids) * (1 if batch is None else len(batch) + 1)
        if batch is not None and size <= TOKENS_AT_ONCE:
            batch.append(ids)
        elif rounds and held + len(ids) <= most:
            rounds[-1].append([ids])
        else:
            rounds.append([[ids]])
            held = 0
        held += len(ids)
    return rounds


def _in_order(answers: dict[int, Answer]) -> list[Answer]:
    return [answers[number] for number in range(len(answers))]
