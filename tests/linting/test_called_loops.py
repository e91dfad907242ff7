"""Loops that other code calls or that call other code: hooks of Lightning, helpers that are not shown, retries."""

import pytest

from microbatch.linting.doctor import doctor

_HEAD = "import torch\nimport torch.nn.functional as F\n"

# Each right loop, what is changed in it, and the faults that are certain then.
PAIRS: dict[str, tuple[str, tuple[str, str], set[str]]] = {
    "a counter that Lightning's hook sets back": (
        """
class Net(pl.LightningModule):
    def __init__(self, n):
        super().__init__()
        self.n = n
        self.automatic_optimization = False
    def on_train_epoch_start(self):
        self.seen = 0
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        x, y = batch
        self.manual_backward(F.mse_loss(self(x), y) / self.n)
        self.seen += 1
        if self.seen % self.n == 0:
            opt.step()
            opt.zero_grad()
""",
        ("if self.seen %", "if (self.seen + 1) %"),
        {"MB105"},
    ),
    "an average in a hook of Lightning": (
        """
class Net(pl.LightningModule):
    def __init__(self, n, net, ema):
        super().__init__()
        self.n, self.net, self.ema = n, net, ema
        self.automatic_optimization = False
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        x, y = batch
        self.manual_backward(F.mse_loss(self.net(x), y) / self.n)
        if (batch_idx + 1) % self.n == 0:
            opt.step()
            opt.zero_grad()
    def on_before_optimizer_step(self, optimizer):
        self.ema.update(self.net)
""",
        ("on_before_optimizer_step(self, optimizer)", "on_before_backward(self, loss)"),
        {"MB303"},
    ),
    "clipping in a hook of Lightning": (
        """
class Net(pl.LightningModule):
    def __init__(self, n, net):
        super().__init__()
        self.n, self.net = n, net
        self.automatic_optimization = False
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        x, y = batch
        self.manual_backward(F.mse_loss(self.net(x), y) / self.n)
        if (batch_idx + 1) % self.n == 0:
            opt.step()
            opt.zero_grad()
    def on_before_optimizer_step(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
""",
        ("on_before_optimizer_step(self, optimizer)", "on_after_backward(self)"),
        {"MB201"},
    ),
    "weights that are exchanged for their average now and then": (
        """
def keep(model):
    model.apply_ema_weights()
    torch.save(model.state_dict(), "ema.pt")
def train(model, batches, opt, n, args):
    for k in range(args.steps):
        x, y = next(batches)
        (F.mse_loss(model(x), y) / n).backward()
        if (k + 1) % n == 0:
            opt.step()
            opt.zero_grad()
        if k % args.every == 0:
            model.update_ema()
            keep(model)
""",
        (
            "        if k % args.every == 0:\n            model.update_ema()\n",
            "        model.update_ema()\n        if True:\n",
        ),
        {"MB303"},
    ),
    "a helper that has the scaler": (
        """
from ours.steps import step_optimizer_with_scaler
def train(model, batches, opt, scaler, n, steps):
    for step in range(steps):
        opt.zero_grad()
        for k in range(n):
            x, y = next(batches)
            scaler.scale(F.mse_loss(model(x), y) / n).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        taken = step_optimizer_with_scaler(scaler, opt)
""",
        ("taken = step_optimizer_with_scaler(scaler, opt)", "scaler.step(opt)"),
        {"MB203", "MB204"},
    ),
    "N is asked of a dictionary, and several models train in turn": (
        """
class Tasks:
    def epoch(self, models, optimizers, iterators, config):
        done, ended = 0, False
        while not ended:
            for model, optimizer, batches in zip(models, optimizers, iterators):
                batch = next(batches, None)
                if batch is None:
                    ended = True
                else:
                    self.one(model, optimizer, batch, config, done)
            done += 1
    def one(self, model, optimizer, batch, config, done):
        loss = F.mse_loss(model(batch.x), batch.y) / config.get("grad_accum", 4)
        loss.backward()
        if (done + 1) % config.get("grad_accum", 4) == 0:
            optimizer.step()
            model.zero_grad()
""",
        ("if (done + 1) %", "if done %"),
        {"MB105"},
    ),
    "the first window is too long, whether gradients are clipped or not": (
        """
def train(model, loader, opt, n, args):
    def ends(k):
        return (k + 1) % n == 0
    for epoch in range(3):
        for k, (x, y) in enumerate(loader):
            (F.mse_loss(model(x), y) / n).backward()
            if ends(k):
                if args.max_norm:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
                opt.step()
                opt.zero_grad()
""",
        ("return (k + 1) % n == 0", "return k > 0 and k % n == 0"),
        {"MB105"},
    ),
    "each item of the loader is a whole window": (
        """
def train(model, loader, opt, n, state):
    state.resume_step = state.global_step % len(loader)
    for whole in loader:
        for k in range(n):
            x, y = whole[k]
            (F.mse_loss(model(x), y) / n).backward()
        opt.step()
        opt.zero_grad()
        state.global_step += 1
""",
        (
            "    for whole in loader:\n        for k in range(n):\n            x, y = whole[k]\n",
            "    data = forever(loader)\n    while True:\n        for k in range(n):\n            x, y = next(data)\n",
        ),
        {"MB304"},
    ),
    "the length of a schedule is handed on": (
        """
class Manager:
    def tools(self, model, total_steps):
        opt = torch.optim.AdamW(model.parameters())
        return opt, get_linear_schedule_with_warmup(opt, 10, total_steps)
    def fit(self, model, loaders, n):
        length = len(loaders[0])
        opt, scheduler = self.tools(model, length // n)
        self.kept.append((opt, scheduler))
        self.epochs(model, iter(loaders[0]), self.kept, n)
    def epochs(self, model, batches, tools, n):
        opt, scheduler = tools[0]
        for k in range(self.rounds):
            x, y = next(batches)
            (F.mse_loss(model(x), y) / n).backward()
            if (k + 1) % n == 0:
                opt.step()
                scheduler.step()
                opt.zero_grad()
""",
        ("self.tools(model, length // n)", "self.tools(model, length)"),
        {"MB301"},
    ),
    "a term that is 0 where nothing is counted": (
        """
def train(model, loader, opt, n):
    for k, batch in enumerate(loader):
        out = model(batch["x"])
        mask = batch["wanted"] > 0
        if mask.sum() > 0:
            near = F.l1_loss(out, batch["y"])
        else:
            near = torch.tensor(0.0, device=out.device)
        loss = near + F.mse_loss(out, batch["z"])
        (loss / n).backward()
        if (k + 1) % n == 0:
            opt.step()
            opt.zero_grad()
""",
        ('F.l1_loss(out, batch["y"])', 'F.l1_loss(out[mask], batch["y"][mask])'),
        {"MB401"},
    ),
}


