"""Converts the tokenizer of multilingual-e5-small to a fast one of transformers, which knows words and offsets."""

from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Pipeline
from transformers import PreTrainedTokenizerFast

from graddrop_kernels.demo import e5_small


def fast_tokenizer(tokenizer: e5_small.Tokenizer, texts: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """Cuts ``texts`` into the ids that ``tokenizer`` gives, pairs as XLM-R does: <s> a </s></s> b </s>.

    Args:
        texts: all that will be cut; only characters in them are normalised.
        max_length: what the model can take.
    """
    pipeline = Pipeline(models.Unigram(tokenizer.pieces, e5_small.UNK))
    # One replacement per occurring character, as the file does not have the library's own form of such a table.
    used = sorted({character for text in texts for character in text if ord(character) in tokenizer.characters})
    changes = [normalizers.Replace(character, tokenizer.characters[ord(character)]) for character in used]
    pipeline.normalizer = normalizers.Sequence([*changes, normalizers.Replace(Regex("  +"), " ")])
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    names = {"<s>": e5_small.BOS, "<pad>": e5_small.PAD, "</s>": e5_small.EOS, "<unk>": e5_small.UNK}
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, names[name]) for name in ("<s>", "</s>")],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=pipeline, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length, clean_up_tokenization_spaces=False,
    )  # fmt: skip
