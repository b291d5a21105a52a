"""Folders that are damaged, cut off, of another kind or made by somebody malicious: a sentence that says which file."""

import json
import pickle
import random
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from seqfuse import models
from seqfuse.models import CheckpointError, Decoder, Model, Transformer
from seqfuse.models.files import read_json, read_safetensors, write_json
from seqfuse.tokenizer import Tokenizer

IDS = torch.arange(8)[None]
CONFIG = {"vocab": 20, "width": 16, "layers": 2, "heads": 2, "max_positions": 16}


@pytest.fixture
def folder(tmp_path):
    Decoder.from_config(CONFIG).save(tmp_path)
    return tmp_path


def sentence(folder, *parts):
    with pytest.raises(CheckpointError) as raised:
        models.load(folder)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def with_tensors(folder, change):
    tensors = read_safetensors(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip_and_what_is_in_the_folder(folder):
    model = models.load(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert read_json(folder / "config.json")["model"] == "Decoder" and not model.training
    before = (folder / "model.safetensors").read_bytes()
    model.save(folder)
    assert (folder / "model.safetensors").read_bytes() == before  # free of times and paths
    assert Model.from_config(folder / "config.json").config == model.config


def test_shared_weights_are_saved_once(tmp_path):
    model = Transformer.from_config(CONFIG | {"bos_id": 0})
    model.save(tmp_path)
    names = read_safetensors(tmp_path / "model.safetensors")
    assert sum("embedding" in name for name in names) == 1
    again = models.load(tmp_path)
    assert again.decoder.embedding.weight is again.encoder.embedding.weight


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is not JSON"),
        ('{"model": "Decoder", ', "is not JSON"),
        ("[1, 2]", "holds a list"),
        ("{}", "got model_type None"),
        ('{"model_type": "t5"}', "got model_type 't5'"),
        ('{"model": "Dreamer"}', '"model" must be one of'),
        ('{"model": "Head"}', '"model" must be one of'),
        ('{"model": ["Decoder"]}', '"model" must be one of'),
        ('{"model_type": ["gpt2"]}', "got model_type ['gpt2']"),
        (json.dumps(CONFIG | {"model": "Decoder", "eps": float("inf")}), "eps must be finite, got inf"),
        (json.dumps(CONFIG | {"model": "Decoder", "dropout": float("nan")}), "dropout must be finite, got nan"),
        ('{"model": "Decoder"}', "the key 'vocab' is missing"),
        ("\ud800", "is not JSON"),
    ],
)
def test_configs(folder, text, said):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    sentence(folder, "config.json", said)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"width": 32}, "the tensor 'stack.blocks.0.attention.out.bias' has shape [16], the config asks for [32]"),
        ({"layers": 1}, "the tensor 'stack.blocks.1.attention.out.bias' is no part of"),
        ({"layers": 3}, "the tensor 'stack.blocks.2.norm1.weight' is missing"),
        ({"tied": False}, "the tensor 'output.weight' is missing"),
    ],
    ids=str,
)
def test_a_config_of_another_model(folder, change, said):
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    sentence(folder, "model.safetensors: " + said)


@pytest.mark.parametrize(
    "change", [{"heads": "2"}, {"depth": 1}, {"layers": 10**9}, {"eos_id": 20}, {"rope": 3}], ids=str
)
def test_values_of_a_config(folder, change):
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    sentence(folder, "config.json: ", next(iter(change)))


