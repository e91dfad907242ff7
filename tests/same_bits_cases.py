"""The combinations that `same_bits.py` compares, and the processes that run them; see there for the usage."""

import datetime as dt
import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.faults import FULL
from tests.same_bits import make_limits_small
from tests.same_bits_subject import (
    Case,
    Skipped,
    Subject,
    adamw,
    contrast,
    contrast_plain,
    encoder,
    engine_steps,
    fails_once,
    loop_encodes,
    loop_fails,
    loop_over_loader,
    loop_over_own_pieces,
    loops,
    masked,
    memory_ends,
    not_a_number,
    one_count,
    one_of_each,
    optimizer_runs_out,
    overflow,
    points,
    ragged,
    ragged_encoder,
    refused,
    resume,
    sometimes_none,
    sometimes_zero,
    summed,
    tune,
    two_counts,
    two_terms,
    wrong_uses,
)

import microbatch as mb

# -- the combinations on one rank -------------------------------------------------------------------------------------

DROP, BN, NOISY = {"drop": 0.5}, {"bn": True}, {"blocks": 2, "noisy": True}
TWICE, KEEP = {"coupled": "twice"}, {"coupled": "keep"}
EXACT, POOLED, FROZEN = ({"batch_norm": how} for how in ("exact", "pooled", "frozen"))
MASKS, LENGTHS, AUTOCAST = {"dropout": "by_row"}, {"lengths": "mask"}, {"autocast": torch.bfloat16}
FOLD, FIXED, NO_FUSE = {"gradient_buffer": "none"}, {"deterministic": True}, {"fuse": False}
NARROW, OVERLAP, MICRO = {"accumulate_dtype": torch.bfloat16}, {"overlap": True}, {"batch_norm": "microbatch"}
MINE = ValueError("mine")

coupled_case = partial(Case, loss=contrast, encode=encoder)
ragged_case = partial(Case, batch=ragged, loss=masked)
ragged_coupled = partial(Case, batch=ragged, loss=contrast, encode=ragged_encoder)


def cases_alone() -> dict[str, Case]:
    return {
        "plain": Case(),
        "plain sum/count": Case(loss=summed),
        "dropout": Case(net=DROP),
        "autocast bf16": Case(options=AUTOCAST),
        "no fuse": Case(options=NO_FUSE),
        "checkpoint": Case(net=DROP, options={"checkpoint": ["a"]}),
        "bn pooled": Case(net=BN, options=POOLED),
        "bn frozen": Case(net=BN, options=FROZEN),
        "bn exact": Case(net=BN, options=EXACT),
        "bn exact sum/count": Case(net=BN, options=EXACT, loss=summed),
        "bn exact + autocast": Case(net=BN, options=EXACT | AUTOCAST),
        "masks": Case(net=DROP, options=MASKS),
        "lengths": ragged_case(net=DROP, options=LENGTHS),
        "lengths + masks": ragged_case(net=DROP, options=LENGTHS | MASKS),
        "offload": Case(options={"offload": "activations"}),
        "fold (no buffer)": Case(options=FOLD),
        "clip": Case(options={"max_grad_norm": 0.1}),
        "deterministic": Case(net=DROP, options=FIXED),
        "deterministic + masks": Case(net=DROP, options=FIXED | MASKS),
        "coupled twice": coupled_case(net=DROP, options=TWICE),
        "coupled keep": coupled_case(net=DROP, options=KEEP),
        "coupled twice + autocast": coupled_case(net=DROP, options=TWICE | AUTOCAST),
        "coupled twice + pooled": coupled_case(net=BN, options=TWICE | POOLED),
        "coupled keep + pooled": coupled_case(net=BN, options=KEEP | POOLED),
        "coupled twice + masks": coupled_case(net=DROP, options=TWICE | MASKS),
        "coupled keep + masks": coupled_case(net=DROP, options=KEEP | MASKS),
        "coupled twice + lengths": ragged_coupled(net=DROP, options=TWICE | LENGTHS),
        "coupled twice + lengths + masks": ragged_coupled(net=DROP, options=TWICE | LENGTHS | MASKS),
        "coupled + bn exact": coupled_case(net=BN, options=EXACT),
        "coupled + bn exact + autocast": coupled_case(net=BN, options=EXACT | AUTOCAST),
        "coupled + fold": coupled_case(options=TWICE | FOLD),
        **losses_and_numbers(),
        **loops_alone(),
        **chosen_alone(),
        **errors_alone(),
        **memory_alone(),
    }


