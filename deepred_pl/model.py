"""The θ-update: Deep Image Prior and DeepRED as LightningModules."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, callbacks
from pytorch_lightning.callbacks import Timer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from deepred_pl import admm
from deepred_pl.directory import last_checkpoint, load_checkpoint
from deepred_pl.losses import Term
from deepred_pl.memory import as_text, free_memory
from deepred_pl.networks import INPUT_CHANNELS, SkipNet
from deepred_pl.problem import InverseProblem

# The released rise starts at 20 dB; its noise of σ = 25 has a PSNR of 20.17 dB.
NOISE_MARGIN = 0.17

# Lightning's callbacks that average weights, of which older versions have one.
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")

CHANGEABLE = ("result", "init_from", "compile")  # settings that a fit which goes on may change


def adam(parameters: Iterable) -> Optimizer:
    """Adam at a learning rate of 0.01."""
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


class DeepImagePrior(LightningModule):
    """Fits an untrained network to one measurement (Ulyanov et al. 2018, arXiv:1711.10925).

    Each `training_step` is one θ-update on D(A T_θ(z + noise), y). Given a `problem`, the
    module is complete after construction and works as a child of another LightningModule;
    without one, it takes the problem of the datamodule when the fit starts.

    All images below are (1, C, H, W), float32, in [0, 1].

    Args:
        network: Called with the image's number of channels, gives T_θ (`deepred_pl.networks`).
        optimizer: Called with the network's parameters, gives the optimizer; default `adam`.
        lr_scheduler: Called with the optimizer, or None; stepped after every θ-step.
        input_scale: z is drawn once from U(0, input_scale).
        input_noise_std: σ_p, std of the fresh noise added to z at every step.
        average_decay: Decay of the exponential average of `out`, in [0, 1).
        regularizer: A term beside the data term, called with `out` and this module
            (`deepred_pl.losses`), or None.
        result: What `restored` returns: "average" or "out".
        init_from: Run directory, or checkpoint, of another image's fit with the same network:
            start from its θ and its z (enlarged or reduced to this image's size) and not from
            random ones; `input_scale` is then of no effect. For images that are alike, as the next
            slice or frame, and networks whose z is drawn, as `SkipNet`.
        compile: Compile the network (`torch.compile`): a minute or two at the start, meant for long
            fits on a GPU; on CPUs it gains nothing.
        seed: Seed of θ₀, z and the input noise; the noise of step n depends on (seed, n) alone.
        problem: The inverse problem, or None to take the datamodule's.

    Attributes:
        step: Number of θ-steps made.
        out: T_θ(z) at the latest step, before the optimizer moved θ.
        average: The exponential average of `out`; starts at the problem's first guess.
        chosen: What a callback chose to return instead of `result`, or None.

    Raises:
        ValueError: An argument out of range, an image smaller than the network or larger than the
            memory can take, or a regularizer that does not apply to the problem.
    """

    RESULTS: ClassVar[tuple[str, ...]] = ("average", "out")
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
        regularizer: Term | Callable[[Tensor, "DeepImagePrior"], Tensor] | None = None,
        result: Literal["average", "out"] = "average",
        init_from: str | None = None,
        compile: bool = False,
        seed: int = 0,
        problem: InverseProblem | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            ignore=["network", "optimizer", "lr_scheduler", "regularizer", "problem"]
        )
        if not 0 < input_scale < math.inf:
            raise ValueError(f"input_scale must be > 0, got {input_scale}")
        if not 0 <= input_noise_std < math.inf:
            raise ValueError(f"input_noise_std must be >= 0, got {input_noise_std}")
        if not 0 <= average_decay < 1:
            raise ValueError(f"average_decay must be in [0, 1), got {average_decay}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if result not in self.RESULTS:
            raise ValueError(f"result must be one of {self.RESULTS}, got {result!r}")
        self.make_network = network
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.input_scale = input_scale
        self.input_noise_std = input_noise_std
        self.average_decay = average_decay
        self.regularizer = regularizer
        self.result = result
        self.init_from = init_from
        self.compiled = compile
        self.seed = seed
        self.step = 0
        self.network: nn.Module | None = None
        self.problem: InverseProblem | None = None
        self.register_buffer("chosen", None)
        self._saved_problem: dict[str, Tensor] = {}  # of a checkpoint loaded without a problem
        if problem is not None:
            self.build(problem)

    # Building

    def build(self, problem: InverseProblem) -> None:
        """Make the network, z and the state for `problem`; the only place that does.

        A module loaded from a checkpoint keeps the state it has.

        Raises:
            ValueError: The module, or the checkpoint it was loaded from, has another problem, or
                the image does not fit the network.
        """
        if self.problem is problem:
            return
        if self.problem is not None:
            raise ValueError("this module already restores another image; make a new one for it")
        if self.network is None:
            with _seeded(self.seed):
                network = self._new_network(problem.image_shape[1])
                _check_size(network, problem)
                saved = {} if self.init_from is None else _load_into(network, self.init_from)
                z = self._new_input(network, problem, saved.get("z"))
            self.network = network.to(problem.y.device)
            for name, tensor in {"z": z, **self._initial_state(problem)}.items():
                self.register_buffer(name, tensor.to(problem.y.device))
        else:
            problem.load_state_dict(self._saved_problem)  # refuses another measurement
            self._saved_problem = {}
        self.problem = problem
        if isinstance(self.regularizer, Term):
            self.regularizer.check(self)

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
                f"init_from: {type(network).__name__} makes its own input from the image; give it "
                "with networks whose input is drawn, as SkipNet"
            )
        if prepare is not None:
            return prepare(problem)
        height, width = problem.image_shape[-2:]
        _check_memory(height, width)
        if saved is not None:
            return F.interpolate(saved, (height, width), mode="nearest-exact")
        # Drawn as (1, H, W, 32) and viewed as (1, 32, H, W): channels_last without a copy.
        z = torch.rand(1, height, width, INPUT_CHANNELS).movedim(-1, 1)
        return z.mul_(self.input_scale)

    def _initial_state(self, problem: InverseProblem) -> dict[str, Tensor]:
        guess = problem.first_guess()
        return {"out": guess.clone(), "average": guess.clone()}

    def configure_model(self) -> None:
        """Lightning's hook: take the datamodule's problem."""
        if self._trainer is None:  # load_from_checkpoint; the state comes from the file
            return
        if self.trainer.training:
            self.chosen = None  # of an earlier fit; a checkpoint's comes back with it
            check_trainer(self, self.trainer)
        timed = any(isinstance(callback, Timer) for callback in self.trainer.callbacks)
        if self.trainer.training and self.trainer.max_steps == -1 and not timed:
            raise ValueError(
                "a fit is one endless epoch: expected max_steps (or max_time), got neither; "
                "give Trainer(max_steps=3000), or --trainer.max_steps 3000"
            )
        problem = getattr(self.trainer.datamodule, "problem", None)
        if problem is not None:
            self.build(problem)

    def train_dataloader(self) -> Iterable[int]:
        """One endless epoch of θ-steps; y is on the device already."""
        return itertools.repeat(0)

    def configure_optimizers(self) -> Any:
        """One optimizer over the network's parameters, its scheduler stepped per θ-step."""
        optimizer = self.make_optimizer(self._checked().parameters())
        fused = any(group.get("fused") for group in optimizer.param_groups)
        trainer = self._trainer
        if fused and trainer and trainer.gradient_clip_val and "mixed" in str(trainer.precision):
            raise ValueError(
                f"gradients in {trainer.precision} precision cannot be clipped before a fused "
                "optimizer's step; give an optimizer with fused=False "
                "(--model.optimizer.fused false), or leave gradient_clip_val out"
            )
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # The θ-update

    def training_step(self, batch: Any = None, batch_idx: int = 0) -> Tensor:
        """The loss of one θ-step, 0-dim; keeps `out` and updates `average`."""
        network = self._checked()
        z = self.z
        if self.input_noise_std > 0:
            z = z.add(self._input_noise(), alpha=self.input_noise_std)
        out = network(z).float()
        if out.shape != self.average.shape:
            raise ValueError(
                f"the network must give {tuple(self.average.shape)} like the image, "
                f"got {tuple(out.shape)}"
            )
        self.out = out.detach()
        self.average.lerp_(self.out, 1 - self.average_decay)
        self.step += 1
        with torch.autocast(out.device.type, enabled=False):  # A, D, x and u stay float32
            loss = self.loss(out)
        if self.regularizer is not None:  # it may run the network
            loss = loss + self.regularizer(out, self)
        return loss

    def loss(self, out: Tensor) -> Tensor:
        """What the θ-update minimises but for the regularizer, 0-dim, for T_θ(z) = out."""
        assert self.problem is not None
        return self.problem.data_term(out)

    def generator(self, purpose: str = "") -> torch.Generator:
        """Random numbers of this step, a function of (seed, step, purpose) alone."""
        # Torch's CPU generator keeps 32 bits of a seed; hashing puts all into them.
        entropy = np.random.SeedSequence([self.seed, self.step, *purpose.encode()])
        seed = int(entropy.generate_state(1)[0])
        return torch.Generator(self.z.device).manual_seed(seed)

    def _input_noise(self) -> Tensor:
        _, channels, height, width = self.z.shape
        shape = (1, height, width, channels)
        noise = torch.randn(shape, generator=self.generator(), device=self.z.device)
        return noise.movedim(-1, 1)

    def _checked(self) -> nn.Module:
        if self.network is None or self.problem is None:
            raise RuntimeError(
                f"{type(self).__name__} has no measurement to fit; give it problem="
                "InverseProblem(y, ...), or give the trainer a RestorationDataModule"
            )
        if self.z.dtype != torch.float32:
            raise ValueError(
                f"expected float32 state, got {self.z.dtype}: a '*-true' precision rounds y, x and "
                "u; use precision='bf16-mixed' or '16-mixed'"
            )
        return self.network

    # Results

    @property
    def restored(self) -> Tensor:
        """The restored image, (1, C, H, W) in [0, 1]: `chosen`, or else what `result` says.

        Raises:
            RuntimeError: No step was made yet.
        """
        if self.step == 0:
            raise RuntimeError(
                "nothing is restored yet; fit this module, or give a checkpoint (--ckpt_path)"
            )
        image = self._result() if self.chosen is None else self.chosen
        return image.detach().clamp(0, 1)

    def _result(self) -> Tensor:
        return self.average if self.result == "average" else self.out

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The restored image; `Monitor` scores it. The network is not run."""
        return self.restored

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The restored image; `Writer` writes it. The network is not run."""
        return self.restored

    # Checkpoints

    def get_extra_state(self) -> int:
        """The step, a host number: reading it from the device would stall every step."""
        return self.step

    def set_extra_state(self, state: int) -> None:
        """Restore the step."""
        self.step = state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.network is None:  # no problem yet: the checkpoint says what there is
            own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
            if "average" in own:
                with _seeded(self.seed):
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
        """Refuse settings that a fit which goes on cannot change any more."""
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        for name, value in self.hparams.items():
            if name not in CHANGEABLE and name in saved and saved[name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name}={saved[name]!r}, got {value!r}; a fit "
                    "that goes on keeps its settings: give the same, or start without a checkpoint"
                )


