"""GradDrop in a loop of Accelerate, its p annealed from epoch to epoch."""

from accelerate import Accelerator
from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import FusedGradDropAdamW, GradDrop, LinearAnneal, param_groups
from graddrop_kernels.integrations.accelerate import graddrop_optimizer, mask_log, set_epoch

args = options(__doc__)
model, rows = load(args)
loader = DataLoader(rows, args.batch_size, collate_fn=collate)
mask = GradDrop(p=LinearAnneal(epochs=args.epochs))
optimizer = FusedGradDropAdamW(param_groups(model), lr=args.lr, mask=mask, seed=args.seed)

accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for epoch in range(args.epochs):
    set_epoch(optimizer, epoch)
    for batch in (bar := tqdm(loader, desc=f"epoch {epoch}")):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", p=mask_log(optimizer)["graddrop_p"])

report(losses, graddrop_optimizer(optimizer))
