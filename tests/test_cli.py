"""The command line, as a user calls it."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from deepred_pl import REDUpdate, metrics
from deepred_pl.callbacks import LastCheckpoint, Monitor, RestorationBar, Writer
from deepred_pl.cli import RestorationCLI, main
from deepred_pl.denoisers import NonLocalMeans
from deepred_pl.images import ImageFormat, read_image, to_array, write_image
from deepred_pl.lightning import NAME, Trainer, loggers
from tests.helpers import RUN, picture, result_of

ROOT = Path(__file__).parents[1]
QUICKSTART, DENOISING = (ROOT / "configs" / f"{n}.yaml" for n in ("quickstart", "denoising"))
FAST = ROOT / "configs" / "fast.yaml"
TASKS = sorted(set((ROOT / "configs").glob("*.yaml")) - {FAST})
MACHINES = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))
METHODS = [*sorted((ROOT / "configs" / "methods").glob("*.yaml")), FAST]
TINY = ["--model.network.init_args.width=4"]


@pytest.fixture
def deepred(tmp_path, capsys):
    """Call `deepred fit` for a few steps of a small network; give its run directory."""

    def call(*args, command="fit", tiny=True, **overrides):
        settings = {"trainer.default_root_dir": tmp_path, "trainer.accelerator": "cpu"}
        if command == "fit":
            settings["trainer.max_steps"] = 4
        settings |= {name.replace("__", "."): value for name, value in overrides.items()}
        options = [f"--{name}={value}" for name, value in settings.items()]
        main([command, *map(str, args), *(TINY if tiny else []), *options])
        runs = tmp_path.glob("lightning_logs/version_*")
        return max(runs, key=lambda path: int(path.name.split("_")[1]))

    return call


@pytest.fixture
def refused(deepred, capsys):
    """Call `deepred` with a mistake; give the one line it says."""

    def call(*args, **overrides):
        with pytest.raises(SystemExit) as stop:
            deepred(*args, **overrides)
        said = stop.value.code  # Python prints it, and ends with status 1
        assert isinstance(said, str) and said.startswith("deepred: error: ")
        assert len(said.splitlines()) == 1
        printed = "".join(capsys.readouterr())
        assert "usage:" not in printed and "Traceback" not in printed
        return said

    return call


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    write_image(path, picture(3, 41, 47))
    return path


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def fits(task, method):
    """Whether a method applies to a task: SURE is for Gaussian denoising alone."""
    return method.stem != "dip_sure" or task.stem == "denoising"


def has_network(method):
    return method not in ("red", "pnp")


def fitted(image, method, *options):
    """The model after four steps of the fit that `deepred fit` makes, without its files."""
    options += (f"--data.ground_truth={image}", "--trainer.accelerator=cpu")
    options += (*(TINY if has_network(method) else []), "--trainer.fast_dev_run=4")
    cli = RestorationCLI(list(map(str, options)), run=False)
    cli.before_fit()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli.model


@pytest.mark.parametrize(
    ("suffix", "task", "options", "warned"),
    [
        (".jpg", "deblurring_gaussian", [], True),
        (".JPEG", "deblurring_gaussian", [], True),
        (".png", "deblurring_gaussian", [], False),
        (".jpg", "deblurring_gaussian", ["--config=methods/likelihood"], False),
        (".jpg", "denoising", ["--data.noise.sigma=null"], False),
    ],
)
def test_a_jpeg_is_deblurred_with_a_warning(tmp_path, recwarn, suffix, task, options, warned):
    path = tmp_path / f"photo{suffix}"
    Image.fromarray((picture(3, 41, 47)[0].movedim(0, -1) * 255).byte().numpy()).save(path)
    options = [f"--config={task}", *options, f"--data.measurement={path}", *TINY]
    cli = RestorationCLI([*options, "--trainer.fast_dev_run=1"], run=False)
    cli.before_fit()
    assert any("JPEG is not white" in str(w.message) for w in recwarn) == warned


# Without two that are nothing new to a method: both are deblurring_uniform, one by another kernel,
# one by the schedule of tomography.
UNLIKE = [task for task in TASKS if task.stem not in ("deblurring_gaussian", "quickstart")]
PAIRS = [(task, method) for method in METHODS for task in UNLIKE if fits(task, method)]


@pytest.mark.filterwarnings("ignore:AutoStop is off")
@pytest.mark.parametrize(("task", "method"), PAIRS, ids=lambda path: path.stem)
def test_every_method_fits_every_task(photo, task, method):
    configs = ("--config", task, "--config", method)
    model = fitted(photo, method.stem, *configs, "--red.every_n_steps=3")
    truth = model.problem.ground_truth
    assert model.step == 4 and model.restored.shape == truth.shape
    if method.stem != "dip_sgld":  # a mean of outputs, and these are still blank
        assert metrics.psnr(model.restored, truth) > 17  # a flat picture has 15.5 dB at most


# Each method on one task, and each task with a method or two, every second one grey.
RUNS = [
    (task if fits(task, method) else DENOISING, method, 1 if i % 2 else 3)
    for i, (task, method) in enumerate(zip(2 * TASKS, METHODS, strict=False))
]


@pytest.mark.filterwarnings("ignore:AutoStop is off")
@pytest.mark.parametrize(
    ("task", "method", "channels"), RUNS, ids=[f"{t.stem}-{m.stem}-{c}" for t, m, c in RUNS]
)
def test_a_run_of_every_method_is_complete(deepred, tmp_path, task, method, channels):
    image, name = picture_file(tmp_path, channels), method.stem
    settings = {"data__ground_truth": image, "red__every_n_steps": 3}  # one round of x and u
    configs = ("--config", task, "--config", method)
    run = deepred(*configs, tiny=has_network(name), **settings)
    psnr, kind = result_of(run)["psnr"], config_of(run)["model"]["init_args"]["result"]
    if name == "dip_sgld":  # a mean of outputs, and these are still blank
        assert psnr["restored"] == pytest.approx(psnr["out"], abs=1)
    else:
        # The average, and x without a network, are near the first guess; x - u is mostly f(x).
        # A flat picture has 15.5 dB at most, a black, random or mirrored one less.
        assert psnr["restored"] > max(17, psnr["measurement"] - 3 if kind != "x-u" else 0)
    assert result_of(run)["steps"] == 4
    assert (psnr["x"] is None) == name.startswith(("dip", "deep_decoder"))
    assert_complete(run, channels)


def picture_file(folder, channels):
    write_image(folder / "truth.png", picture(channels, 37, 47))
    return folder / "truth.png"


def assert_complete(run, channels):
    assert {"config.yaml", "restored.png", "comparison.png", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    assert list(run.glob("events.out.tfevents.*"))
    assert Image.open(run / "restored.png").mode == {1: "L", 3: "RGB"}[channels]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda path: path.stem)
def test_an_overlay_for_the_machine_leaves_the_rest(deepred, photo, machine):
    run = deepred("--config", DENOISING, "--config", machine, data__ground_truth=photo)
    settings = config_of(run)
    assert settings["trainer"]["precision"] == "bf16-mixed"
    assert settings["model"]["init_args"]["lam"] == 0.5
    assert result_of(run)["steps"] == 4


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("denoising_poisson", "expected GaussianNoise, got PoissonNoise"),
        ("deblurring_uniform", "expected the Identity operator, got Blur"),
        ("super_resolution", "MeasurementNet is for denoising"),
        ("inpainting", "expected the Identity operator, got Mask"),
        ("tomography", "MeasurementNet is for denoising"),
    ],
)
def test_sure_is_refused_with_a_reason_where_it_does_not_hold(refused, photo, task, reason):
    said = refused("--config", task, "--config", "methods/dip_sure", data__ground_truth=photo)
    assert reason in said


# For each overlay, the same run without what defines it.
WITHOUT = {
    "deepred_gradient": ["--red.x_update=fixed_point"],
    "deepred_tv": ["--red.denoiser=NonLocalMeans"],
    "dip": ["--model=DeepRED"],
    "dip_tv": ["--model.regularizer=null"],
    "dip_sure": ["--model.regularizer=null"],
    "dip_sgld": ["--trainer.callbacks=null"],
    "deep_decoder": ["--model.network=SkipNet"],
    "red": ["--model.network=SkipNet"],
    "pnp": ["--red.x_update=fixed_point"],
}


@pytest.mark.parametrize("method", WITHOUT)
def test_without_its_defining_term_a_method_is_another(photo, method):
    settings = ["--config", DENOISING, "--config", "methods/quick", "--config", f"methods/{method}"]
    settings += ["--red.every_n_steps=1"]
    whole = fitted(photo, method, *settings)
    less = fitted(photo, method, *settings, *WITHOUT[method])
    assert torch.equal(whole.problem.y, less.problem.y)
    assert not torch.allclose(whole.out, less.out, atol=1e-4)


def network_of(run):
    return config_of(run)["model"]["init_args"]["network"]


def test_methods_keep_the_width_of_quick(deepred, photo):
    quick = ("--config", DENOISING, "--config", "methods/quick")
    for method, name in {"dip_sure": "MeasurementNet", "deep_decoder": "DeepDecoder"}.items():
        run = deepred(*quick, "--config", f"methods/{method}", tiny=False, data__ground_truth=photo)
        assert network_of(run)["class_path"] == f"deepred_pl.networks.{name}"
        assert network_of(run)["init_args"]["width"] == 32


def test_another_network_goes_with_red_and_keeps_the_tasks_weights(deepred, photo):
    run = deepred(
        *("--config", "deblurring_uniform", "--config", "methods/quick"),
        *("--model.network=DeepDecoder", "--model.input_noise_std=0"),
        tiny=False,
        data__ground_truth=photo,
    )
    assert network_of(run)["class_path"] == "deepred_pl.networks.DeepDecoder"
    settings = config_of(run)["model"]["init_args"]
    assert (settings["lam"], settings["mu"], settings["result"]) == (0.7, 0.7, "average")
    assert result_of(run)["psnr"]["x"] is not None


def test_callbacks_of_two_overlays_stack_and_their_settings_can_be_given(
    deepred, refused, tmp_path, photo
):
    rate = {"class_path": f"{NAME}.callbacks.LearningRateMonitor"}
    (tmp_path / "rate.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [rate]}}))
    run = deepred(
        *("--config", DENOISING, "--config", tmp_path / "rate.yaml"),
        *("--config", "methods/dip", "--config", "methods/auto_stop"),
        *("--trainer.callbacks.init_args.window=10", "--trainer.callbacks.init_args.patience=1"),
        data__ground_truth=photo,
        trainer__max_steps=80,
    )
    callbacks = config_of(run)["trainer"]["callbacks"]
    names = [c["class_path"].split(".")[-1] for c in callbacks]
    assert names == ["LearningRateMonitor", "AutoStop"]
    assert result_of(run)["stop_reason"].startswith("auto_stop: variance, best at step")
    assert result_of(run)["steps"] < 80
    again = ("--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    predicted = deepred(*again, command="predict", tiny=False)
    assert (predicted / "restored.png").read_bytes() == (run / "restored.png").read_bytes()


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("inpainting", ["auto_stop", "rule=discrepancy"], "needs a noise model"),
        ("denoising", ["dip_sgld", "burn_in=7000"], "burn_in must be a fraction of the run"),
    ],
)
def test_what_a_callback_cannot_do_is_found_before_anything_is_written(
    refused, tmp_path, photo, task, more, message
):
    method, setting = more
    said = refused(
        *("--config", task, "--config", f"methods/{method}"),
        f"--trainer.callbacks.init_args.{setting}",
        data__ground_truth=photo,
    )
    assert message in said
    assert not list(tmp_path.glob("lightning_logs/version_*/config.yaml"))


def test_a_wrong_term_or_callback_is_told_without_the_parsers_trials(refused, photo):
    for method, setting, said in (
        ("dip_tv", "--model.regularizer.init_args.weight=-1", "leave the term out instead"),
        ("dip_sgld", "--trainer.callbacks.init_args.burn_in=7000", "the last 65 % of the steps"),
    ):
        line = refused("--config", DENOISING, "--config", f"methods/{method}", setting)
        assert line.endswith(said)


def test_two_callbacks_that_choose_the_image_are_refused(refused, photo):
    stacked = ("--config", "methods/dip_sgld", "--config", "methods/auto_stop")
    said = refused("--config", DENOISING, *stacked, data__ground_truth=photo)
    assert "one callback that chooses the returned image, got Langevin and AutoStop" in said


@pytest.mark.parametrize(
    ("task", "channels"),
    [(task, 3 if i % 2 else 1) for i, task in enumerate(TASKS)],  # of RUNS, the other one
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_every_task_restores_a_measurement_from_a_file(deepred, tmp_path, task, channels):
    simulated = deepred("--config", task, "--data.ground_truth", picture_file(tmp_path, channels))
    assert_complete(simulated, channels)
    data = set_up_again(simulated)
    measurement = tmp_path / ("measurement.jpg" if task.stem == "jpeg" else "measurement.tif")
    if task.stem == "jpeg":
        pixels = to_array(data.problem.ground_truth, ImageFormat()).squeeze()
        Image.fromarray(pixels).save(measurement, quality=10, subsampling="4:2:0")
    else:
        write_image(measurement, data.problem.y, ImageFormat("float32"))
    more = {}
    if task.stem == "inpainting":
        Image.fromarray((data.problem.operator.mask[0, 0] * 255).byte().numpy()).save(
            tmp_path / "mask.png"
        )
        more["data__operator__mask"] = tmp_path / "mask.png"
    run = deepred("--config", task, data__measurement=measurement, **more)
    first, second = (torch.load(r / "checkpoints/last.ckpt") for r in (simulated, run))
    torch.testing.assert_close(first["state_dict"]["problem.y"], second["state_dict"]["problem.y"])
    # The same fit: nothing of the ground truth reached the first one.
    assert torch.equal(first["state_dict"]["average"], second["state_dict"]["average"])
    restored = read_image(next(run.glob("restored.*")))[0]
    assert restored.shape == data.problem.image_shape
    assert set(result_of(run)["psnr"].values()) == {None}


def set_up_again(run):
    settings = config_of(run)
    data = RestorationCLI({"model": settings["model"], "data": settings["data"]}, False).datamodule
    data.setup()
    return data


def test_a_shipped_configuration_is_found_by_its_name(deepred, tmp_path, monkeypatch, photo):
    monkeypatch.chdir(tmp_path)  # where there is no configs/
    for given in (["--config", "inpainting"], ["--config=configs/inpainting.yaml"]):
        run = deepred(*given, "--config", "methods/dip", data__ground_truth=photo)
        config = (run / "config.yaml").read_text()
        assert "keep_fraction: 0.5" in config and "DeepImagePrior" in config


def test_a_file_goes_before_a_shipped_name(deepred, refused, tmp_path, monkeypatch, photo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "denoising").write_text(QUICKSTART.read_text())
    run = deepred("--config", "denoising", data__ground_truth=photo)
    assert "WarmupCosine" in (run / "config.yaml").read_text()
    said = refused("--config", "denoisin")
    assert "found no denoisin; shipped are" in said and "methods/dip" in said


def test_settings_of_an_earlier_version_are_refused_with_the_remedy(deepred, refused, photo):
    run = deepred("--config", QUICKSTART, data__ground_truth=photo)
    config = run / "config.yaml"
    text = config.read_text().replace("deepred_pl.optim", "deepred_pl.model")
    config.write_text(text.replace("  timeout:", "  wait_for_denoiser: true\n  timeout:"))
    said = refused("--config", config, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert "wait_for_denoiser: remove this line" in said
    assert "replace it with deepred_pl.optim.WarmupCosine" in said


def test_super_resolution_by_another_factor(deepred, photo):
    run = deepred(
        *("--config", ROOT / "configs/super_resolution.yaml", "--data.operator.factor=8"),
        data__ground_truth=photo,
    )
    assert Image.open(run / "restored.png").size == (40, 40)
    assert set_up_again(run).problem.y.shape == (1, 3, 5, 5)
    assert result_of(run)["metric_on"] == "luminance"


def test_a_blur_kernel_from_a_file(deepred, tmp_path, photo):
    np.save(tmp_path / "kernel.npy", np.ones((3, 5)))
    run = deepred(
        *("--config", ROOT / "configs/deblurring_uniform.yaml"),
        *(
            "--data.operator=deepred_pl.operators.Blur.from_file",
            "--data.operator.boundary=reflect",
        ),
        data__operator__path=tmp_path / "kernel.npy",
        data__ground_truth=photo,
    )
    blur = set_up_again(run).problem.operator
    assert blur.kernel.shape == (3, 5) and blur.boundary == "reflect"


def test_noise_is_swapped_by_its_short_name(deepred, photo):
    run = deepred(
        *("--config", DENOISING, "--data.noise=GammaNoise", "--data.noise.looks=5"),
        data__ground_truth=photo,
    )
    assert set_up_again(run).problem.noise.looks == 5


def test_overlays_are_stacked(deepred, photo):
    run = deepred(
        *("--config", DENOISING, "--config", "methods/dip", "--config", "methods/quick"),
        data__ground_truth=photo,
    )
    config = (run / "config.yaml").read_text()
    assert "DeepImagePrior" in config and "WarmupCosine" in config


def test_the_papers_settings_are_the_released_ones():
    cli = RestorationCLI(["--config", str(DENOISING), "--config", "paper/denoising"], run=False)
    assert isinstance(cli.trainer, Trainer) and cli.trainer.max_steps == 6000
    model = cli.model
    assert (model.initial_lam, model.initial_mu, model.weighting) == (0.5, 0.5, "rise")
    assert (model.input_scale, model.input_noise_std) == (0.1, 0.033)
    cli.datamodule.setup()
    assert model._first_threshold(cli.datamodule.problem) == pytest.approx(20, abs=0.01)
    assert model.make_optimizer([torch.zeros(1)]).defaults["lr"] == 0.008
    assert model.result == "average" and model.average_decay == 0.99
    assert sum(p.numel() for p in model.make_network(3).parameters()) == pytest.approx(2.22e6, 0.01)
    assert cli.datamodule.noise.sigma == 25
    red = next(c for c in cli.trainer.callbacks if isinstance(c, REDUpdate))
    assert isinstance(red.denoiser, NonLocalMeans) and red.denoiser.sigma == 3
    assert (red.every_n_steps, red.rounds_per_denoising, red.x_update) == (1, 10, "fixed_point")


def test_a_measurement_without_a_ground_truth_has_null_metrics(deepred, photo):
    run = deepred("--config", DENOISING, data__measurement=photo, data__noise__sigma="null")
    result = result_of(run)
    assert set(result["psnr"].values()) == {None}
    assert 0 < result["noise_sigma"] < 255
    assert Image.open(run / "comparison.png").size[0] > 2 * 47


def test_methods_share_the_measurement(deepred, photo):
    scores = []
    for more in ([], ["--config", METHODS[0]], ["--model.seed=5"]):
        run = deepred("--config", QUICKSTART, *more, data__ground_truth=photo)
        scores.append(result_of(run)["psnr"]["measurement"])
    assert len(set(scores)) == 1


def test_parts_are_swapped_by_their_short_names(deepred, photo):
    run = deepred(
        *("--config", QUICKSTART, "--red.denoiser=TotalVariation", "--red.denoiser.weight=0.05"),
        *("--red.every_n_steps=2", "--model.result=x-u", "--model.lam=0.1"),
        data__ground_truth=photo,
    )
    config = (run / "config.yaml").read_text()
    assert "deepred_pl.denoisers.TotalVariation" in config and "weight: 0.05" in config
    result = result_of(run)
    assert result["psnr"]["restored"] != result["psnr"]["average"]


def test_a_run_that_started_from_another_outlives_it(deepred, photo):
    first = deepred("--config", DENOISING, data__ground_truth=photo)
    started = deepred(
        "--config", DENOISING, data__ground_truth=photo, model__init_from=first, model__seed=3
    )
    shutil.rmtree(first)
    again = ("--config", started / "config.yaml", "--ckpt_path", started / "checkpoints/last.ckpt")
    predicted = deepred(*again, command="predict", tiny=False)
    assert (predicted / "restored.png").read_bytes() == (started / "restored.png").read_bytes()


def test_test_and_predict_take_the_runs_config_and_checkpoint(deepred, photo, capsys):
    run = deepred("--config", QUICKSTART, data__ground_truth=photo)
    result = result_of(run)
    again = ["--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"]
    capsys.readouterr()
    deepred(*again, command="test", tiny=False)
    said = capsys.readouterr().out
    for metric in ("psnr", "ssim"):
        printed = re.search(rf"{metric}\W+(\d+\.\d+)", said)
        assert float(printed[1]) == pytest.approx(result[metric]["restored"], rel=1e-6)
    predicted = deepred(*again, command="predict", tiny=False)
    assert predicted != run
    assert (predicted / "restored.png").read_bytes() == (run / "restored.png").read_bytes()


def test_a_resumed_fit_goes_on_and_a_changed_weight_is_refused(deepred, refused, photo):
    run = deepred("--config", QUICKSTART, data__ground_truth=photo)
    again = ["--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"]
    longer = deepred(*again, tiny=False, trainer__max_steps=6)
    assert result_of(longer)["steps"] == 6
    assert "no step is left: the fit is at step 4 of 4" in refused(*again, tiny=False)
    assert "lam=0.7, got 0.2" in refused(*again, "--model.lam=0.2", tiny=False)
    assert "is not this problem's" in refused(*again, "--data.seed=1", tiny=False)


def test_alpha_and_depth_survive(deepred, tmp_path):
    values = (np.random.default_rng(0).random((35, 41, 4)) * 255).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "alpha.png")
    run = deepred("--config", QUICKSTART, data__measurement=tmp_path / "alpha.png")
    np.testing.assert_array_equal(
        np.asarray(Image.open(run / "restored.png"))[..., 3], values[..., 3]
    )


def test_a_run_can_be_quiet_and_unlogged(deepred, tmp_path, photo):
    args = ["fit", "--config", str(QUICKSTART), *TINY, f"--data.ground_truth={photo}"]
    args += ["--trainer.max_steps=2", "--trainer.logger=false"]
    args += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    main(args)
    assert (tmp_path / RUN / "restored.png").is_file() and (
        tmp_path / RUN / "result.json"
    ).is_file()


def test_the_processes_random_numbers_are_left_alone(deepred, photo):
    before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
    deepred("--config", QUICKSTART, data__ground_truth=photo)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]


# Help


def helped(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_begins_with_what_is_this_packages(capsys):
    said = helped(capsys, "fit", "--help")
    assert said.startswith("usage: deepred fit --config NAME")
    sections = [said.index(f"  --{name} ") for name in ("model", "data", "red", "trainer")]
    assert sections == sorted(sections)
    assert "known subclasses: torch" not in said and "torch.nn.Parameter" not in said
    assert "every_n_steps" in said and "grey levels of an 8-bit image" in said
    assert "Write the restored image of a checkpoint" in helped(capsys, "--help")


def test_help_names_the_networks_there_are(capsys):
    said = helped(capsys, "fit", "--model.help", "DeepRED")
    assert "λ > 0, weight of the RED prior" in said and "deepred_pl.networks.SkipNet" in said
    assert "torch.nn.Linear" not in said and "GaussianNoise" not in said
    assert "torch.optim.Adam" in said  # where there is none of ours, all there are


# A user's mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__measurement": "nowhere.png"}, "found none at nowhere.png"),
        ({"data__noise__sigma": 0}, "sigma must be in (0, 255]"),
        ({"data__noise__sigma": 256}, "sigma must be in (0, 255]"),
        ({"data__noise__sigma": "null"}, "to simulate a measurement"),
        ({"data__ground_truth": "sample:nothing"}, "expected one of the samples"),
        ({"model__lam": 0}, "use DeepImagePrior (methods/dip)"),
        ({"model__mu": -1}, "use DeepImagePrior (methods/dip)"),
        ({"red__every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"red__inner_iterations": 0}, "inner_iterations must be at least 1"),
        ({"red__denoiser": "Unknown"}, "Expected a path but Unknown"),
        ({"red__denoiser__sigma": 0}, "(0, 255] grey levels"),
        ({"checkpoint__every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"trainer__precision": "bf16-true"}, "bf16-mixed"),
        ({"trainer__max_steps": -1}, "max_steps"),
        ({"trainer__devices": 2}, "expected devices=1, got 2"),
        ({"trainer__accumulate_grad_batches": 2}, "expected accumulate_grad_batches=1, got 2"),
        ({"panels__every_n_steps": -1}, "every_n_steps must be at least 0"),
        ({"model__lamda": 1}, "Option 'lamda' is not accepted"),
        ({"data__intensity_range": "[5, 1]"}, "two finite numbers"),
        ({"data__operator": "Mask"}, "image in which known pixels are white"),
        ({"data__operator": "Downsample", "data__operator__factor": 1}, "at least 2"),
        ({"data__operator": "Radon", "data__operator__angles": "[]"}, "at least one angle"),
        ({"data__operator": "Radon", "data__measurement": "sample"}, "found none at sample"),
        ({"data__operator": "Blur"}, "kernel"),
        ({"data__noise": "PoissonNoise", "data__noise__peak": 0}, "peak must be > 0"),
        ({"data__degrade": "antialiased_resize"}, "needs a Downsample"),
        ({"data__metric_on": "y"}, "metric_on"),
        ({"guard__drop": 0}, "drop must be > 0 dB"),
        ({"model__weighting": "growing"}, "weighting"),
        ({"red__denoiser": "Learned"}, "expected a path or a module, got neither"),
        ({"red__denoiser": "Learned", "red__denoiser__path": "nowhere.pt"}, "found none at"),
        ({"red__every_n_step": 2}, "every_n_step"),
        ({"trainer__max_steps": "many"}, "Expected a <class 'int'>"),
        ({"config": "nowhere.yaml"}, "found no nowhere.yaml; shipped are deblurring_blind"),
        ({"ckpt_path": "nowhere.ckpt"}, "nowhere.ckpt"),
    ],
)
def test_mistakes_get_one_clear_line(refused, settings, message):
    assert message in refused("--config", QUICKSTART, **settings)


@pytest.mark.parametrize("name", ["empty.png", "text.png", "cut.png", "nan.npy"])
def test_files_that_are_no_images_get_one_clear_line(refused, tmp_path, photo, name):
    path = tmp_path / name
    if name == "nan.npy":
        np.save(path, np.full((40, 40), np.nan))
    else:
        data = {"empty.png": b"", "text.png": b"text", "cut.png": photo.read_bytes()[:500]}
        path.write_bytes(data[name])
    said = refused("--config", QUICKSTART, data__measurement=path)
    assert name in said and said.startswith("deepred: error: expected")
    assert not list(tmp_path.glob("lightning_logs/version_*/config.yaml"))


def test_an_image_too_small_or_of_two_sizes_gets_one_clear_line(refused, tmp_path, photo):
    write_image(tmp_path / "small.png", picture(3, 20, 40))
    small = {"data__measurement": tmp_path / "small.png"}
    assert "at least 33×33 pixels, got 20×40" in refused("--config", QUICKSTART, **small)
    said = refused("--config", QUICKSTART, data__ground_truth=photo, **small)
    assert "ground_truth must be (1, 3, 20, 40)" in said
    assert not list(tmp_path.glob("lightning_logs/version_*/config.yaml"))


def test_a_run_directory_that_cannot_be_written_is_found_before_the_fit(refused, tmp_path, photo):
    (tmp_path / "file").write_text("in the way")
    said = refused(
        *("--config", QUICKSTART),
        data__ground_truth=photo,
        trainer__default_root_dir=tmp_path / "file" / "run",
    )
    assert "expected to write the run directory" in said and "default_root_dir" in said


def test_a_file_that_is_no_checkpoint_gets_one_clear_line(refused, tmp_path):
    (tmp_path / "last.ckpt").write_text("text")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    for name in ("last.ckpt", "other.ckpt"):
        said = refused("--config", QUICKSTART, ckpt_path=tmp_path / name)
        assert "expected a run's checkpoints/last.ckpt" in said and "weights_only" not in said


@pytest.mark.parametrize(
    ("section", "base"),
    [
        ("red.denoiser", "denoisers.Denoiser"),
        ("data.operator", "operators.Operator"),
        ("data.noise", "noise.NoiseModel"),
        ("model.regularizer", "losses.Term"),
    ],
)
def test_the_base_class_is_named_where_a_users_class_lacks_it(refused, section, base):
    said = refused("--config", DENOISING, f"--{section}=torch.nn.Identity")
    assert f"expected a class derived from deepred_pl.{base}, got torch.nn.Identity" in said


@pytest.mark.parametrize(
    ("option", "missing"),
    [
        ("--trainer.callbacks+=RichProgressBar", RestorationBar),
        ("--trainer.enable_checkpointing=false", LastCheckpoint),
        ("--trainer.barebones=true", (LastCheckpoint, Monitor, RestorationBar)),
    ],
)
def test_parts_of_every_run_give_way_to_the_users_settings(option, missing):
    args = ["--config", str(DENOISING), option, "--trainer.accelerator=cpu"]
    bare = ["--trainer.log_every_n_steps=null"] if "barebones" in option else []
    cli = RestorationCLI([*args, *bare], run=False)
    parts = (RestorationBar, LastCheckpoint, Monitor, Writer, REDUpdate)
    given = {kind for kind in parts if any(isinstance(c, kind) for c in cli.trainer.callbacks)}
    assert given == {kind for kind in parts if not issubclass(kind, missing)}


def test_settings_are_kept_whatever_the_logger_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("mine")
    tiny = ["--data.crop=40", "--model.network.width=4", "--trainer.max_steps=2"]
    quick = ["fit", "--config", str(DENOISING), *tiny, "--trainer.enable_progress_bar=false"]
    logger = {"class_path": f"{__name__}.Remote"}
    for option in ("--trainer.logger=false", f"--trainer.logger={json.dumps(logger)}"):
        main([*quick, option])
    last = tmp_path / RUN / "checkpoints" / "last.ckpt"
    main([*quick, "--trainer.logger=false", f"--ckpt_path={last}", "--trainer.max_steps=3"])
    runs = [tmp_path / "lightning_logs" / f"version_{i}" for i in range(3)]
    assert [result_of(run)["steps"] for run in runs] == [2, 2, 3]
    assert all(config_of(run)["trainer"]["max_steps"] for run in runs)
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert not (tmp_path / "remote").exists()


class Remote(loggers.Logger):
    """A logger of a service, whose folder on this machine is not the run's."""

    name, version, save_dir = "remote", "1", "remote"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_run_directory_that_is_taken_is_refused(refused, tmp_path):
    settings = {"save_dir": str(tmp_path), "name": "", "version": ""}
    logger = {"class_path": "CSVLogger", "init_args": settings}
    (tmp_path / "config.yaml").write_text("mine")
    given = ["--config", DENOISING, f"--trainer.logger={json.dumps(logger)}", "--data.crop=40"]
    said = refused(*given)
    assert "expected a run directory of its own, but there is a run in" in said
    assert (tmp_path / "config.yaml").read_text() == "mine"
    (tmp_path / "config.yaml").unlink()
    main(["fit", *map(str, given), *TINY, "--trainer.max_steps=2"])
    last = f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"
    main(["fit", *map(str, given), *TINY, "--trainer.max_steps=3", last])  # its own
    assert config_of(tmp_path)["trainer"]["max_steps"] == 3


@pytest.mark.parametrize("command", ["test", "predict"])
def test_there_is_nothing_to_score_or_write_without_a_checkpoint(refused, command):
    said = refused("--config", QUICKSTART, command=command)
    assert "nothing is restored yet" in said and "ckpt_path" in said


def test_a_checkpoint_of_another_network_gets_one_line_of_bearable_length(deepred, refused, photo):
    run = deepred("--config", QUICKSTART, data__ground_truth=photo)
    last = {"ckpt_path": run / "checkpoints" / "last.ckpt", "data__ground_truth": photo}
    said = refused("--config", QUICKSTART, "--model.network.init_args.scales=3", **last)
    assert "loading state_dict" in said and len(said) < 700


def test_a_traceback_can_be_asked_for(deepred, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(FileNotFoundError):
        deepred("--config", QUICKSTART, data__measurement="nowhere.png")


@pytest.mark.parametrize(("built", "why"), [(None, "is not built for one"), ("13.0", "sees none")])
def test_a_gpu_that_is_not_there_gets_one_clear_line(refused, monkeypatch, built, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    message = refused("--config", QUICKSTART, trainer__accelerator="gpu")
    assert why in message and "leave trainer/gpu out" in message
