"""GradDrop in a plain loop, its p annealed from epoch to epoch."""

from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import FusedGradDropAdamW, GradDrop, LinearAnneal, param_groups

args = options(__doc__)
model, rows = load(args)
loader = DataLoader(rows, args.batch_size, collate_fn=collate)

mask = GradDrop(p=LinearAnneal(epochs=args.epochs))
optimizer = FusedGradDropAdamW(param_groups(model), lr=args.lr, mask=mask, seed=args.seed)

losses = []
for epoch in range(args.epochs):
    optimizer.set_epoch(epoch)
    for batch in (bar := tqdm(loader, desc=f"epoch {epoch}")):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

report(losses, optimizer)
