"""Hugging Face's Trainer, and loops of accelerate."""

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead, replace_predictor, restore  # noqa: E402
from peers import record  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS, PARTS, ROWS = 4, 2, 8


class SimSiam(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        self.predictor = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x):
        z1, z2 = self.encoder(x), self.encoder(x + 1)
        cos = nn.functional.cosine_similarity
        loss = cos(self.predictor(z1), z2.detach()) + cos(self.predictor(z2), z1.detach())
        return {"loss": -loss.mean()}


def rows():
    return torch.randn(STEPS * PARTS * ROWS, 6, generator=torch.Generator().manual_seed(1))


def expected(batches):
    return oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))


def trainer(model, folder, callback=True, **options):
    transformers = pytest.importorskip("transformers")
    from directpred.adapters.transformers import DirectPredCallback

    options = {"num_train_epochs": 1, "save_strategy": "no", **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=PARTS,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"x": x} for x in rows()],
        callbacks=[DirectPredCallback()] if callback else [],
    )


@pytest.mark.parametrize("callback", [True, False])  # without it the head finds the optimizer
def test_the_trainers_accumulated_batches_are_one_step(callback, tmp_path):
    model = SimSiam()
    head = replace_predictor(model)
    batches = record(head)
    trainer(model, tmp_path, callback).train()
    assert int(head.step_count) == STEPS
    assert [len(batch) for batch in batches] == [2 * PARTS] * STEPS
    np.testing.assert_allclose(head.weight, expected(batches), atol=1e-3)
    assert not callback or head._watch.followed() is None  # detached again


def test_the_trainer_goes_on_from_its_own_checkpoint(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "epoch"}
    whole, resumed = SimSiam(), SimSiam()
    for model in (whole, resumed):
        replace_predictor(model)
    trainer(whole, tmp_path, **options).train()
    again = trainer(resumed, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert int(resumed.predictor.step_count) == 2 * STEPS
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], msg=name)


def test_a_model_without_a_head_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no DirectPredHead in SimSiam"):
        trainer(SimSiam(), tmp_path).train()


@pytest.mark.parametrize("prepared", ["before", "after"])
def test_accelerates_accumulated_batches_are_one_step(prepared):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    model = SimSiam()
    learned = model.predictor
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if prepared == "after":
        head = replace_predictor(model, optimizer)
    loader = torch.utils.data.DataLoader(rows(), ROWS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if prepared == "before":
        head = replace_predictor(model, optimizer)
    batches = record(head)
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert int(head.step_count) == STEPS
    assert [len(batch) for batch in batches] == [2 * PARTS] * STEPS
    np.testing.assert_allclose(head.weight, expected(batches), atol=1e-3)
    assert restore(model) is learned is model.predictor
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held >= set(learned.parameters())


def test_accelerates_states_hold_the_head(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = SimSiam()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    head = replace_predictor(model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(rows())["loss"])
    optimizer.step()
    accelerator.save_state(str(tmp_path))
    weight = head.weight.clone()
    head.load_state_dict(DirectPredHead(4).state_dict())
    accelerator.load_state(str(tmp_path))
    assert torch.equal(head.weight, weight)
    assert int(head.step_count) == 1
