"""200 frequent words become tokens of their own. The model learns what they mean from how it understood the same
sentences before. Only the rows of these tokens are trained: every other weight keeps every bit, and has no moments.
"""

import copy
from collections import Counter

import torch
from topics import options, report
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import FusedGradDropAdamW, new_token_rows
from graddrop_kernels.demo import e5_small, sib200

args = options(__doc__, lr=3e-3)
texts = sib200.load("en", "train").texts[: args.sentences]
teacher, tokenizer = e5_small.load(texts)
teacher.encoder.layer = teacher.encoder.layer[: args.layers]
teacher.eval()
old_vocab_size = teacher.config.vocab_size
counts = Counter(word for text in texts for word in text.split() if word.isalpha() and len(word) > 3)
new = {word: old_vocab_size + i for i, (word, _) in enumerate(counts.most_common(200))}
torch.manual_seed(args.seed)
model = copy.deepcopy(teacher)
model.resize_token_embeddings(old_vocab_size + len(new), mean_resizing=False)


def ids_of(text: str) -> list[int]:
    """A sentence's ids, one for each new word."""
    words = ([new[word]] if word in new else tokenizer([word])["input_ids"][0][1:-1] for word in text.split())
    return [e5_small.BOS, *(token for word in words for token in word), e5_small.EOS]


def embedded(bert: nn.Module, batch: list[list[int]]) -> torch.Tensor:
    """The mean of each sentence's last hidden states."""
    ids = nn.utils.rnn.pad_sequence(list(map(torch.tensor, batch)), batch_first=True, padding_value=e5_small.PAD)
    mask = (ids != e5_small.PAD).long()
    hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


optimizer = FusedGradDropAdamW(
    model.named_parameters(), lr=args.lr, weight_decay=0.01, seed=args.seed,
    mask=new_token_rows(model, old_vocab_size, rest="frozen"),
)  # fmt: skip
before = [param.detach().clone() for param in model.parameters()]
pairs = [(ids_of(text), ids) for text, ids in zip(texts, tokenizer(texts)["input_ids"])]
loader = DataLoader(pairs, args.batch_size, collate_fn=lambda batch: list(zip(*batch)))

losses = []
teacher.requires_grad_(False)
for epoch in range(args.epochs):
    for ids, old_ids in tqdm(loader, desc=f"epoch {epoch}"):
        alike = nn.functional.cosine_similarity(embedded(model, ids), embedded(teacher, old_ids))
        loss = 100 * (1 - alike).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

report(losses, optimizer)
moved = [param != old for param, old in zip(model.parameters(), before)]
new_rows = moved[0][old_vocab_size:]  # the embeddings of words are the first parameter
others = sum(map(torch.sum, moved)) - new_rows.sum()
print(f"moved: {new_rows.any(dim=1).sum()} of {len(new)} new rows, {others} of all other weights")
moments, dense = optimizer.memory()["now"]["moments"], 8 * sum(param.numel() for param in model.parameters())
print(f"moments: {moments:,} bytes; of all parameters {dense:,}")
