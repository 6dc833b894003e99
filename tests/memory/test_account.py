"""The account of every storage, by device and owner."""

import torch
from torch._subclasses import FakeTensorMode

from crepatrain.memory.account import StorageAccount

CPU = torch.device("cpu")


def test_an_account_follows_what_lives():
    account = StorageAccount()
    with account:
        with account.of("a"):
            kept = torch.empty(1024)
        account.begin()
        with account.of("b"):
            gone = torch.empty(2048)
            view = gone[:10]
            del gone
            more = torch.empty(256)
            del view
        with account.of("c"):
            last = torch.empty(1)
        found = account.on(CPU)
        assert found.peak == 4096 + 8192 + 1024
        assert dict(found.peak_of) == {"a": 4096, "b": 9216}
        account.begin()
        assert found.peak == 4096 + 1024 + 512
        account.give(kept, "d")
        account.begin()
        assert found.peak_of["d"] == 4096
        assert found.peak_of["a"] == 0
    assert last.numel() + more.numel() == 257


def test_every_device_has_an_account_of_its_own():
    """As where blocks stay in host memory: what one device holds at its fullest moment says nothing of the other."""
    account, gpu = StorageAccount(), torch.device("cuda:0")
    with FakeTensorMode(), account:
        with account.of("blocks"):
            blocks = [torch.empty(1024) for _ in range(3)]
        with account.of("slot"):
            slot = torch.empty(1024, device=gpu)
        account.begin()
        with account.of("activations"):
            output = slot * 2
            kept = output.cpu()
            del output
        assert torch.empty(1024, device="meta").is_meta
        del blocks
        assert set(account.devices) == {CPU, gpu}
        host, device = account.on(CPU), account.on(gpu)
        assert (dict(host.peak_of), host.peak_op) == ({"blocks": 3 * 4096, "activations": 4096}, "aten._to_copy.default")
        assert (dict(device.peak_of), device.peak_op) == ({"slot": 4096, "activations": 4096}, "aten.mul.Tensor")
        assert (host.now, device.now) == (4096, 4096)
        account.give(kept, "offloaded")
        assert (host.now_of["offloaded"], device.now_of["offloaded"]) == (4096, 0)