def losses_and_numbers() -> dict[str, Case]:
    """Return combinations of losses with several counts, of narrow numbers, and of options that stand alone."""
    narrow = partial(Case, net=DROP, dtype=torch.bfloat16, optimizers=adamw)
    return {
        "two terms + counts": Case(net=DROP, loss=two_terms, counts=two_counts),
        "two terms without counts": Case(net=DROP, loss=two_terms, drive=refused),
        "loss None in some microbatches": Case(net=DROP, loss=sometimes_none),
        "count 0 in some microbatches": Case(net=DROP, loss=sometimes_zero),
        "bf16 parameters": narrow(),
        "bf16 parameters, no fuse": narrow(options=NO_FUSE),
        "bf16 parameters, bf16 sums": narrow(options=NARROW),
        "bf16 parameters, compensated": narrow(options=NARROW | {"accumulate": "compensated"}),
        "bf16 parameters, coupled twice": narrow(loss=contrast, encode=encoder, options=TWICE),
        "scaler, fp16": Case(net=DROP, scaled=True, options={"autocast": torch.float16}),
        "scaler, overflow": Case(net=DROP, scaled=True, drive=overflow),
        "scaler, overflow, clip": Case(net=DROP, scaled=True, options={"max_grad_norm": 0.1}, drive=overflow),
        "scaler, coupled twice": coupled_case(net=DROP, scaled=True, options=TWICE),
        "two optimizers": Case(net=DROP, optimizers=one_of_each),
        "two optimizers, clip": Case(net=DROP, optimizers=one_of_each, options={"max_grad_norm": 0.1}),
        "microbatch_tokens": ragged_case(options={"lengths": mb.Lengths(of="mask", microbatch_tokens=12)}),
        "noisy blocks": Case(net=NOISY | BN, options=MICRO),
        "bn pooled, no fuse": Case(net=BN, options=POOLED | NO_FUSE),
        "bn exact, no fuse": Case(net=BN, options=EXACT | NO_FUSE),
        "bn exact, dropout": Case(net=BN | DROP, options=EXACT),
        "bn exact + clip": Case(net=BN, options=EXACT | {"max_grad_norm": 0.1}),
        "coupled spill": coupled_case(net=DROP, options={"coupled": "spill"}),
        "coupled keep, no fuse": coupled_case(net=DROP, options=KEEP | NO_FUSE),
        "coupled twice, no fuse": coupled_case(net=DROP, options=TWICE | NO_FUSE),
        "offload + masks": Case(net=DROP, options=MASKS | {"offload": "activations"}),
    }


def loops_alone() -> dict[str, Case]:
    return {
        "loop": Case(net=DROP, drive=loops),
        "loop + counts": Case(net=DROP, loss=two_terms, counts=two_counts, drive=loops),
        "loop over a loader": Case(net=DROP | BN, options=POOLED, batch=partial(points, 12), drive=loop_over_loader),
        "loop over a loader + counts": Case(net=DROP, loss=two_terms, counts=two_counts, drive=loop_over_loader),
        "loop over own pieces": Case(net=DROP, drive=loop_over_own_pieces),
        "loop encodes": coupled_case(net=DROP, drive=partial(loop_encodes, keep=False)),
        "loop encodes, keep": coupled_case(net=DROP, drive=partial(loop_encodes, keep=True)),
    }


