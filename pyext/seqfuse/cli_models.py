"""The commands that read and write whole models: generate, translate, import, export and info MODEL."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder, ours or Hugging Face's.")]
NewTokens = Annotated[int, typer.Option(min=1, help="At most this many new tokens.")]
Beams = Annotated[int, typer.Option(min=1, help="Beam search with this many beams; 1 takes the likeliest token.")]
LengthPenalty = Annotated[float, typer.Option(help="Of beam search: above 0 favours longer texts.")]
DeviceName = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")]


def generate(
    model: ModelFolder,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; without it, standard input.")] = None,
    max_new_tokens: NewTokens = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest of together this probability.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 weakens what was said.")] = 1.0,
    beams: Beams = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the text; may be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Write on from a prompt, piece by piece as it comes."""
    from seqfuse.generate import generate as run

    with one_sentence():
        loaded = load(model, device)
        _need_tokenizer(loaded, model)
        if loaded.config.encoder_decoder:
            raise ValueError(f"{model}: a {type(loaded).__name__} reads a source: use seqfuse translate")
        prompt = _standard_input().rstrip("\n") if prompt is None else prompt
        options = dict(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, num_beams=beams,
            repetition_penalty=repetition_penalty, stop=stop or None, seed=seed,
        )  # fmt: skip
        if beams > 1:
            text, report = run(loaded, prompt, return_report=True, **options)
            typer.echo(text)
        else:
            pieces = run(loaded, prompt, stream=True, **options)
            typer.echo(prompt, nl=False)
            for piece in pieces:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            typer.echo()
            report = pieces.report
    typer.echo(str(report), err=True)


def translate(
    model: ModelFolder,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, the lines of standard input.")] = None,
    max_new_tokens: NewTokens = 64,
    beams: Beams = 4,
    length_penalty: LengthPenalty = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 32,
    device: DeviceName = "auto",
) -> None:
    """Turn each text into another one, a line each: translations, phonemes, summaries, whatever the model learnt."""
    from seqfuse.generate import generate as run

    with one_sentence():
        loaded = load(model, device)
        _need_tokenizer(loaded, model)
        if not loaded.config.encoder_decoder:
            raise ValueError(f"{model}: a {type(loaded).__name__} has no source to read: use seqfuse generate")
        lines = list(texts) if texts else _lines(_standard_input())
        options = dict(max_new_tokens=max_new_tokens, num_beams=beams, length_penalty=length_penalty)
        for i in range(0, len(lines), batch):
            for line in run(loaded, lines[i : i + batch], **options):
                typer.echo(" ".join(line.splitlines()))


def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder, or g2p-en, which is fetched.")],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
) -> None:
    """Turn a checkpoint of another library into a folder of ours."""
    with one_sentence():
        if source == "g2p-en":
            from seqfuse.interop import g2p_en

            loaded = g2p_en.load()
        else:
            loaded = load(Path(source), "cpu")
        _new_folder(folder)
        loaded.save(folder)
        typer.echo(f"{folder}: {_summary(loaded)}")


def export(
    model: ModelFolder,
    folder: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
) -> None:
    """Write a model as a folder that transformers loads."""
    from seqfuse.interop import export_hf

    with one_sentence():
        loaded = load(model, "cpu")
        _new_folder(folder)
        export_hf(loaded, folder)
        typer.echo(f"{folder}: {_summary(loaded)}, as transformers reads it")


def model_rows(path: Path) -> Iterator[tuple[str, object]]:
    """What `seqfuse info MODEL` shows: (name, value)."""
    loaded = load(path, "cpu")
    yield "model", type(loaded).__name__
    yield "parameters", f"{loaded.num_parameters():,}"
    yield "dtype", str(next(loaded.parameters()).dtype).removeprefix("torch.")
    for name in ("tokenizer", "source_tokenizer"):
        tokenizer = getattr(loaded, name)
        yield name.replace("_", " "), "none" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens"
    for name, value in loaded.config.to_dict().items():
        if name != "model":
            yield name, value


# ------------------------------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """What a user can have given wrongly ends the command with one sentence and exit code 2."""
    from safetensors import SafetensorError  # of a file that could not be written

    from seqfuse.data import DataError

    try:
        yield
    except (DataError, ValueError, TypeError, OSError, SafetensorError) as error:
        typer.echo(f"seqfuse: {error}", err=True)
        raise typer.Exit(2) from None


def load(path: Path, device: str):
    """The model of a folder, on a device."""
    import torch

    from seqfuse import models
    from seqfuse.parallel import pick_device

    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    with torch.no_grad():
        return models.load(path, device=pick_device(device))


def _need_tokenizer(model, path: Path) -> None:
    if not callable(getattr(model, "begin", None)):
        raise ValueError(f"{path}: a {type(model).__name__} does not generate text")
    if model.tokenizer is None:
        raise ValueError(f"{path / 'tokenizer.json'}: there is no such file, and without it text is no tokens")


def _new_folder(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists already, and nothing is written over: give the name of a new folder")


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise ValueError("no text was given, neither as an argument nor through a pipe")
    return sys.stdin.read()


def _lines(text: str) -> list[str]:
    """Blank ones too. str.splitlines() also splits where files do not, at form feeds and Unicode's separators."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _summary(model) -> str:
    return f"{type(model).__name__}, {model.num_parameters():,} parameters"
