"""The GRU encoder-decoder inside the PyPI package g2p-en (Park and Kim 2019): spelling in, phonemes out.

    model = g2p_en.load()                                   # fetched once, then from the cache
    seqfuse.generate(model, "translation", max_new_tokens=20)     # 'T R AE0 N S L EY1 SH AH0 N'

One layer in one direction, without attention: the last state of the encoder is the decoder's first. The package itself
is not installed; of its archive only the weights are read, and numpy unpickles nothing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from seqfuse.data import PackageFile, fetch
from seqfuse.models.base import Model
from seqfuse.models.files import CheckpointError, fill, tensors_of
from seqfuse.models.seq2seq import RNNSeq2Seq, RNNSeq2SeqConfig
from seqfuse.tokenizer import Tokenizer

CHECKPOINT = PackageFile(
    name="g2p-en",
    version="2.1.0",
    member="g2p_en/checkpoint20.npz",
    sha256="b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6",
    licence_member="g2p_en-2.1.0.dist-info/LICENSE.txt",
    licence="Apache License 2.0",
    source="Grapheme-to-phoneme model by Kyubyong Park and Jongseok Kim, from the PyPI package g2p-en",
)

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
PHONEMES = [
    *("<pad>", "<unk>", "<s>", "</s>"),
    *"AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1 EH2 ER0 ER1".split(),
    *"ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH".split(),
    *"UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH".split(),
]

TENSORS = {
    "enc_emb": "encoder.embedding.weight",
    "dec_emb": "decoder.embedding.weight",
    "fc_w": "output.weight",
    "fc_b": "output.bias",
} | {
    f"{short}_{kind}": f"{whole}.layers.0.{name}_l0"
    for short, whole in (("enc", "encoder"), ("dec", "decoder"))
    for kind, name in (("w_ih", "weight_ih"), ("w_hh", "weight_hh"), ("b_ih", "bias_ih"), ("b_hh", "bias_hh"))
}  # theirs: ours


def load(path: str | Path | None = None) -> Model:
    """The model, with both tokenizers, in eval mode. path: of a checkpoint20.npz; None fetches the package's own.

    Raises DataError if it can't be fetched, CheckpointError if the file is not such a checkpoint.
    """
    path = fetch(CHECKPOINT) if path is None else Path(path)
    tensors = _read(path)
    sizes = {"embed": tensors["dec_emb"].shape[1], "hidden": tensors["fc_w"].shape[-1]}
    config = RNNSeq2SeqConfig(
        cell="gru", attention=None, bidirectional=False, vocab=len(PHONEMES), source_vocab=len(LETTERS), pad_id=0,
        bos_id=PHONEMES.index("<s>"), eos_id=PHONEMES.index("</s>"), **sizes,
    )  # fmt: skip
    model = RNNSeq2Seq(config)
    assert set(TENSORS.values()) == set(tensors_of(model))
    fill(model, {ours: tensors[theirs] for theirs, ours in TENSORS.items()}, path)
    model.source_tokenizer = Tokenizer.of(LETTERS, "characters", specials=LETTERS[:3], add_eos=True)
    model.tokenizer = Tokenizer.of(PHONEMES, "words", specials=PHONEMES[:4])
    return model.eval()


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: is damaged or no checkpoint of g2p-en: {error}") from error
    for name in TENSORS:
        if name not in arrays:
            raise CheckpointError(f"{path}: the tensor {name!r} of a g2p-en checkpoint is missing")
        if name.endswith(("emb", "w_ih", "w_hh", "fc_w")) and arrays[name].ndim != 2:
            raise CheckpointError(f"{path}: the tensor {name!r} has shape {list(arrays[name].shape)}, 2-D is wanted")
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
