"""Loops as people write them, with other names than the usual ones: no false alarm, and no silence."""

import pytest

from microbatch.linting.doctor import doctor

RIGHT = {
    "a list of microbatches, divided by its length": """
def fit(model, opt, loader, accum_steps):
    waiting = []
    for batch in loader:
        waiting.append(batch)
        if len(waiting) < accum_steps:
            continue
        for x, y in waiting:
            loss = torch.nn.functional.mse_loss(model(x), y)
            (loss / len(waiting)).backward()
        waiting.clear()
        opt.step()
        opt.zero_grad()
""",
    "two networks, one batch each": """
def train(netG, netD, loader, optimizerG, optimizerD, criterion):
    for i, real in enumerate(loader):
        netD.zero_grad()
        criterion(netD(real), 1).backward()
        fake = netG(noise())
        criterion(netD(fake.detach()), 0).backward()
        optimizerD.step()
        netG.zero_grad()
        errG = criterion(netD(fake), 1)
        errG.backward()
        optimizerG.step()
        if i % 50 == 0:
            print(errG.item())
""",
    "Accelerate divides by the number it was made with": """
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=4)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for b in loader:
    with accelerator.accumulate(model):
        loss = model(**b).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
""",
    "the step and the rest of a counter at once": """
for i in range(steps * N):
    x, y = next(batches)
    loss = torch.nn.functional.mse_loss(model(x), y) / N
    loss.backward()
    step, rest = divmod(i + 1, N)
    if rest == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    "a loss that is chosen by match": """
for i in range(steps * N):
    x, y = next(batches)
    match mode:
        case "mse":
            loss = torch.nn.functional.mse_loss(model(x), y)
        case _:
            loss = torch.nn.functional.l1_loss(model(x), y)
    (loss / N).backward()
    if (i + 1) % N == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    "a window out of a generator, divided by its length": """
from itertools import islice


def windows(loader, n):
    it = iter(loader)
    while chunk := list(islice(it, n)):
        yield chunk


def train(model, loader, opt, n):
    for chunk in windows(loader, n):
        opt.zero_grad()
        for x, y in chunk:
            (torch.nn.functional.mse_loss(model(x), y) / len(chunk)).backward()
        opt.step()
""",
    "gradients divided in place, under another name": """
def average(parameters, n):
    for p in parameters:
        if p.grad is None:
            continue
        g = p.grad
        g.mul_(1 / n)


def train(model, batches, opt, accum_steps, updates):
    for update in range(updates):
        opt.zero_grad()
        for _ in range(accum_steps):
            x, y = next(batches)
            torch.nn.functional.mse_loss(model(x), y).backward()
        average(model.parameters(), accum_steps)
        opt.step()
""",
    "two networks, a window each": """
class Gan:
    def __init__(self, G, D, data, accum):
        self.G, self.D, self.data, self.accum = G, D, data, accum
        self.opt_G = torch.optim.Adam(G.parameters())
        self.opt_D = torch.optim.Adam(D.parameters())

    def step_D(self):
        self.opt_D.zero_grad()
        for _ in range(self.accum):
            loss = self.D(next(self.data)).mean() - self.D(self.G(noise()).detach()).mean()
            (loss / self.accum).backward()
        self.opt_D.step()

    def step_G(self):
        self.opt_G.zero_grad()
        for _ in range(self.accum):
            (-self.D(self.G(noise())).mean() / self.accum).backward()
        self.opt_G.step()

    def train(self, steps):
        for _ in range(steps):
            self.step_D()
            self.step_G()
""",
    "a network that is trained every few microbatches": """
def train(q, buffer, opt, steps, accum_every=4):
    for step in range(1, steps + 1):
        observe(buffer)
        if step % accum_every == 0:
            s, y = buffer.sample()
            loss = torch.nn.functional.mse_loss(q(s), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
""",
    "means within each row": """
def train(model, batches, opt, accum, updates):
    for i in range(updates * accum):
        x, y, mask = next(batches)
        losses = (model(x) - y) ** 2
        loss = ((losses * mask).sum(dim=1) / mask.sum(dim=1)).mean() / accum
        loss.backward()
        if (i + 1) % accum == 0:
            opt.step()
            opt.zero_grad()
""",
}
UNCERTAIN = {
    "a learning rate that is divided by N": (
        "MB101",
        """
def train(model, loader, lr, accum_steps):
    opt = torch.optim.SGD(model.parameters(), lr=lr / accum_steps)
    for i, (x, y) in enumerate(loader):
        torch.nn.functional.mse_loss(model(x), y).backward()
        if (i + 1) % accum_steps == 0:
            opt.step()
            opt.zero_grad()
""",
    ),
    "pieces of an order of rows": (
        "MB404",
        """
def train(model, opt, states, goals, n_chunks):
    opt.zero_grad()
    order = torch.randperm(states.size(0))
    for _ in range(epochs):
        opt.zero_grad()
        for rows in order.chunk(n_chunks):
            loss = torch.nn.functional.mse_loss(model(states[rows]), goals[rows])
            (loss / n_chunks).backward()
        opt.step()
""",
    ),
}
WRONG = {
    "a counter that is set back": (
        "MB101",
        """
def train(model, loader, opt, accum=4):
    pending = 0
    for x, y in loader:
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        pending += 1
        if pending >= accum:
            opt.step()
            opt.zero_grad()
            pending = 0
""",
    ),
    "a division and no window": (
        "MB104",
        """
def train(model, loader, opt, epochs=5, accum=4):
    for epoch in range(epochs):
        for x, y in loader:
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y) / accum
            loss.backward()
            opt.step()
""",
    ),
    "pieces of a batch": (
        "MB101",
        """
def train(model, loader, optimizer, pieces=4):
    for x, y in loader:
        optimizer.zero_grad()
        for xm, ym in zip(x.chunk(pieces), y.chunk(pieces)):
            torch.nn.functional.mse_loss(model(xm), ym).backward()
        optimizer.step()
""",
    ),
    "one of two backwards is not divided": (
        "MB101",
        """
def train(model, loader, opt, accum):
    for i, (x, y, z) in enumerate(loader):
        out = model(x)
        (torch.nn.functional.mse_loss(out, y) / accum).backward(retain_graph=True)
        torch.nn.functional.l1_loss(out, z).backward()
        if (i + 1) % accum == 0:
            opt.step()
            opt.zero_grad()
""",
    ),
    "one of two terms is not divided": (
        "MB101",
        """
def train(model, loader, opt, accum):
    for i, (x, y, z) in enumerate(loader):
        out = model(x)
        loss = torch.nn.functional.mse_loss(out, y) / accum
        loss = loss + torch.nn.functional.l1_loss(out, z)
        loss.backward()
        if (i + 1) % accum == 0:
            opt.step()
            opt.zero_grad()
""",
    ),
    "one network of two is cleared in its window": (
        "MB103",
        """
def train(G, D, opt_g, opt_d, data, accum, steps):
    for step in range(steps):
        for k in range(accum):
            opt_d.zero_grad()
            loss = D(G(noise()).detach()).mean() - D(next(data)).mean()
            (loss / accum).backward()
        opt_d.step()
        opt_g.zero_grad()
        for k in range(accum):
            (-D(G(noise())).mean() / accum).backward()
        opt_g.step()
""",
    ),
    "a comprehension that trains": (
        "MB105",
        """
class Learner:
    def __init__(self, net, opt, accum):
        self.net, self.opt, self.accum, self.updates = net, opt, accum, 0

    def update(self, x, y):
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        (loss / self.accum).backward()
        if self.updates % self.accum == 0:
            self.opt.step()
            self.opt.zero_grad()
        self.updates += 1
        return loss.detach()

    def fit(self, loader, epochs):
        for epoch in range(epochs):
            losses = [self.update(x, y) for x, y in loader]
            print(torch.stack(losses).mean())
""",
    ),
    "a mask of any name": (
        "MB401",
        """
def masked(out, y, lens):
    ok = torch.arange(y.size(1))[None] < lens[:, None]
    return ((out - y) ** 2 * ok).sum() / ok.sum()


def train(model, loader, opt, accum):
    k = 0
    for x, y, lens in loader:
        (masked(model(x), y, lens) / accum).backward()
        k = (k + 1) % accum
        if k == 0:
            opt.step()
            opt.zero_grad()
""",
    ),
    "a model of the file that compares its rows": (
        "MB402",
        """
class Towers(torch.nn.Module):
    def __init__(self, left, right):
        super().__init__()
        self.left = torch.nn.Linear(4, 8)
        self.right = torch.nn.Linear(4, 8)

    def forward(self, a, b):
        scores = self.left(a) @ self.right(b).t()
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(a)))


def train(model, loader, opt, accum):
    for i, (a, b) in enumerate(loader):
        (model(a, b) / accum).backward()
        if (i + 1) % accum == 0:
            opt.step()
            opt.zero_grad()
""",
    ),
    "a schedule as long as the counter of microbatches": (
        "MB301",
        """
from transformers import get_cosine_schedule_with_warmup


class Trainer:
    def __init__(self, cfg, model, loader):
        self.cfg, self.model, self.loader, self.step = cfg, model, loader, 0
        self.opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
        self.sched = get_cosine_schedule_with_warmup(self.opt, cfg.warmup_steps, cfg.max_steps)

    def run(self):
        for x, y in self.loader:
            (torch.nn.functional.mse_loss(self.model(x), y) / self.cfg.accum).backward()
            self.step += 1
            if self.step % self.cfg.accum == 0:
                self.opt.step()
                self.sched.step()
                self.opt.zero_grad()
            if self.step >= self.cfg.max_steps:
                return
""",
    ),
    "clipping under two settings": (
        "MB202",
        """
def train(model, loader, opt, args):
    scaler = torch.amp.GradScaler()
    for i, (x, y) in enumerate(loader):
        loss = torch.nn.functional.mse_loss(model(x), y) / args.accum
        scaler.scale(loss).backward()
        if (i + 1) % args.accum == 0:
            if args.clips and args.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
""",
    ),
    "a loss that is not divided, and one backward of a window": (
        "MB106",
        """
def train(model, loader, opt, accum=4):
    total = 0.0
    for i, (x, y) in enumerate(loader):
        loss = torch.nn.functional.mse_loss(model(x), y)
        total += loss.item()
        if (i + 1) % accum == 0:
            opt.zero_grad()
            loss.backward()
            opt.step()
""",
    ),
    "the others are computed and thrown away": (
        "MB106",
        """
def train(model, loader, opt, accum=4):
    for i, (x, y) in enumerate(loader):
        loss = torch.nn.functional.mse_loss(model(x), y) / accum
        if (i + 1) % accum == 0:
            loss.backward()
            opt.step()
            opt.zero_grad()
""",
    ),
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_nothing_is_certain_where_nothing_is_wrong(name: str) -> None:
    assert [each for each in doctor(RIGHT[name]) if each.confidence != "note"] == []


@pytest.mark.parametrize("name", list(WRONG))
def test_the_fault_is_certain_whatever_n_is_called(name: str) -> None:
    code, source = WRONG[name]
    found = [each.rule for each in doctor(source) if each.confidence == "certain" and each.rule < "MB6"]
    assert found == [code]


@pytest.mark.parametrize("name", list(UNCERTAIN))
def test_what_the_file_does_not_settle_depends(name: str) -> None:
    code, source = UNCERTAIN[name]
    found = {each.rule: each.confidence for each in doctor(source)}
    assert found.get(code) == "depends"
    assert "certain" not in found.values()


def test_a_thousand_branches_and_a_thousand_functions_are_read() -> None:
    loop = WRONG["a division and no window"][1]
    branches = "".join(f"    elif kind == {k}:\n        value = {k}\n" for k in range(900))
    chain = f"def pick(kind):\n    if kind is None:\n        value = 0\n{branches}    return value\n"
    functions = "".join(f"def f{k}(x):\n    return f{k + 1}(x) + {k}\n" for k in range(1000))
    for source in (loop + chain, loop + functions):
        assert [each.rule for each in doctor(source) if each.confidence == "certain"] == ["MB104"]
