"""The training loop: a stopped run goes on as if it had not been stopped."""

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[train]'")

from trimix_gguf.convert.training import Settings, train  # noqa: E402


def a_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(16, 1)
    )


def loss_of(model):
    """The loss of a step's batch, which is a function of the step's number."""

    def loss(step):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 6, generator=generator)
        return (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()

    return loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def settings(tmp_path):
    return Settings(0.01, state=tmp_path / "state.pt", n_steps=30, weight_decay=0.1)


@pytest.fixture
def whole(settings, tmp_path):
    """The weights after a run that nobody stopped."""
    model = a_model()
    train(model, loss_of(model), settings)
    settings.state.unlink()
    return weights(model)


@pytest.mark.parametrize("where", ["loss", "optimizer", "progress"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(settings, whole, monkeypatch, where):
    model, real_step = a_model(), torch.optim.AdamW.step

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    def loss(step):
        found = loss_of(model)(step)  # dropout has drawn already
        if step == 11 and where == "loss":
            interrupt()
        return found

    def show(standing):
        if standing.step == 10 and where == "optimizer":
            monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
        if standing.step == 11 and where == "progress":
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(model, loss, settings, progress=show)
    # Within the optimizer some weights may be of the new step: nothing of that is saved.
    assert settings.state.exists() == (where != "optimizer")
    monkeypatch.setattr(torch.optim.AdamW, "step", real_step)
    again, steps = a_model(), []
    train(again, loss_of(again), settings, progress=lambda at: steps.append(at.step))
    first = {"loss": 11, "optimizer": 0, "progress": 12}[where]
    assert steps == list(range(first, 30))
    assert same(weights(again), whole)


def test_a_state_that_cannot_be_written_leaves_the_one_before(settings, whole, monkeypatch):
    model = a_model()

    def stop(standing):
        if standing.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, loss_of(model), settings, progress=stop)
    before = settings.state.read_bytes()

    def full(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    again = a_model()
    with pytest.raises(OSError, match="No space"):
        train(again, loss_of(again), settings)
    assert settings.state.read_bytes() == before
    assert list(settings.state.parent.iterdir()) == [settings.state]


def test_what_needs_no_gradient_stays_and_only_matrices_decay(settings):
    model = a_model()
    model[0].requires_grad_(False)
    frozen, bias = weights(model[0]), model[3].bias
    zero = torch.zeros(())
    train(model, lambda step: (model[3].weight.sum() + bias.sum()) * zero, settings)
    assert same(weights(model[0]), frozen)
    assert torch.load(settings.state)["trained"].keys() == {"3.weight", "3.bias"}
    assert torch.equal(bias, a_model()[3].bias)
    assert model[3].weight.norm() < a_model()[3].weight.norm()


def test_matrices_between_layers_take_steps_alike_in_all_directions(settings):
    """Muon's law, whose steps have the size of AdamW's; embeddings take AdamW's, row by row."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 12), torch.nn.Linear(12, 12, bias=False))
    before = weights(model)

    def loss(step):  # most of its gradient is in one direction
        given = torch.arange(12) * model(torch.tensor([1, 2, 3])).sum(0)
        return given.sum() + 5 * (model[1].weight * torch.randn(12, 12)).sum()

    train(model, loss, replace(settings, n_steps=1, n_warm_up=0, decay_from=1, weight_decay=0.0))
    embedding, matrix = (new - old for new, old in zip(weights(model), before, strict=True))
    directions = torch.linalg.svdvals(matrix)
    assert directions[0] < 4 * directions[-1]
    assert matrix.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)
    moved = embedding.abs().amax(1)
    assert torch.allclose(moved[1:4], torch.tensor(0.01), rtol=0.01)
    assert not moved[[0, *range(4, 10)]].any()


def test_the_rate_warms_up_then_falls_by_a_cosine(tmp_path):
    state = tmp_path / "state.pt"
    adapter = Settings(3e-4, state=state, n_steps=488)  # of an adapter
    for step in (0, 19, 20, 244, 487):
        slope = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / 488))
        assert adapter.rate(step) == 3e-4 * min(1, (step + 1) / 20) * slope
    nano = Settings(4e-3, state=state, n_steps=600, n_warm_up=12, decay_from=400, final_share=0.03)
    assert nano.rate(5) == pytest.approx(4e-3 * 6 / 12)
    assert nano.rate(11) == nano.rate(250) == nano.rate(400) == 4e-3
    assert nano.rate(500) == pytest.approx(4e-3 * (0.03 + 0.97 / 2))
