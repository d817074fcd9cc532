"""GradDrop in the Trainer of Lightning, its p annealed from epoch to epoch."""

import lightning
from topics import collate, load, loss_of, options, report
from torch.utils.data import DataLoader

from graddrop_kernels import FusedGradDropAdamW, GradDrop, LinearAnneal, param_groups
from graddrop_kernels.integrations.lightning import GradDropCallback

args = options(__doc__)
model, rows = load(args)


class Topics(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        mask = GradDrop(p=LinearAnneal(epochs=args.epochs))
        # self.model, not self: masks are keyed by the names of parameters.
        return FusedGradDropAdamW(param_groups(self.model), lr=args.lr, mask=mask, seed=args.seed)


module = Topics()
trainer = lightning.Trainer(
    accelerator="cpu", max_epochs=args.epochs, logger=False, enable_checkpointing=False, callbacks=[GradDropCallback()]
)
trainer.fit(module, DataLoader(rows, args.batch_size, collate_fn=collate))

report(module.losses, trainer.optimizers[0])
