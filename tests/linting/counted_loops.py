"""Loops whose counters, helpers and outputs are told apart: each wrong one beside the right one."""

_HEAD = "import math\nimport torch\nimport torch.nn.functional as F\nfrom accelerate import Accelerator\n"

_RESUMED = """
accelerator = Accelerator(gradient_accumulation_steps=n_accum)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
updates = math.ceil(len(loader) / n_accum)
global_step = int(path.split("-")[1])
done = global_step * n_accum
first_epoch = done // len(loader)
resume_step = done % len(loader)
for epoch in range(first_epoch, 3):
    for step, (x, y) in enumerate(loader):
        if epoch == first_epoch and step < resume_step:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            global_step += 1
"""
_ENDS = """
accelerator = Accelerator(gradient_accumulation_steps=n_accum)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
max_train_steps = 3 * math.ceil(len(loader) / n_accum)
global_step = 0
for epoch in range(3):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            global_step += 1
        if global_step >= max_train_steps:
            break
"""
_NAMED = """
completed = 0
resume_step = int(path.replace("step_", "")) * n_accum
first_epoch = resume_step // len(loader)
resume_step -= first_epoch * len(loader)
for epoch in range(first_epoch, 3):
    for step, (x, y) in enumerate(loader):
        if epoch == first_epoch and step < resume_step:
            continue
        (F.cross_entropy(model(x), y) / n_accum).backward()
        if (step + 1) % n_accum == 0:
            optimizer.step()
            optimizer.zero_grad()
            completed += 1
            torch.save(model.state_dict(), f"step_{completed}")
"""
_WRAPPER = """
def train(model, loader, optimizer, scaler, grad_acc_step):
    step = 1
    for x, y in loader:
        scaler.scale(F.cross_entropy(model(x), y) / grad_acc_step).backward()
        if step % grad_acc_step == 0:
            optimizer.step_and_update_lr(scaler)
            scaler.update()
            optimizer.zero_grad()
        step += 1
"""
_WRAPPER_STEP = """        if step % grad_acc_step == 0:
            optimizer.step_and_update_lr(scaler)
            scaler.update()
            optimizer.zero_grad()
"""
_PIECES = """
class Trainer:
    def run(self):
        while self.step < self.total:
            self.run_step(next(self.data))
            self.step += 1
    def run_step(self, batch):
        self.forward_backward(batch)
        self.optimizer.step()
    def forward_backward(self, batch):
        self.optimizer.zero_grad()
        pieces = batch.shape[0] // self.microbatch
        for i in range(0, batch.shape[0], self.microbatch):
            micro = batch[i : i + self.microbatch]
            loss = F.mse_loss(self.model(micro), micro)
            (loss * len(micro) / len(batch)).backward()
"""
_OPTION = """
def train(model, loader, optimizer, max_steps, grad_accum_steps=1):
    scheduler = get_linear_schedule_with_warmup(optimizer, 10, max_steps)
    optimizer.zero_grad()
    for i, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y) / grad_accum_steps
        loss.backward()
        if (i + 1) % grad_accum_steps == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
"""
_STEPS = """        loss = F.cross_entropy(model(x), y) / grad_accum_steps
        loss.backward()
        if (i + 1) % grad_accum_steps == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
"""
_STEPS_EACH_TIME = """        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
"""
_KINDS = """
def train(model, loader, optimizer, scheduler, kind, accum_steps):
    for i, (x, y) in enumerate(loader):
        if kind == "noise":
            shown = y
        elif kind == "velocity":
            raise NotImplementedError
        else:
            raise ValueError(kind)
        (F.mse_loss(model(x), y) / accum_steps).backward()
        if (i + 1) % accum_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""

_WARMUP = """
batch_size, micro_batch_size = 64 // devices, 4
accum_iters = batch_size // micro_batch_size
warmup_iters = 2 * (rows // batch_size) // devices
def train(model, optimizer, loader):
    steps = 0
    for i, (x, y) in enumerate(loader):
        if steps <= warmup_iters:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * steps / warmup_iters
        (F.cross_entropy(model(x), y) / accum_iters).backward()
        if (i + 1) % accum_iters == 0:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
"""

# The right loop, what is changed to make it wrong, and the rules that say so.
PAIRS: dict[str, tuple[str, list[tuple[str, str]], set[str]]] = {
    "a resumed run skips steps as microbatches": (
        _RESUMED,
        [("resume_step = done % len(loader)", "resume_step = global_step % updates")],
        {"MB304"},
    ),
    "microbatches divided by steps": (
        _RESUMED,
        [("first_epoch = done // len(loader)", "first_epoch = done // updates")],
        {"MB304"},
    ),
    "microbatches counted up to a number of steps": (
        _ENDS,
        [("        if accelerator.sync_gradients:\n            global_step += 1\n", "        global_step += 1\n")],
        {"MB304"},
    ),
    "an option that scales the schedule and nothing else": (
        _OPTION,
        [(_STEPS, _STEPS_EACH_TIME), ("10, max_steps)", "10, max_steps * grad_accum_steps)")],
        {"MB104", "MB301"},
    ),
    "a number out of the name of a checkpoint": (_NAMED, [(" * n_accum\n", "\n")], {"MB304"}),
    "a wrapper of an optimizer": (
        _WRAPPER,
        [
            (
                _WRAPPER_STEP,
                _WRAPPER_STEP.replace("        if step % grad_acc_step == 0:\n", "").replace(
                    "            ", "        "
                ),
            )
        ],
        {"MB104"},
    ),
    "a warmup of microbatches, counted in steps": (
        _WARMUP,
        [("rows // batch_size", "rows // micro_batch_size")],
        {"MB301"},
    ),
    "branches that all raise": (_KINDS, [("(i + 1) %", "i %")], {"MB105"}),
}

# Right loops that were once blamed.
RIGHT = {
    "a warmup of microbatches, counted in microbatches": _WARMUP.replace("steps <=", "i <=").replace(
        "rows // batch_size", "rows // micro_batch_size"
    ),
    "one helper steps two optimizers": """
def update(net, step, loss, opt):
    (loss / grad_acc_step).backward()
    if step % grad_acc_step == 0:
        opt.step()
        opt.zero_grad()
step = 1
while True:
    for x, y in loader:
        update(discriminator, step, d_loss(discriminator(y), discriminator(generator(x).detach())), optD)
        update(generator, step, g_loss(discriminator(generator(x))), optG)
        step += 1
""",
    "gradients for a measure of curvature": """
for step in range(total):
    for micro in range(acc_steps):
        x, y = next(batches)
        loss = F.mse_loss(model(x), y) / acc_steps
        loss.backward()
    opt.step()
    if kind == "curved":
        opt.zero_grad()
        if step % freq == freq - 1:
            (F.cross_entropy(model(x), y, ignore_index=pad_id) / acc_steps).backward()
            opt.update_hessian()
            opt.zero_grad()
    else:
        opt.zero_grad()
""",
    "an optimizer that steps at every other batch": """
def training_step(self, batch, batch_idx):
    g_opt, d_opt = self.optimizers()
    d_opt.zero_grad()
    self.manual_backward(errD)
    if (batch_idx + 1) % 2 == 0:
        d_opt.step()
    g_opt.zero_grad()
    self.manual_backward(errG)
    g_opt.step()
""",
    "gradients in a context of their own": """
for k in range(accum_steps):
    for x, y in loader:
        with dist_autograd.context() as context_id:
            dist_autograd.backward(context_id, [criterion(model(x), y)])
            optimizer.step(context_id)
""",
    "an example that leaves out code": """
for step, batch in enumerate(loader):
    loss = F.cross_entropy(model(batch), labels) / accum_steps
    loss.backward()
    if (step + 1) % accum_steps == 0:
        optimizer.step()
        ...
""",
    "an average of weights with the name of an optimizer": """
for epoch in range(3):
    with LocalSGD(accelerator, model, local_sgd_steps=8) as local_sgd:
        for step, (x, y) in enumerate(loader):
            (F.cross_entropy(model(x), y) / accum_steps).backward()
            if (step + 1) % accum_steps == 0:
                optimizer.step()
                optimizer.zero_grad()
""",
    "a counter in the other branch of the guard": """
max_train_steps = 3 * (len(loader) // accum_steps)
completed = counter = 0
for x, y in loader:
    counter += 1
    loss = F.cross_entropy(model(x), y) / accum_steps
    if counter % accum_steps != 0:
        loss.backward()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        completed += 1
    if completed >= max_train_steps:
        break
""",
    "labels that are only shown with -100": """
for step, batch in enumerate(loader):
    print([decode(k) if k != -100 else -100 for k in batch["labels"][0]], pad(batch, pad_index=-100))
    (model(**batch).loss / accum_steps).backward()
    if (step + 1) % accum_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
}


def right(name: str) -> str:
    """The right loop of a pair."""
    return _HEAD + PAIRS[name][0]


def wrong(name: str) -> str:
    """The wrong loop of a pair."""
    source = right(name)
    for old, new in PAIRS[name][1]:
        assert old in source, old
        source = source.replace(old, new)
    return source


def pieces(*, divided: bool) -> str:
    """A batch that is cut into pieces in a method, with the step in the method that calls it."""
    return _HEAD + (_PIECES if divided else _PIECES.replace("(loss * len(micro) / len(batch))", "loss"))
