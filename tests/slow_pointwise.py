"""`wave.CleanRun.pointwise` layer by layer, each with a replay of its own: what the wave has to equal, and what it is
timed against. Every block above a layer is run again for it, forward and backward."""

from mipfast.scoring import memory
from mipfast.scoring.nodes import CleanNode, HookedNodes, ResidualNodes
from mipfast.scoring.replay import Replay, repeated


def layer_by_layer(clean, layers, nodes, weights, budget, value_of, groups):
    """In the place of CleanRun.pointwise; of all layers, whichever are asked for."""
    clean.run()
    capture, at_one = clean.capture, nodes == 1
    steps = max(1, min(len(nodes), memory.copies_that_fit(capture, budget)))
    if clean.additive and bool(at_one.any()):
        one = Replay(capture, 1)
        found = one.clean_gradients(value_of, range(capture.stack.num_layers))
        node = CleanNode(one, nodes[at_one], weights[at_one], False, clean.replay.states, *found)
        for layer, act in enumerate(capture.activations):
            yield from _part(layer, node.score(act, groups, value_of)[0])
            node.replay.push(clean.replay.states[layer], None)
        nodes, weights = nodes[~at_one], weights[~at_one]
    for alphas, w in zip(nodes.split(steps), weights.split(steps), strict=True):
        if not len(alphas):
            continue
        replay = Replay(capture, len(alphas))
        group = (_AtCleanState if clean.additive else HookedNodes)(replay, alphas, w, carry=False)
        for layer, act in enumerate(capture.activations):
            group.clean_output = clean.replay.baseline_outputs[layer]
            with memory.measured(capture, [0] * len(alphas)):
                yield from _part(layer, group.score(act, groups, value_of)[0])
            replay.push(repeated(clean.replay.states[layer], len(alphas)), None)


class _AtCleanState(ResidualNodes):
    """The states before a layer are the clean run's, and so is its block's output at its baseline."""

    def baseline_output(self):
        self._output, self._d_output = repeated(self.clean_output, self.replay.copies), None
        return self._output


def _part(layer, sums):
    return [] if sums is None else [(layer, sums)]
