"""Run the network as a CUDA graph."""

import threading

from deepred_pl import graphs
from deepred_pl.background import has_abandoned_job
from deepred_pl.lightning import Callback, LightningModule, Trainer, rank_zero_info
from deepred_pl.model import DeepImagePrior
from deepred_pl.torch_state import own_random_numbers


class CudaGraph(Callback):
    """Launches all kernels of the network at once, forward and backward, on an NVIDIA GPU.

    For images of up to about 512×512 pixels a GPU should be faster than the calls that launch its
    kernels one by one. The passes are captured before the first step, and their memory is kept
    until the fit ends. A network of your own must launch the same operations in every step, and has
    no hooks in the graph; otherwise set the module's `graph` to False.

    It applies to a restoration that is trained directly, in the program's main thread, while no
    denoiser of another fit runs. On a CPU, or with `compile`, the network is called as usual; also
    if it cannot be captured, with a message.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the denoiser's thread starts, whose work on the GPU a capture would not permit.
        model = pl_module
        if not isinstance(model, DeepImagePrior) or not _applies(model):
            return
        network = model.trainable_network()
        try:
            with (
                trainer.precision_plugin.forward_context(),
                own_random_numbers(device=model.device),
            ):
                graphs.capture(network, model.z)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            rank_zero_info(
                "The network cannot be captured as a CUDA graph, and is called as usual: " + reason
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, DeepImagePrior) and pl_module.network is not None:
            graphs.release(pl_module.network)


def _applies(model: DeepImagePrior) -> bool:
    # A capture fails if other threads work on the GPU, or makes their work fail.
    alone = threading.current_thread() is threading.main_thread() and not has_abandoned_job()
    return model.z.device.type == graphs.DEVICE and model.graph and not model.compiled and alone
