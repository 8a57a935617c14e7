"""The configurations of the paper's tables, and what makes the tables of them."""

import csv
import dataclasses
import hashlib
import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from deepred_pl import sources
from deepred_pl.batch import workers
from deepred_pl.cli import CONFIGS, settings_of
from deepred_pl.cli import main as deepred
from deepred_pl.data import RestorationDataModule
from deepred_pl.denoisers import BM3D, Declipped, NonLocalMeans
from deepred_pl.images import read_image, write_image
from deepred_pl.noise import GaussianNoise
from deepred_pl.tiles import Region
from tests.benchmarks import paper
from tests.helpers import picture, result_of, run_here

TINY = {
    "trainer": {"max_steps": 4, "log_every_n_steps": 2, "accelerator": "cpu"},
    "model": {
        "init_args": {"network": {"class_path": "SkipNet", "init_args": {"width": 4, "scales": 2}}}
    },
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two small images in the place of each set."""
    rows = ["folder,file,sha256,repository,commit,path"]
    for folder in sources.FOLDERS.values():
        (tmp_path / folder).mkdir()
        for name, image in {"head": picture(3, 40, 52), "tail": picture(1, 44, 40)}.items():
            path = tmp_path / folder / f"{name}.png"
            write_image(path, image)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append(f"{folder},{name}.png,{digest},someone/images,0123abc,{name}.png")
    (tmp_path / "sources.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(sources, "TABLE", tmp_path / "sources.csv")
    monkeypatch.setenv("DEEPRED_DATA", str(tmp_path))


@pytest.fixture
def fitted(monkeypatch):
    """Fits within this process; the run directories of those that were made."""
    made = []

    def note_and_run(fits, *args):
        made.extend(fit.directory for fit in fits)
        return run_here(fits, *args)

    monkeypatch.setattr(workers, "on_this_machine", note_and_run)
    return made


ALONE = {
    "nlm": NonLocalMeans(25),
    "bm3d": BM3D(25, threads=1),
    "bm3d_declipped": Declipped(BM3D(25, threads=1)),
}
OVERLAYS = [
    (name, f"{paper.TABLES[name].folder}/{method}")
    for name in ("denoising", "sr4", "deblur_uniform")
    for method in paper.TABLES[name].methods
    if method != "deepred" and not (name == "denoising" and method in ALONE)  # a test of their own
]
OVERLAYS += [("sr8", "paper/super_resolution/dip8"), ("deblur_gaussian", "paper/deblurring/ours")]


def flat(settings, prefix=""):
    """Nested settings under dotted names, classes by their short ones."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            short = value.rpartition(".")[2] if name == "class_path" else value
            found[prefix + name] = short
    return found


def configs(name):
    return [word for config in paper.TABLES[name].configs for word in ("--config", config)]


@pytest.mark.parametrize(("task", "method"), OVERLAYS)
def test_every_method_of_a_table_runs_with_its_task(tmp_path, tiny, task, method):
    image = tmp_path / "image.png"
    write_image(image, picture(3, 48, 56))
    deepred(
        [
            *("fit", *configs(task), "--config", "paper/reduced", "--config", str(tiny)),
            *("--config", method, f"--data.ground_truth={image}", "--data.crop=40"),
            *(f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"),
            # Of methods that have their own, too: few steps, with one round of x and u.
            *("--trainer.max_steps=4", "--red.every_n_steps=3"),
        ]
    )
    run = tmp_path / "lightning_logs" / "version_0"
    psnr = result_of(run)["psnr"]
    assert psnr["restored"] > psnr["measurement"] - 3  # a flat, black or mirrored picture is below
    said = flat(yaml.safe_load((CONFIGS / f"{method}.yaml").read_text()))
    for name in ("trainer.max_steps", "red.every_n_steps"):
        said.pop(name, None)
    settings = flat(yaml.safe_load((run / "config.yaml").read_text()))
    assert {name: settings[name] for name in said} == said  # none is lost between the others


@pytest.mark.parametrize("name", [name for name in paper.TABLES if name != "inpainting"])
def test_the_tasks_have_the_released_settings(name):
    settings = settings_of(configs(name))
    model, red = settings["model"]["init_args"], settings["red"]
    steps = settings["trainer"]["max_steps"]
    of_model = [model[key] for key in ("lam", "mu", "input_noise_std", "result")]
    found = (of_model, model["optimizer"]["init_args"]["lr"], red["denoiser"]["init_args"]["sigma"])
    blurred = ([0.02, 0.04, 0.01, "x-u"], 0.004, 3), 30000
    enlarged = [0.05, 0.06, 0.02, "x-u"], 0.001, 5
    assert (found, steps) == {
        "denoising": (([0.5, 0.5, 0.033, "average"], 0.008, 3), 6000),
        "sr4": (enlarged, 2000),
        "sr8": (enlarged, 4000),
        "deblur_uniform": blurred,
        "deblur_gaussian": blurred,
    }[name]
    kernel = settings["data"].get("operator", {}).get("init_args", {}).get("kernel")
    assert kernel == ("lanczos2" if name.startswith("sr") else None)
    assert (red["every_n_steps"], red["rounds_per_denoising"]) == (1, 10)
    assert model["network"]["init_args"]["width"] == 128


@pytest.mark.parametrize("name", ["sr4", "deblur_uniform", "deblur_gaussian"])
def test_ours_is_the_task_as_configured(name):
    table = paper.TABLES[name]
    ours = settings_of([*configs(name), "--config", f"{table.folder}/ours"])
    task = settings_of(["--config", table.configs[0]])
    for part in (ours, task):
        data = part.pop("data")  # the test conditions are the paper's
        assert name != "sr4" or data["operator"]["init_args"]["kernel"] == "lanczos3"
        part["trainer"].pop("log_every_n_steps", None)
    assert ours == task


@pytest.mark.parametrize(("method", "denoiser"), ALONE.items())
def test_a_denoiser_alone_is_the_denoised_measurement(tmp_path, method, denoiser):
    image = tmp_path / "image.png"
    write_image(image, picture(3, 40, 45))
    options = ["--data.as_floats=true", "--trainer.enable_progress_bar=false"]
    deepred(
        [
            *("fit", *configs("denoising"), "--config", f"paper/denoising/{method}"),
            *(f"--data.ground_truth={image}", f"--trainer.default_root_dir={tmp_path}", *options),
        ]
    )
    data = RestorationDataModule(ground_truth=image, noise=GaussianNoise(25))
    data.setup()
    restored, _ = read_image(tmp_path / "lightning_logs/version_0/restored.tif")
    torch.testing.assert_close(restored, denoiser(data.problem.y).clamp(0, 1))


@pytest.fixture
def make_table(tmp_path, sets, fitted, tiny):
    """Makes a table of tiny fits, and returns its Markdown and the rows of its CSV."""

    def make(name, *args):
        args = (*args, f"--results={tmp_path}/results", f"--runs={tmp_path}/runs")
        paper.main([*args, "--config", str(tiny), "--threads=1"])
        with (tmp_path / "results" / f"{name}.csv").open() as file:
            return (tmp_path / "results" / f"{name}.md").read_text(), list(csv.DictReader(file))

    return make


def results_in(runs):
    """PSNR by run directory."""
    return {
        path.parent.relative_to(runs).as_posix(): json.loads(path.read_text())["psnr"]
        for path in runs.rglob("result.json")
    }


def test_a_table_grows_image_by_image_and_resumes(
    tmp_path, make_table, fitted, monkeypatch, capsys
):
    methods = {m: paper.TABLES["sr4"].methods[m] for m in ("dip", "deepred", "ours")}
    published = {("set5", "mean"): 30.0}
    table = dataclasses.replace(
        paper.TABLES["sr4"], methods=methods, dip_steps=3, published=published
    )
    monkeypatch.setitem(paper.TABLES, "sr4", table)
    steps = ("--trainer.max_steps=4", "--red.every_n_steps=3")  # also of ours
    written, rows = make_table("sr4_set5_reduced", "sr4", "--reduced", *steps)
    header = (
        "| image | bicubic | DIP | DIP, best* | DeepRED, released | DeepRED, ours "
        "| DeepRED, ours, mean of two | published† |\n"
    )
    assert header in written and "| **30.00** |\n| mean inside‡ |" in written
    assert "python tests/benchmarks/paper.py sr4 --reduced" in written
    assert len(rows) == 2 * 6 and len(fitted) == 2 * (1 + 1 + 2)
    results = results_in(tmp_path / "runs" / "sr4_set5_reduced")
    for row in rows:
        run, which = {
            "bicubic": ("dip", "measurement"),
            "DeepRED, released": ("deepred", "restored"),
            "DeepRED, ours": ("ours/restart_0", "restored"),
            "DeepRED, ours, mean of two": ("ours", "restored"),
        }.get(row["method"], (None, None))
        if run is not None:
            psnr = results[f"{row['image']}/{run}"][which]
            assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-3)
        if row["method"] == "DIP":
            assert row["steps"] == "2"  # the last curve before its release stops, after 3
        of_end = row["method"].startswith("DeepRED")  # its image is that of the run
        assert of_end == bool(row["psnr_inside"]) or row["method"] == "DIP, best*"
        assert "--trainer.max_steps=4" in row["options"]
    again, _ = make_table("sr4_set5_reduced", "sr4", "--reduced", *steps)
    assert len(fitted) == 8 and again == written
    assert "nothing to run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="expected results with the same settings"):
        make_table("sr4_set5_reduced", "sr4", "--reduced", *steps, "--data.crop=36")
    assert len(fitted) == 8

    # Of the second image only what was measured elsewhere is there, and no run directory.
    path = tmp_path / "results" / "sr4_set5_reduced.csv"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if "tail" not in line or "ours" not in line]
    path.write_text("\n".join(kept) + "\n")
    shutil.rmtree(tmp_path / "runs")
    _, rows = make_table("sr4_set5_reduced", "sr4", "--reduced", *steps)
    assert {d.parts[-3:] for d in fitted[8:]} == {
        ("tail", "ours", "restart_0"),
        ("tail", "ours", "restart_1"),
    }
    assert len(rows) == 12


