"""A YOLO model of Ultralytics in a loop of one's own, with the gradient of the whole batch.

Ultralytics divides its loss by the sum of the scores that its assigner gives to targets, and multiplies it by the batch
size. So the sum is taken with that denominator as its count. Targets are a list with one entry an image, and each
microbatch puts its own together. The last line compares the gradient with plain PyTorch on the whole batch.
"""

import copy

import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

import microbatch as mb

IMAGES, MICROBATCH, SIZE = 16, 4, 64


def yolo() -> DetectionModel:
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    model.args = get_cfg()  # the weights of the three terms
    return model


def draw(generator: torch.Generator) -> dict[str, object]:
    """Draw images of shape (IMAGES, 3, SIZE, SIZE), and 1 to 4 boxes each: class, and middle and size in [0, 1]."""
    number = torch.randint(1, 5, (IMAGES,), generator=generator).tolist()
    targets = [
        {
            "cls": torch.randint(3, (n, 1), generator=generator).float(),
            "bboxes": 0.2 + 0.4 * torch.rand(n, 4, generator=generator),
        }
        for n in number
    ]
    return {"img": torch.rand(IMAGES, 3, SIZE, SIZE, generator=generator), "targets": mb.Rows(targets)}


def flat(rows: dict[str, object]) -> dict[str, Tensor]:
    """Return a batch as Ultralytics has it: the boxes of all images, and the number of each box's image."""
    targets = rows["targets"]
    image = torch.cat([torch.full((len(each["cls"]),), float(i)) for i, each in enumerate(targets)])
    boxes = {name: torch.cat([each[name] for each in targets]) for name in ("cls", "bboxes")}
    return {"img": rows["img"], "batch_idx": image, **boxes}


def loss_fn(model: nn.Module, rows: dict[str, object]) -> mb.Loss:
    criterion, scores = model.init_criterion(), []
    handle = criterion.assigner.register_forward_hook(lambda module, inputs, found: scores.append(found[2].sum()))
    batch = flat(rows)
    terms, _ = criterion(model(batch["img"]), batch)
    handle.remove()
    scores = scores[0]
    return mb.Loss(sum=terms.sum() / len(batch["img"]) * scores.clamp(min=1), count=scores)


def main() -> float:
    model, batch = yolo(), draw(torch.Generator().manual_seed(1))
    whole = copy.deepcopy(model)
    accumulator = mb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.01), microbatch_size=MICROBATCH, batch_norm="exact"
    )
    step = accumulator.gradient(batch, loss_fn)  # accumulator.step takes the optimizer's step as well
    terms, _ = whole.init_criterion()(whole(batch["img"]), flat({**batch, "targets": batch["targets"].value}))
    (terms.sum() / IMAGES).backward()
    pairs = [
        (p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters(), strict=True) if q.grad is not None
    ]
    norm = torch.stack([theirs.norm() for _, theirs in pairs]).norm()
    error = float(torch.stack([(ours - theirs).norm() for ours, theirs in pairs]).norm() / norm)
    print(f"loss {step.loss:.4f} of {IMAGES} images in {step.microbatches} microbatches; gradient {error:.1e} off")
    return error


if __name__ == "__main__":
    main()