def certain(source: str) -> set[str]:
    return {each.rule for each in doctor(_HEAD + source) if each.confidence == "certain" and each.rule < "MB5"}


@pytest.mark.parametrize("name", list(PAIRS))
def test_nothing_is_certain_in_the_right_loop(name: str) -> None:
    assert certain(PAIRS[name][0]) == set()


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_fault_is_certain_in_the_wrong_loop(name: str) -> None:
    source, (old, new), codes = PAIRS[name]
    assert old in source
    assert certain(source.replace(old, new)) == codes


RETRY = """
def train(model, loader, opt, n):
    for k, (x, y) in enumerate(loader):
        while True:
            loss = F.mse_loss(model(x), y) / n
            if room() > 10:
                break
            else:
                torch.cuda.empty_cache()
        loss.backward()
        if (k + 1) % n == 0:
            opt.step()
            opt.zero_grad()
"""


def test_a_cache_that_is_emptied_before_another_try_is_not_emptied_in_every_microbatch() -> None:
    always = RETRY.replace("        while True:\n", "        torch.cuda.empty_cache()\n        while True:\n")
    found = [[each.rule for each in doctor(_HEAD + source)] for source in (RETRY, always)]
    assert ["MB603" in rules for rules in found] == [False, True]


LOGS = [
    'log.write("loss {:.3f}".format(loss.item()))',
    'log.write("loss {loss:.3f}".format(loss=loss.item()))',
    'print("loss %.3f" % loss.item())',
    'logger.write_metric("loss", loss.detach(), k)',
    "if args.every and (k + 1) % args.every == 0:\n            print(loss.item())",
    "if (k + 1) % 100 == 0:\n            print(loss.item())",
    'shown = {}\n        shown["loss"] = loss.item()\n        wandb.log(shown)',
    'tracker = MetricsTracker()\n        tracker.update({"loss": loss.item()})',
]