def test_the_grey_form_of_a_set_is_the_weighted_sum_in_8_bits(tmp_path, sets):
    images = paper.images_of("set5_grey", tmp_path / "runs")
    assert list(images) == ["head", "tail"]
    colours = np.asarray(Image.open(tmp_path / "set5" / "head.png")).astype(int)
    grey = np.asarray(Image.open(images["head"]))
    red, green, blue = np.moveaxis(colours, -1, 0)
    want = (2989 * red + 5870 * green + 1140 * blue) / 10000
    assert grey.dtype == np.uint8 and np.abs(grey - want).max() <= 0.5
    assert paper.images_of("set5", tmp_path)["head"] == str(tmp_path / "set5" / "head.png")


def test_inpainting_takes_each_images_mask(tmp_path, make_table, monkeypatch):
    folder = tmp_path / "dip_inpainting"
    for name, share in (("head", 0.2), ("tail", 0.6)):
        with Image.open(folder / f"{name}.png") as image:
            known = np.arange(image.height * image.width).reshape(image.height, image.width)
        write_image(
            folder / f"{name}_mask.png",
            torch.from_numpy(known % 10 < 10 * share).float()[None, None],
        )
    rows = ["folder,file,sha256,repository,commit,path"]
    for path in sorted(folder.glob("*.png")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(f"dip_inpainting,{path.name},{digest},someone/images,0123abc,{path.name}")
    (tmp_path / "sources.csv").write_text("\n".join(rows) + "\n")
    table = dataclasses.replace(paper.TABLES["inpainting"], methods={"dip": "DIP"})
    monkeypatch.setitem(paper.TABLES, "inpainting", table)
    written, _ = make_table("inpainting_inpainting", "inpainting", "--data.crop", "34")
    assert "crops (34 pixels)" in written.splitlines()[0]
    assert paper.TABLES["inpainting"].note in written
    for name in ("head", "tail"):
        run = tmp_path / "runs" / "inpainting_inpainting" / name / "dip"
        config = yaml.safe_load((run / "config.yaml").read_text())
        mask = config["data"]["operator"]["init_args"]["mask"]
        assert mask == f"set:inpainting/{name}_mask"


def test_only_some_methods_of_a_table(tmp_path, make_table, fitted):
    written, _ = make_table("sr4_set5", "sr4", "--only", "dip", "--trainer.max_steps=3")
    assert "| image | bicubic | DIP | DIP, best* | published† |\n" in written
    assert "Failed" not in written and "channels and steps" not in written
    written, _ = make_table("sr4_set5", "sr4", "--only", "red", "--trainer.max_steps=3")
    assert "| image | bicubic | RED | DIP | DIP, best* | published† |\n" in written
    assert "\n    python tests/benchmarks/paper.py sr4 --only red dip --trainer" in written
    assert [d.parts[-2:] for d in fitted] == [
        (image, method) for method in ("dip", "red") for image in ("head", "tail")
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["sr4", "--only", "bm3d"], "deepred (DeepRED, released), ours (DeepRED, ours), got bm3d"),
        (["inpainting", "--set=set5"], "inpainting needs masks"),
        (["parts", "--only", "red"], "--set and --only are for tables"),
    ],
)
def test_mistakes_are_found_before_anything_runs(args, said, capsys):
    with pytest.raises(SystemExit):
        paper.main(args)
    assert said in capsys.readouterr().err


