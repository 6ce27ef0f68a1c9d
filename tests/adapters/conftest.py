import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread():
    """The batches are small: threads that wait for a core made them 20 times as slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path_factory):
    """Where it is installed, stable-pretraining makes every Lightning trainer write to a cache."""
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path_factory.mktemp("spt")))
