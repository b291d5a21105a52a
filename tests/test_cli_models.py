"""The commands of models: what they print, and one sentence with exit code 2 for what can't be."""

import sys

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

import seqfuse
from seqfuse import models
from seqfuse.cli import app
from seqfuse.tokenizer import Tokenizer


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A folder with a decoder and its tokenizer."""
    tokenizer = Tokenizer.train([], "bytes", vocab=260)
    torch.manual_seed(0)
    config = models.DecoderConfig(width=16, layers=1, heads=2, **tokenizer.config())
    model = models.Decoder(config)
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("models") / "decoder"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    """A folder with an encoder-decoder whose source has a tokenizer of its own."""
    target = Tokenizer.train(["one two three"], "words", vocab=9)
    source = Tokenizer.train(["abcdef"], "characters", vocab=12, add_eos=True)
    torch.manual_seed(0)
    config = models.RNNSeq2SeqConfig(source_vocab=source.vocab_size, embed=8, hidden=8, **target.config())
    model = models.RNNSeq2Seq(config)
    model.tokenizer, model.source_tokenizer = target, source
    folder = tmp_path_factory.mktemp("models") / "seq2seq"
    model.save(folder)
    return folder


def test_generate_writes_what_generate_returns(decoder):
    model = models.load(decoder)
    result = run("generate", decoder, "abc", "--max-new-tokens", 8)
    assert result.exit_code == 0 and "tokens/s" in result.stderr
    assert result.stdout == seqfuse.generate(model, "abc", max_new_tokens=8) + "\n"
    piped = run("generate", decoder, "--max-new-tokens", 8, input="abc\n")
    assert piped.stdout == result.stdout
    beams = run("generate", decoder, "abc", "--max-new-tokens", 8, "--beams", 3)
    assert beams.stdout == seqfuse.generate(model, "abc", max_new_tokens=8, num_beams=3) + "\n"
    drawn = [run("generate", decoder, "abc", "--temperature", 1, "--seed", 5, "--top-k", 9).stdout for _ in range(2)]
    assert drawn[0] == drawn[1] != result.stdout


def test_translate_gives_a_line_for_each_line(seq2seq):
    model = models.load(seq2seq)
    lines = ["abc", "f", "fedcba"]
    expected = "".join(t + "\n" for t in seqfuse.generate(model, lines, max_new_tokens=5, num_beams=4))
    for arguments, given in ((lines, None), ([], "\n".join(lines) + "\n"), ([*lines, "--batch", 2], None)):
        result = run("translate", seq2seq, *arguments, "--max-new-tokens", 5, input=given)
        assert (result.exit_code, result.stdout) == (0, expected)


def test_lines_stay_at_their_places(seq2seq, monkeypatch):
    """Blank ones at the end too, and characters that Python counts as ends of lines but files do not."""
    given = []
    monkeypatch.setattr(
        sys.modules["seqfuse.generate"], "generate", lambda model, lines, **_: given.extend(lines) or lines
    )
    run("translate", seq2seq, input="a\u2028b\n\nc\x0cd\n\n\n")
    assert given == ["a\u2028b", "", "c\x0cd", "", ""]
    given.clear()
    run("translate", seq2seq, input="a\r\nb\r\n")
    assert given == ["a", "b"]
    assert run("translate", seq2seq, input="").stdout == "" and given == ["a", "b"]


def test_a_translation_of_several_lines_stays_one(seq2seq, monkeypatch):
    monkeypatch.setattr(sys.modules["seqfuse.generate"], "generate", lambda model, lines, **_: ["a\nb"] * len(lines))
    assert run("translate", seq2seq, "abc", "d").stdout == "a b\na b\n"


def test_info_shows_a_model(seq2seq):
    result = run("info", seq2seq)
    assert result.exit_code == 0
    for text in ("RNNSeq2Seq", f"{models.load(seq2seq).num_parameters():,}", "general", "source tokenizer"):
        assert text in result.stdout


def test_a_checkpoint_goes_out_and_comes_back(decoder, tmp_path):
    out = run("export", decoder, tmp_path / "theirs")
    assert out.exit_code == 0 and "Decoder" in out.stdout
    back = run("import", tmp_path / "theirs", tmp_path / "ours")
    assert back.exit_code == 0, back.output
    ours, first = models.load(tmp_path / "ours"), models.load(decoder)
    ids = torch.randint(3, 260, (2, 7))
    assert torch.equal(ours(ids), first(ids))
    assert seqfuse.generate(ours, "abc", max_new_tokens=4) == seqfuse.generate(first, "abc", max_new_tokens=4)


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_full_disk_gets_one_sentence(decoder, tmp_path, monkeypatch, command):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("seqfuse.models.files.save_file", full)
    result = run(command, decoder, tmp_path / "new")
    assert result.exit_code == 2 and result.stderr == "seqfuse: I/O error: No space left on device (os error 28)\n"
    assert not (tmp_path / "new/model.safetensors").exists()


def test_what_cannot_be_gets_one_sentence(decoder, seq2seq, tmp_path):
    bare = tmp_path / "bare"
    models.RNNLanguageModel(models.RNNLanguageModelConfig(vocab=9, embed=4, hidden=4)).save(bare)
    body = tmp_path / "body"
    models.RNNEncoder(models.RNNEncoderConfig(vocab=9, embed=4, hidden=4)).save(body)
    broken = tmp_path / "broken"
    models.load(bare).save(broken)
    (broken / "model.safetensors").write_bytes(b"\x00" * 30)
    for arguments, sentence in (
        (("generate", tmp_path / "none", "a"), "none: there is no such folder"),
        (("generate", bare, "a"), "tokenizer.json: there is no such file, and without it text is no tokens"),
        (("generate", body, "a"), "a RNNEncoder does not generate text"),
        (("generate", seq2seq, "abc"), "a RNNSeq2Seq reads a source: use seqfuse translate"),
        (("translate", decoder, "abc"), "a Decoder has no source to read: use seqfuse generate"),
        (("generate", broken, "a"), "model.safetensors: is damaged"),
        (("info", broken), "model.safetensors: is damaged"),
        (("generate", decoder, "a", "--top-k", 3), "temperature=0 draws nothing"),
        (("generate", decoder, "a", "--device", "tpu"), "unknown device 'tpu'"),
        (("generate", decoder, "a", "--max-new-tokens", 5000), "more than the 1024 that the model has positions for"),
        (("import", bare, decoder), "exists already, and nothing is written over"),
        (("import", tmp_path, tmp_path / "new"), "config.json: there is no such file"),
        (("export", seq2seq, tmp_path / "new"), "no Hugging Face family has such a RNNSeq2Seq"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stdout == "", (arguments, result.output)
        assert result.stderr.startswith("seqfuse: ") and sentence in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
