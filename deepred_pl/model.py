"""The θ-update: Deep Image Prior and DeepRED as LightningModules."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from deepred_pl import admm, graphs
from deepred_pl.checks import as_plain, check_at_least, check_choice, check_factory, check_positive
from deepred_pl.fidelity import (
    Fidelity,
    automatic_epsilon,
    backprojection,
    check_backprojection,
    expected_backprojection,
    weighted_variance,
)
from deepred_pl.files import last_checkpoint, load_checkpoint
from deepred_pl.lightning import LightningModule
from deepred_pl.losses import Term
from deepred_pl.memory import check_memory
from deepred_pl.networks import INPUT_CHANNELS, SkipNet
from deepred_pl.optim import adam
from deepred_pl.problem import InverseProblem
from deepred_pl.torch_state import default_factories, default_settings, own_random_numbers
from deepred_pl.trainer import Epoch, check_epochs, check_optimizer, check_trainer

# The released rise starts at 20 dB, for noise of σ = 25, which has a PSNR of 20.17 dB.
NOISE_MARGIN = 0.17

CHANGEABLE = ("result", "init_from", "compile", "graph")  # settings that a resumed fit may change

NOT_FITTED = "nothing is restored yet; fit this module, or load a checkpoint (ckpt_path)"

Weighting = Literal["fixed", "discrepancy", "rise"]
Result = Literal["average", "out"]
REDResult = Literal["average", "out", "x", "x-u"]


class DeepImagePrior(LightningModule):
    """Fits an untrained network to one measurement (Ulyanov et al. 2018, arXiv:1711.10925).

    Each `training_step` is one θ-update on D(A T_θ(z + noise), y). Given a `problem`, the
    module is complete after construction and works as a child of another LightningModule, which
    calls `training_step` or `theta_step`; without one, it uses the datamodule's problem when the
    fit starts.

    All images below are (1, C, H, W), float32, in [0, 1] or the problem's wider limits.

    Args:
        network: Called with the image's number of channels, returns T_θ (`deepred_pl.networks`).
        optimizer: Called with the network's parameters, returns the optimizer; default `adam`.
        lr_scheduler: Called with the optimizer, returns a schedule, stepped after every θ-step; or
            None.
        input_scale: z is drawn once from U(0, input_scale).
        input_noise_std: σ_p, standard deviation of the fresh noise added to z at every step.
        average_decay: Decay of the exponential average of `out`, in [0, 1).
        fidelity: The data term: the noise model's "likelihood", or "backprojection", by which the
            network learns detail that a blur or a Radon transform attenuates much sooner
            (`fidelity.backprojection`).
        epsilon: ε > 0 of the back-projection, or "auto" to derive it from the operator and the
            noise (`fidelity.automatic_epsilon`).
        regularizer: A term added to the data term, called with `out` and this module
            (`deepred_pl.losses`), or None.
        result: Which image `restored` returns: "average" or "out".
        init_from: Run directory or checkpoint of another image's fit with the same network, to
            start from its θ and its z (resized to this image) instead of random ones;
            `input_scale` then has no effect. For similar images, such as the next slice or frame,
            and networks whose z is drawn, such as `SkipNet`.
        compile: Compile the network (`torch.compile`), which takes a minute or two at the start;
            intended for long fits on a GPU, without gain on CPUs.
        graph: Let the callback `CudaGraph` run the network as a CUDA graph on an NVIDIA GPU.
        seed: Seed of θ₀, z and the input noise; the noise of step n depends only on (seed, n).
        problem: The inverse problem, or None to use the datamodule's.

    Attributes:
        step: Number of θ-steps made.
        problem: The `InverseProblem`, which cannot be replaced by another.
        out: T_θ(z) at the latest step, before the optimizer moved θ, without its gradient, which
            `theta_step` returns.
        average: The exponential average of `out`; starts at the problem's first guess.
        chosen: An image that a callback chose to return instead of `result`, or None.
        epsilon: ε of the back-projection, a number once there is a problem.

    Raises:
        ValueError: An argument is out of range or of another kind, the image is smaller than the
            network allows or too large for the memory, or the regularizer does not apply to the
            problem.
    """

    RESULTS: ClassVar[Any] = Result
    z: Tensor
    out: Tensor
    average: Tensor
    chosen: Tensor | None

    def __init__(
        self,
        network: Callable[[int], nn.Module] = SkipNet,
        optimizer: Callable[[Iterable], Optimizer] = adam,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        input_scale: float = 0.1,
        input_noise_std: float = 0.033,
        average_decay: float = 0.99,
        fidelity: Fidelity = "likelihood",
        epsilon: Literal["auto"] | float = "auto",
        regularizer: Term | Callable[[Tensor, "DeepImagePrior"], Tensor] | None = None,
        result: Result = "average",
        init_from: str | None = None,
        compile: bool = False,
        graph: bool = True,
        seed: int = 0,
        problem: InverseProblem | None = None,
    ) -> None:
        super().__init__()
        # Numbers of NumPy would make checkpoints that cannot be loaded.
        input_scale, input_noise_std = as_plain(input_scale), as_plain(input_noise_std)
        average_decay, epsilon, seed = map(as_plain, (average_decay, epsilon, seed))
        self.save_hyperparameters(
            ignore=["network", "optimizer", "lr_scheduler", "regularizer", "problem"]
        )
        self.hparams.update({name: as_plain(value) for name, value in self.hparams.items()})
        check_factory("network", network, nn.Module, "SkipNet, width=32")
        check_factory("optimizer", optimizer, Optimizer, "torch.optim.Adam, lr=0.01")
        check_factory("lr_scheduler", lr_scheduler, LRScheduler, "WarmupCosine, total_steps=3000")
        if not (problem is None or isinstance(problem, InverseProblem)):
            raise ValueError(
                f"problem must be an InverseProblem, got {type(problem).__name__}; create it with "
                "InverseProblem(y, operator, noise)"
            )
        check_positive("input_scale", input_scale)
        if not 0 <= input_noise_std < math.inf:
            raise ValueError(f"input_noise_std must be >= 0, got {input_noise_std}")
        if not 0 <= average_decay < 1:
            raise ValueError(f"average_decay must be in [0, 1), got {average_decay}")
        check_choice("fidelity", fidelity, Fidelity)
        if isinstance(epsilon, str) and epsilon != "auto":
            raise ValueError(f"epsilon must be a number > 0 or 'auto', got {epsilon!r}")
        if not isinstance(epsilon, str):
            check_positive("epsilon (ε)", epsilon, "'auto' derives it from the noise")
        check_at_least(0, seed=seed)
        check_choice("result", result, self.RESULTS)
        self.make_network = network
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.input_scale = input_scale
        self.input_noise_std = input_noise_std
        self.average_decay = average_decay
        self.fidelity = fidelity
        self.epsilon = epsilon
        self.weighted_variance = 0.0  # E(ε) of the back-projection; `build` sets it and the factor
        self.weight_scale = 1.0  # of λ and μ
        self.regularizer = regularizer
        self.result = result
        self.init_from = init_from
        self.compiled = compile
        self.graph = graph
        self.seed = seed
        self.step = 0
        self.limits = (0.0, 1.0)
        self.network: nn.Module | None = None
        self.problem: InverseProblem | None = None
        self.register_buffer("chosen", None)
        # Of a checkpoint that is loaded without a problem, until there is one:
        self._saved_problem: dict[str, Tensor] = {}
        self._saved_settings: dict[str, Any] = {}
        if problem is not None:
            self.build(problem)

    # Building

    @default_settings()
    def build(self, problem: InverseProblem) -> None:
        """Create the network, z and the state for `problem`.

        A module loaded from a checkpoint keeps its state.

        Raises:
            ValueError: The module, or the checkpoint it was loaded from, has another problem, or
                the image does not fit the network.
        """
        if self.problem is problem:
            return
        if self.problem is not None:
            raise ValueError("this module already restores another image; create a new module")
        if self.fidelity == "backprojection":
            self._prepare_backprojection(problem)
        self.limits = problem.limits
        if self.network is None:
            with own_random_numbers(self.seed), default_factories():
                network = self._new_network(problem.image_shape[1])
                _check_size(network, problem)
                saved = {} if self.init_from is None else _load_into(network, self.init_from)
                z = self._new_input(network, problem, saved.get("z"))
            self.network = network.to(problem.y.device)
            for name, tensor in {"z": z, **self._initial_state(problem)}.items():
                self.register_buffer(name, tensor.to(problem.y.device))
        else:
            problem.load_state_dict(self._saved_problem)  # raises for another measurement
            self._check_settings(self._saved_settings)
            self._saved_problem, self._saved_settings = {}, {}
        if hasattr(self.network, "limits"):
            self.network.limits = problem.limits  # type: ignore[assignment]
        super().__setattr__("problem", problem)
        if isinstance(self.regularizer, Term):
            self.regularizer.check(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "problem" and value is not None and value is not self.problem:
            raise AttributeError(
                "a module restores the image it was built for: build(problem) gives the problem to "
                "a module without one; create a new module for another image"
            )
        super().__setattr__(name, value)

    def _prepare_backprojection(self, problem: InverseProblem) -> None:
        check_backprojection(problem)
        if self.hparams["epsilon"] == "auto":
            self.epsilon, self.weight_scale = automatic_epsilon(problem)
        if problem.noise is not None:
            self.weighted_variance = float(weighted_variance(problem, self._epsilon()))

    def _new_network(self, channels: int) -> nn.Module:
        network = self.make_network(channels)
        if self.compiled:
            network.compile()
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _new_input(
        self, network: nn.Module, problem: InverseProblem, saved: Tensor | None
    ) -> Tensor:
        prepare = getattr(network, "prepare", None)
        if prepare is not None and saved is not None:
            raise ValueError(
                f"init_from: {type(network).__name__} creates its own input from the image; use "
                "init_from with networks whose input is drawn, such as SkipNet"
            )
        if prepare is not None:
            return prepare(problem)
        height, width = problem.image_shape[-2:]
        channels = getattr(network, "input_channels", INPUT_CHANNELS)
        # z, its noise and their sum, in float32; without the network's activations.
        needed = 3 * 4 * height * width * channels
        check_memory(needed, f"restoring {height}×{width} pixels", "restore a part of the image")
        if saved is not None:
            return F.interpolate(saved, (height, width), mode="nearest-exact")
        # A generator that other threads do not draw from, in the state after θ₀ was drawn.
        generator = torch.Generator().set_state(torch.get_rng_state())
        # Drawn as (1, H, W, 32) and viewed as (1, 32, H, W): channels_last without a copy.
        z = torch.rand(1, height, width, channels, generator=generator).movedim(-1, 1)
        return z.mul_(self.input_scale)

    def _initial_state(self, problem: InverseProblem) -> dict[str, Tensor]:
        guess = problem.first_guess()
        return {"out": guess.clone(), "average": guess.clone()}

    def configure_model(self) -> None:
        """Lightning's hook: use the datamodule's problem."""
        if self._trainer is None:  # load_from_checkpoint; the state comes from the file
            return
        if self.trainer.training:
            self.chosen = None  # of an earlier fit; a checkpoint restores its own
            check_trainer(self, self.trainer)
        problem = getattr(self.trainer.datamodule, "problem", None)
        if problem is not None:
            self.build(problem)

    def train_dataloader(self) -> Iterable[int]:
        """An epoch of as many θ-steps as the trainer's log_every_n_steps, without data."""
        return Epoch(self._trainer)

    def test_dataloader(self) -> Iterable[int]:
        """One item: the image is scored once."""
        return [0]

    def predict_dataloader(self) -> Iterable[int]:
        """One item: the image is returned once."""
        return [0]

    def on_train_start(self) -> None:
        """Lightning's hook: refuse data that would not be used, and epochs that end too soon."""
        _check_loader(self.trainer.train_dataloader, "fit")
        check_epochs(self.trainer)

    def on_predict_start(self) -> None:
        """Lightning's hook: refuse data that would not be used, and a module that is not fitted."""
        _check_loader(self.trainer.predict_dataloaders, "predict")
        self.on_test_start()

    def on_test_start(self) -> None:
        """Lightning's hook: refuse a module that is not fitted."""
        if self.step == 0:
            raise RuntimeError(NOT_FITTED)

    def configure_optimizers(self) -> Any:
        """One optimizer for the network's parameters, its schedule stepped after every θ-step."""
        optimizer = self.make_optimizer(self.trainable_network().parameters())
        if self._trainer is not None:
            check_optimizer(optimizer, self._trainer)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # The θ-update

    def training_step(self, batch: Any = None, batch_idx: int = 0) -> Tensor:
        """The loss of one θ-step, 0-dim."""
        return self.theta_step()[0]

    def theta_step(self) -> tuple[Tensor, Tensor]:
        """The loss of one θ-step, 0-dim, and T_θ(z), (1, C, H, W), with its gradient.

        A parent that adds a loss of its own on the image takes the image from here: `out`, which
        this stores, has no gradient. It also updates `average`.
        """
        network = self.trainable_network()
        z = self.z
        if self.input_noise_std > 0:
            z = z.add(self._input_noise(), alpha=self.input_noise_std)
        out = graphs.run(network, z).float()
        if out.shape != self.average.shape:
            raise ValueError(
                f"the network must return {tuple(self.average.shape)} like the image, "
                f"got {tuple(out.shape)}"
            )
        self.out = out.detach()
        self.average.lerp_(self.out, 1 - self.average_decay)
        self.step += 1
        return self.total_loss(out), out

    def total_loss(self, out: Tensor) -> Tensor:
        """The loss with the regularizer, 0-dim, for T_θ(z) = out, (1, C, H, W)."""
        with torch.autocast(out.device.type, enabled=False):  # A, D, x and u stay float32
            loss = self.loss(out)
        if self.regularizer is None:
            return loss
        return loss + self.regularizer(out, self)  # it may run the network

    def loss(self, out: Tensor) -> Tensor:
        """The loss without the regularizer, 0-dim, for T_θ(z) = out."""
        return self.data_term(out)

    def data_term(self, out: Tensor) -> Tensor:
        """D(A out, y) by the `fidelity`, 0-dim; `out` is (1, C, H, W)."""
        assert self.problem is not None
        if self.fidelity == "likelihood":
            return self.problem.data_term(out)
        check_backprojection(self.problem)  # a parent may have replaced the kernel by a learned one
        return backprojection(self.problem, out, self._epsilon())

    def _epsilon(self) -> float:
        assert not isinstance(self.epsilon, str)  # `build` set it
        return self.epsilon

    def generator(self, purpose: str = "") -> torch.Generator:
        """The random generator of this step, a function of (seed, step, purpose) only."""
        # Torch's CPU generator uses only 32 bits of its seed, so everything is hashed into 32.
        entropy = np.random.SeedSequence([self.seed, self.step, *purpose.encode()])
        seed = int(entropy.generate_state(1)[0])
        return torch.Generator(self.z.device).manual_seed(seed)

    def _input_noise(self) -> Tensor:
        _, channels, height, width = self.z.shape
        shape = (1, height, width, channels)
        noise = torch.randn(
            shape, generator=self.generator(), dtype=self.z.dtype, device=self.z.device
        )
        return noise.movedim(-1, 1)

    def trainable_network(self) -> nn.Module:
        """The network, if the module can be trained.

        Raises:
            RuntimeError: There is no problem yet.
            ValueError: The module's values are not float32.
        """
        if self.network is None or self.problem is None:
            raise RuntimeError(
                f"{type(self).__name__} has no measurement to fit; create it with problem="
                "InverseProblem(y, ...), give the trainer a RestorationDataModule, or, inside "
                "another module, call build(problem) in that module's setup()"
            )
        if self.z.dtype != torch.float32:
            raise ValueError(
                f"expected float32 state, got {self.z.dtype}: '*-true' precisions round y, x and "
                "u; use precision='bf16-mixed' or '16-mixed'"
            )
        return self.network

    # Results

    @property
    def restored(self) -> Tensor:
        """The restored image, (1, C, H, W): `chosen`, or else the one named by `result`.

        It is within the problem's limits, by default [0, 1]; before the first step it is the
        problem's first guess.

        Without a noise model, the known pixels of inpainting are those of the measurement, unless
        the module was loaded without its problem.

        Raises:
            RuntimeError: There is no problem yet.
        """
        if self.network is None:
            raise RuntimeError(NOT_FITTED)
        image = self._result() if self.chosen is None else self.chosen
        if self.problem is not None:
            image = self.problem.keep_known(image)
        return image.detach().clamp(*self.limits)

    def _result(self) -> Tensor:
        return self.average if self.result == "average" else self.out

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The restored image, which `Monitor` scores. The network is not run."""
        return self.restored

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The restored image, which `Writer` writes. The network is not run."""
        return self.restored

    # Checkpoints

    def get_extra_state(self) -> dict[str, Any]:
        """Step, limits and settings; the step from the device would stall every step."""
        settings = {k: v for k, v in self.hparams.items() if k not in CHANGEABLE and _is_plain(v)}
        return {"step": self.step, "limits": self.limits, "settings": settings}

    def set_extra_state(self, state: dict[str, Any] | int) -> None:
        """Restore step and limits, and refuse other settings; earlier versions saved less."""
        state = {"step": state} if isinstance(state, int) else state
        if self.problem is None:
            self._saved_settings = state.get("settings", {})
        else:
            self._check_settings(state.get("settings", {}))
        self.step = state["step"]
        limits = tuple(state.get("limits", (0.0, 1.0)))
        if self.problem is not None and limits != self.limits:
            raise ValueError(
                f"the checkpoint was made for values of x within {limits}, and this problem's are "
                f"{self.limits}; resume with the same measurement and data.intensity_range"
            )
        self.limits = limits

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.network is None:  # no problem yet: the checkpoint defines the buffers
            own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
            if "average" in own:
                with default_settings(), own_random_numbers(self.seed), default_factories():
                    self.network = self._new_network(own["average"].shape[1])
            for name, value in own.items():
                if isinstance(value, Tensor) and "." not in name:
                    self.register_buffer(name, torch.empty_like(value))
                elif name.startswith("problem."):
                    self._saved_problem[name.removeprefix("problem.")] = value
                    del state_dict[prefix + name]
        chosen = state_dict.get(prefix + "chosen")
        self.chosen = None if chosen is None else torch.empty_like(chosen)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other settings than those of a checkpoint of an earlier version."""
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        self._check_settings({k: v for k, v in saved.items() if k not in CHANGEABLE})

    def _check_settings(self, saved: dict[str, Any]) -> None:
        """Refuse settings that a resumed fit cannot change."""
        for name, value in self.hparams.items():
            if name in saved and saved[name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name}={saved[name]!r}, got {value!r}; resume "
                    "with the same settings, or start without a checkpoint"
                )


class DeepRED(DeepImagePrior):
    """Deep Image Prior powered by RED (Mataev et al. 2019, arXiv:1903.10176).

    Minimizes D(A T_θ(z), y) + λ/2 · xᵀ(x − f(x)) subject to x = T_θ(z) by ADMM. The module makes
    the θ-update; the `REDUpdate` callback makes the x- and u-updates every k steps and runs the
    denoiser f. Training without this callback is an error.

    Args:
        lam: λ > 0, weight of the RED prior.
        mu: μ > 0, ADMM penalty of x = T_θ(z).
        weighting: How λ and μ change, once per round of x- and u-update:
            "fixed"         they do not;
            "discrepancy"   λ follows Morozov's discrepancy principle, so that the network does not
                            learn the noise (`admm.discrepancy`, or for the back-projection
                            `admm.discrepancy_of_backprojection`), with `lam` as its minimum; μ
                            keeps its proportion to λ; needs a noise model;
            "rise"          the released rule: both grow by `rise_step` when PSNR(A T_θ(z), y), as
                            if the noise were not clipped, exceeds a threshold, which then grows
                            by 0.01 dB.
        rise_step: Increment of the released rule, > 0; 0.03 as released.
        rise_start: Its first threshold in dB, 20 as released, or "noise": the noise's own PSNR
            less 0.17 dB, which is 20 dB at σ = 25 and suits other noise levels too.
        result: Which image `restored` returns: "average", "out", "x" or "x-u".
        kwargs: The other arguments of `DeepImagePrior`: network, optimizer, lr_scheduler,
            input_scale, input_noise_std, average_decay, fidelity, epsilon, regularizer, init_from,
            compile, graph, seed and problem.

    Attributes:
        x, u: ADMM's splitting variable and scaled dual.
        f_x: f(x), the latest denoised x; starts at x.
        prior: mean(x · (x − f(x))) at the x that was denoised to f_x, 0-dim.
        lam, mu, threshold: Current λ, μ, and threshold of their rise in dB, 0-dim.
        weight_scale: Factor of λ and μ, 1 or less, that comes with an automatic ε
            (`fidelity.automatic_epsilon`).
        x_pending, v_pending, lam_pending, mu_pending: The snapshot being denoised.

    Raises:
        ValueError: λ or μ is not positive, or another argument is out of range.
    """

    RESULTS: ClassVar[Any] = REDResult
    x: Tensor
    u: Tensor
    f_x: Tensor
    prior: Tensor
    lam: Tensor
    mu: Tensor
    threshold: Tensor
    x_pending: Tensor
    v_pending: Tensor
    lam_pending: Tensor
    mu_pending: Tensor

    def __init__(
        self,
        lam: float = 0.5,
        mu: float = 0.5,
        weighting: Weighting = "fixed",
        rise_step: float = 0.03,
        rise_start: Literal["noise"] | float = "noise",
        result: REDResult = "average",
        **kwargs: Any,
    ) -> None:
        lam, mu, rise_step, rise_start = map(as_plain, (lam, mu, rise_step, rise_start))
        for name, value in {"lam (λ)": lam, "mu (μ)": mu}.items():
            check_positive(name, value, "without the RED prior use DeepImagePrior (methods/dip)")
        check_choice("weighting", weighting, Weighting)
        check_positive("rise_step", rise_step, "weighting='fixed' keeps λ and μ constant")
        if isinstance(rise_start, str) and rise_start != "noise":
            raise ValueError(f"rise_start must be a number in dB or 'noise', got {rise_start!r}")
        self.initial_lam, self.initial_mu = lam, mu
        self.weighting = weighting
        self.rise_step = rise_step
        self.rise_start = rise_start
        self.driven = False  # a REDUpdate sets it
        super().__init__(result=result, **kwargs)  # type: ignore[arg-type]

    def _initial_state(self, problem: InverseProblem) -> dict[str, Tensor]:
        state = super()._initial_state(problem)
        guess = state["out"]
        lam = torch.tensor(self.weight_scale * self.initial_lam)
        mu = torch.tensor(self.weight_scale * self.initial_mu)
        return {
            **state,
            "x": guess.clone(),
            "u": torch.zeros_like(guess),
            "f_x": guess.clone(),
            "prior": torch.tensor(0.0),  # f_x is x at first
            "lam": lam,
            "mu": mu,
            "threshold": torch.tensor(self._first_threshold(problem)),
            "x_pending": guess.clone(),
            "v_pending": guess.clone(),
            "lam_pending": lam.clone(),
            "mu_pending": mu.clone(),
        }

    def _first_threshold(self, problem: InverseProblem) -> float:
        by_noise = self.weighting == "discrepancy" or self.rise_start == "noise"
        if self.weighting != "fixed" and by_noise and problem.noise is None:
            raise ValueError(
                f"weighting={self.weighting!r} needs a noise model, but this problem has none; set "
                "noise, a rise_start in dB with weighting='rise', or weighting='fixed'"
            )
        if self.rise_start != "noise":
            return self.rise_start
        variance = problem.noise_variance()
        return 0.0 if variance is None else -10 * math.log10(float(variance)) - NOISE_MARGIN

    @torch.no_grad()
    def update_weighting(self) -> None:
        """Set λ and μ for the next round by the rule `weighting`, without waiting for a GPU."""
        assert self.problem is not None
        if self.weighting == "rise":
            ratio, variance = self.problem.residual_ratio(self.out), self.problem.noise_variance()
            if ratio is None or variance is None:
                residual = self.problem.residual(self.out)
            else:  # as if the noise had not been clipped, which would look like a closer fit
                residual = ratio * variance
            psnr = -10 * torch.log10(residual)
            self.lam, self.mu, self.threshold = admm.rise(
                self.lam, self.mu, self.threshold, psnr, self.weight_scale * self.rise_step
            )
        elif self.weighting == "discrepancy":
            self.lam = self._lam_by_discrepancy(self.problem)
            self.mu = self.lam * (self.initial_mu / self.initial_lam)

    def _lam_by_discrepancy(self, problem: InverseProblem) -> Tensor:
        least = self.weight_scale * self.initial_lam
        if self.fidelity == "backprojection":
            expected = expected_backprojection(problem, self.out, self.weighted_variance)
            return admm.discrepancy_of_backprojection(least, self.data_term(self.out), expected)
        expected_residual = problem.expected_residual(self.out)
        assert expected_residual is not None
        return admm.discrepancy(problem.residual(self.out), expected_residual).clamp(min=least)

    def theta_step(self) -> tuple[Tensor, Tensor]:
        """The loss of one θ-step, and T_θ(z) with its gradient; requires a `REDUpdate`."""
        if not self.driven:
            self.trainable_network()  # a missing problem is reported first
            raise RuntimeError(
                "DeepRED is trained without its x- and u-updates; add REDUpdate(denoiser) to the "
                "trainer's callbacks, with submodule='name' if it is a child of another module"
            )
        return super().theta_step()

    def loss(self, out: Tensor) -> Tensor:
        """D(A out, y) + μ · mean((out − (x − u))²), 0-dim."""
        return super().loss(out) + self.mu * F.mse_loss(out, self.x - self.u)

    def _result(self) -> Tensor:
        if self.result == "x":
            return self.x
        if self.result == "x-u":
            return self.x - self.u
        return super()._result()


def _check_size(network: nn.Module, problem: InverseProblem) -> None:
    height, width = problem.image_shape[-2:]
    smallest = getattr(network, "smallest_side", 1)
    if min(height, width) < smallest:
        raise ValueError(
            f"{type(network).__name__} needs images of at least {smallest}×{smallest} pixels, "
            f"got {height}×{width}; use a larger image, or fewer scales (model.network.scales)"
        )


def _load_into(network: nn.Module, run: str) -> dict[str, Any]:
    """Load another fit's θ into the network; return the rest of that fit's state."""
    path = last_checkpoint(Path(run)) if Path(run).is_dir() else Path(run)
    try:
        state = load_checkpoint(path)["state_dict"]
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from error
    prefix = "network."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"init_from: the network of {run} does not match this {type(network).__name__}; use "
            "its settings of model.network, and images with as many channels"
        ) from error
    return state


def _check_loader(loader: Any, verb: str) -> None:
    """Refuse a DataLoader, whose batches a restoration that is trained directly cannot use."""
    if isinstance(loader, DataLoader):
        raise ValueError(
            "a DeepImagePrior restores the measurement of its problem, and would not use the "
            f"batches of a DataLoader: leave it out of {verb}(), and restore several images with "
            "a module each, restore() or `deepred restore`"
        )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