class DeepRED(DeepImagePrior):
    """Deep Image Prior powered by RED (Mataev et al. 2019, arXiv:1903.10176).

    Minimises D(A T_θ(z), y) + λ/2 · xᵀ(x − f(x)) subject to x = T_θ(z) by ADMM. The module
    makes the θ-update; the `REDUpdate` callback makes the x- and u-updates every k steps and
    runs the denoiser f. Training without that callback is an error.

    Args:
        lam: λ > 0, weight of the RED prior.
        mu: μ > 0, ADMM penalty of x = T_θ(z).
        weighting: How λ and μ go on from there, once in a round of x- and u-update:
            "fixed"         not at all;
            "discrepancy"   λ sets itself by Morozov's discrepancy principle, so that the network
                            does not learn the noise (`admm.discrepancy`), but not below `lam`;
                            μ keeps its proportion to λ; needs a noise model;
            "rise"          the released rule: both grow by `rise_step` where PSNR(A T_θ(z), y)
                            has passed a threshold, which then grows by 0.01 dB.
        rise_step: Of the released rule, > 0; 0.03 as released.
        rise_start: The first threshold in dB, 20 as released, or "noise": the noise's own PSNR
            less 0.17 dB, which is 20 dB at σ = 25 and holds for other noise levels too.
        result: What `restored` returns: "average", "out", "x" or "x-u".
        kwargs: The other arguments of `DeepImagePrior`: network, optimizer, lr_scheduler,
            input_scale, input_noise_std, average_decay, regularizer, init_from, compile, seed and
            problem.

    Attributes:
        x, u: ADMM's splitting variable and scaled dual.
        f_x: f(x), the latest denoised x; starts at x.
        prior: mean(x · (x − f(x))) at the x that f_x was made of, 0-dim.
        lam, mu, threshold: Current λ, μ, and threshold of their rise in dB, 0-dim.
        x_pending, v_pending, lam_pending, mu_pending: The snapshot being denoised.

    Raises:
        ValueError: λ or μ not above 0, or another argument out of range.
    """

    RESULTS: ClassVar[tuple[str, ...]] = ("average", "out", "x", "x-u")
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
        weighting: Literal["fixed", "discrepancy", "rise"] = "fixed",
        rise_step: float = 0.03,
        rise_start: Literal["noise"] | float = "noise",
        result: Literal["average", "out", "x", "x-u"] = "average",
        **kwargs: Any,
    ) -> None:
        for name, value in {"lam (λ)": lam, "mu (μ)": mu}.items():
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be > 0, got {value}; without the RED prior use the DIP method: "
                    "DeepImagePrior, or --config configs/methods/dip.yaml"
                )
        if weighting not in ("fixed", "discrepancy", "rise"):
            raise ValueError(
                f"weighting must be 'fixed', 'discrepancy' or 'rise', got {weighting!r}"
            )
        if not 0 < rise_step < math.inf:
            raise ValueError(
                f"rise_step must be > 0, got {rise_step}; weighting='fixed' keeps λ and μ constant"
            )
        if isinstance(rise_start, str) and rise_start != "noise":
            raise ValueError(f"rise_start must be a number of dB or 'noise', got {rise_start!r}")
        self.initial_lam, self.initial_mu = lam, mu
        self.weighting = weighting
        self.rise_step = rise_step
        self.rise_start = rise_start
        self.driven = False  # a REDUpdate sets it
        super().__init__(result=result, **kwargs)  # type: ignore[arg-type]

    def _initial_state(self, problem: InverseProblem) -> dict[str, Tensor]:
        guess = problem.first_guess()
        lam, mu = torch.tensor(self.initial_lam), torch.tensor(self.initial_mu)
        return {
            **super()._initial_state(problem),
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
                f"weighting={self.weighting!r} needs a noise model, and this problem has none; "
                "give noise, a rise_start in dB with weighting='rise', or weighting='fixed'"
            )
        if self.rise_start != "noise":
            return self.rise_start
        variance = problem.noise_variance()
        return 0.0 if variance is None else -10 * math.log10(float(variance)) - NOISE_MARGIN

    @torch.no_grad()
    def update_weighting(self) -> None:
        """λ and μ for the next round, by the rule `weighting`; on the device, without waiting."""
        assert self.problem is not None
        if self.weighting == "rise":
            psnr = -10 * torch.log10(self.problem.residual(self.out))
            self.lam, self.mu, self.threshold = admm.rise(
                self.lam, self.mu, self.threshold, psnr, self.rise_step
            )
        elif self.weighting == "discrepancy":
            expected = self.problem.expected_residual(self.out)
            assert expected is not None
            lam = admm.discrepancy(self.problem.residual(self.out), expected)
            self.lam = lam.clamp(min=self.initial_lam)
            self.mu = self.lam * (self.initial_mu / self.initial_lam)

    def training_step(self, batch: Any = None, batch_idx: int = 0) -> Tensor:
        """The loss of one θ-step, 0-dim, for a fit that a `REDUpdate` drives."""
        if not self.driven:
            self._checked()  # without a problem, that is what to say
            raise RuntimeError(
                "DeepRED is trained without its x- and u-updates; add REDUpdate(denoiser) to the "
                "trainer's callbacks, with submodule='name' if it is a child of another module"
            )
        return super().training_step(batch, batch_idx)

    def loss(self, out: Tensor) -> Tensor:
        """D(A out, y) + μ · mean((out − (x − u))²), 0-dim."""
        return super().loss(out) + self.mu * F.mse_loss(out, self.x - self.u)

    def _result(self) -> Tensor:
        if self.result == "x":
            return self.x
        if self.result == "x-u":
            return self.x - self.u
        return super()._result()