def chosen_alone() -> dict[str, Case]:
    """Return combinations in which the accumulator chooses, and those that are interrupted and resumed."""
    auto = partial(Case, net=DROP, batch=partial(points, 32), size="auto", drive=tune)
    budget = {"memory_budget": "230 KiB"}
    deep = partial(Case, net={"blocks": 4}, batch=partial(points, 512), size=256)
    return {
        "auto": auto(),
        "auto, bn pooled": auto(net=BN, options=POOLED),
        "auto, masks": auto(options=MASKS),
        "auto, resumed": auto(drive=partial(tune, resumed=5)),
        "auto, resumed later": auto(drive=partial(tune, resumed=12)),
        "checkpoint all": deep(options={"checkpoint": "all"}),
        "checkpoint all, noisy": Case(net=NOISY, options={"checkpoint": "all"}),
        "checkpoint all, coupled twice": coupled_case(net=NOISY, options=TWICE | {"checkpoint": "all"}),
        "checkpoint auto, all fits": deep(options={"checkpoint": "auto"}),
        "checkpoint auto": deep(options={"checkpoint": "auto"} | budget),
        "memory budget": deep(options=budget),
        "memory budget, bn pooled": deep(net={"blocks": 4} | BN, options=POOLED | budget),
        "memory budget, two retries": deep(options={"memory_budget": "104 KiB"}),
        "memory budget, auto": auto(batch=partial(points, 512), options={"memory_budget": "100 KiB"}),
        "watched by default": Case(net=DROP, options={"memory_budget": None}, steps=5),
        "coupled auto, fits": coupled_case(net=DROP, options={"memory_budget": "1 GiB"}, steps=5),
        "memory budget, not even one row": deep(size=8, options={"memory_budget": "20 KiB"}, drive=refused),
        "resumed": Case(net=DROP, drive=resume),
        "resumed, masks": Case(net=DROP, options=MASKS, drive=resume),
        "resumed, deterministic": Case(net=DROP, options=FIXED, drive=resume),
        "resumed, coupled keep": coupled_case(net=DROP, options=KEEP, drive=resume),
        "resumed, scaler": Case(net=DROP, scaled=True, drive=resume),
        "resumed, fold": Case(net=DROP, options=FOLD, drive=resume),
    }


def errors_alone() -> dict[str, Case]:
    skip = {"nonfinite": "skip"}
    found = {
        "wrong uses": Case(net=DROP, drive=wrong_uses),
        "loop fails": Case(net=NOISY, drive=partial(loop_fails, error=MINE)),
        "loop fails in backward": Case(net=NOISY, drive=partial(loop_fails, error=MINE, where="backward")),
        "NaN raises": Case(net=NOISY, drive=not_a_number),
        "NaN raises, coupled twice": coupled_case(net=DROP, options=TWICE, drive=not_a_number),
        "NaN raises, bn exact": Case(net=BN, options=EXACT, drive=not_a_number),
        "NaN skipped": Case(net=NOISY, options=skip, drive=not_a_number),
        "NaN skipped, bn pooled": Case(net=BN, options=POOLED | skip, drive=not_a_number),
        "NaN skipped, coupled keep": coupled_case(net=DROP, options=KEEP | skip, drive=not_a_number),
        "NaN skipped, bn exact": Case(net=BN, options=EXACT | skip, drive=not_a_number),
        "NaN skipped, fold": Case(net=NOISY, options=FOLD | skip, drive=not_a_number),
    }
    for name, case in may_fail().items():
        found[f"fails in forward, {name}"] = case(drive=partial(fails_once, error=MINE))
        found[f"fails in backward, {name}"] = case(drive=partial(fails_once, error=MINE, where="backward"))
    return found


