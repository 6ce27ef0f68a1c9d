"""BGRL, whose rows are the nodes of one graph, from its source."""

import sys

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
geometric = pytest.importorskip("torch_geometric")

from directpred.torch import replace_predictor, restore  # noqa: E402
from peers import importable, record, source  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def graph(nodes=40):
    """Two blocks of nodes, mostly linked among themselves."""
    generator = torch.Generator().manual_seed(0)
    block = torch.arange(nodes) % 2
    near = torch.where(block[:, None] == block, 0.3, 0.02)
    edges = (torch.rand(nodes, nodes, generator=generator) < near).nonzero().T
    x = torch.randn(nodes, 12, generator=generator) + block[:, None]
    return geometric.data.Data(x=x, edge_index=edges)


def test_bgrl_trains_with_it():
    with importable(source("bgrl")):
        from bgrl import BGRL, GCN, MLP_Predictor, get_graph_drop_transform
    torch.manual_seed(0)
    model = BGRL(GCN([12, 16, 8], batchnorm=True), MLP_Predictor(8, 8, hidden_size=16))
    learned = model.predictor
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=1e-5)
    head = replace_predictor(model, optimizer)
    batches = record(head)
    data, losses = graph(), []
    transform = get_graph_drop_transform(drop_edge_p=0.2, drop_feat_p=0.2)
    cos = torch.nn.functional.cosine_similarity
    for _ in range(30):  # the step of its train_transductive.py
        optimizer.zero_grad()
        x1, x2 = transform(data), transform(data)
        (q1, y2), (q2, y1) = model(x1, x2), model(x2, x1)
        loss = 2 - cos(q1, y2.detach(), dim=-1).mean() - cos(q2, y1.detach(), dim=-1).mean()
        loss.backward()
        optimizer.step()
        model.update_target_network(0.9)
        losses.append(loss.item())
    assert int(head.step_count) == 30
    assert {sum(map(len, batch)) for batch in batches} == {80}
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-3)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert restore(model) is learned
    assert "bgrl" in sys.modules
