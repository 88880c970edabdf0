"""A training step in the model of another library."""
import torch


def check_step(loss, model, backbone):
    """Steps down a finite loss; every weight of the backbone has a finite gradient, and most of them move."""
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert torch.isfinite(loss)
    assert len(before) > 50  # it is a SAN
    trained = dict(backbone.named_parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
    torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.).step()
    moved = [not torch.equal(before[name], p) for name, p in trained.items()]
    assert sum(moved) > 0.8 * len(moved)