def may_fail() -> dict[str, Callable[..., Case]]:
    """Return makers of the combinations in which memory ends, or something else fails, in a microbatch of four rows."""
    coupled, ragged_ = partial(coupled_case, net=NOISY | DROP), partial(ragged_case, net=DROP)
    one = partial(Case, net=NOISY | DROP, optimizers=adamw)
    found: dict[str, Callable[..., Case]] = {
        "plain": one,
        "no fuse": partial(one, options=NO_FUSE),
        "sum/count": partial(one, loss=summed),
        "two terms": partial(one, loss=two_terms, counts=two_counts),
        "autocast": partial(one, options=AUTOCAST),
        "masks": partial(one, options=MASKS),
        "lengths": partial(ragged_, options=LENGTHS),
        "fold": partial(Case, net=NOISY | DROP, options=FOLD),
        "checkpoint": partial(one, options={"checkpoint": "all"}),
        "deterministic": partial(one, options=FIXED),
        "compensated": partial(Case, dtype=torch.bfloat16, options=NARROW | {"accumulate": "compensated"}),
        "scaler": partial(one, scaled=True),
        "two optimizers": partial(one, optimizers=one_of_each),
        "bn pooled": partial(one, net=NOISY | BN, options=POOLED, batch=partial(points, 12)),
        "bn exact": partial(one, net=BN | DROP, options=EXACT),
        "bn exact, no fuse": partial(one, net=BN | DROP, options=EXACT | NO_FUSE),
        "coupled twice": partial(coupled, options=TWICE),
        "coupled twice, no fuse": partial(coupled, options=TWICE | NO_FUSE),
        "coupled twice + masks": partial(coupled, options=TWICE | MASKS),
        "coupled keep": partial(coupled, options=KEEP),
        "coupled keep, no fuse": partial(coupled, options=KEEP | NO_FUSE),
        "coupled spill": partial(coupled, options={"coupled": "spill"}),
        "coupled bn exact": partial(coupled_case, net=BN | DROP, options=EXACT),
    }
    return {name: partial(each, size=4) for name, each in found.items()}


def memory_alone() -> dict[str, Case]:
    found = {
        "memory ends, loop": Case(net=NOISY, size=4, drive=partial(loop_fails, error=FULL)),
        "memory ends in backward, loop": Case(
            net=NOISY, size=4, drive=partial(loop_fails, error=FULL, where="backward")
        ),
    }
    for name, case in may_fail().items():
        found[f"memory ends in forward, {name}"] = case(drive=partial(fails_once, error=FULL))
        found[f"memory ends in backward, {name}"] = case(drive=partial(fails_once, error=FULL, where="backward"))
        found[f"memory ends at operators, {name}"] = case(drive=memory_ends)
        if name != "fold":  # whose optimizer has its state already, and asks for no memory
            found[f"memory ends in the optimizer, {name}"] = case(drive=optimizer_runs_out)
            found[f"memory ends in the optimizer twice, {name}"] = case(drive=partial(optimizer_runs_out, times=2))
    return found


# -- the combinations on two ranks ------------------------------------------------------------------------------------


def cases_of_two() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for how in ("bare", "ddp", "sharded"):
        for name, case in beside(how).items():
            found[f"{how} {name}"] = case
    for sync in ("lean", "fast"):
        for raf in (True, False):
            one = partial(two_ranks, how="sharded", reshard=raf, net=DROP)
            name = f"sharded {sync} raf={raf}"
            found[f"{name} plain 11/1"] = one(split=11, options={"sync": sync})
            coupled = partial(one, loss=contrast_plain, encode=encoder, options=TWICE | {"sync": sync})
            for split in (11, 12):
                found[f"{name} coupled {split}/{12 - split}"] = coupled(split=split)
    one = partial(two_ranks, how="bare", net=DROP)
    return found | {
        "bare coupled keep 11/1": one(split=11, loss=contrast, encode=encoder, options=KEEP),
        "bare deterministic 9/3": one(split=9, options=FIXED),
        "bare deterministic + masks 9/3": one(split=9, options=FIXED | MASKS),
        "bare fold 9/3": one(split=9, options=FOLD),
        **more_of_two(),
        **pipelines(),
        **engines(),
        **faults_of_two(),
    }


