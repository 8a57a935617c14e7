"""The configurations of the paper's tables, and what makes the tables of them."""

import csv
import hashlib
import json

import matplotlib.pyplot as plt
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
from deepred_pl.denoisers import BM3D, NonLocalMeans
from deepred_pl.images import read_image, write_image
from deepred_pl.noise import GaussianNoise
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


ALONE = [("denoising", "nlm"), ("denoising", "bm3d")]  # have a test of their own
OVERLAYS = [
    (name, f"paper/{paper.TABLES[name].folder}/{method}")
    for name in ("denoising", "sr4", "deblur_uniform")
    for method in paper.TABLES[name].methods
    if method != "deepred" and (name, method) not in ALONE
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
def test_every_method_of_a_table_runs_behind_its_task(tmp_path, tiny, task, method):
    image = tmp_path / "image.png"
    write_image(image, picture(3, 48, 56))
    deepred(
        [
            *("fit", *configs(task), "--config", "paper/quick", "--config", str(tiny)),
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


@pytest.mark.parametrize("name", paper.TABLES)
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
    assert (red["every_n_steps"], red["rounds_per_denoising"]) == (1, 10)
    assert model["network"]["init_args"]["width"] == 128


@pytest.mark.parametrize(
    ("method", "denoiser"), [("nlm", NonLocalMeans(25)), ("bm3d", BM3D(25, threads=1))]
)
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


def test_a_table_is_made_and_made_again(tmp_path, sets, fitted, tiny, monkeypatch):
    few = {m: paper.TABLES["sr4"].methods[m] for m in ("dip", "deepred")}
    table = paper.Table(
        "Small",
        paper.TABLES["sr4"].configs,
        "set5",
        "super_resolution",
        "bicubic",
        few,
        3,
        {("set5", "mean"): 30.0},
    )
    monkeypatch.setitem(paper.TABLES, "sr4", table)
    command = ["sr4", "--quick", f"--results={tmp_path}/results", f"--runs={tmp_path}/runs"]
    command += ["--config", str(tiny), "--data.crop=36", "--threads=1"]
    paper.main(command)
    written = (tmp_path / "results" / "sr4_set5_quick.md").read_text()
    header = "| image | bicubic | DIP | DIP, best* | DeepRED, released |\n"
    assert header in written and "soft target: mean 30.0 dB" in written
    assert "python tests/benchmarks/paper.py sr4 --quick" in written
    with (tmp_path / "results" / "sr4_set5_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4
    results = {
        (path.parts[-3], path.parts[-2]): json.loads(path.read_text())["psnr"]
        for path in (tmp_path / "runs").rglob("result.json")
    }
    for row in rows:
        psnr = float(row["psnr"])
        if row["method"] == "bicubic":
            assert psnr == pytest.approx(results[row["image"], "dip"]["measurement"], abs=1e-3)
        if row["method"] == "DeepRED, released":
            assert psnr == pytest.approx(results[row["image"], "deepred"]["restored"], abs=1e-3)
        if row["method"] == "DIP":
            assert row["steps"] == "2"  # the last curve before its release stops, after 3
    assert len(fitted) == 4
    paper.main(command)  # goes on: nothing is left to do
    assert len(fitted) == 4
    assert (tmp_path / "results" / "sr4_set5_quick.md").read_text() == written


def test_dip_is_read_where_its_release_stops_and_at_its_best(tmp_path):
    run = tmp_path / "head" / "dip"
    with SummaryWriter(run) as writer:
        for step, psnr in [(10, 20.0), (20, 29.0), (30, 27.0), (40, 25.0)]:
            writer.add_scalar("curves/psnr_average", psnr, step - 1)  # as Lightning counts
    row = {"image": "head", "method": "dip", "directory": "head/dip", "steps": "40"}
    row |= {"psnr_measurement": "15.5", "psnr_restored": "25.0", "seconds": "8"}
    table = paper.Table("", (), "set5", "", "noisy", {"dip": "DIP"}, dip_steps=30)
    columns, scores = paper.columns_of(table, [row], tmp_path)
    assert columns == ["noisy", "DIP", "DIP, best*"]
    assert scores == {
        ("head", "noisy"): paper.Score(15.5, 0, 0.0),
        ("head", "DIP"): paper.Score(27.0, 30, 6.0),
        ("head", "DIP, best*"): paper.Score(29.0, 20, 0.0),
    }
    lines = paper.markdown(["head", "tail"], columns, scores, {})
    assert lines[:5] == [
        "| image | noisy | DIP | DIP, best* |",
        "|---|---|---|---|",
        "| head | 15.50 | 27.00 | 29.00 |",
        "| tail |  |  |  |",
        "| **mean of 1** | **15.50** | **27.00** | **29.00** |",
    ]


def test_published_figures_are_in_a_column_of_their_own():
    scores = {(i, c): paper.Score(20.0 + len(i), 5, 1.0) for i in ("a", "bb") for c in ("y", "m")}
    published = {("set5", "a"): 31.5, ("set5", "mean"): 30.72, ("set14", "mean"): 27.63}
    table = paper.Table("", (), "set5", "", "y", {"m": "m"}, published=published)
    of_paper = paper.of_paper(table, "set5")
    lines = paper.markdown(["a", "bb"], ["y", "m"], scores, of_paper)
    assert lines[2:5] == [
        "| a | 21.00 | 21.00 | 31.5 |",
        "| bb | 22.00 | 22.00 |  |",
        "| **mean** | **21.50** | **21.50** | **30.72** |",
    ]
    lines = paper.markdown(["a", "bb", "c"], ["y", "m"], scores, of_paper)
    assert lines[5] == "| **mean of 2** | **21.50** | **21.50** |  |"


def test_figure_3_is_drawn(tmp_path, sets, fitted, tiny):
    plt.switch_backend("agg")
    options = ["--config", str(tiny), "--data.crop=36", "--threads=1"]
    paper.main(["figure3", f"--results={tmp_path}", f"--runs={tmp_path}/runs", *options])
    assert Image.open(tmp_path / "figure3.png").height > 500
    drawn = [
        [(line.get_label(), len(line.get_xdata())) for line in axis.get_lines()]
        for axis in plt.gcf().axes
    ]
    one, both = [("DeepRED", 2)], [("DeepRED", 2), ("DIP", 2)]
    assert drawn == [one, one, both] * 2


@pytest.mark.parametrize("option", ["--restarts=2", "--method=dip", "--tile=64"])
def test_what_a_table_owns_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        paper.main(["denoising", option])
    assert f"{option.partition('=')[0]} is set by the table" in capsys.readouterr().err
