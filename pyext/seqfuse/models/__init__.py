"""Whole models, from the recurrent encoder-decoder to decoder LLMs: one readable file each, on seqfuse's kernels."""

from pathlib import Path

import torch

from seqfuse.models import files
from seqfuse.models.base import TOKENIZERS, Model, check_tokenizer, empty_model
from seqfuse.models.config import MODELS, Config
from seqfuse.models.decoder import Decoder, DecoderConfig
from seqfuse.models.encoder import Encoder, EncoderConfig
from seqfuse.models.files import CheckpointError
from seqfuse.models.heads import (
    ActorCritic,
    ActorCriticConfig,
    Classifier,
    ClassifierConfig,
    MaskedLM,
    MaskedLMConfig,
    SpanQA,
    SpanQAConfig,
    Tagger,
    TaggerConfig,
)
from seqfuse.models.positions import RopeSettings
from seqfuse.models.recurrent import (
    ClassToText,
    ClassToTextConfig,
    RNNEncoder,
    RNNEncoderConfig,
    RNNLanguageModel,
    RNNLanguageModelConfig,
)
from seqfuse.models.seq2seq import RNNSeq2Seq, RNNSeq2SeqConfig
from seqfuse.models.transformer import Transformer, TransformerConfig

__all__ = [
    "MODELS",
    "ActorCritic",
    "ActorCriticConfig",
    "CheckpointError",
    "ClassToText",
    "ClassToTextConfig",
    "Classifier",
    "ClassifierConfig",
    "Config",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "MaskedLM",
    "MaskedLMConfig",
    "Model",
    "RNNEncoder",
    "RNNEncoderConfig",
    "RNNLanguageModel",
    "RNNLanguageModelConfig",
    "RNNSeq2Seq",
    "RNNSeq2SeqConfig",
    "RopeSettings",
    "SpanQA",
    "SpanQAConfig",
    "Tagger",
    "TaggerConfig",
    "Transformer",
    "TransformerConfig",
    "load",
]


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Model:
    """The model in a folder, in eval mode: one that Model.save wrote, or a Hugging Face checkpoint.

    folder: with config.json, model.safetensors (or shards with their index) and perhaps tokenizer.json. Hugging Face's
        families that are known: gpt2, llama, bert, marian, bart. dtype: of the weights, by default the file's.
    Raises CheckpointError, one sentence that names the file and the tensor, where a file is missing or damaged, the
    family unknown, a tensor missing, left over or of another shape, or the tokenizer larger than the embedding.
    """
    folder = Path(folder)
    path = folder / "config.json"
    values = files.read_json(path)
    if "model" in values:
        with files.named(path):
            config = Config.from_dict(values)
        model = empty_model(config, path)
        files.fill(model, *files.read_tensors(folder), dtype)
    else:
        from seqfuse.interop import hf_models

        model = hf_models.load(folder, values, dtype)
    for name, file in TOKENIZERS.items():
        path = folder / file
        if path.is_file():
            from seqfuse.tokenizer import Tokenizer

            setattr(model, name, Tokenizer.load(path))
            check_tokenizer(model, name, path)
    return model.eval().to(device)
