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
    assert [each.rule for each in doctor(source) if each.confidence == "certain"] == [code]