def two_ranks(*, how: str, **changed: Any) -> Case:
    dtype = torch.float64 if how == "sharded" else torch.float32
    settings: dict[str, Any] = {"batch": partial(points, 12), "steps": 2, "dtype": dtype}
    return Case(how=how, **(settings | changed))


def beside(how: str) -> dict[str, Case]:
    """Return the combinations that bare, wrapped and sharded models have alike."""
    one = partial(two_ranks, how=how)
    coupled = partial(one, loss=contrast_plain, encode=encoder)
    return {
        **{f"plain {split}/{12 - split}": one(net=DROP, split=split) for split in (6, 11, 12)},
        "sum/count 11/1": one(loss=summed, split=11),
        "coupled twice 11/1": coupled(net=DROP, options=TWICE, split=11),
        "coupled twice 12/0": coupled(net=DROP, options=TWICE, split=12),
        "masks 11/1": one(net=DROP, options=MASKS, split=11),
        "coupled + masks 8/4": coupled(net=DROP, options=TWICE | MASKS, split=8),
        "pooled 9/3": one(net=BN, options=POOLED, split=9),
        "coupled + pooled 9/3": coupled(net=BN, options=POOLED | TWICE, split=9),
        "exact BN 9/3": one(net=BN, options=EXACT, split=9),
        "coupled + exact BN 9/3": coupled(net=BN, options=EXACT, split=9),
    }


def more_of_two() -> dict[str, Case]:
    one = partial(two_ranks, how="bare", net=DROP, split=9)
    narrow = partial(one, dtype=torch.bfloat16, optimizers=adamw)
    auto = partial(one, batch=partial(points, 64), split=32, size="auto", drive=tune)
    found = {
        "bare overlap 9/3": one(options=OVERLAP),
        "bare overlap 12/0": one(options=OVERLAP, split=12),
        "bare overlap, loop": one(options=OVERLAP, drive=loops),
        "bare overlap, clip": one(options=OVERLAP | {"max_grad_norm": 0.1}),
        "bare overlap, no fuse": one(options=OVERLAP | NO_FUSE),
        "ddp overlap 9/3": one(how="ddp", options=OVERLAP),
        "ddp overlap, loop": one(how="ddp", options=OVERLAP, drive=loops),
        "bare bf16 parameters": narrow(),
        "bare bf16 parameters, reduce in bf16": narrow(options={"reduce_dtype": None}),
        "bare bf16 parameters, compensated": narrow(options=NARROW | {"accumulate": "compensated"}),
        "sharded bf16 parameters, reduce in bf16": narrow(how="sharded", options={"reduce_dtype": None}),
        "bare lengths": one(batch=ragged, loss=masked, options=LENGTHS, split=7),
        "bare scaler, overflow": one(scaled=True, drive=overflow),
        "bare two optimizers": one(optimizers=one_of_each),
        "bare resumed, masks": one(options=MASKS, drive=resume),
        "bare auto": auto(),
        "bare auto, bn pooled": auto(net=BN, options=POOLED),
        "sharded auto": auto(how="sharded"),
        "sharded sync auto, fits": one(how="sharded", options={"memory_budget": "1 GiB"}, steps=5),
    }
    for how in ("bare", "ddp", "sharded"):
        its = partial(one, how=how)
        found[f"{how} clip"] = its(options={"max_grad_norm": 0.1})
        found[f"{how} autocast"] = its(options=AUTOCAST, dtype=torch.float32)
        found[f"{how} no fuse"] = its(options=NO_FUSE)
        found[f"{how} two terms + counts"] = its(loss=two_terms, counts=two_counts)
        found[f"{how} loss None in some microbatches"] = its(loss=sometimes_none)
        found[f"{how} count 0 in some microbatches"] = its(loss=sometimes_zero)
        found[f"{how} loop"] = its(drive=loops)
        found[f"{how} loop + counts"] = its(loss=two_terms, counts=two_counts, drive=loops)
        found[f"{how} loop over a loader"] = its(drive=loop_over_loader, split=6)
        found[f"{how} loop encodes"] = its(loss=contrast_plain, drive=partial(loop_encodes, keep=False))
        if how != "sharded":
            found[f"{how} checkpoint"] = its(net=NOISY, options={"checkpoint": "all"})
        found[f"{how} resumed"] = its(drive=resume)
    return found


