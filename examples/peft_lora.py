"""GradDrop on the LoRA parameters of PEFT in a plain loop; the head, which modules_to_save trains whole, is dense."""

from peft import LoraConfig, get_peft_model
from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader
from tqdm import tqdm

from graddrop_kernels import FusedGradDropAdamW, GradDrop, param_groups

args = options(__doc__)
model, rows = load(args)
loader = DataLoader(rows, args.batch_size, collate_fn=collate)

model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"]))
model.print_trainable_parameters()
# LoRA and a new head want a higher learning rate than pretrained weights.
optimizer = FusedGradDropAdamW(param_groups(model), lr=10 * args.lr, mask=GradDrop(p=0.2), seed=args.seed)

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
