"""Lightning 2 as ``import pytorch_lightning``: the callback that sets the optimizer's epoch.

    trainer = pytorch_lightning.Trainer(callbacks=[GradDropCallback()])
"""

from pytorch_lightning import Callback

from .lightning_hooks import GradDropHooks


class GradDropCallback(GradDropHooks, Callback):
    __doc__ = GradDropHooks.__doc__
