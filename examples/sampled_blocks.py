"""One block of the transformer trained at a time, others after some steps. The rest has no moments, and its backward
pass makes no weight gradients.
"""

from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import FusedGradDropAdamW, SampleBlocks, param_groups

args = options(__doc__)
model, rows = load(args)
loader = DataLoader(rows, args.batch_size, collate_fn=collate)

mask = SampleBlocks(k=1, every=4, idle_state="drop")
optimizer = FusedGradDropAdamW(param_groups(model), lr=args.lr, mask=mask, seed=args.seed)
dense = FusedGradDropAdamW(param_groups(model), mask=None)

losses = []
for epoch in range(args.epochs):
    for batch in (bar := tqdm(loader, desc=f"epoch {epoch}")):
        with optimizer.skip_dropped():
            loss = loss_of(model, batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

report(losses, optimizer)
print(f"moments: {optimizer.memory()['now']['moments']:,} bytes; of all blocks {dense.memory()['peak']['moments']:,}")
