"""Loops that are fed by generators, lists and queues: each wrong one beside the right one, and what is certain."""

_HEAD = "import torch\nimport torch.nn.functional as F\nfrom collections import deque\n"

_FLAG = """
def batches(loader, accum_steps):
    k = 0
    for x, y in loader:
        k += 1
        yield x, y, k % accum_steps == 0
def train(model, loader, optimizer, accum_steps):
    for epoch in range(3):
        for x, y, boundary in batches(loader, accum_steps):
            (F.cross_entropy(model(x), y) / accum_steps).backward()
            if boundary:
                optimizer.step()
                optimizer.zero_grad()
"""
_ITERATOR = """
class Flow:
    def __init__(self, loader, n):
        self.loader, self.n = loader, n
    def __iter__(self):
        for i, batch in enumerate(self.loader):
            yield batch, (i + 1) % self.n == 0
def train(model, loader, optimizer, accum_steps):
    flow = Flow(loader, accum_steps)
    for (x, y), ready in flow:
        (F.cross_entropy(model(x), y) / accum_steps).backward()
        if ready:
            optimizer.step()
            optimizer.zero_grad()
"""
_FOREVER = """
def forever(loader):
    while True:
        yield from loader
def train(model, loader, optimizer, accum_steps, total):
    for i, (x, y) in enumerate(forever(loader)):
        (F.cross_entropy(model(x), y) / accum_steps).backward()
        if (i + 1) % accum_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        if i >= total:
            break
"""
_GROUPS = """
def groups(loader, n):
    buffer = []
    for batch in loader:
        buffer.append(batch)
        if len(buffer) == n:
            yield buffer
            buffer = []
def train(model, loader, optimizer, accum_steps):
    for group in groups(loader, accum_steps):
        for x, y in group:
            loss = F.cross_entropy(model(x), y)
            (loss / len(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
"""
_QUEUE = """
def train(model, loader, optimizer, accum_steps):
    waiting = deque()
    for x, y in loader:
        waiting.append((x, y))
        if len(waiting) < accum_steps:
            continue
        while waiting:
            x, y = waiting.popleft()
            (F.cross_entropy(model(x), y) / accum_steps).backward()
        optimizer.step()
        optimizer.zero_grad()
"""
_BUFFER = """
class Trainer:
    def __init__(self, model, optimizer, accum):
        self.model, self.optimizer, self.accum, self.buffer = model, optimizer, accum, []
    def add(self, batch):
        self.buffer.append(batch)
        if len(self.buffer) == self.accum:
            self.flush()
    def flush(self):
        for x, y in self.buffer:
            loss = F.cross_entropy(self.model(x), y)
            (loss / self.accum).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.buffer = []
    def fit(self, loader):
        for epoch in range(2):
            for batch in loader:
                self.add(batch)
"""
_LIST = """
def train(model, loader, optimizer, accum_steps):
    window = []
    for x, y in loader:
        window.append((x, y))
        if len(window) == accum_steps:
            for x, y in window:
                (F.cross_entropy(model(x), y) / accum_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del window[:]
"""
_HELPERS = """
class Trainer:
    def clear(self):
        self.optimizer.zero_grad()
    def back(self, loss):
        (loss / self.accum).backward()
    def fit(self, loader):
        for i, (x, y) in enumerate(loader):
            self.back(F.cross_entropy(self.model(x), y))
            if (i + 1) % self.accum == 0:
                self.optimizer.step()
                self.clear()
"""
_OPTION = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
args = parser.parse_args()
total = len(loader) // args.gradient_accumulation_steps * 3
for epoch in range(3):
    for i, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y) / args.gradient_accumulation_steps
        loss.backward()
        if (i + 1) % args.gradient_accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
print(f"{total} steps of {args.gradient_accumulation_steps} microbatches")
"""

# The right loop, what is changed to make it wrong, and the rule that says so.
PAIRS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "a flag that comes with the batch": (
        _FLAG,
        [("        k += 1\n", ""), ("k % accum_steps == 0\n", "k % accum_steps == 0\n        k += 1\n")],
        "MB105",
    ),
    "a flag of an iterator": (_ITERATOR, [("(i + 1) % self.n", "i % self.n")], "MB105"),
    "a loader without an end": (_FOREVER, [("(i + 1) %", "i %")], "MB105"),
    "groups out of a generator": (_GROUPS, [("(loss / len(group))", "loss")], "MB101"),
    "a queue": (_QUEUE, [("< accum_steps", "<= accum_steps")], "MB105"),
    "a buffer of an object": (_BUFFER, [("(loss / self.accum)", "loss")], "MB101"),
    "a list": (
        _LIST,
        [
            (
                "            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n",
                "                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n",
            )
        ],
        "MB201",
    ),
    "clearing in a helper": (
        _HELPERS,
        [
            ("                self.clear()\n", ""),
            ("            self.back(", "            self.clear()\n            self.back("),
        ],
        "MB103",
    ),
    "an option that nothing uses": (
        _OPTION,
        [
            (" / args.gradient_accumulation_steps\n", "\n"),
            ("if (i + 1) % args.gradient_accumulation_steps == 0:", "if True:"),
        ],
        "MB104",
    ),
}


def right(name: str) -> str:
    """The right loop of a pair."""
    return _HEAD + PAIRS[name][0]


def wrong(name: str) -> str:
    """The wrong loop of a pair."""
    source = _HEAD + PAIRS[name][0]
    for old, new in PAIRS[name][1]:
        assert old in source
        source = source.replace(old, new)
    return source
