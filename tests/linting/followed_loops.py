"""Loops whose counters, contexts and losses stand in classes, closures and helpers, and what is certain in each."""

OBJECTS = {
    "a counter in a dataclass, tested before it is raised": (
        {"MB105"},
        """
from dataclasses import dataclass

@dataclass
class State:
    micro: int = 0
    def advance(self):
        self.micro += 1

def train(cfg, model, loader, opt):
    state = State()
    for epoch in range(cfg.epochs):
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss / cfg.accum_steps).backward()
            if state.micro % cfg.accum_steps == 0:
                opt.step()
                opt.zero_grad()
            state.advance()
""",
    ),
    "a counter in an enclosing function": (
        {"MB105"},
        """
def make_step(model, opt, accum):
    count = 0
    def step(x, y):
        nonlocal count
        loss = torch.nn.functional.mse_loss(model(x), y) / accum
        loss.backward()
        if count % accum == 0:
            opt.step()
            opt.zero_grad()
        count += 1
    return step

def main(model, loader, opt):
    step = make_step(model, opt, 4)
    for epoch in range(3):
        for x, y in loader:
            step(x, y)
""",
    ),
    "a property is the condition of the step": (
        {"MB105"},
        """
class Trainer:
    def __init__(self, model, opt, loader, k):
        self.model, self.opt, self.loader, self.k = model, opt, loader, k
        self.turn = 0
    @property
    def ready(self):
        return (self.turn + 1) % self.k == 0
    def train(self):
        for epoch in range(3):
            for x, y in self.loader:
                self.turn += 1
                (torch.nn.functional.mse_loss(self.model(x), y) / self.k).backward()
                if self.ready:
                    self.opt.step()
                    self.opt.zero_grad()
""",
    ),
    "a context manager of the file clears the gradients": (
        {"MB103"},
        """
from contextlib import contextmanager

@contextmanager
def fresh(opt):
    opt.zero_grad()
    yield opt

for step in range(steps):
    for k in range(accum_steps):
        x, y = next(batches)
        with fresh(opt):
            (torch.nn.functional.mse_loss(model(x), y) / accum_steps).backward()
    opt.step()
""",
    ),
    "a context of the file takes the step when it is left": (
        {"MB101"},
        """
class Window:
    def __init__(self, opt):
        self.opt = opt
    def __enter__(self):
        self.opt.zero_grad()
    def __exit__(self, *error):
        self.opt.step()

for step in range(steps):
    with Window(opt):
        for k in range(accum_steps):
            x, y = next(batches)
            torch.nn.functional.mse_loss(model(x), y).backward()
""",
    ),
    "the loss is a lambda": (
        {"MB101"},
        """
criterion = lambda out, y: torch.nn.functional.mse_loss(out, y)
for i, (x, y) in enumerate(loader):
    criterion(model(x), y).backward()
    if (i + 1) % accum_steps == 0:
        opt.step()
        opt.zero_grad()
""",
    ),
    "the loss is a partial function": (
        {"MB101"},
        """
from functools import partial
from torch.nn.functional import cross_entropy as ce
loss_fn = partial(ce, label_smoothing=0.1)
for i, (x, y) in enumerate(loader):
    loss_fn(model(x), y).backward()
    if (i + 1) % accum_steps == 0:
        opt.step()
        opt.zero_grad()
""",
    ),
    "groups of a loader": (
        {"MB101"},
        """
from itertools import batched
for group in batched(loader, k):
    for x, y in group:
        torch.nn.functional.mse_loss(model(x), y).backward()
    opt.step()
    opt.zero_grad()
""",
    ),
    "a window whose step stands in a method": (
        {"MB101"},
        """
class Agent:
    def update(self):
        self.opt.zero_grad()
        for _ in range(self.pieces):
            s, a = self.memory.draw()
            torch.nn.functional.mse_loss(self.net(s), a).backward()
        self.opt.step()
    def learn(self, rounds):
        for t in range(rounds):
            self.update()
""",
    ),
    "pairs by einsum": (
        {"MB402"},
        """
import torch.nn.functional as F
from einops import einsum
for i, (image, text) in enumerate(loader):
    a, b = model(image), model(text)
    similar = einsum(a, b, "i d, j d -> i j")
    loss = F.cross_entropy(similar, torch.arange(len(similar))) / accum
    loss.backward()
    if (i + 1) % accum == 0:
        opt.step()
        opt.zero_grad()
""",
    ),
    "a resumed run compares microbatches with steps": (
        {"MB304"},
        """
start = saved % (len(loader) // accum_steps)
for i, (x, y) in enumerate(loader):
    if i < start:
        continue
    (torch.nn.functional.mse_loss(model(x), y) / accum_steps).backward()
    if (i + 1) % accum_steps == 0:
        opt.step()
        opt.zero_grad()
""",
    ),
    "gradients that are cleared once an epoch": (
        {"MB107"},
        """
for epoch in range(epochs):
    opt.zero_grad()
    for i, (x, y) in enumerate(loader):
        (torch.nn.functional.mse_loss(model(x), y) / accum_steps).backward()
        if (i + 1) % accum_steps == 0:
            opt.step()
""",
    ),
    "a loop that does not accumulate, and never clears": (
        {"MB107"},
        """
for epoch in range(epochs):
    for x, y in loader:
        criterion(model(x), y).backward()
        opt.step()
""",
    ),
    "one optimizer of two is never cleared": (
        {"MB107"},
        """
for it in range(iterations):
    d_optim.zero_grad()
    for _ in range(accum):
        real = next(loader)
        (D(G(noise()).detach()).mean() / accum).backward()
    d_optim.step()
    for _ in range(accum):
        (-D(G(noise())).mean() / accum).backward()
    g_optim.step()
""",
    ),
}

_STEP = """
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        (torch.nn.functional.mse_loss(net(x), y) / accum).backward()
        if (i + 1) % accum == 0 or i + 1 == len(loader):
            opt.step()
            {}
"""
# Statements that clear gradients without an optimizer's `zero_grad`, or may do so.
CLEARINGS = [
    "net.zero_grad()",
    "whole_system.zero_grad()",
    "reset_gradients(net)",
    "[p.grad.zero_() for p in net.parameters()]",
    "for p in net.parameters(): p.grad = None",
    "for p in net.parameters(): del p.grad",
    "list(map(lambda p: p.grad.zero_(), net.parameters()))",
    "torch._foreach_zero_(gradients)",
    "helper.step_and_clear_gradients(opt)",
]


def cleared_by(statement: str) -> str:
    """A right loop that clears its gradients by this statement."""
    return _STEP.format(statement)