def pipelines() -> dict[str, Case]:
    one = partial(two_ranks, how="pipeline")
    return {
        "pipeline 1F1B": one(net={"schedule": "1F1B"}),
        "pipeline GPipe": one(net={"schedule": "GPipe"}),
        "pipeline sum/count": one(loss=summed),
        "pipeline two terms + counts": one(loss=two_terms, counts=two_counts),
        "pipeline loss None in some microbatches": one(loss=sometimes_none),
        "pipeline clip": one(options={"max_grad_norm": 0.1}),
        "pipeline autocast": one(options=AUTOCAST),
        "pipeline bf16 parameters": one(dtype=torch.bfloat16),
        "pipeline NaN raises": one(drive=not_a_number),
        "pipeline NaN skipped": one(options={"nonfinite": "skip"}, drive=not_a_number),
        "pipeline fails": one(drive=partial(fails_once, error=MINE, at=7)),
        "pipeline memory ends": one(drive=partial(fails_once, error=FULL, at=7)),
    }


def engines() -> dict[str, Case]:
    one = partial(two_ranks, how="bare", net=DROP, split=9, loss=summed, counts=one_count)
    return {f"engine zero-{stage} 9/3": one(drive=partial(engine_steps, stage=stage)) for stage in range(4)}


def faults_of_two() -> dict[str, Case]:
    """Return combinations in which something fails on the second rank alone."""
    found: dict[str, Case] = {}
    for how in ("bare", "ddp", "sharded"):
        for name, case in may_fail_on_one_rank(how).items():
            fault = partial(partial, fails_once)
            found[f"{how} fails in forward, {name}"] = case(drive=fault(error=MINE))
            found[f"{how} fails in backward, {name}"] = case(drive=fault(error=MINE, where="backward"))
            found[f"{how} memory ends in forward, {name}"] = case(drive=fault(error=FULL))
            found[f"{how} memory ends in backward, {name}"] = case(drive=fault(error=FULL, where="backward"))
            found[f"{how} NaN raises, {name}"] = case(drive=not_a_number)
        one = partial(two_ranks, how=how, net=NOISY, size=4)
        found[f"{how} NaN skipped"] = one(options={"nonfinite": "skip"}, drive=not_a_number)
        if how != "sharded":  # whose other ranks wait in vain for a hand-written loop that fails
            found[f"{how} loop fails"] = one(drive=partial(loop_fails, error=MINE))
            found[f"{how} memory ends, loop"] = one(drive=partial(loop_fails, error=FULL))
        for times, word in ((1, ""), (2, " twice")):
            its = partial(optimizer_runs_out, times=times)
            found[f"{how} memory ends in the optimizer{word}"] = one(optimizers=adamw, drive=its)
        found[f"{how} memory ends at operators"] = one(optimizers=adamw, drive=memory_ends)
    return found


def may_fail_on_one_rank(how: str) -> dict[str, Callable[..., Case]]:
    one = partial(two_ranks, how=how, net=NOISY, size=4)
    coupled = partial(one, loss=contrast_plain, encode=encoder)
    found: dict[str, Callable[..., Case]] = {
        "plain": one,
        "coupled twice": partial(coupled, options=TWICE),
        "bn exact": partial(one, net=BN, options=EXACT),
        "coupled bn exact": partial(coupled, net=BN, options=EXACT),
    }
    if how != "sharded":
        found["overlap"] = partial(one, options=OVERLAP)
        found["coupled keep"] = partial(coupled, options=KEEP)
    if how == "sharded":
        found["fast"] = partial(one, options={"sync": "fast"})
        found["fast, coupled twice"] = partial(coupled, options=TWICE | {"sync": "fast"})
    if how == "bare":
        found["masks"] = partial(one, options=MASKS)
        found["bn pooled"] = partial(one, net=BN, options=POOLED)
        found["deterministic"] = partial(one, options=FIXED, size=2)
        found["fold"] = partial(one, options=FOLD)
    return found


