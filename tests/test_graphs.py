"""A captured network: the fit is the same, and the module stays free of it. The capture itself is
emulated; tests/test_gpu.py has the real one."""

import copy
import gc
import io
import threading
import weakref
from functools import partial

import pytest
import torch

from deepred_pl import DeepImagePrior, DeepRED, REDUpdate, graphs
from deepred_pl.callbacks import CollapseGuard, CudaGraph, LastCheckpoint
from deepred_pl.lightning import Callback, LightningModule
from deepred_pl.losses import SURE
from deepred_pl.networks import MeasurementNet
from deepred_pl.optim import WarmupCosine
from tests.helpers import RUN, TinyNet, assert_same_state, noisy_problem, smooth


class Emulated(torch.autograd.Function):
    """Replays passes in static memory, as a CUDA graph does, and in the autocast of the capture."""

    @staticmethod
    def forward(ctx, recorded, z, *parameters):
        recorded.z.copy_(z)
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=recorded.rounded):
            recorded.made = recorded.original(recorded.z)
        recorded.out.copy_(recorded.made)
        recorded.replays += 1
        ctx.recorded = recorded
        return recorded.out.detach()

    @staticmethod
    def backward(ctx, grad):
        recorded = ctx.recorded
        grads = torch.autograd.grad(recorded.made, [*recorded.parameters], grad)
        torch._foreach_copy_(recorded.grads, grads)
        return None, None, *(g.detach() for g in recorded.grads)


class Recorded:
    """Stands in for `torch.cuda.make_graphed_callables`."""

    replays = 0

    def __call__(self, module, arguments):
        assert not torch.is_autocast_cache_enabled()
        (self.z,) = arguments
        self.original, self.parameters = module.forward, list(module.parameters())
        self.rounded = torch.is_autocast_enabled("cpu")
        self.out = module(self.z).detach().clone()
        self.grads = [torch.empty_like(p) for p in self.parameters]
        self.module = module
        module.forward = lambda z: Emulated.apply(self, z, *self.parameters)
        return module


@pytest.fixture
def capture(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    return recorded


def build(network=TinyNet, **settings):
    schedule = partial(WarmupCosine, total_steps=40, warmup_steps=5)
    problem = noisy_problem(3, 16, 17)
    return DeepRED(network=network, lr_scheduler=schedule, problem=problem, **settings)


def callbacks():
    return [CudaGraph(), CollapseGuard(), REDUpdate(smooth, every_n_steps=5)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_fit_is_the_same_also_when_it_is_resumed(make_trainer, tmp_path, capture, precision):
    def fit(steps, ckpt_path=None, **settings):
        model = build(**settings)
        made = make_trainer(
            max_steps=steps,
            callbacks=[*callbacks(), LastCheckpoint()],
            enable_checkpointing=True,
            precision=precision,
        )
        made.fit(model, ckpt_path=ckpt_path)
        return model

    plain = fit(32, graph=False)
    assert capture.replays == 0
    replayed = fit(32)
    assert capture.replays == 32
    assert_same_state(plain, replayed)
    fit(17)
    resumed = fit(32, tmp_path / RUN.replace("0", "2") / "checkpoints" / "last.ckpt")
    assert capture.replays == 32 + 32
    assert_same_state(plain, resumed)


def test_the_module_can_be_copied_and_pickled_meanwhile(make_trainer, capture):
    class Copies(Callback):
        def on_train_batch_end(self, trainer, model, *args):
            if model.step == 10:
                self.copy = copy.deepcopy(model.network)
                torch.save(model.network, io.BytesIO())
                z, replays = model.z, capture.replays
                assert torch.equal(graphs.run(self.copy, z), model.network(z))
                assert capture.replays == replays

    watched = build()
    make_trainer(max_steps=12, callbacks=[*callbacks(), Copies()]).fit(watched)
    assert capture.replays == 12


def test_the_graph_is_released_at_the_end_and_after_an_error(make_trainer, capture):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, model, *args):
            if self.fails:
                raise ZeroDivisionError

    for Stop.fails in (False, True):
        model = build()
        trainer = make_trainer(max_steps=3, callbacks=[*callbacks(), Stop()])
        if Stop.fails:
            with pytest.raises(ZeroDivisionError):
                trainer.fit(model)
        else:
            trainer.fit(model)
        replays = capture.replays
        graphs.run(model.network, model.z)
        assert capture.replays == replays > 0
        held = weakref.ref(capture.module)  # it refers to itself, as torch's does
        capture.module = capture.original = None
        gc.collect()
        assert held() is None


def test_without_gradients_the_network_is_called(capture):
    network, z = TinyNet(3), torch.rand(1, 32, 16, 17)
    graphs.capture(network, z)
    with torch.no_grad():
        expected = graphs.run(network, z)
    assert capture.replays == 0
    assert torch.equal(graphs.run(network, z), expected) and capture.replays == 1
    graphs.release(network)


class Parent(LightningModule):
    """A larger module, whose step may run the network several times."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def training_step(self, batch=None, batch_idx=0):
        return self.child.training_step() + self.child.training_step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.child.network.parameters())

    def train_dataloader(self):
        return self.child.train_dataloader()


def test_a_child_may_run_its_network_twice_in_a_step_and_is_called_as_usual(make_trainer, capture):
    trained, update = Parent(build()), REDUpdate(smooth, submodule="child")
    make_trainer(max_steps=3, callbacks=[CudaGraph(), update]).fit(trained)
    assert capture.replays == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_regularizer_that_runs_the_network_leaves_the_graph_alone(
    make_trainer, capture, precision
):
    def fit(graph):
        model = DeepImagePrior(
            network=partial(MeasurementNet, width=4, skip_width=2, scales=2),
            input_noise_std=0,
            regularizer=SURE(),
            graph=graph,
            problem=noisy_problem(3, 16, 17),
        )
        make_trainer(max_steps=20, callbacks=[CudaGraph()], precision=precision).fit(model)
        return model

    assert_same_state(fit(True), fit(False))
    assert capture.replays == 20


def test_other_threads_call_the_network_as_usual(make_trainer, capture):
    model = build()
    trainer = make_trainer(max_steps=3, callbacks=[CudaGraph(), REDUpdate(smooth)])
    thread = threading.Thread(target=trainer.fit, args=(model,))
    thread.start()
    thread.join()
    assert model.step == 3 and capture.replays == 0


def test_a_network_that_cannot_be_captured_says_so(make_trainer, monkeypatch, capture, caplog):
    def refuse(*arguments):
        raise RuntimeError("CUDA error: operation not permitted\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    model, plain = build(), build(graph=False)
    with caplog.at_level("INFO"):
        make_trainer(max_steps=12, callbacks=callbacks()).fit(model)
    assert "called as usual: CUDA error: operation not permitted" in caplog.text
    assert "Compile with" not in caplog.text
    make_trainer(max_steps=12, callbacks=callbacks()).fit(plain)
    assert_same_state(model, plain)