class WarmupCosine(LambdaLR):
    """Learning rate: a linear warm-up, then a cosine down to 0 at `total_steps`.

    Args:
        optimizer: The optimizer, with the peak learning rate.
        total_steps: θ-steps until the rate is 0, where it stays.
        warmup_steps: θ-steps until the rate is at its peak.

    Raises:
        ValueError: Not 0 <= warmup_steps < total_steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"expected 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}"
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)


def check_trainer(model: DeepImagePrior, trainer: Trainer) -> None:
    """Refuse what Lightning offers and the fit of one image cannot have; called before it.

    Raises:
        ValueError: Several devices, accumulated gradients, a compiled module, or callbacks that
            average weights.
    """
    devices = trainer.num_devices * trainer.num_nodes
    if devices > 1:
        raise ValueError(
            f"one image does not shard: expected one device, got {devices}; give devices=1 "
            "(--trainer.devices 1), and many images to deepred-batch"
        )
    accumulated: Any = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:
        if isinstance(callback, callbacks.GradientAccumulationScheduler):
            accumulated = callback.scheduling
    if accumulated != 1:
        raise ValueError(
            "a θ-step is one pass over the one image: expected accumulate_grad_batches=1, got "
            f"{accumulated}; average_decay smooths over steps"
        )
    if model._compiler_ctx is not None:  # Lightning's mark
        raise ValueError(
            f"expected a {type(model).__name__} that is not compiled, got torch.compile's, which "
            "starts anew at every step's number; compile=True compiles the network alone"
        )
    check_averaging(trainer)


def check_averaging(trainer: Trainer) -> None:
    """Refuse callbacks that average a module's weights.

    Raises:
        ValueError: There is one.
    """
    kinds = [getattr(callbacks, name, ()) for name in AVERAGING]
    for callback in trainer.callbacks:
        if isinstance(callback, tuple(kinds)):
            raise ValueError(
                f"{type(callback).__name__} averages weights, and the result is made of images "
                "that the network gave on the way: leave it out, for `average` is the exponential "
                "average of those (average_decay)"
            )


def find_restoration(module: LightningModule, submodule: str = "") -> DeepImagePrior:
    """The restoration at the dotted name `submodule` of a trained module; "" is the module.

    Raises:
        ValueError: There is none; the message says where there are.
    """
    children = dict(module.named_modules())
    found = children.get(submodule)
    if not isinstance(found, DeepImagePrior):
        names = [name for name, child in children.items() if isinstance(child, DeepImagePrior)]
        raise ValueError(
            f"expected a DeepImagePrior or DeepRED at submodule={submodule!r} of "
            f"{type(module).__name__}, which has them at {names}; give one of these names"
        )
    return found


def _check_size(network: nn.Module, problem: InverseProblem) -> None:
    height, width = problem.image_shape[-2:]
    smallest = getattr(network, "smallest_side", 1)
    if min(height, width) < smallest:
        raise ValueError(
            f"{type(network).__name__} needs images of at least {smallest}×{smallest} pixels, "
            f"got {height}×{width}; take a larger part, or fewer scales (--model.network.scales)"
        )


def _check_memory(height: int, width: int) -> None:
    """Refuse an image for which z alone would fill the memory, before it does."""
    z, free = height * width * INPUT_CHANNELS * 4, free_memory(torch.device("cpu"))
    if 3 * z > free:  # z, its noise and their sum; what the network takes comes on top
        raise ValueError(
            f"to restore an image of {height}×{width} pixels takes more than {as_text(3 * z)} of "
            f"memory, and {as_text(free)} are free; restore a part of it, or ask for a smaller one"
        )


def _load_into(network: nn.Module, run: str) -> dict[str, Any]:
    """Give the network another fit's θ; return the rest of that fit's state."""
    path = last_checkpoint(Path(run)) if Path(run).is_dir() else Path(run)
    try:
        state = load_checkpoint(path)["state_dict"]
    except Exception as error:  # unpicklers raise what they like
        raise ValueError(
            f"init_from: expected a run directory with checkpoints/last.ckpt, or a checkpoint, got "
            f"{run}, which has none that can be read ({type(error).__name__})"
        ) from error
    prefix = "network."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"init_from: the network of {run} is not this {type(network).__name__}; give the "
            "settings of model.network that it was made with, and images of as many channels"
        ) from error
    return state


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from `seed`, whatever the device, and leave the process's seed alone."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