def test_dip_is_read_where_its_release_stops_and_at_its_best(tmp_path):
    run = tmp_path / "head" / "dip"
    with SummaryWriter(run) as writer:
        for step, psnr in [(10, 20.0), (20, 29.0), (30, 27.0), (40, 25.0)]:
            writer.add_scalar("curves/psnr_average", psnr, step - 1)  # as Lightning counts
    row = {"method": "dip", "restart": "", "steps": "40", "seconds": "8"}
    row |= {"psnr_measurement": "15.5", "psnr_restored": "25.0"}
    table = paper.Table("", (), "set5", "", "noisy", {"dip": "DIP"}, dip_steps=30)
    scores = paper.scores_of(table, row, run)
    assert scores == {
        "noisy": paper.Score(15.5, 0, 0.0),
        "DIP": paper.Score(27.0, 30, 6.0),
        "DIP, best*": paper.Score(29.0, 20, 0.0),
    }
    rows = {
        ("head", heading): {"psnr": s.psnr, "steps": s.steps, "seconds": s.seconds}
        for heading, s in scores.items()
    }
    lines = paper.markdown(["head", "tail"], list(scores), rows, {})
    assert lines[:6] == [
        "| image | noisy | DIP | DIP, best* |",
        "|---|---|---|---|",
        "| head | 15.50 | 27.00 | 29.00 |",
        "| tail |  |  |  |",
        "| **mean of 1** | **15.50** | **27.00** | **29.00** |",
        "| seconds per image |  | 6 |  |",
    ]


