"""GradDrop on an optimizer of torch: SGD with momentum, whose gradients are masked before each step."""

import torch
from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import GradDrop, LinearAnneal, attach_mask, param_groups

args = options(__doc__, layers=2, sentences=64, lr=3e-2)
model, rows = load(args)
loader = DataLoader(rows, args.batch_size, collate_fn=collate)

optimizer = torch.optim.SGD(param_groups(model), lr=args.lr, momentum=0.9)
masks = attach_mask(optimizer, GradDrop(p=LinearAnneal(epochs=args.epochs)), seed=args.seed)

losses = []
for epoch in range(args.epochs):
    masks.set_epoch(epoch)
    for batch in (bar := tqdm(loader, desc=f"epoch {epoch}")):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

report(losses, masks)
