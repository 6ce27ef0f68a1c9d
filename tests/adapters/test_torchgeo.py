"""torchgeo's BYOLTask, trained by Lightning on tiny images."""

import logging

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pytest.importorskip("torchgeo")
pl = pytest.importorskip("lightning.pytorch")

from directpred.adapters.lightning import DirectPredCallback  # noqa: E402
from directpred.torch import replace_predictor, restore  # noqa: E402
from peers import record, views  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 3


def test_byol_task_trains_with_it(tmp_path):
    from torchgeo.trainers import BYOLTask

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    task = BYOLTask(model="resnet18", in_channels=3, lr=1e-3)
    learned = task.model.predictor
    head = replace_predictor(task)
    assert task.model.predictor is head
    batches = record(head)
    images = torch.cat([views(step, 32, 4)[0] for step in range(STEPS)])
    loader = torch.utils.data.DataLoader([{"image": image} for image in images], 4)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[DirectPredCallback()],
    )
    trainer.fit(task, loader)
    assert int(head.step_count) == STEPS == trainer.global_step
    assert {len(batch) for batch in batches} == {2}
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    assert np.linalg.norm(head.weight.numpy() - expected, 2) < 2e-3 * np.linalg.norm(expected, 2)
    (optimizer,) = trainer.optimizers
    assert not set(learned.parameters()) & {
        p for group in optimizer.param_groups for p in group["params"]
    }
    assert restore(task) is learned
