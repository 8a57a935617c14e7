"""`deepred restore`, as a user calls it."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image
from skimage.data import shepp_logan_phantom
from skimage.transform import radon, resize

from deepred_pl.batch import stacks, workers
from deepred_pl.batch.arguments import of_restore
from deepred_pl.batch.jobs import Job, ready
from deepred_pl.batch.main import main, restore
from deepred_pl.batch.reports import lines_of
from deepred_pl.cli import RestorationCLI
from deepred_pl.images import ImageFormat, write_image
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, Downsample
from tests.helpers import picture, result_of, run_here

TINY = [
    *("--model.network", "SkipNet", "--model.network.width=4", "--model.network.scales=2"),
    *("--trainer.accelerator=cpu", "--trainer.precision=32", "--red.every_n_steps=2"),
]
FEW = [*TINY, "--trainer.max_steps=8"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Call `deepred restore` in `tmp_path`; give its status, standard output and messages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "on_this_machine", run_here)
    monkeypatch.setattr(workers, "_cores", lambda: 1)

    def call(*args, settings=FEW):
        status = 0
        try:
            restore([*map(str, args), *settings], time.time())
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return (1, out, status) if isinstance(status, str) else (status, out, err)

    return call


@pytest.fixture
def batch_command(command):
    """Call `deepred-batch` in the same way, with results in "out"."""
    return lambda *args: main([*args, "--out", "out", *FEW, "--data.noise.sigma=12"])


@pytest.fixture
def refused(command):
    """Call it with a mistake; give the one line it says."""

    def call(*args, **kwargs):
        _, _, said = command(*args, **kwargs)
        assert said.startswith("deepred restore: error: ") and len(said.splitlines()) == 1
        return said

    return call


def save(name, image, sigma=0.0):
    noisy = image if not sigma else GaussianNoise(sigma).sample(image, torch.Generator())
    write_image(name, noisy.clamp(0, 1), ImageFormat())


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def chosen(command, *args, **kwargs):
    """The report of a single image."""
    status, out, _ = command(*args, "--json", **kwargs)
    assert status == 0
    [report] = json.loads(out)
    return report


def test_a_photo_is_denoised_next_to_itself(command, refused):
    save("photo.png", picture(3, 48, 64), 15)
    status, out, said = command("photo.png")
    assert status == 0 and out == ""
    assert names() == ["photo.comparison.png", "photo.png", "photo.restored.png"]
    assert Image.open("photo.restored.png").size == (64, 48)
    assert re.search(r"Read +.*photo.png: 48×64 pixels, 3 channels, uint8", said)
    assert re.search(r"Assumed +white noise of 1\d\.\d+ grey levels, estimated", said)
    assert re.search(r"Fit +8 steps in \d+ s$", said, re.MULTILINE)
    assert re.search(r"Image +.*photo.restored.png", said)
    assert len(said.splitlines()) < 15
    assert "exists already" in refused("photo.png")
    assert command("photo.png", "--overwrite")[0] == 0


def test_a_blurred_image_by_the_kernels_file(command):
    blur = Blur.gaussian(5, 0.9, boundary="reflect")
    np.save("psf.npy", blur.kernel.numpy())
    save("blurred.png", blur(picture(1, 48, 64)), 2)
    report = chosen(command, "blurred.png", "--blur", "psf.npy")
    assert "Blur(5×5, boundary='unknown'), 85.9% observed" in report["read"]
    assert report["result"]["fidelity"] == "backprojection"


@pytest.mark.parametrize(
    "name, blur",
    [
        ("gaussian:1.2", Blur.gaussian(11, 1.2)),
        ("uniform:3", Blur.uniform(3)),
        ("motion:5:30", Blur.motion(5, 30)),
    ],
)
def test_a_kernel_by_its_name(name, blur):
    options = of_restore(["a.png", "--blur", name], 0.0).options
    operator = RestorationCLI(
        ["--config=deblurring_uniform", *options], run=False
    ).datamodule.operator
    assert torch.equal(operator.kernel, blur.kernel) and operator.boundary == "unknown"


def test_a_small_image_is_enlarged(command):
    save("small.png", Downsample(2, "lanczos3")(picture(3, 96, 128)))
    report = chosen(command, "small.png", "--scale", 2)
    assert Image.open(report["restored"]).size == (128, 96)
    assert report["result"]["noise"] is None and report["assumed"]["data.noise"] == "no noise"


def test_scratches_are_filled_and_the_rest_is_kept(command):
    image, known = picture(3, 48, 64), torch.ones(1, 1, 48, 64)
    known[..., 20:23, :] = 0
    save("scratched.png", image * known)
    save("mask.png", known)
    report = chosen(command, "scratched.png", "--mask", "mask.png")
    before, after = (np.asarray(Image.open(p)) for p in ("scratched.png", report["restored"]))
    changed = (before != after).any(-1)
    assert changed[20:23].mean() > 0.9 and not changed[:20].any() and not changed[23:].any()


def test_a_kernel_that_is_unknown_is_found_and_written(command, refused):
    blur = Blur.motion(5, 30, boundary="reflect")
    save("shaken.png", blur(picture(3, 64, 80)), 1)
    report = chosen(command, "shaken.png", "--blur", "unknown:9")
    assert "UnknownBlur(9×9, estimates agree to" in report["read"]
    assert report["kernel"].endswith("shaken.kernel.npy") and report["directory"] is None
    kernel = np.load("shaken.kernel.npy")
    assert kernel.shape == (9, 9) and Image.open("shaken.kernel.png").size == (9, 9)
    assert any(line.startswith("Kernel   ") for line in lines_of(report))
    assert "exists already" in refused("shaken.png", "--blur", "unknown:9")
    assert command("shaken.png", "--blur", "unknown:5", "--overwrite")[0] == 0
    assert "must be odd" in refused("shaken.png", "--blur", "unknown:8", "--overwrite")


def test_a_stack_is_restored_next_to_itself(command):
    stack = (255 * picture(2, 48, 64)[0].numpy()).round().astype(np.uint8)
    tifffile.imwrite("stack.tif", stack, metadata={"axes": "TYX"})
    status, _, said = command("stack.tif", "--sigma", 5)
    assert status == 0 and "stack.restored.tif" in said
    assert tifffile.imread("stack.restored.tif").shape == (2, 48, 64)


@pytest.mark.parametrize("tile", [(), ("--tile", 48)])
def test_a_jpegs_artefacts_are_removed(command, tile):
    save("clean.png", picture(3, 75, 91))
    Image.open("clean.png").save("photo.jpg", quality=20)
    report = chosen(command, "photo.jpg", "--jpeg", *tile)
    assert "75×91 pixels, 3 channels, uint8" in report["read"]
    assert "JPEG(4:2:0, mean quantization step" in report["read"]
    assert report["result"]["share_in_cells"] > 0.9 and report["result"]["noise"] is None
    assert "data.hold_out" not in report["chosen"] and not report["assumed"]
    assert Image.open(report["restored"]).size == (91, 75)
    assert f"{report['result']['share_in_cells']:.1%} of the JPEG's" in "".join(lines_of(report))


def test_a_jpeg_that_is_none_is_refused(command):
    save("photo.png", picture(3, 48, 64))
    status, _, said = command("photo.png", "--jpeg")
    assert status == 1 and "failed: expected a JPEG file, got PNG" in said


@pytest.mark.parametrize("circle", [True, False])
def test_a_sinogram_of_sums_along_rays_gives_the_object(command, circle):
    side = 48
    phantom = 0.02 * resize(shepp_logan_phantom(), (side, side)).clip(0)
    if not circle:
        phantom[:] = 0.01  # up to the corners
    angles = np.linspace(0, 180, 20, endpoint=False)
    sinogram = radon(phantom, angles, circle=circle)
    sinogram = 100 * sinogram / phantom.max()  # of density 100
    sinogram += np.random.default_rng(0).normal(0, 5, sinogram.shape)
    np.save("sinogram.npy", sinogram.astype(np.float32))
    report = chosen(command, "sinogram.npy", "--angles", "0:180:20")
    assert report["chosen"]["data.operator.circle"] is circle
    assert report["chosen"]["model.lam"] == 0.7  # with the estimated noise
    low, high = report["chosen"]["data.intensity_range"]
    assert low == 0 and 80 < high / len(sinogram) < 250  # of 100
    assert circle or "with corners" in report["assumed"]["data.operator.circle"]


def test_a_folder_gets_run_directories_and_a_table(command):
    Path("stack").mkdir()
    for i in range(2):
        save(f"stack/{i}.png", picture(1, 48 + i, 50), 12)
    status, _, said = command("stack/", "--out", "restored", "--sigma", 12, "--effort", "fast")
    assert status == 0 and "2 of 2 restored" in said
    assert (Path("restored") / "summary.md").exists()
    for i in range(2):
        run = Path("restored") / str(i)
        assert result_of(run)["noise_sigma"] == pytest.approx(12)
        assert (run / "choice.json").exists()
        copy = Path("restored") / f"{i}.png"
        assert copy.read_bytes() == (run / "restored.png").read_bytes()
    written = (run / "result.json").stat().st_mtime_ns
    again = command("stack/", "--out", "restored", "--sigma", 12, "--effort", "fast")
    assert again[0] == 0 and (run / "result.json").stat().st_mtime_ns == written


def test_a_folders_files_are_only_replaced_if_asked(command):
    Path("stack").mkdir()
    Path("out").mkdir()
    save("stack/a.png", picture(1, 48, 50), 12)
    Path("out/a.png").write_bytes(b"mine")
    status, _, said = command("stack", "--out", "out")
    assert status == 1 and "out/a.png exists already; use --overwrite" in said
    assert Path("out/a.png").read_bytes() == b"mine" and names("out") == ["a.png"]
    assert command("stack", "--out", "out", "--overwrite")[0] == 0
    assert Image.open("out/a.png").size == (50, 48)
    Path("out/a/restored.png").unlink()
    status, _, said = command("stack", "--out", "out")
    assert status == 1 and re.search("the result in .*out/a was deleted", said)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("data.noise", None, "to change: --sigma"),
        ("data.noise", {"init_args": {"sigma": 12.5}}, "same as --sigma 12.5"),
        (
            "data.noise",
            {"init_args": {"sigma": [1, 2.5]}},
            "same as --data.noise GaussianNoise --data.noise.sigma '[1, 2.5]'",
        ),
        ("data.intensity_range", [0, 4096], "same as --data.intensity_range '[0, 4096]'"),
        ("data.operator.circle", True, "same as --data.operator.circle true"),
        ("model.fidelity", "likelihood", "to change: --model.fidelity backprojection"),
        ("data.hold_out", None, "to change: --data.hold_out"),
    ],
)
def test_the_report_says_how_to_change_an_assumption(name, value, said):
    scores = {"measurement": None, "restored": None}
    report = {
        "read": "a.png",
        "assumed": {name: "this"},
        "chosen": {} if value is None else {name: value},
        "result": {"steps": 3, "seconds": 1, "stop_reason": "max_steps", "psnr": scores},
        **{"fits": 1, "warnings": [], "diagnosis": "", "restored": "b.png", "comparison": "c.png"},
        "kernel": None,
    }
    assert lines_of(report)[1] == f"Assumed  this ({said})"


def test_angles_are_a_range_a_list_or_a_file(tmp_path):
    angles = list(range(180))
    (tmp_path / "angles.txt").write_text("0 1.5\n3")
    np.save(tmp_path / "angles.npy", [0, 2.5])
    for text, expected in {
        "0:180:60": np.arange(0, 180, 3),
        ",".join(map(str, angles)): angles,
        str(tmp_path / "angles.txt"): [0, 1.5, 3],
        str(tmp_path / "angles.npy"): [0, 2.5],
    }.items():
        option = of_restore(["y.npy", "--angles", text], 0.0).options[0]
        assert json.loads(option.partition("=")[2]) == pytest.approx(expected)


def test_the_result_is_nearer_to_the_true_image(command):
    save("clean.png", picture(3, 64, 80))
    save("photo.png", picture(3, 64, 80), 25)
    more = [*TINY, "--model.network.width=8", "--trainer.max_steps=100"]
    report = chosen(command, "photo.png", "--data.ground_truth=clean.png", settings=more)
    before, after = (report["result"]["psnr"][name] for name in ("measurement", "restored"))
    assert after > before + 2
    clean, restored = (np.asarray(Image.open(p)) / 255 for p in ("clean.png", report["restored"]))
    mse = np.mean((clean - restored) ** 2)
    assert after == pytest.approx(-10 * np.log10(mse), abs=0.05)  # of 8 bits


def test_large_images_are_cut_if_the_operator_allows(command, monkeypatch):
    monkeypatch.setattr("deepred_pl.batch.plan.SIMPLE_TILE", 48)
    save("photo.png", picture(1, 48, 120), 15)
    status, _, said = command("photo.png", "--out", "out")
    assert status == 0 and re.search("Fit +24 steps.*over 3 fits", said)
    assert len(list(Path("out/photo").glob("tile_*/choice.json"))) == 3
    assert Image.open("out/photo/restored.png").size == (120, 48)


def test_a_stopped_fit_keeps_its_choice(command, monkeypatch):
    save("photo.png", picture(1, 48, 50), 12)
    saved = [*FEW, "--checkpoint.every_n_steps=2"]

    def stop(*args):
        raise RuntimeError("stopped here")

    monkeypatch.setattr("deepred_pl.callbacks.writer.compare", stop)
    status, _, said = command("photo.png", settings=saved)
    assert (
        status == 1
        and "photo: failed: stopped here" in said
        and "repeat the command to resume" in said
    )
    run = Path("photo.restored.run/photo")
    before = json.loads((run / "choice.json").read_text())
    folder = Path().resolve()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(workers, "on_this_machine", run_here)
    monkeypatch.setattr(workers, "_cores", lambda: 1)
    monkeypatch.setattr("deepred_pl.batch.jobs.choose", stop)
    report = chosen(command, "photo.png", settings=saved)
    assert report["chosen"] == before["settings"]
    assert names() == ["photo.comparison.png", "photo.png", "photo.restored.png"]


def test_a_bad_image_of_a_folder_fails_alone(command):
    Path("stack").mkdir()
    save("stack/good.png", picture(1, 48, 50), 12)
    Path("stack/bad.png").write_bytes(b"no image")
    status, out, said = command("stack", "--out", "out", "--json")
    assert status == 1 and "1 of 2 restored" in said
    good, bad = json.loads(out)
    assert good["image"] == "good" and good["warnings"] == []
    assert bad["image"] == "bad" and "in none of these formats" in bad["error"]


def test_restarts_give_an_uncertainty(command):
    save("photo.png", picture(1, 48, 50), 12)
    status, _, said = command("photo.png", "--restarts", 2, "--out", "out")
    run = Path("out/photo")
    assert status == 0 and (run / "uncertainty.png").exists()
    assert re.search(r"Fit +16 steps", said) and re.search(r"Image +.*out/photo.png", said)


@pytest.mark.parametrize(
    "args, said",
    [
        (
            ("photo.png", "--blur", "gaussian:1", "--scale", "2"),
            "--scale cannot be combined with --blur",
        ),
        (("photo.png", "--jpeg", "--sigma", 5), "does not apply to --jpeg"),
        (("photo.png", "--blur", "gaussian"), "gaussian:WIDTH, uniform:SIZE, motion:"),
        (("photo.png", "--blur", "gaussian:x"), "gaussian:WIDTH, .*got gaussian:x"),
        (("photo.png", "--blur", "no.png"), "expected a file as --blur, found none: no.png"),
        (("photo.png", "--out", "fixed.png"), "--out is a folder, .*got fixed.png"),
        (("photo.png", "--blur", "uniform:4"), "size must be odd"),
        (("photo.png", "--scale", "1"), "--scale 1 enlarges nothing"),
        (("photo.png", "--mask", "no.png"), "expected a file as --mask, found none: no.png"),
        (("photo.png", "--angles", "0:180"), "START:STOP:COUNT such as 0:180:60"),
        (("photo.png", "--sigma", "0"), r"--sigma in \(0, 255\] grey levels, got 0"),
        (("photo.png", "--sigma", "nan"), "got nan"),
        (("photo.png", "--sigma", "3", "--data.noise.sigma=4"), "both state the noise"),
        (("photo.png", "--blur", "motion:inf:0"), "unknown:SIZE, got motion:inf:0"),
        (("photo.png", "--json", "--out", "out", "--shard", "1/2"), "--shard makes no report"),
        (("photo.png", "--sigma", "x"), "--sigma: invalid float value"),
        (("photo.png", "--effort", "much"), "fast, default, best or a time such as 90s"),
        (("photo.png", "--data.measurement=a.png"), "is set by this command; use IMAGE"),
        (("photo.png", "--config", "denoising"), "unrecognized arguments: --config denoising"),
        (("photo.png", "grey.png"), "expected --out DIR"),
        (("photo.png", "--out", "."), "has the images, and gets NAME.png"),
        (("photo.png", "--out", "linked"), "has the images, and gets NAME.png"),
        (("photo.png", "--restarts", "2"), "expected --out DIR"),
        (
            ("photo.png", "--blur", "unknown:9", "--restarts", "2", "--out", "out"),
            "an unknown blur needs a single fit, got 2 restarts",
        ),
        ((), "required: IMAGE; see `deepred restore --help`"),
        (("nowhere.png",), "found nothing: nowhere.png"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_begun(refused, args, said):
    save("photo.png", picture(3, 48, 64))
    save("grey.png", picture(1, 48, 64))
    Path("linked").symlink_to(".")
    before = names()
    assert re.search(said, refused(*args))
    assert names() == before


def test_a_kernel_that_was_found_is_not_replaced(refused):
    save("photo.png", picture(3, 48, 64))
    Path("photo.kernel.npy").touch()
    assert "photo.kernel.npy exists already" in refused("photo.png", "--blur", "unknown:9")


@pytest.mark.parametrize(
    "args, said",
    [
        (("photo.png", "--mask", "other.png"), "mask must have the image's 48×64 pixels"),
        (("photo.png", "--effort", "1s"), "an effort of 1s is too short: it leaves .* s"),
        (("photo.png", "--angles", "0:180:60"), "sinogram must be .* with 60 angles, got 48×64"),
    ],
)
def test_what_does_not_fit_the_image_is_one_line_of_it(command, args, said):
    save("photo.png", picture(3, 48, 64), 10)
    save("other.png", torch.ones(1, 1, 40, 64))
    status, _, message = command(*args, settings=TINY)
    assert status == 1 and re.search(rf"photo: .*{said}", message)
    assert names() == ["other.png", "photo.png"]


def save_stack(name, pages, dtype="uint16", **metadata):
    """An ImageJ hyperstack of times, of noisy images (pages, 36, 44)."""
    white = {"uint16": 4095, "float32": 1}[dtype]
    noisy = pages + np.random.default_rng(0).normal(0, 0.05, pages.shape)
    stored = (noisy.clip(0, 1) * white).astype(dtype)
    metadata = {"axes": "TYX", "unit": "um", "finterval": 0.5, **metadata}
    tifffile.imwrite(name, stored, imagej=True, metadata=metadata, resolution=(4, 4))
    return stored


@pytest.fixture
def frames():
    image = picture(1, 36, 48)[0, 0].numpy()
    return np.stack([image[:, t : t + 44] for t in range(3)])


def test_pages_of_a_stack_are_restored_into_one_file(command, refused, frames):
    stored = save_stack("stack.tif", frames)
    status, _, said = command("stack.tif", "--pages", "1:")
    assert status == 0
    assert names() == ["stack.comparison.png", "stack.restored.tif", "stack.tif"]
    with tifffile.TiffFile("stack.restored.tif") as file:
        restored, series = file.asarray(), file.series[0]
        assert (series.axes, series.shape, series.dtype) == ("TYX", (3, 36, 44), "uint16")
        assert file.imagej_metadata["unit"] == "um" and file.imagej_metadata["finterval"] == 0.5
    np.testing.assert_array_equal(restored[0], stored[0])
    for page in (1, 2):  # each is that page's, less its noise
        errors = [np.abs(restored[page] / 4095 - frame).mean() for frame in frames]
        assert np.argmin(errors) == page
        assert 0 < errors[page] < np.abs(stored[page] / 4095 - frames[page]).mean()
    assert "stack.tif: 36×44 pixels, 1 channel, uint16" in said
    assert "axes TYX, page 1 (from 0) of 3" in said
    assert re.search(r"Fits +2 pages, 16 steps in \d+ s", said)
    assert "exists already" in refused("stack.tif")


def test_a_bad_page_fails_alone_and_is_named(command, frames):
    bad = save_stack("stack.tif", frames, "float32")
    bad[1] = np.nan
    tifffile.imwrite("stack.tif", bad, imagej=True, metadata={"axes": "TYX"})
    status, _, said = command("stack.tif")
    assert status == 1
    assert re.search(r"2 of 3: stack page 1: failed: expected finite values", said)
    assert re.search(r"Failed +page 1, which is not restored in the result: expected finite", said)
    assert "partial results are in" in said
    restored = tifffile.imread("stack.restored.tif")
    assert np.isnan(restored[1]).all() and np.isfinite(restored[[0, 2]]).all()
    before = Path("stack.restored.run/stack/page_0/result.json").stat().st_mtime_ns
    assert command("stack.tif")[0] == 1  # it tries the bad page again, and keeps the others
    assert Path("stack.restored.run/stack/page_0/result.json").stat().st_mtime_ns == before


def test_a_stopped_stack_is_resumed(command, frames, monkeypatch):
    save_stack("stack.tif", frames)
    fitted = []

    def stopping(jobs, *args):
        for outcome in run_here(jobs, *args):
            fitted.append(outcome and outcome[0].about["image"])
            if fitted == ["stack page 0"]:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr(workers, "on_this_machine", stopping)
    status, _, said = command("stack.tif")
    assert status == 130 and "repeat the command to resume" in said
    assert not Path("stack.restored.tif").exists()
    status, out, _ = command("stack.tif", "--json")
    assert status == 0
    assert [name for name in fitted if name] == ["stack page 0", "stack page 1", "stack page 2"]
    [report] = json.loads(out)
    assert [page["image"] for page in report["pages"]] == [f"stack page {i}" for i in range(3)]
    assert {page["restored"] for page in report["pages"]} == {None}  # no longer there
    assert report["failed"] == {} and report["restored"].endswith("stack.restored.tif")
    assert len(tifffile.imread("stack.restored.tif")) == 3


def test_pages_are_restored_together_as_channels(command, frames):
    stored = save_stack("stack.tif", frames)
    report = chosen(command, "stack.tif", "--together")
    assert "36×44 pixels, 3 channels" in report["read"]
    assert "axes TYX, all pages as channels" in report["read"]
    with tifffile.TiffFile("stack.restored.tif") as file:
        assert (file.series[0].axes, file.series[0].shape) == ("TYX", (3, 36, 44))
        for t, restored in enumerate(file.asarray()):
            errors = [np.abs(restored / 4095 - frame).mean() for frame in frames]
            assert np.argmin(errors) == t
            assert errors[t] < np.abs(stored[t] / 4095 - frames[t]).mean()


def test_stacks_in_a_folder_become_files_of_their_names(command, frames):
    Path("in").mkdir()
    stored = save_stack("in/stack.tif", frames)
    save("in/photo.png", picture(1, 36, 44), 12)
    status, _, said = command("in", "--out", "out", "--pages", "0,2", "--sigma", 12)
    assert status == 0 and "3 of 3 restored" in said
    assert {"stack.tif", "photo.png"} <= {*names("out")}
    assert names("out/stack") == ["page_0", "page_2", "stack.png", "stack.tif"]
    table = Path("out/results.csv").read_text()
    assert "stack page 2" in table and "stack/page_2" in table
    before = Path("out/stack.tif").read_bytes()
    assert command("in", "--out", "out", "--pages", "0,2", "--sigma", 12)[0] == 0
    assert Path("out/stack.tif").read_bytes() == before
    assert command("in", "--out", "out", "--pages", "1", "--sigma", 12)[0] == 0  # in addition
    one_page = [tifffile.imread(f"out/stack/page_{page}/restored.tif") for page in range(3)]
    np.testing.assert_array_equal(tifffile.imread("out/stack.tif"), one_page)
    assert not np.equal(one_page, stored).all(axis=(1, 2)).any()
    assert (
        command("in/stack.tif", "--out", "out", "--together", "--sigma", 12, "--overwrite")[0] == 0
    )
    together = tifffile.imread("out/stack.tif")
    np.testing.assert_array_equal(together, tifffile.imread("out/stack/restored.tif"))
    assert not np.array_equal(together, one_page)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photo.png", "--pages", "0"], "expected a file with several pages, got none"),
        (["stack.tif", "--pages", "0:4"], "from 0 to 2 of .*stack.tif, got 0:4"),
        (["stack.tif", "--pages", "x"], "such as 0:10 or 0,3,5, .* got x"),
        (["stack.tif", "--pages", "0", "--together"], "--pages and --together cannot"),
        (["stack.tif", "--pages", "0", "--data.page", "1"], "--pages and --data.page cannot"),
        (["stack.tif", "--axes", "TYX", "--data.axes", "TYX"], "state the same"),
        (["stack.tif", "--axes", "TY"], "one letter for each axis of stack.tif"),
    ],
)
def test_mistakes_about_pages_are_refused(refused, frames, arguments, said):
    save_stack("stack.tif", frames)
    save("photo.png", picture(1, 36, 44), 12)
    assert re.search(said, refused(*arguments))


def test_pages_of_a_chain_start_from_the_network_before(command, frames):
    save_stack("stack.tif", frames)
    settings = ["--out", "out", "--sigma", 12, "--trainer.max_steps=4"]
    assert command("stack.tif", "--chain", 2, *settings, settings=TINY)[0] == 0
    for page in range(3):
        before = f"out/stack/page_{page - 1}" if page % 2 else None
        config = yaml.safe_load(Path(f"out/stack/page_{page}/config.yaml").read_text())
        started_from = config["model"]["init_args"]["init_from"]
        assert started_from == (before and str(Path(before).resolve()))
    changed = command("stack.tif", *settings, settings=TINY)[2]
    assert "chain was 2, and is now None" in changed


def test_fits_of_a_chain_wait_for_one_another(tmp_path):
    paths = [tmp_path / str(i) for i in range(4)]
    fits = [
        Job(path, (), {}, after=after)
        for path, after in zip(paths, [None, paths[0], None, paths[2]], strict=True)
    ]
    assert ready(fits, []) == [fits[0], fits[2]]
    assert ready(fits[1:], [fits[0]]) == [fits[2]]
    assert ready([fits[1], fits[3]], [fits[2]]) == [fits[1]]  # fits[0] has ended, well or not


def test_results_of_other_pages_are_not_lost(command, frames):
    """Though they were stopped, and the next call restores others."""
    save_stack("stack.tif", frames)
    assert command("stack.tif", "--pages", "0", "--sigma", 12)[0] == 0
    Path("stack.restored.tif").unlink()
    Path("stack.comparison.png").unlink()
    run = Path("stack.restored.run/stack/page_2")
    run.mkdir(parents=True)
    (run / "job.json").write_text("{}")  # with other settings
    status, _, said = command("stack.tif", "--pages", "1", "--sigma", 12)
    assert status == 0 and "partial results are in" in said and (run / "job.json").exists()


def test_pages_are_kept_if_their_file_cannot_be_written(command, frames, monkeypatch):
    save_stack("stack.tif", frames)

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stacks, "write_stack", full)
        status, _, said = command("stack.tif", "--pages", "0,1", "--sigma", 12)
    assert status == 1 and "No space left" in said and "partial results are in" in said
    assert not Path("stack.restored.tif").exists()
    assert command("stack.tif", "--pages", "0,1", "--sigma", 12)[0] == 0
    assert names() == ["stack.comparison.png", "stack.restored.tif", "stack.tif"]


def test_pages_have_one_range_and_one_geometry(command):
    phantom = resize(shepp_logan_phantom(), (40, 40), anti_aliasing=True)
    angles = np.arange(0, 180, 9)
    slices = [radon(k * phantom, angles, circle=True) for k in (1, 2)]
    np.save("slices.npy", np.stack(slices).astype(np.float32))
    report = chosen(command, "slices.npy", "--axes", "ZYX", "--angles", "0:180:20", "--sigma", 0.5)
    for name in ("data.intensity_range", "data.operator.circle"):
        assert len({str(page["chosen"][name]) for page in report["pages"]}) == 1
    restored = tifffile.imread("slices.restored.tif")
    assert restored[1].sum() > 1.5 * restored[0].sum()  # in one unit


def test_axes_may_be_stated_in_a_configuration(batch_command, frames):
    np.save("stack.npy", frames.astype(np.float32))
    Path("axes.yaml").write_text("data:\n  axes: TYX\n")
    batch_command(
        "--config", "denoising", "--config", "axes.yaml", "--images", "stack.npy", "--pages", "2"
    )
    assert tifffile.imread("out/stack/stack.tif").shape == frames.shape