@pytest.mark.parametrize("log", LOGS)
def test_a_divided_loss_is_seen_in_every_kind_of_log(log: str) -> None:
    source = f"""
def train(model, loader, opt, n, args):
    for k, (x, y) in enumerate(loader):
        loss = F.mse_loss(model(x), y)
        (loss / n).backward()
        if (k + 1) % n == 0:
            opt.step()
            opt.zero_grad()
        {log}
"""
    divided = source.replace("F.mse_loss(model(x), y)", "F.mse_loss(model(x), y) / n").replace("(loss / n)", "loss")
    found = [[each.rule for each in doctor(_HEAD + each) if each.rule > "MB7"] for each in (source, divided)]
    assert found == [[], ["MB701"]]


METER = """
def train(model, loader, opt, criterion, config):
    losses = AverageMeter()
    for k, (x, y) in enumerate(loader):
        out, parts = model(x), {}
        for name in criterion.keys():
            parts[name] = criterion[name](out, y)
        loss = 0.0
        for key, value in parts.items():
            loss += value
        loss = loss / config.accumulation_steps
        config.scaler.scale(loss).backward()
        losses.update(loss.item())
        if (k + 1) % config.accumulation_steps == 0:
            config.scaler.unscale_(config.optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            config.scaler.step(config.optimizer)
            config.scaler.update()
            config.optimizer.zero_grad()
    average = losses.avg
    return average * config.accumulation_steps
"""


def test_objects_among_the_settings_and_sums_that_are_not_followed_are_read() -> None:
    scaled = METER.replace("            config.scaler.unscale_(config.optimizer)\n", "")
    assert (certain(METER), certain(scaled)) == (set(), {"MB202"})
    assert not {"MB101", "MB701"} & {each.rule for each in doctor(_HEAD + METER)}


def test_what_a_meter_gives_may_be_multiplied_by_n() -> None:
    source = METER.replace("return average * config.accumulation_steps", "return average")
    assert [each.rule for each in doctor(_HEAD + source) if each.rule > "MB7"] == ["MB701"]


LIGHTNING = """
class Net(pl.LightningModule):
    def __init__(self, n):
        super().__init__()
        self.n = n
        self.automatic_optimization = False
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        loss = F.mse_loss(self(batch.x), batch.y)
        self.manual_backward(loss / self.n)
        if (batch_idx + 1) % self.n == 0:
            opt.step()
            opt.zero_grad()
        self.log("loss", loss)
"""


def test_what_lightning_averages_is_not_the_last_loss_alone_but_may_be_divided() -> None:
    divided = LIGHTNING.replace("batch.y)\n", "batch.y) / self.n\n").replace("(loss / self.n)", "(loss)")
    found = [[each.rule for each in doctor(_HEAD + each) if each.rule > "MB7"] for each in (LIGHTNING, divided)]
    assert found == [[], ["MB701"]]


def test_a_loss_that_is_not_shown_is_divided_under_a_scaler_too() -> None:
    source = """
def train(loader, opt, tables, n):
    for k, batch in enumerate(loader):
        loss = 0
        loss = loss + tables[batch.task]
        loss = loss / n
        with amp.scale_loss(loss, opt) as scaled:
            scaled.backward()
        if (k + 1) % n == 0:
            opt.step()
            opt.zero_grad()
"""
    native = source.replace("with amp.scale_loss(loss, opt) as scaled:", "if True:").replace(
        "scaled.", "scaler.scale(loss)."
    )
    for each in (source, native):
        assert "MB101" in {finding.rule for finding in doctor(_HEAD + each.replace("loss / n", "loss"))}
        assert "MB101" not in {finding.rule for finding in doctor(_HEAD + each)}


def test_costs_and_logs_are_seen_where_the_default_is_to_evaluate() -> None:
    source = """
def epoch(model, loader, opt, n):
    for k, (x, y) in enumerate(loader):
        loss = F.mse_loss(model(x), y) / n
        loss.backward()
        print(loss.item())
        if (k + 1) % n == 0:
            opt.step()
            opt.zero_grad()
def main(args):
    if args.mode == "fit":
        for e in range(args.epochs):
            epoch(model, loader, opt, args.accum_steps)
    else:
        evaluate(model, loader)
main(parse())
"""
    assert {each.rule for each in doctor(_HEAD + source) if each.rule > "MB6"} == {"MB601", "MB701"}
