"""Only the 5 % of the weights with the largest squared gradients are trained, as in Child-Tuning-D. All others keep
every bit, though the optimizer has momentum and weight decay.
"""

from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import FixedMask, FusedGradDropAdamW, top_gradient

args = options(__doc__)
model, rows = load(args)
loader = DataLoader(rows, args.batch_size, collate_fn=collate)

masks = top_gradient(model, list(loader)[:4], density=0.05, loss_of=loss_of)
optimizer = FusedGradDropAdamW(
    model.named_parameters(), lr=args.lr, weight_decay=0.01, mask=FixedMask(masks), seed=args.seed
)
before = {name: param.detach().clone() for name, param in model.named_parameters()}

losses = []
for epoch in range(args.epochs):
    for batch in (bar := tqdm(loader, desc=f"epoch {epoch}")):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

report(losses, optimizer)
count = sum(mask.numel() for mask in masks.values())
moved = sum(int((param != before[name]).sum()) for name, param in model.named_parameters())
outside = sum(int((param != before[name])[~masks[name]].sum()) for name, param in model.named_parameters())
print(f"moved: {moved:,} of {count:,} weights, {outside} of them outside of the mask")
