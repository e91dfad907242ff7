"""A GAN with two accumulators: each network has its optimizer, and its step is the whole batch's.

While one network learns, the other only computes: requires_grad_(False) says so and saves its gradients. The generator
learns to draw points on a circle.
"""

import torch
from torch import Tensor, nn

import microbatch as mb

BATCH, MICROBATCH, STEPS = 256, 32, 200


def network(inputs: int, outputs: int) -> nn.Sequential:
    bend = nn.LeakyReLU(0.2)
    return nn.Sequential(nn.Linear(inputs, 64), bend, nn.Linear(64, 64), bend, nn.Linear(64, outputs))


def real(rows: int) -> Tensor:
    """Draw points near a circle of radius 2, of shape (rows, 2)."""
    angle = 2 * torch.pi * torch.rand(rows)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(rows, 2)


def main() -> float:
    torch.manual_seed(0)
    generator, critic = network(4, 2), network(2, 1)
    learn_to_draw = mb.Accumulator(
        generator, torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9)), microbatch_size=MICROBATCH
    )
    learn_to_judge = mb.Accumulator(
        critic, torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9)), microbatch_size=MICROBATCH
    )

    def critic_loss(critic: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            drawn = generator(rows["noise"])
        softplus = nn.functional.softplus
        return (softplus(-critic(rows["real"])) + softplus(critic(drawn))).mean()

    def generator_loss(generator: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        return nn.functional.softplus(-critic(generator(rows["noise"]))).mean()

    for index in range(1, STEPS + 1):
        judged = learn_to_judge.step({"real": real(BATCH), "noise": torch.randn(BATCH, 4)}, critic_loss)
        critic.requires_grad_(False)
        drawn = learn_to_draw.step({"noise": torch.randn(BATCH, 4)}, generator_loss)
        critic.requires_grad_(True)
        if index % 100 == 0:
            print(f"step {index}  critic {judged.loss:.3f}  generator {drawn.loss:.3f}")
    with torch.no_grad():
        radius = generator(torch.randn(2000, 4)).norm(dim=1)
    print(f"radius of what is drawn: {radius.mean():.2f} on average; 2.00 is right")
    return float(radius.mean())


if __name__ == "__main__":
    main()