def test_published_figures_are_in_a_column_of_their_own():
    rows = {
        (image, column): {"psnr": 20.0 + len(image), "steps": 5, "seconds": 1.0}
        for image in ("a", "bb")
        for column in ("y", "m")
    }
    published = {("set5", "a"): 31.5, ("set5", "mean"): 30.72, ("set14", "mean"): 27.63}
    table = paper.Table("", (), "set5", "", "y", {"m": "m"}, published=published)
    of_paper = paper.of_paper(table, "set5")
    lines = paper.markdown(["a", "bb"], ["y", "m"], rows, of_paper)
    assert lines[2:5] == [
        "| a | 21.00 | 21.00 | 31.50 |",
        "| bb | 22.00 | 22.00 |  |",
        "| **mean** | **21.50** | **21.50** | **30.72** |",
    ]
    lines = paper.markdown(["a", "bb", "c"], ["y", "m"], rows, of_paper)
    assert lines[5] == "| **mean of 2** | **21.50** | **21.50** |  |"
    assert lines[-1] == "Failed, not run, or without a finite PSNR: c."


@pytest.mark.parametrize("channels", [1, 3])
def test_the_psnr_inside_is_that_of_luminance_without_a_border(tmp_path, channels):
    truth, restored = picture(channels, 30, 37), 0.9 * picture(channels, 28, 36)
    write_image(tmp_path / "truth.png", truth)
    write_image(tmp_path / "restored.png", restored)

    def luma(name):
        rgb = np.asarray(Image.open(tmp_path / name).convert("RGB")) / 255
        return (16 + rgb @ np.array([65.481, 128.553, 24.966])).round()

    error = luma("truth.png")[1 + 4 : 29 - 4, 4 : 36 - 4] - luma("restored.png")[4:-4, 4:-4]
    want = 10 * np.log10(255**2 / (error**2).mean())
    found = paper.psnr_inside(tmp_path / "restored.png", str(tmp_path / "truth.png"), 4)
    assert found == pytest.approx(want, abs=1e-4)


def test_settings_are_the_options_that_are_not_about_the_machine():
    machine = ["--config", "trainer/gpu", "--threads=1", "--workers", "2"]
    crop = ([], ["--data.crop", "96"])
    assert paper.settings([*machine, "--data.crop=96"]) == crop
    assert paper.settings(["--data.crop", "96"]) == crop
    assert paper.settings(["--config=methods/dip"]) == (["methods/dip"], [])


def test_figure_3_is_drawn(tmp_path, sets, fitted, tiny):
    plt.switch_backend("agg")
    options = ["--config", str(tiny), "--data.crop=36", "--threads=1"]
    paper.main(["figure3", f"--results={tmp_path}", f"--runs={tmp_path}/runs", *options])
    assert Image.open(tmp_path / "figure3.png").height > 500
    runs = {directory.parts[-3] for directory in fitted}
    assert runs == {"figure3_denoising", "figure3_sr4"}  # not those of the tables
    drawn = [
        [(line.get_label(), len(line.get_xdata())) for line in axis.get_lines()]
        for axis in plt.gcf().axes
    ]
    one, both = [("DeepRED", 2)], [("DeepRED", 2), ("DIP", 2)]
    assert drawn == [one, one, both] * 2