def test_what_is_not_there(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    sentence(folder, "model.safetensors: there is no such file")
    (folder / "config.json").unlink()
    sentence(folder, "config.json: there is no such file")
    sentence(tmp_path / "nowhere", "nowhere/config.json: there is no such file")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_cut_off(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    end = int(len(data) * keep) if isinstance(keep, float) else keep
    (folder / "model.safetensors").write_bytes(data[:end])
    sentence(folder, "model.safetensors: is damaged or no safetensors file")


def test_flipped_bytes_never_do_worse_than_a_sentence(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    header, draw = 8 + int.from_bytes(data[:8], "little"), random.Random(0)
    for _ in range(200):
        at, bit = draw.randrange(header), draw.randrange(8)
        data[at] ^= 1 << bit
        (folder / "model.safetensors").write_bytes(data)
        try:
            models.load(folder)
        except CheckpointError as error:
            assert "model.safetensors: " in str(error)
        data[at] ^= 1 << bit


def test_tensors(folder):
    name = "stack.blocks.0.mlp.up.weight"
    with_tensors(folder, lambda t: t.update({name: t[name].long()}))
    sentence(folder, f"model.safetensors: the tensor {name!r} is torch.int64")
    with_tensors(folder, lambda t: t.update({name: t[name].t().float().contiguous()}))
    sentence(folder, f"model.safetensors: the tensor {name!r} has shape [16, 64]")
    with_tensors(folder, lambda t: t.pop(name))
    sentence(folder, f"model.safetensors: the tensor {name!r} is missing")


def sharded(folder, **changes):
    tensors = read_safetensors(folder / "model.safetensors")
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": where | changes})


def test_shards(folder, tmp_path):
    wanted = models.load(folder)(IDS)
    sharded(folder)
    assert torch.equal(models.load(folder)(IDS), wanted)
    index = folder / "model.safetensors.index.json"
    good = read_json(index)["weight_map"]
    write_json(index, {"weight_map": good | {"more": "part-0.safetensors"}})
    sentence(folder, "part-0.safetensors: the tensor 'more', which the index lists, is missing")
    write_json(index, {"weight_map": good | {"more": "../config.json"}})
    sentence(folder, "index.json: lists the shard '../config.json', which is not in this folder")
    write_json(index, {"weight_map": [1]})
    sentence(folder, "index.json: has no weight_map")
    write_json(index, {"weight_map": good})
    (folder / "part-1.safetensors").write_bytes(b"nothing")
    sentence(folder, "part-1.safetensors: is damaged")
    (folder / "part-1.safetensors").unlink()
    sentence(folder, "index.json: lists the shard 'part-1.safetensors', which is not in this folder")


class Malicious:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.seqfuse_was_here = True",))


@pytest.mark.parametrize("write", [lambda f: pickle.dump({"w": Malicious()}, f), lambda f: f.write(b"no pickle"),
                                   lambda f: torch.save({"w": Malicious()}, f), lambda f: torch.save([1], f)],
                         ids=["pickle", "text", "torch", "list"])  # fmt: skip
def test_a_pickle_runs_nothing(folder, write):
    import builtins

    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        write(file)
    sentence(folder, "pytorch_model.bin: ")
    assert not hasattr(builtins, "seqfuse_was_here")


def test_tokenizers(folder):
    Tokenizer.train(["a b c"], "characters", vocab=30).save(folder / "tokenizer.json")
    model = models.load(folder)
    assert model.tokenizer.decode(model.tokenizer.encode("abc")) == "abc"
    Tokenizer.of([f"w{i}" for i in range(21)], "words").save(folder / "tokenizer.json")
    sentence(folder, "tokenizer.json: it has 21 tokens, but the model's embedding has 20 rows")
    (folder / "tokenizer.json").write_text("{}")
    sentence(folder, "tokenizer.json: is damaged")


def test_a_folder_that_is_a_file(folder, tmp_path):
    with pytest.raises(CheckpointError, match="config.json: is a file, not a folder"):
        models.load(folder).save(folder / "config.json")
    sentence(folder / "config.json", "config.json/config.json: there is no such file")


# ------------------------------------------------------------------------------------------------------- Hugging Face

SMALL = {"vocab_size": 20, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 2}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "max_position_embeddings": 16,
         "decoder_start_token_id": 2}  # fmt: skip
LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
          "max_position_embeddings": 16}  # fmt: skip
FAMILIES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **LAYERS)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **LAYERS)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**SMALL, **SIDES)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL, **SIDES)),
}


@pytest.fixture(params=FAMILIES)
def theirs(request, tmp_path):
    FAMILIES[request.param]().save_pretrained(tmp_path)
    return tmp_path


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "peft", "sacrebleu", "seqeval", "matplotlib", "accelerate")))
import seqfuse, torch, seqfuse.recipes, seqfuse.trainer, seqfuse.cli
from seqfuse import models
for name in sys.argv[2:]:
    theirs = f"{sys.argv[1]}/{name}"
    model = models.load(theirs)
    if model.config.model in ("Decoder", "Transformer"):
        seqfuse.generate(model, torch.tensor([[3, 4, 5]]), max_new_tokens=4)
    seqfuse.interop.export_hf(model, theirs + "-again")
    assert models.load(theirs + "-again").num_parameters() == model.num_parameters()
"""


def test_their_folders_need_nothing_of_theirs(tmp_path):
    """Loaded, generated from and exported in a process where an import of transformers fails."""
    for name, make in FAMILIES.items():
        make().save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_their_tensors_are_named_as_they_name_them(theirs):
    good = read_safetensors(theirs / "model.safetensors")
    name = next(n for n in good if n.endswith("weight") and good[n].dim() == 2 and "embed_pos" not in n)
    short = re.sub(r"^(transformer|bert|model)\.", "", name)
    with_tensors(theirs, lambda t: t.pop(name))
    sentence(theirs, "model.safetensors: the tensor ", short, "is missing")
    with_tensors(theirs, lambda t: t.update({name: torch.zeros(3, 5)}))
    sentence(theirs, "model.safetensors: the tensor ", short, "has shape [3, 5], the config asks for [")
    with_tensors(theirs, lambda t: t.update(good, extra=torch.zeros(1)))
    sentence(theirs, "model.safetensors: the tensor 'extra' is no part of")


def test_any_value_in_their_config_is_taken_or_refused_in_a_sentence(theirs):
    good = json.loads((theirs / "config.json").read_text())
    models.load(theirs)
    refused = 0
    for key in good:
        if key in ("model_type", "transformers_version"):
            continue
        for junk in (None, -1, 3, 10**9, "x", [], [1], {}, {"rope_type": "dynamic"}, True, 0.5):
            write_json(theirs / "config.json", good | {key: junk})
            try:
                models.load(theirs)
            except CheckpointError as error:
                refused += 1
                assert str(theirs) in str(error) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    "family, change, said",
    [
        ("gpt2", {"activation_function": "mish"}, "the activation 'mish' is none of"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "the rope_type 'dynamic' is none of"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("bert", {"architectures": ["BertForNextSentencePrediction"]}, "'BertForNextSentencePrediction' is none of"),
        ("bert", {"is_decoder": True}, "is_decoder True is not supported"),
        ("bart", {"decoder_ffn_dim": 20}, "decoder_ffn_dim 20 is not supported, only 16"),
    ],
    ids=str,
)
def test_what_they_have_and_we_do_not(family, change, said, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | change)
    sentence(tmp_path, "config.json: ", said)
