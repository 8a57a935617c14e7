"""Throughput of a batch: images per hour with 1, 2 and 4 fits beside each other."""

import shutil
from functools import partial

import pytest
import skimage.data
from PIL import Image

from deepred_pl.batch.main import main

IMAGES, STEPS = 4, 200


@pytest.mark.parametrize("width", [32, 128])
def test_throughput(race, device, side, width, tmp_path):
    photo = skimage.data.astronaut()
    for i in range(IMAGES):
        crop = photo[20 * i : 20 * i + side, 128 : 128 + side]
        Image.fromarray(crop).save(tmp_path / f"image{i}.png")
    kind = "gpu" if device.type == "cuda" else "cpu"
    settings = ["--config=denoising", "--config=methods/quick", f"--model.network.width={width}"]
    settings += [f"--trainer.max_steps={STEPS}", f"--trainer.accelerator={kind}"]

    def batch(workers: int) -> None:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        main(
            [*settings, "--ground_truth", str(tmp_path), "--out", str(out), f"--workers={workers}"]
        )

    rows = race({f"{n} beside": partial(batch, n) for n in (1, 2, 4)})
    for row in rows.values():
        row["images/h"] = round(3600 * IMAGES / row["seconds"])
