"""Settings: flags over a file over the job's defaults, and every value that cannot work says why before work starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.devices.available_devices import resolve_device
from microbatch.errors import ConfigError, DataError
from microbatch.train.config import Settings, load_settings
from microbatch.train.find_job import call_job, find_job
from microbatch.train.job import Job
from microbatch.train.resolve import resolve, resolved_settings
from microbatch.train.run_config import RunConfig

CPU = torch.device("cpu")


class NoLength(torch.utils.data.Dataset[int]):
    """A data set that can be indexed, and does not say how far."""


def mean_output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def a_job(**changes: Any) -> Job:
    model = nn.Linear(3, 1)
    values: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": mean_output,
        "data": [torch.zeros(3)] * 10,
        "batch_size": 4,
        "microbatch_size": 2,
        "steps": 20,
    }
    return Job(**(values | changes))


def resolved(job: Job | None = None, **flags: Any) -> RunConfig:
    return resolve(load_settings(flags), job or a_job(), device=CPU)


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_go_over_the_file_and_the_file_over_the_job(tmp_path: Path) -> None:
    file = toml(tmp_path, "batch_size = 6\nmicrobatch_size = 3\n")
    config = resolve(load_settings({"batch_size": 8}, file=file), a_job(), device=CPU)
    assert (config.batch_size, config.microbatch_size, config.steps) == (8, 3, 20)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("batchsize", "batch_size"),
        ("micro_batch", "microbatch_size"),
        ("step", "steps"),
        ("lr", "learning_rate"),
        ("memory_budget", "memory"),
        ("max-grad-norm", "max_grad_norm"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, wrong: str, right: str) -> None:
    file = toml(tmp_path, f"{wrong} = 3\n")
    with pytest.raises(ConfigError, match=rf"unknown key '{wrong}' in .*run\.toml; did you mean '{right}'\?"):
        load_settings({}, file=file)


def test_a_key_like_nothing_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known keys are job, batch_size"):
        load_settings({}, file=toml(tmp_path, "zzzzqqq = 3\n"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "--batch-size is 0: it must be at least 1"),
        ("batch_size", True, "a whole number"),
        ("batch_size", "8", "a whole number"),
        ("microbatch_size", -1, "at least 1"),
        ("microbatch_size", "all", "a whole number or 'auto'"),
        ("memory", "6 GiX", "--memory: '6 GiX' is not an amount of memory"),
        ("memory", 0, "at least 1"),
        ("memory", "3", '--memory is 3: 3 what\\? Write "3 GiB" or "3 MiB", or "3 B" for bytes'),
        ("memory", "1.5", "1.5 what"),
        ("steps", 0, "--steps is 0: it must be at least 1"),
        ("epochs", 0.0, "more than 0"),
        ("epochs", float("inf"), "a finite number"),
        ("seed", -1, "at least 0"),
        ("autocast", "fp8", "'bf16', 'fp16' or 'none'"),
        ("learning_rate", -0.1, "--lr is -0.1: it must be more than 0"),
        ("max_grad_norm", 0.0, "more than 0"),
        ("device", "", "a text"),
        ("keep_checkpoints", 0, "at least 1"),
        ("warmup_steps", -1, "at least 0"),
    ],
)
def test_a_value_that_cannot_work_says_why(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings({key: value})


def test_a_small_number_of_memory_in_a_file_is_asked_about_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory in .*toml is 6: 6 what\?"):
        load_settings({}, file=toml(tmp_path, "memory = 6\n"))
    assert load_settings({}, file=toml(tmp_path, "memory = 6442450944\n")).memory == 6442450944
    assert load_settings({"memory": 4096}).memory == 4096  # what an earlier run has stored


def test_the_file_of_the_documentation_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
    block = page.partition("```toml\n")[2].partition("```")[0]
    settings = load_settings({"steps": 50}, file=toml(tmp_path, block))
    assert (settings.steps, settings.epochs, settings.keep_checkpoints) == (50, None, 3)
    assert set(block.split()) >= {"schedule", "nonfinite", "keep_checkpoints"}  # which no flag sets


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"steps": 0}, file=toml(tmp_path, "batch_size = 0\nbatchsize = 1\n"))
    assert len(str(caught.value).splitlines()) == 3


def test_steps_and_epochs_exclude_each_other_within_one_source_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both steps and epochs"):
        load_settings({"steps": 3, "epochs": 1.0})
    settings = load_settings({"steps": 3}, file=toml(tmp_path, "epochs = 2.0\n"))
    assert (settings.steps, settings.epochs) == (3, None)


def test_a_missing_file_names_the_one_beside_it(tmp_path: Path) -> None:
    toml(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no configuration file .*runn\.toml; did you mean .*run\.toml\?"):
        load_settings({}, file=tmp_path / "runn.toml")


def test_a_file_that_is_not_toml_says_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 2"):
        load_settings({}, file=toml(tmp_path, "steps = 3\nbatch_size = = 3\n"))


@given(
    st.builds(
        Settings,
        job=st.text(min_size=1),
        data=st.none() | st.text(min_size=1),
        batch_size=st.none() | st.integers(1, 2**40),
        memory=st.none() | st.integers(2**20, 2**50) | st.just("6 GiB"),
        epochs=st.none() | st.floats(1e-9, 1e9),
        max_grad_norm=st.none() | st.just("none") | st.floats(1e-9, 1e9),
        compare=st.booleans(),
    )
)
def test_settings_written_as_toml_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, settings: Settings
) -> None:
    file = tmp_path_factory.mktemp("toml") / "config.toml"
    file.write_bytes(settings.toml().encode("utf-8", "surrogatepass"))
    assert load_settings({}, file=file) == settings


def test_a_resolved_configuration_resolves_to_itself() -> None:
    settings = load_settings({"epochs": 1.5, "memory": "1 GiB", "microbatch_size": 7})
    config = resolve(settings, a_job(max_grad_norm=1.0, warmup_steps=2, buffers="mean"), device=CPU)
    again = resolve(
        load_settings(resolved_settings(settings, config).model_dump(exclude_none=True)), a_job(), device=CPU
    )
    for name in RunConfig.__dataclass_fields__:
        if name not in {"notices", "job"}:
            assert getattr(again, name) == getattr(config, name), name


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"),
    [(10, 4, 1.0, 3), (10, 4, 2.0, 6), (12, 4, 1.0, 3), (3, 8, 2.0, 2), (10, 4, 0.1, 1)],
)
def test_epochs_count_the_short_last_batch(samples: int, batch: int, epochs: float, steps: int) -> None:
    job = a_job(data=[torch.zeros(3)] * samples, batch_size=batch)
    assert resolved(job, epochs=epochs).steps == steps


def test_a_microbatch_larger_than_the_batch_is_cut_down_and_said() -> None:
    config = resolved(microbatch_size=64)
    assert (config.microbatch_size, config.microbatches) == (4, 1)
    assert "a microbatch of 64 is more than the batch of 4" in config.notices[0]


def test_a_batch_larger_than_the_data_is_said() -> None:
    assert "every batch holds 10 instead of 64" in resolved(batch_size=64).notices[0]


def test_none_switches_off_what_the_job_brings() -> None:
    job = a_job(max_grad_norm=1.0, memory_budget="1 GiB", autocast=torch.bfloat16)
    config = resolved(job, max_grad_norm="none", memory="none", autocast="none")
    assert (config.max_grad_norm, config.memory_budget, config.autocast) == (None, None, None)
    config = resolved(job)
    assert (config.max_grad_norm, config.memory_budget, config.autocast) == (1.0, 2**30, torch.bfloat16)


@pytest.mark.parametrize(
    ("job", "flags", "error", "message"),
    [
        ({"steps": None}, {}, ConfigError, "pass --steps or --epochs"),
        ({"data": []}, {}, DataError, "data has 0 samples"),
        ({"data": NoLength()}, {}, DataError, "no length"),
        ({"validation": []}, {}, DataError, "validation has 0 samples"),
        ({"batch_size": 0}, {}, ConfigError, "batch_size is 0"),
        ({"model": nn.ReLU()}, {}, ConfigError, "no trainable parameters"),
        ({}, {"warmup_steps": 20}, ConfigError, "never reach its learning rate"),
    ],
)
def test_a_job_that_cannot_run_says_why(
    job: dict[str, Any], flags: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolved(a_job(**job), **flags)


def test_a_job_with_a_scheduler_keeps_its_learning_rate() -> None:
    job = a_job()
    assert isinstance(job.optimizer, torch.optim.Optimizer)
    step_lr = torch.optim.lr_scheduler.StepLR(job.optimizer, 5)
    with pytest.raises(ConfigError, match="--lr: the job has its own scheduler"):
        resolved(a_job(optimizer=job.optimizer, scheduler=step_lr), learning_rate=0.2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "not a device"),
        ("meta", "no such device"),
        ("cuda:99", "here (is|are) cpu"),
        ("cpu0", "device"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("langauge", "did you mean 'language'"),
        ("nothing", "the built-in jobs are language, images"),
        ("{folder}/jbs.py:good", r"no file .*jbs\.py; did you mean .*jobs\.py"),
        ("{folder}/jobs.py", "its functions are good, silent, greedy"),
        ("{folder}/jobs.py:goood", "has no function 'goood'; its functions are good, silent, greedy"),
        ("{folder}/jobs.py:number", "is an int, not a function"),
    ],
)
def test_a_job_that_cannot_be_found_says_what_there_is(tmp_path: Path, name: str, message: str) -> None:
    source = "number = 3\ndef good(): ...\ndef silent(): ...\ndef greedy(*, tokens): ...\ndef _private(): ...\n"
    (tmp_path / "jobs.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        find_job(name.format(folder=tmp_path))


def test_a_job_is_called_with_what_it_accepts() -> None:
    seen: dict[str, object] = {}

    def make(*, seed: int, data: object, batch_size: int = 5) -> Job:
        seen.update(seed=seed, data=data, batch_size=batch_size)
        return a_job()

    call_job(make, {"seed": 3, "device": CPU, "data": None, "batch_size": None}, name="job")
    assert seen == {"seed": 3, "data": None, "batch_size": 5}


def nothing() -> None: ...


def wants_tokens(tokens: int) -> None: ...


def wants_a_position(x: int, /) -> None: ...


def a_job_without_data() -> Job:
    return a_job()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "returned nothing, not a Job"),
        (wants_tokens, "needs the argument 'tokens'"),
        (wants_a_position, "needs the argument 'x'"),
        (a_job_without_data, "takes no data"),
    ],
)
def test_a_function_that_makes_no_job_says_why(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_job(make, {"seed": 3, "data": Path("x") if "takes no data" in message else None}, name="job")


def test_an_error_inside_the_users_file_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "broken_job.py").write_text("raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        find_job(f"{tmp_path}/broken_job.py:make")
