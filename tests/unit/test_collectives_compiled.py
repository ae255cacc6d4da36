"""What notes the collectives for the stall line is invisible to the compiler."""

import torch

from base.flight_recorder import OWN, entering


def test_a_step_with_a_collective_is_compiled_once():
    """Not again for every number of collectives before it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x):
        with entering("all_gather"):
            return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend)
    for _ in range(4):
        compiled(torch.ones(1))
        step(torch.ones(1))  # another of the process, not compiled
    assert len(graphs) == 1
    assert OWN.name == "all_gather" and not OWN.waits
