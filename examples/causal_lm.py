"""A small causal language model from random weights, on the bytes of real sentences: LayerGradDrop drops whole blocks,
and the weight gradients of dropped blocks are not computed.
"""

import torch
from topics import options, report
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from graddrop_kernels import FusedGradDropAdamW, LayerGradDrop, param_groups
from graddrop_kernels.demo import sib200

LENGTH = 64  # bytes per row

args = options(__doc__, layers=4, sentences=701)
text = "\n".join(sib200.load("en", "train").texts[: args.sentences]).encode()
rows = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)

torch.manual_seed(args.seed)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=args.layers, num_attention_heads=4,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config)
optimizer = FusedGradDropAdamW(param_groups(model), lr=10 * args.lr, mask=LayerGradDrop(p=0.2), seed=args.seed)

losses = []
for epoch in range(args.epochs):
    optimizer.set_epoch(epoch)
    for batch in (bar := tqdm(rows.split(args.batch_size), desc=f"epoch {epoch}")):
        with optimizer.skip_dropped():
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

report(losses, optimizer)
