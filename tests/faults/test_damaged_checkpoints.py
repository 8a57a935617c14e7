"""A damaged checkpoint is refused, or goes on to the picture that the whole one leads to."""

import random
import warnings
from collections import Counter

import pytest
import torch

from deepred_pl.cli import EXPECTED, RestorationCLI, reason
from deepred_pl.images import write_image
from tests.faults import processes
from tests.helpers import RUN, picture

SAVED, STEPS = 11, 14


def fit(folder, out, steps, *more):
    """The module of a small fit by the command line."""
    options = [
        *("fit", "--config", "quickstart", "--trainer.max_steps", str(steps), "--trainer.logger"),
        *("false", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--model.network.init_args.width", "4", "--model.network.init_args.scales", "3"),
        *("--data.ground_truth", str(folder / "truth.png"), "--red.every_n_steps", "3"),
    ]
    return RestorationCLI([*options, "--trainer.default_root_dir", str(folder / out), *more]).model


def damaged(data, chance):
    """The bytes with some of them changed, zeroed or cut off."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        at = chance.randrange(len(data))
        kind = chance.choice(["flip", "flip", "zero", "cut"])
        if kind == "flip":
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "zero":
            data[at : at + 4] = bytes(len(data[at : at + 4]))
        elif chance.random() < 0.3:
            del data[max(1, at) :]
    return bytes(data)


def resume_them(connection, folder, seed, tries):
    """Go on from so many damaged checkpoints, and tell what becomes of each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(folder, "whole", SAVED)
    whole = folder / "whole" / RUN / "checkpoints" / "last.ckpt"
    expected = fit(folder, "expected", STEPS, "--ckpt_path", str(whole)).restored
    chance = random.Random(seed)
    for i in range(tries):
        path = folder / "damaged.ckpt"
        path.write_bytes(damaged(whole.read_bytes(), chance))
        try:
            restored = fit(folder, f"resumed_{i}", STEPS, "--ckpt_path", str(path)).restored
            what = "same" if torch.equal(restored, expected) else "another picture"
        except EXPECTED as error:
            what = "refused" if "which is damaged or another" in reason(error) else str(error)
        except BaseException as error:
            what = f"{type(error).__name__}: {error}"
        connection.send(("resumed", what))


def test_a_damaged_checkpoint_is_refused_or_does_no_harm(tmp_path, seed, long, record_property):
    write_image(tmp_path / "truth.png", picture(3, 37, 45))
    tries = 500 if long else 8
    *messages, end = processes.told_by(resume_them, tmp_path, seed, tries, seconds=60)
    assert end == ("ended", 0)
    counts = Counter(what for _, what in messages)
    survived = counts["same"] + counts["refused"]
    record_property(
        "figures",
        f"damaged checkpoints: {len(messages)} tried, {survived} survived ({counts['refused']} "
        f"refused, {counts['same']} without harm), seed {seed}",
    )
    assert survived == tries, counts
    assert counts["refused"] > tries // 2


def test_a_checkpoint_with_more_than_data_is_refused(tmp_path, capfd):
    class Harmful:
        def __reduce__(self):
            return print, ("unpickled",)

    write_image(tmp_path / "truth.png", picture(3, 37, 45))
    torch.save({"loops": Harmful()}, tmp_path / "harmful.ckpt")
    for option in ("--ckpt_path", "--model.init_from"):
        with pytest.raises(ValueError, match=r"harmful\.ckpt"):
            fit(tmp_path, option, STEPS, option, str(tmp_path / "harmful.ckpt"))
    assert "unpickled" not in capfd.readouterr().out


def test_a_checkpoint_from_the_network_is_refused(tmp_path):
    write_image(tmp_path / "truth.png", picture(3, 37, 45))
    with pytest.raises(ValueError, match="found no file"):
        fit(tmp_path, "run", STEPS, "--ckpt_path", "http://localhost:9/last.ckpt")
