"""PPO: one rollout is the effective batch of every epoch, and goes through the network in microbatches.

The loss has three terms with one denominator, the moves of the rollout. Advantages are normalised over the rollout,
before it is cut. The game: on a line of 9 cells, walk from the middle to the right end.
"""

import torch
from torch import Tensor, nn

import microbatch as mb

CELLS, WALKERS, MOVES, MICROBATCH = 9, 64, 16, 128


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(CELLS, 32), nn.Linear(32, 32), nn.Tanh())
        self.move, self.value = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, cell: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        hidden = self.body(cell)
        return torch.distributions.Categorical(logits=self.move(hidden)), self.value(hidden).squeeze(-1)


def loss_fn(policy: Policy, rows: dict[str, Tensor]) -> mb.Loss:
    chosen, value = policy(rows["cell"])
    ratio = (chosen.log_prob(rows["move"]) - rows["log_prob"]).exp()
    gain = torch.minimum(ratio * rows["advantage"], ratio.clamp(0.8, 1.2) * rows["advantage"])
    loss = -gain + 0.5 * (value - rows["return"]).square() - 0.01 * chosen.entropy()
    clipped = ((ratio - 1).abs() > 0.2).sum()
    return mb.Loss(sum=loss.sum(), count=len(loss), metrics={"clipped": clipped})  # metrics: sums over the window


@torch.no_grad()
def rollout(policy: Policy) -> tuple[dict[str, Tensor], float]:
    """Play; every tensor of the batch has shape (WALKERS * MOVES,)."""
    cell = torch.full((WALKERS,), CELLS // 2)
    cells, moves, log_probs, rewards = [], [], [], []
    for _ in range(MOVES):
        chosen, _ = policy(cell)
        move = chosen.sample()
        cells.append(cell)
        moves.append(move)
        log_probs.append(chosen.log_prob(move))
        cell = (cell + 2 * move - 1).clamp(0, CELLS - 1)
        rewards.append((cell == CELLS - 1).float())
    returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)
    batch = {"cell": cells, "move": moves, "log_prob": log_probs}
    rows = {name: torch.stack(each).flatten() for name, each in batch.items()} | {"return": returns.flatten()}
    advantage = rows["return"] - policy(rows["cell"])[1]
    rows["advantage"] = (advantage - advantage.mean()) / advantage.std()  # over the rollout, and not a microbatch
    return rows, float(torch.stack(rewards).sum(0).mean())


def main() -> float:
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    accumulator = mb.Accumulator(policy, optimizer, microbatch_size=MICROBATCH, max_grad_norm=0.5)
    reward = 0.0
    for iteration in range(1, 21):
        rows, reward = rollout(policy)
        for _ in range(4):
            step = accumulator.step(rows, loss_fn)
        if iteration % 10 == 0:
            clipped = float(step.metrics["clipped"]) / step.count
            print(f"iteration {iteration}  reward {reward:.2f} of {MOVES - 3}  moves clipped {clipped:.1%}")
    return reward


if __name__ == "__main__":
    main()
