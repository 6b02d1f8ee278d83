"""skorch, whose nets give an optimizer parameters, where kfqn's want the model.

Example::

    class Net(TakesModule, skorch.NeuralNetClassifier):
        pass

    Net(module, optimizer=kfqn.KFBFGS, optimizer__weight_decay=0.01).fit(x, y)
"""

import skorch


class TakesModule(skorch.NeuralNet):
    """Before a net of skorch among the bases: its ``optimizer`` is given the module.

    Settings are those named ``optimizer__…``; ``lr`` of the net is for others. Second passes are run by
    skorch's own closure, of which it keeps the first loss.
    """

    def initialize_optimizer(self, triggered_directly: None = None) -> "TakesModule":
        """Make ``optimizer_``; see `skorch.NeuralNet`."""
        self.optimizer_ = self.optimizer(self.module_, **self.get_params_for("optimizer"))
        return self
