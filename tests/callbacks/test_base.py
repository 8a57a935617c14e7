import json

import pytest

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.callbacks import AutoStop, CollapseGuard, Langevin, RestorationCallback, Writer
from tests.helpers import RUN, TinyNet, noisy_problem, smooth


class Counting(RestorationCallback):
    """Counts steps."""

    def __init__(self, submodule=""):
        super().__init__(submodule)
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, *batch):
        self.steps += 1

    def summary(self):
        return {"counted": self.steps}


def made(**settings):
    return DeepRED(network=TinyNet, problem=noisy_problem(3, 12, 13), **settings)


def test_what_a_callback_adds_to_the_result_is_written(make_trainer, tmp_path):
    update = REDUpdate(smooth, every_n_steps=2)
    make_trainer(max_steps=5, callbacks=[update, Counting(), Writer()]).fit(made())
    result = json.loads((tmp_path / RUN / "result.json").read_text())
    assert (result["counted"], result["steps"]) == (5, 5)
    assert (result["denoiser"], result["k"], result["x_update"]) == ("smooth", 2, "fixed_point")


def test_a_callback_for_another_restoration_is_no_sibling(make_trainer):
    one, two, other = Counting(), CollapseGuard(), Counting("child")
    trainer = make_trainer(max_steps=1, callbacks=[one, two, other])
    assert one.siblings(trainer) == [two] and other.siblings(trainer) == []
    assert len({one.state_key, two.state_key, other.state_key}) == 3


@pytest.mark.parametrize("first", [AutoStop, Langevin])
def test_only_one_callback_may_choose_the_image(make_trainer, first):
    second = {AutoStop: Langevin, Langevin: AutoStop}[first]
    callbacks = [REDUpdate(smooth), first(), second()]
    with pytest.raises(ValueError, match=f"got {first.__name__} and {second.__name__}; leave one"):
        make_trainer(max_steps=20, callbacks=callbacks).fit(made())
