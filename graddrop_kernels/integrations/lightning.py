"""Lightning 2 as ``import lightning``: the callback that sets the optimizer's epoch.

    trainer = lightning.Trainer(callbacks=[GradDropCallback()])
"""

from lightning.pytorch import Callback

from .lightning_hooks import GradDropHooks


class GradDropCallback(GradDropHooks, Callback):
    __doc__ = GradDropHooks.__doc__
