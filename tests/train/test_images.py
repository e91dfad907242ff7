"""The job `images`: digits or folders in, a gradient that does not depend on the cut, accuracy that is real."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from microbatch.errors import DataError, MissingDependencyError
from microbatch.train.config import load_settings
from microbatch.train.job import Job
from microbatch.train.jobs.images import class_loss, class_scores, images, images_batchnorm
from microbatch.train.jobs.pictures import SIDE, Pictures, hold_out, read_digits, read_folder
from microbatch.train.resolve import resolve
from microbatch.train.rundir import RunDirectory
from microbatch.train.training_loop import TrainingLoop


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to gain from threads, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job() -> Job:
    return images()


def pictures_of(data: Any) -> Pictures:
    assert isinstance(data, Pictures)
    return data


def gradients(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Bars that stand in one class and lie in the other; grey, of different sizes."""
    for kind, size in (("lying", (40, 20)), ("standing", (24, 48))):
        (tmp_path / kind).mkdir()
        for i in range(5):
            picture = Image.new("L", size, 10 * i)
            middle = (0, size[1] // 2, size[0], size[1] // 2 + 4)
            picture.paste(255, middle if kind == "lying" else (size[0] // 2, 0, size[0] // 2 + 4, size[1]))
            picture.save(tmp_path / kind / f"{i}.png")
    return tmp_path


# --------------------------------------------------------------------------------------------------------- digits


def test_digits_are_held_out_by_class_and_never_in_both(job: Job) -> None:
    train, validation = pictures_of(job.data), pictures_of(job.validation)
    assert len(train) + len(validation) == 1797
    for part, share in ((train, 0.8), (validation, 0.2)):
        found = torch.bincount(part.labels).double() / torch.bincount(read_digits().labels)
        assert torch.allclose(found, torch.full((10,), share, dtype=torch.float64), atol=0.01)
    every, held_out = hold_out(read_digits(), share=0.2, seed=0)
    marked = Pictures(
        images=torch.arange(1797.0)[:, None, None, None], labels=read_digits().labels, classes=every.classes
    )
    kept, out = hold_out(marked, share=0.2, seed=0)
    assert torch.equal(torch.cat((kept.images, out.images)).flatten().sort().values, torch.arange(1797.0))
    assert torch.equal(held_out.labels, out.labels)


def test_the_job_is_the_same_every_time(job: Job) -> None:
    state = torch.get_rng_state()
    again, other = images(), images(seed=1, batch_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    weights, same = job.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert torch.equal(pictures_of(job.data).images, pictures_of(again.data).images)
    assert other.batch_size == 32
    assert not torch.equal(next(other.model.parameters()), next(job.model.parameters()))
    assert not torch.equal(pictures_of(other.validation).labels, pictures_of(job.validation).labels)


@pytest.mark.parametrize("microbatch_size", [1, 5, 12])
def test_the_gradient_does_not_depend_on_the_cut(microbatch_size: int) -> None:
    job = images()
    model = job.model.double()
    batch = {key: value.double() if key == "images" else value for key, value in pick(job, range(12)).items()}
    whole = class_loss(model, batch)
    (whole.sum / whole.count).backward()
    wanted = gradients(model)
    count = 0
    means: list[Tensor] = []
    for start in range(0, 12, microbatch_size):
        loss = class_loss(model, {key: value[start : start + microbatch_size] for key, value in batch.items()})
        loss.sum.backward(retain_graph=True)
        count += int(loss.count)
        means.append(loss.mean)
    assert relative(gradients(model) / count, wanted) < 1e-12
    if 12 % microbatch_size:  # a short last piece: the usual mean of means is off
        torch.stack(means).mean().backward()
        assert relative(gradients(model), wanted) > 1e-2


def test_with_batch_normalisation_the_step_is_the_whole_batchs_and_the_plain_one_is_not(tmp_path: Path) -> None:
    def weights(name: str, **flags: Any) -> Tensor:
        job = images_batchnorm()
        job.model.double()
        assert isinstance(job.optimizer, torch.optim.Optimizer)
        for group in job.optimizer.param_groups:
            group["eps"] = 1e-3  # or Adam turns the rounding of a gradient that is nearly zero into a whole step
        train = pictures_of(job.data)
        data = Pictures(images=train.images[:24].double(), labels=train.labels[:24], classes=train.classes)
        job = replace(job, data=data, validation=None)
        config = resolve(
            load_settings({"batch_size": 12, "steps": 2, "warmup_steps": 0} | flags), job, device=torch.device("cpu")
        )
        directory = RunDirectory(tmp_path / name)
        directory.start(config="", files={})
        assert TrainingLoop(job, config=config, run=directory).run() is None
        return torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])

    whole, exact = weights("whole", microbatch_size=12), weights("exact", microbatch_size=5)
    plain = weights("plain", microbatch_size=5, accumulation="plain")
    assert relative(exact, whole) < 1e-10
    assert relative(plain, whole) > 1e-3


def test_scores_are_pooled_to_the_accuracy(job: Job) -> None:
    batch = pick(job, range(40))
    with torch.no_grad():
        parts = [
            class_scores(job.model, {key: value[at : at + 7] for key, value in batch.items()}) for at in range(0, 40, 7)
        ]
        wanted = (job.model(batch["images"]).argmax(-1) == batch["labels"]).double().mean()
    pooled = sum(float(part["accuracy"].sum) for part in parts) / sum(int(part["accuracy"].count) for part in parts)
    assert pooled == pytest.approx(float(wanted))


def test_two_passes_learn_most_digits() -> None:
    job = images()
    optimizer = job.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for rows in torch.randperm(len(pictures_of(job.data)), generator=generator).split(64):
            optimizer.zero_grad()
            class_loss(job.model, pick(job, rows.tolist())).mean.backward()
            optimizer.step()
    held_out = pictures_of(job.validation)
    with torch.no_grad():
        scores = class_scores(job.model, {"images": held_out.images, "labels": held_out.labels})
    assert scores["accuracy"].mean.item() > 0.9


def pick(job: Job, rows: Any) -> dict[str, Tensor]:
    return job.collate([job.data[row] for row in rows])


# -------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_in_classes(shapes: Path) -> None:
    found = read_folder(shapes)
    assert found.classes == ("lying", "standing")
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert found.images.shape == (10, 1, SIDE, SIDE)
    # The bar is white where it was drawn; the ground keeps its grey.
    assert found.images[2, 0, SIDE // 2 + 1].min() > 0.9
    assert found.images[7, 0, :, SIDE // 2 + 1].min() > 0.9
    assert found.images[2, 0, 0, 0].item() == pytest.approx(20 / 255)
    job = images(data=shapes)
    assert job.files["classes.txt"] == "lying\nstanding\n"
    assert class_loss(job.model, pick(job, range(4))).mean.isfinite()


def test_one_colour_image_makes_all_of_them_colour(shapes: Path) -> None:
    Image.new("RGBA", (9, 9), (255, 0, 51, 128)).save(shapes / "lying" / "z.png")
    found = read_folder(shapes)
    assert found.images.shape == (11, 3, SIDE, SIDE)
    assert torch.allclose(found.images[5].mean(dim=(1, 2)), torch.tensor([1.0, 0.0, 0.2]))
    assert torch.equal(found.images[2, 0], found.images[2, 2])


def test_hidden_names_and_other_files_are_left_out(shapes: Path) -> None:
    (shapes / ".git").mkdir()
    (shapes / ".git" / "a.png").write_bytes(b"no image")
    (shapes / "empty").mkdir()
    (shapes / "lying" / "notes.txt").write_text("not an image", encoding="utf-8")
    assert read_folder(shapes).classes == ("lying", "standing")


def test_an_image_that_cannot_be_read_is_named(shapes: Path) -> None:
    whole = (shapes / "standing" / "3.png").read_bytes()
    (shapes / "standing" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"standing.3\.png is not an image that can be read"):
        images(data=shapes)


def test_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist; pass a folder"):
        images(data=tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    picture = tmp_path / "a" / "1.png"
    Image.new("L", (4, 4)).save(picture)
    with pytest.raises(DataError, match="is a file, not a folder"):
        images(data=picture)
    with pytest.raises(DataError, match="holds 1 folders with images, and at least two"):
        images(data=tmp_path)
    (tmp_path / "b").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "b" / "1.png")
    with pytest.raises(DataError, match="the class 'a' has a single image"):
        images(data=tmp_path)


def test_a_missing_library_says_what_to_install(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r'"scikit-learn".*pip install "microbatch\[jobs\]"'):
        images()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r'"pillow".*pip install "microbatch\[jobs\]"'):
        images(data=shapes)
