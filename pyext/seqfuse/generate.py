"""seqfuse.generate: text from any model that knows the protocol

    logits, cache = model.begin(ids [B, T], lengths [B] | None, capacity)   the prompt or the source in; logits [B, V]
    logits = model.step(ids [B], cache)                                     one token for each row; cache moves on
    cache.reorder(index [B'], grouped)                                      rows gathered, for beam search (cache.py)

where the cache is whatever the model needs: keys and values of a Transformer, the state of a recurrent network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqfuse.captured import CapturedSteps
from seqfuse.sampling import Options, Rules, choose


@dataclass
class Report:
    """What a call of generate took.

    tokens: new ones, over all rows. steps: calls of model.step. prompt_seconds: model.begin. step_seconds: the rest.
    step_bytes: weights that one step reads. device: where.
    """

    tokens: int = 0
    steps: int = 0
    prompt_seconds: float = 0.0
    step_seconds: float = 0.0
    step_bytes: int = 0
    device: str = "cpu"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.prompt_seconds + self.step_seconds)

    @property
    def bytes_per_second(self) -> float:
        """Of weights read by the steps; 0 where there was no step."""
        return self.steps * self.step_bytes / self.step_seconds if self.steps else 0.0

    def bandwidth_percent(self) -> float:
        """bytes_per_second in percent of a copy of as many bytes as the weights have, measured here and now."""
        from seqfuse.benchmarks.ceilings import Ceilings

        limit = Ceilings(self.device, quick=True).limit("memory", "fp32", max(1, self.step_bytes))
        return 100 * self.bytes_per_second / limit

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {self.prompt_seconds + self.step_seconds:.2f} s, {self.tokens_per_second:,.1f} "
            f"tokens/s; weights read at {self.bytes_per_second / 1e9:.1f} GB/s, {self.bandwidth_percent():.0f}% of a "
            "copy's bandwidth"
        )


def generate(model, prompts, *, stream: bool = False, return_report: bool = False, cuda_graph: bool = False, **options):
    """New tokens after `prompts`, or for them if the model is an encoder-decoder.

    prompts: token ids, [B, T] int64, or a list of 1-D tensors or lists of ids of any lengths; or a string or a list of
    strings, if the model has a tokenizer.

    Options (defaults): max_new_tokens (64); temperature (0.0, which is greedy); top_k (None): draw from the k
    likeliest; top_p (None): from the likeliest that together have probability p; repetition_penalty (1.0): logits of
    tokens said before are divided by it, or multiplied where negative; no_repeat_ngram (0): no n-gram of this length
    twice in a row of tokens; num_beams (1): beam search if more; length_penalty (1.0): a beam's log-probability is
    divided by its length to this power; stop (None: the model's eos_ids): ids, which take their place (() for none),
    and strings, which also end a row; forbidden (()): ids that are never said; seed (None: torch's own generator). A
    decoder's prompt counts as said, an encoder's source does not. A row to which the rules leave no token ends.

    Returns ids [B, T + new] int64: each row its prompt, then its new tokens up to and with the one that stopped it,
    then padding; of an encoder-decoder [B, new], without the source. Strings for strings: prompt and continuation, or
    the output alone. stream=True: an iterator, of [B] tensors, or for one string of pieces of new text.
    return_report=True: (that, Report); with stream, the iterator's `report`, complete once it ran out.
    cuda_graph=True: on a GPU, steps are captured once and repeated by one launch each (not yet run on a GPU).

    In greedy search a row gets the same tokens alone and in a batch. Raises TypeError or ValueError, in one sentence,
    for prompts and options that don't fit, before the model runs.
    """
    options = Options.of(options)
    _check_model(model)
    texts, ids, lengths = _prompts(model, prompts)
    strings, stops = _stops(model, options)
    if strings and texts is None:
        raise ValueError(f"generate: stop={strings[0]!r} is text, so the prompts must be text too")
    if stream and options.num_beams > 1:
        raise ValueError(f"generate: num_beams={options.num_beams} knows its text only at the end: leave out stream")
    if stream and isinstance(prompts, list | tuple) and texts is not None:
        raise ValueError(f"generate: stream takes one string at a time, got {len(texts)}")
    if len(set(options.forbidden)) >= model.config.vocab:
        raise ValueError("generate: forbidden names every token that there is")
    for token in options.forbidden:
        if not 0 <= token < model.config.vocab:
            raise ValueError(f"generate: forbidden names token {token}, but there are {model.config.vocab}")
    if cuda_graph and not ids.is_cuda:
        raise ValueError(f"generate: cuda_graph=True needs a model on a CUDA GPU, this one is on {ids.device}")
    _check_room(model, ids, options)
    report = Report(device=ids.device.type, step_bytes=model.weight_bytes())
    alone = model.config.encoder_decoder
    writers = None
    if texts is not None:
        heads = [[]] * len(texts) if alone else [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
        writers = [Writer(model.tokenizer, head, strings) for head in heads]

    if options.num_beams > 1:
        from seqfuse.beam import beam_search

        if strings:
            raise ValueError(f"generate: beam search stops at ids, not at text: leave out stop={strings[0]!r}")
        new = beam_search(model, ids, lengths, options, stops, report, cuda_graph)[0]
        if texts is not None:
            for writer, row in zip(writers, new.tolist(), strict=True):
                writer.push(_upto(row, stops))
        out = None if texts is not None else _joined(model, ids, lengths, new, stops, alone)
    else:
        tokens = _Tokens(_loop(model, ids, lengths, options, stops, writers, report, cuda_graph), report)
        if stream:
            return _pieces(tokens, writers[0]) if texts is not None else tokens
        new = torch.stack(list(tokens), dim=1)  # (B, new)
        out = None if texts is not None else _joined(model, ids, lengths, new, stops, alone)
    if texts is not None:
        out = [("" if alone else text) + writer.text for text, writer in zip(texts, writers, strict=True)]
        out = out[0] if isinstance(prompts, str) else out
    return (out, report) if return_report else out


class _Tokens:
    """An iterator with the report of what it did."""

    def __init__(self, items: Iterator, report: Report):
        self._items, self.report = items, report

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._items)


def _pieces(tokens: _Tokens, writer: Writer) -> _Tokens:
    def pieces():
        for _ in tokens:
            if piece := writer.take():
                yield piece
        if piece := writer.take(last=True):
            yield piece

    return _Tokens(pieces(), tokens.report)


class evaluating:
    """The model in evaluation, no gradients; as it was afterwards."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.training = [module for module in self.model.modules() if module.training]
        for module in self.training:
            module.training = False
        self.grad = torch.no_grad()
        self.grad.__enter__()

    def __exit__(self, *error):
        self.grad.__exit__(*error)
        for module in self.training:
            module.training = True


def stepper(model, cache, cuda_graph: bool):
    """What takes the tokens of a step, [B] int64, and gives the logits of the next, [B, V] float32."""
    return CapturedSteps(model, cache) if cuda_graph else lambda ids: model.step(ids, cache)


def _loop(model, ids, lengths, options: Options, stops: Tensor, writers, report, cuda_graph) -> Iterator[Tensor]:
    """One [B] int64 tensor of tokens after another; padding in rows that have ended."""
    B, device = ids.shape[0], ids.device
    alone, pad = model.config.encoder_decoder, padding(model)
    generator = None if options.seed is None else torch.Generator(device).manual_seed(options.seed)
    rules = Rules(options, None if alone else ids, lengths, B, device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    start = time.perf_counter()
    with evaluating(model):
        logits, cache = model.begin(ids, lengths, capacity(model, ids, options))
    step = stepper(model, cache, cuda_graph)
    clock = time.perf_counter()
    report.prompt_seconds = clock - start
    going = B
    for n in range(options.max_new_tokens):
        scores = rules.apply(logits)
        if options.no_repeat_ngram:  # a row to which the rules leave no token has ended
            mute = (scores == -torch.inf).all(-1)
            done, scores = done | mute, torch.where(mute[:, None], logits, scores)
            going = B - int(done.sum())
            if going == 0 and n > 0:
                return
        token = choose(scores, options, generator).masked_fill(done, pad)
        report.tokens += going
        if writers is not None:
            for row, writer in enumerate(writers):
                if not done[row] and not bool((token[row] == stops).any()):
                    writer.push([int(token[row])])
                    done[row] |= writer.stopped
        done = done | torch.isin(token, stops)
        going = B - int(done.sum())  # what the host waits for
        over = n + 1 == options.max_new_tokens or going == 0
        report.step_seconds += time.perf_counter() - clock
        yield token  # what the caller does meanwhile is not our time
        if over:
            return
        clock = time.perf_counter()
        rules.push(token)
        with evaluating(model):
            logits = step(token)
        report.steps += 1


def capacity(model, ids: Tensor, options: Options) -> int:
    """Positions that a cache must hold: an encoder-decoder's first token is <bos>, others have the prompt."""
    return options.max_new_tokens + (1 if model.config.encoder_decoder else ids.shape[1])


def _check_room(model, ids: Tensor, options: Options) -> None:
    config, needed = getattr(model.config, "body", model.config), capacity(model, ids, options)
    most = getattr(config, "max_positions", None)
    if most is None or max(needed, ids.shape[1]) <= most:
        return
    tokens, new = ids.shape[1], f"max_new_tokens={options.max_new_tokens}"
    if model.config.encoder_decoder:
        what = f"a source of {tokens} tokens is" if tokens > most else f"{new} and the token that starts a target are"
    else:
        what = f"a prompt of {tokens} tokens and {new} are {needed} tokens,"
    raise ValueError(f"generate: {what} more than the {most} that the model has positions for (max_positions)")


def padding(model) -> int:
    config = model.config
    return next((i for i in (config.pad_id, config.eos_id) if i is not None), 0)


class Writer:
    """New tokens of one row as text: only whole characters, and nothing from a stop string on.

    It decodes the prompt with the new tokens, since what a token looks like may depend on what stands before it.
    """

    def __init__(self, tokenizer, head: list[int], stop: list[str]):
        self.tokenizer, self.ids, self.stop = tokenizer, list(head), stop
        self.skip = len(tokenizer.decode(self.ids))
        self.text, self.taken, self.stopped = "", 0, False

    def push(self, tokens: list[int]) -> None:
        self.ids += tokens
        self.text = self.tokenizer.decode(self.ids)[self.skip :]
        ends = [end for end in map(self.text.find, self.stop) if end >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True

    def take(self, last: bool = False) -> str:
        """What is new since the last call and can't change any more."""
        end = len(self.text)
        if not last and not self.stopped:
            end -= len(self.text) - len(self.text.rstrip("\ufffd"))  # a character whose bytes aren't all there
            held = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
            end -= max(held, default=0)
        piece, self.taken = self.text[self.taken : end], max(self.taken, end)
        return piece


# ------------------------------------------------------------------------------------------ what comes in and goes out


def _check_model(model) -> None:
    for name in ("begin", "step", "weight_bytes"):
        if not callable(getattr(model, name, None)):
            raise TypeError(f"generate: {type(model).__name__} does not generate: it has no method {name}()")


def _prompts(model, prompts) -> tuple[list[str] | None, Tensor, Tensor | None]:
    """(texts or None, ids [B, T] on the model's device, lengths [B] or None if all rows are full)."""
    device = next(model.parameters()).device
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype != torch.int64 or 0 in prompts.shape:
            raise ValueError(
                "generate: prompts must be ids [B, T] of int64 with at least one row and one token, got "
                f"{list(prompts.shape)} of {str(prompts.dtype).removeprefix('torch.')}"
            )
        return None, _in_vocabulary(model, prompts.to(device)), None
    texts = None
    if isinstance(prompts, str):
        texts = [prompts]
    elif isinstance(prompts, list | tuple) and prompts and all(isinstance(p, str) for p in prompts):
        texts = list(prompts)
    elif not isinstance(prompts, list | tuple) or not prompts:
        raise TypeError(f"generate: prompts must be ids or text, or a list of them, got {_kind(prompts)}")
    if texts is None:
        rows = [_row(i, row) for i, row in enumerate(prompts)]
    else:
        if model.tokenizer is None:
            raise ValueError("generate: this model has no tokenizer: give token ids instead of text")
        rows = [_encoded(model, text) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), padding(model))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
    ragged = texts is not None or bool((lengths != lengths[0]).any())
    return texts, _in_vocabulary(model, ids.to(device)), lengths.to(device) if ragged else None


def _row(i: int, row) -> list[int] | Tensor:
    good = row.dim() == 1 and row.dtype == torch.int64 if isinstance(row, Tensor) else isinstance(row, list | tuple)
    if not good or (not isinstance(row, Tensor) and not all(type(token) is int for token in row)):
        raise TypeError(f"generate: prompts[{i}] must be a list of ids or a 1-D int64 tensor, got {_kind(row)}")
    if len(row) == 0:
        raise ValueError(f"generate: prompts[{i}] is empty; start with <bos> or some other token")
    return row


def _encoded(model, text: str) -> list[int]:
    ids = (getattr(model, "source_tokenizer", None) or model.tokenizer).encode(text)
    if ids:
        return ids
    start = model.config.eos_id if model.config.encoder_decoder else model.config.bos_id
    if start is None:
        raise ValueError("generate: the prompt is empty, and this model has no <bos> to start with: give it some text")
    return [start]


def _in_vocabulary(model, ids: Tensor) -> Tensor:
    size = getattr(model.config, "source_vocab", None) or model.config.vocab
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(f"generate: token id {low if low < 0 else high} is outside the model's vocabulary of {size}")
    return ids


def _stops(model, options: Options) -> tuple[list[str], Tensor]:
    """(strings, ids [S] int64) that end a row."""
    eos = list(model.config.eos_ids)
    stop = options.stop
    if stop is None:
        stop = eos
    elif isinstance(stop, int | str):
        stop = [stop]
    for item in stop:
        if type(item) not in (int, str) or item == "":
            raise TypeError(f"generate: stop takes token ids and strings, got {item!r}")
    strings = [item for item in stop if isinstance(item, str)]
    ids = [item for item in stop if not isinstance(item, str)]
    if strings and not ids:
        ids = eos
    return strings, torch.tensor(ids, dtype=torch.int64, device=next(model.parameters()).device)


def _joined(model, ids: Tensor, lengths, new: Tensor, stops: Tensor, alone: bool) -> Tensor:
    """Prompt and new tokens of each row without a gap, then padding."""
    if alone:
        return new
    if lengths is None:
        return torch.cat([ids, new], dim=1)
    rows = [
        [*row[:n].tolist(), *_upto(tokens, stops, with_stop=True)]
        for row, n, tokens in zip(ids, lengths.tolist(), new.tolist(), strict=True)
    ]
    out = torch.full((len(rows), max(map(len, rows))), padding(model), device=ids.device)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def _upto(tokens: list[int], stops: Tensor, with_stop: bool = False) -> list[int]:
    """tokens up to the first that stops."""
    known = set(stops.tolist())
    for i, token in enumerate(tokens):
        if token in known:
            return tokens[: i + with_stop]
    return tokens


def _kind(value) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dim()}-D tensor of {str(value.dtype).removeprefix('torch.')}"
    return "an empty list" if value in ([], ()) else type(value).__name__
