"""A graph network: a batch is a list of graphs of different sizes, and the loss counts nodes.

mb.Rows says that the list has one graph a row. The loss function joins the graphs of its microbatch into one large
graph. Every node of the batch weighs the same, whichever microbatch its graph is in.
"""

import torch
from torch import Tensor, nn

import microbatch as mb

GRAPHS, MICROBATCH, STEPS = 64, 8, 41
Graph = dict[str, Tensor]


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(1, 32), nn.Linear(64, 32), nn.Linear(64, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """Return logits of shape (nodes, 2); edges has shape (2, edges)."""
        hidden = self.first(nodes).relu()
        hidden = self.second(with_neighbours(hidden, edges)).relu()
        return self.out(with_neighbours(hidden, edges))


def with_neighbours(hidden: Tensor, edges: Tensor) -> Tensor:
    total = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
    return torch.cat([hidden, total], dim=1)


def joined(graphs: list[Graph]) -> Graph:
    """Join graphs into one: node numbers of each graph are moved behind those of the graphs before it."""
    sizes = [len(graph["nodes"]) for graph in graphs]
    moved = [graph["edges"] + sum(sizes[:index]) for index, graph in enumerate(graphs)]
    nodes, labels = (torch.cat([graph[key] for graph in graphs]) for key in ("nodes", "labels"))
    return {"nodes": nodes, "edges": torch.cat(moved, dim=1), "labels": labels}


def loss_fn(model: GraphNetwork, graphs: list[Graph]) -> mb.Loss:
    graph = joined(graphs)
    logits, labels = model(graph["nodes"], graph["edges"]), graph["labels"]
    total = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return mb.Loss(sum=total, count=len(labels), metrics={"right": (logits.argmax(1) == labels).sum()})


def draw(generator: torch.Generator) -> Graph:
    """Draw a graph of 3 to 30 nodes; a node's label is whether it has more than 3 neighbours."""
    size = int(torch.randint(3, 31, (), generator=generator))
    linked = torch.rand(size, size, generator=generator).triu(1) < 4.0 / size
    edges = (linked | linked.T).nonzero().T
    degree = torch.zeros(size).index_add(0, edges[1], torch.ones(edges.shape[1]))
    return {"nodes": torch.ones(size, 1), "edges": edges, "labels": (degree > 3).long()}


def main() -> float:
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), GraphNetwork()
    accumulator = mb.Accumulator(model, torch.optim.AdamW(model.parameters(), lr=5e-3), microbatch_size=MICROBATCH)
    accuracy = 0.0
    for _ in range(STEPS):
        step = accumulator.step(mb.Rows([draw(generator) for _ in range(GRAPHS)]), loss_fn)
        accuracy = float(step.metrics["right"]) / step.count
        if step.index % 20 == 0:
            print(f"step {step.index}  loss {step.loss:.3f}  accuracy {accuracy:.3f} of {step.count} nodes")
    return accuracy


if __name__ == "__main__":
    main()
