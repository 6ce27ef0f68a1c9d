"""mmpretrain from a config, by mmengine's Runner."""

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pytest.importorskip("mmpretrain")
from mmengine.config import Config  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmpretrain.registry import DATASETS  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402

import directpred as dp  # noqa: E402
from compare_lightly import apply, hunks  # noqa: E402
from directpred.adapters.mmpretrain import DirectPredNeck  # noqa: E402
from peers import REPOSITORY, ROWS, record, views  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = "examples/mmpretrain_simsiam.py"


@DATASETS.register_module(force=True)
class DigitPairs(torch.utils.data.Dataset):
    """Four batches."""

    def __init__(self):
        self.batches = [views(step, 32, ROWS) for step in range(4)]

    def __len__(self):
        return 4 * ROWS

    def __getitem__(self, index):
        batch, row = divmod(index, ROWS)
        return {"inputs": [view[row] for view in self.batches[batch]], "data_samples": DataSample()}


def runner(folder, **changes):
    """Of the example's config after the README's diff, on digits."""
    config = Config.fromstring(apply(hunks(CONFIG), (REPOSITORY / CONFIG).read_text()), ".py")
    config.train_dataloader.dataset = {"type": "DigitPairs"}
    config.train_dataloader.sampler.shuffle = False
    config.merge_from_dict({"work_dir": str(folder), "randomness": {"seed": 0}, **changes})
    return Runner.from_cfg(config)


def test_the_runner_closes_a_step_after_every_step_of_the_optimizer(tmp_path):
    run = runner(tmp_path / "whole")
    head = run.model.head.predictor
    assert isinstance(head, DirectPredNeck)
    batches = record(head)
    run.train()
    assert int(head.step_count) == 6  # of 12 micro-batches
    assert [len(batch) for batch in batches] == [4] * 6
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-4)

    first = tmp_path / "whole" / "epoch_1.pth"
    resumed = runner(tmp_path / "resumed", load_from=str(first), resume=True)
    with pytest.MonkeyPatch.context() as patch:
        # mmengine's checkpoints hold objects that torch.load refuses by default.
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        resumed.train()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_rule_by_its_name():
    assert DirectPredNeck(4, {"type": "DirectCopy", "eps": 0.2}).options.rule == dp.DirectCopy(0.2)
    assert DirectPredNeck(4, dp.Eq18(0.2)).options.rule == dp.Eq18(0.2)
    with pytest.raises(ValueError, match="unknown rule 'Eq17'; known are Eq18"):
        DirectPredNeck(4, {"type": "Eq17"})
    with pytest.raises(TypeError, match="epsilon"):
        DirectPredNeck(4, {"type": "Eq18", "epsilon": 0.1})