# -- a process --------------------------------------------------------------------------------------------------------


class Group:
    """The default process group, made anew after a combination that may have left it unusable."""

    def __init__(self, folder: Path, rank: int, ranks: int, *, name: str) -> None:
        self.folder, self.rank, self.ranks, self.name, self.made = folder, rank, ranks, name, 0
        self._make()

    def _make(self) -> None:
        if self.ranks > 1:
            store = f"file://{self.folder / f'{self.name}-{self.made}'}"
            patience = dt.timedelta(seconds=30)
            dist.init_process_group("gloo", init_method=store, rank=self.rank, world_size=self.ranks, timeout=patience)
            self.made += 1

    def meet(self, number: int, *, usable: bool) -> None:
        """Wait for the other rank, without the group, and make another group if one of the two asks for it."""
        (self.folder / f"met-{number}-{self.rank}.part").write_text(str(usable))
        (self.folder / f"met-{number}-{self.rank}.part").rename(self.folder / f"met-{number}-{self.rank}")
        files = [self.folder / f"met-{number}-{rank}" for rank in range(self.ranks)]
        deadline = time.monotonic() + 100
        while not all(file.exists() for file in files):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another rank did not end combination {number}")
            time.sleep(0.002)
        if self.ranks > 1 and any(file.read_text() == "False" for file in files):
            dist.destroy_process_group()
            self._make()


def run(case: Case, rank: int, ranks: int) -> dict[str, Any]:
    """Run a combination; an error that it does not expect is its result."""
    try:
        subject = Subject(case, rank, ranks)
        found = case.drive(subject) if case.drive else [subject.step() for _ in range(case.steps)]
        return {"several": found} if case.drive and found is not None else subject.result()
    except Skipped as why:
        return {"cannot run": str(why)}
    except Exception as error:  # noqa: BLE001 - the other combinations still run
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = [f"{each.filename}:{each.lineno} in {each.name}" for each in frames]
        return {"crashed": f"{type(error).__name__}: {error}", "where": where}


def selected(ranks: int, select: str) -> dict[str, Case]:
    return {name: each for name, each in (cases_of_two() if ranks > 1 else cases_alone()).items() if select in name}


def main(source: str, folder: Path, rank: int, ranks: int, select: str, first: int) -> None:
    """Run the combinations of one rank, from a number on, and save what they gave."""
    if not Path(mb.__file__).is_relative_to(source):
        raise ImportError(f"microbatch was imported from {mb.__file__}, not from {source}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)  # which also fills fresh memory with NaN
    warnings.simplefilter("ignore")
    make_limits_small()
    gc.freeze()  # each attempt after memory has ended collects garbage
    cases = selected(ranks, select)
    if rank == 0:
        (folder / "names").write_text("\n".join(cases))
    group = Group(folder, rank, ranks, name=f"store-{first}")
    for number, case in list(enumerate(cases.values()))[first:]:
        result = run(case, rank, ranks)
        torch.save(result, folder / f"{number}-{rank}.part")
        (folder / f"{number}-{rank}.part").rename(folder / f"{number}-{rank}.pt")
        group.meet(number, usable="crashed" not in result)
    os._exit(0)  # past Python's own end, at which torch's threads sometimes abort the process


if __name__ == "__main__":
    if sys.argv[2] == "--list":
        print("\n".join([*selected(1, sys.argv[3]), *selected(2, sys.argv[3])]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