def test_the_minutes_have_each_restart_once():
    seconds = {"DIP": 60.0, "DeepRED, ours": 120.0, "DeepRED, ours, mean of two": 240.0}
    blank = dict.fromkeys(paper.COLUMNS, "")
    rows = [blank | {"image": "a", "method": m, "seconds": str(s)} for m, s in seconds.items()]
    assert "5 minutes, summed over the fits" in paper.about(rows)


def test_a_rolled_back_fit_is_named():
    rows = {
        ("a", "DIP"): {"rollbacks": "1", "metric_on": "rgb", "image": "a"},
        ("a", "y"): {"rollbacks": "1", "metric_on": "rgb", "image": "a"},
        ("b", "DIP"): {"rollbacks": "0", "metric_on": "luminance", "image": "b"},
    }
    table = paper.Table("", (), "set5", "", "y", {"dip": "DIP"})
    assert paper.remarks(table, False, rows, reduced=False) == [
        *("", "PSNR on rgb: a.", "", "PSNR on luminance: b."),
        *("", "Rolled back by the guard after a collapse: a, DIP."),
    ]


def test_parts_of_images_are_drawn_enlarged(tmp_path, make_table, monkeypatch, capsys):
    methods = {m: paper.TABLES["sr4"].methods[m] for m in ("red", "dip", "ours")}
    monkeypatch.setitem(
        paper.TABLES, "sr4", dataclasses.replace(paper.TABLES["sr4"], methods=methods)
    )
    head = {"head": str(tmp_path / "set5" / "head.png")}
    monkeypatch.setattr(paper, "images_of", lambda name, runs: head)
    steps = ("--trainer.max_steps=4", "--red.every_n_steps=3")
    make_table("sr4_set5", "sr4", *steps, "--data.operator.factor=5")
    part = Region(4, 8, 12, 10)
    elsewhere = ("deblur_uniform", "ncsr", "head", part)
    monkeypatch.setattr(paper, "PARTS", [elsewhere, ("sr4", "set5", "head", part)])
    plt.switch_backend("agg")
    paper.main(["parts", f"--results={tmp_path}/results", f"--runs={tmp_path}/runs"])
    assert "skipped head of deblur_uniform_ncsr" in capsys.readouterr().err
    assert Image.open(tmp_path / "results" / "sr4_set5_head.png").width > 500
    shown = [axis.get_images()[0].get_array() for axis in plt.gcf().axes]
    assert [image.shape for image in shown] == [(12, 10, 3)] * 4
    mean_of_two = Image.open(tmp_path / "runs" / "sr4_set5" / "head" / "ours" / "restored.png")
    expected = np.asarray(mean_of_two)[4:16, 8:18] / 255
    np.testing.assert_allclose(shown[2], expected, atol=1e-6)
    truth = np.asarray(Image.open(tmp_path / "set5" / "head.png"))  # 40×52, cropped to 40×50
    truth = truth[4:16, 1 + 8 : 1 + 18] / 255
    np.testing.assert_allclose(shown[3], truth, atol=1e-6)

    (tmp_path / "runs" / "sr4_set5" / "head" / "red" / "restored.png").unlink()
    with pytest.raises(SystemExit, match="expected an image to draw"):
        paper.main(["parts", f"--results={tmp_path}/results", f"--runs={tmp_path}/runs"])


def test_an_image_that_fails_is_named_and_gives_status_1(tmp_path, make_table, sets):
    (tmp_path / "set5" / "tail.png").write_bytes(b"no image")
    lines = (tmp_path / "sources.csv").read_text().splitlines()
    digest = hashlib.sha256(b"no image").hexdigest()
    kept = [line for line in lines if not line.startswith("set5,tail")]
    kept.append(f"set5,tail.png,{digest},someone/images,0123abc,tail.png")
    (tmp_path / "sources.csv").write_text("\n".join(kept) + "\n")
    with pytest.raises(SystemExit) as end:
        make_table("sr4_set5", "sr4", "--only", "dip", "--trainer.max_steps=3")
    assert end.value.code == 1
    written = (tmp_path / "results" / "sr4_set5.md").read_text()
    assert "| mean of 1 |" in written.replace("*", "")
    assert "without a finite PSNR: tail." in written


@pytest.mark.parametrize("option", ["--restarts=2", "--method=dip", "--tile=64"])
def test_what_a_table_owns_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        paper.main(["denoising", option])
    assert f"{option.partition('=')[0]} is set by the table" in capsys.readouterr().err
