"""Models as people write them: built with torch.nn, copied, the copy replaced, both trained, and the same comes out."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import ONEDNN_HAS_BFLOAT16, relative_error
from numerics import TOLERANCE as TOLERANCES
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_triton as lt

pytestmark = pytest.mark.both

# of losses and of what training changed in each parameter, in float64: ||ours - torch.nn's|| / ||torch.nn's||
TOLERANCE = 1e-12
BF16 = TOLERANCES[torch.bfloat16]
WORDS, E, H, B = 11, 4, 5, 3


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def twins(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The model with our layers, and the same with torch.nn's."""
    torch.manual_seed(0)
    theirs = build()
    ours = lt.replace(copy.deepcopy(theirs))
    assert any(isinstance(m, (lt.LSTM, lt.GRU, lt.RNN)) for m in ours.modules())
    assert not any(isinstance(m, nn.RNNBase) for m in ours.modules())
    return ours, theirs


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def train(model: nn.Module, losses: Callable[[nn.Module], Iterator[Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A step for each loss, which are yielded one by one -> the losses, and by how much each parameter changed."""
    optimizer = sgd(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    seen = []
    for loss in losses(model.train()):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return seen, {name: p.detach() - start[name] for name, p in model.named_parameters()}


def assert_close(found: Tensor, wanted: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape, what
    error = relative_error(found, wanted)
    assert error <= tolerance, f"{what}: {error:.2e}"


def assert_trains_alike(
    ours: nn.Module, theirs: nn.Module, losses: Callable[[nn.Module], Iterator[Tensor]]
) -> None:  # fmt: skip
    (our_losses, our_changes), (their_losses, their_changes) = train(ours, losses), train(theirs, losses)
    assert len(set(map(float, their_losses))) == len(their_losses) > 1
    for step, (found, wanted) in enumerate(zip(our_losses, their_losses, strict=True)):
        assert_close(found, wanted, f"loss {step}")
    assert our_changes.keys() == their_changes.keys()
    for name, wanted in their_changes.items():
        assert wanted.abs().sum() > 0, name
        assert_close(our_changes[name], wanted, name)


def sentences(seed: int, steps: int, lengths: list[int]) -> Tensor:
    """Word numbers [len(lengths), steps], 0 past each length."""
    words = torch.randint(1, WORDS, (len(lengths), steps), generator=torch.Generator().manual_seed(seed))
    return words.masked_fill(torch.arange(steps) >= torch.tensor(lengths)[:, None], 0)


class Tagger(nn.Module):
    """A label for each word: embedding, two bidirectional layers over packed sentences, dropout, linear."""

    def __init__(self, tags: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, E, padding_idx=0)
        self.encoder = nn.LSTM(E, H, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * H, tags)
        self.whole = nn.Linear(4 * H, tags)

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, state = self.encoder(packed)
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output, batch_first=True, total_length=x.size(1))[0], state

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        mask = words != 0
        output, (h, c) = self.encode(self.embed(words), mask.sum(1))
        last = torch.cat((h[-2], h[-1], c[-2], c[-1]), dim=1)
        return self.head(self.drop(output)) * mask[..., None], self.whole(last)


class TaggerByLengths(Tagger):
    """As Tagger, with our own way to say where the sentences end."""

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.encoder(x, lengths=lengths)


TAGGED = [sentences(seed, 3, lengths) for seed, lengths in enumerate(([2, 3, 1], [3, 3, 3]))]


def tagging_losses(model: nn.Module) -> Iterator[Tensor]:
    for words in TAGGED:
        tags, topic = model(words)
        yield F.cross_entropy(tags.flatten(0, 1), (words % 4).flatten(), ignore_index=0) + F.cross_entropy(
            topic, words[:, 0] % 4
        )


def test_tagger() -> None:
    ours, theirs = twins(Tagger)
    assert_trains_alike(ours, theirs, tagging_losses)
    with torch.no_grad():
        for found, wanted in zip(ours.eval()(TAGGED[0]), theirs.eval()(TAGGED[0]), strict=True):
            assert_close(found, wanted)


def test_tagger_told_lengths() -> None:
    """The same without packing; dropout aside, whose masks follow what lies in memory, padding included."""
    ours, theirs = twins(Tagger)
    ours.__class__ = TaggerByLengths
    for model in (ours, theirs):
        model.encoder.dropout = model.drop.p = 0.0
    assert_trains_alike(ours, theirs, tagging_losses)


class Seq2Seq(nn.Module):
    """Encoder over packed sentences; a decoder with attention that takes one step at a time, on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, E)
        self.encoder = nn.GRU(E, H, bidirectional=True)
        self.bridge = nn.Linear(2 * H, H)
        self.decoder = nn.GRU(E + 2 * H, H, num_layers=2, dropout=0.1)
        self.cell = nn.GRUCell(H, H)
        self.query = nn.Linear(H, 2 * H, bias=False)
        self.output = nn.Linear(H, WORDS)

    def forward(self, source: Tensor, target: Tensor | None, steps: int) -> Tensor:
        """source [B, S], target [B, steps] fed to the decoder, or None for its own words -> logits [steps, B, WORDS]"""
        mask = source != 0
        packed = pack_padded_sequence(self.embed(source), mask.sum(1), batch_first=True, enforce_sorted=False)
        memory, h = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=source.size(1))
        h = self.bridge(torch.cat((h[0], h[1]), dim=1)).tanh()
        state, top = torch.stack((h, h)), h
        word = source.new_ones(source.size(0))
        logits = []
        for step in range(steps):
            scores = (memory @ self.query(top)[..., None]).squeeze(-1).masked_fill(~mask, -torch.inf)
            context = (scores.softmax(1)[:, None] @ memory).squeeze(1)
            y, state = self.decoder(torch.cat((self.embed(word), context), dim=1)[None], state)
            top = self.cell(y[0], top)
            logits.append(self.output(top))
            word = logits[-1].argmax(1) if target is None else target[:, step]
        return torch.stack(logits)


def test_seq2seq_with_attention() -> None:
    ours, theirs = twins(Seq2Seq)
    cell = lt.GRUCell(H, H)
    cell.load_state_dict(ours.cell.state_dict())
    ours.cell = cell
    pairs = [(sentences(2, 3, [3, 1, 2]), sentences(3, 2, [2] * 3)), (sentences(4, 3, [1, 3, 3]), None)]

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for source, target in pairs:
            wanted = source[:, :2] if target is None else target
            yield F.cross_entropy(model(source, target, 2).flatten(0, 1), wanted.t().flatten())

    assert_trains_alike(ours, theirs, losses)
    with torch.no_grad():
        found, wanted = (model.eval()(pairs[0][0], None, 3) for model in (ours, theirs))
    assert_close(found, wanted)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


class LanguageModel(nn.Module):
    """Output weights tied to the embedding, which the projection or the hidden size fits."""

    def __init__(self, proj_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, E)
        self.rnn = nn.LSTM(E, H if proj_size else E, num_layers=2, dropout=0.2, proj_size=proj_size)
        self.output = nn.Linear(E, WORDS)
        self.output.weight = self.embed.weight

    def forward(self, words: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embed(words), state)
        return self.output(y), state


@pytest.mark.parametrize("proj_size", [0, E])
def test_language_model(proj_size: int) -> None:
    """Truncated backpropagation through time: each window starts from the last one's state, detached."""
    ours, theirs = twins(lambda: LanguageModel(proj_size))
    assert ours.output.weight is ours.embed.weight
    text = sentences(5, 10, [10] * B).t()

    def losses(model: nn.Module) -> Iterator[Tensor]:
        state = None
        for window in text.unfold(0, 4, 3).permute(0, 2, 1):
            logits, state = model(window[:-1], state)
            yield F.cross_entropy(logits.flatten(0, 1), window[1:].flatten())
            state = tuple(s.detach() for s in state)

    assert_trains_alike(ours, theirs, losses)


class WeightDrop(nn.Module):
    """DropConnect on recurrent weights (Merity et al. 2017): raw parameters here, what is left of them set there."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...], p: float) -> None:
        super().__init__()
        self.layer, self.names, self.p = layer, names, p
        for name in names:
            weight = getattr(layer, name)
            del layer._parameters[name]
            self.register_parameter(f"{name}_raw", nn.Parameter(weight.detach()))
            setattr(layer, name, weight.detach().clone())

    def forward(self, *args: Any) -> Any:
        for name in self.names:
            setattr(self.layer, name, F.dropout(getattr(self, f"{name}_raw"), self.p, self.training))
        return self.layer(*args)


class Awd(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, E)
        layer = nn.LSTM(E, H, num_layers=2) if layer is None else layer
        self.rnns = nn.ModuleList(
            [WeightDrop(layer, ("weight_hh_l0", "weight_hh_l1"), 0.5), WeightDrop(nn.GRU(H, E), ("weight_hh_l0",), 0.3)]
        )
        self.output = nn.Linear(E, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for rnn in self.rnns:
            x, _ = rnn(x)
        return self.output(x)


AWD_TEXT = sentences(6, 4, [4] * B).t()


def awd_losses(model: nn.Module) -> Iterator[Tensor]:
    for _ in range(2):
        yield F.cross_entropy(model(AWD_TEXT[:-1]).flatten(0, 1), AWD_TEXT[1:].flatten())


def test_weight_dropping() -> None:
    ours, theirs = twins(Awd)
    assert_trains_alike(ours, theirs, awd_losses)
    assert_close(ours.eval()(AWD_TEXT), theirs.eval()(AWD_TEXT))
    back = lt.to_torch(ours)
    assert isinstance(back.rnns[0].layer, nn.LSTM)
    assert_close(back(AWD_TEXT), theirs(AWD_TEXT))


def test_weight_dropping_around_a_layer_of_ours() -> None:
    """The wrapper finds in ours what it looks for in torch.nn's."""
    torch.manual_seed(0)
    theirs = Awd()
    torch.manual_seed(0)
    nn.Embedding(WORDS, E)
    ours = Awd(lt.LSTM(E, H, num_layers=2))
    ours.load_state_dict(theirs.state_dict())
    assert_trains_alike(ours, theirs, awd_losses)


class LitModel(nn.Module):
    """With the methods that a Lightning module has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, E)
        self.rnn = nn.LSTM(E, H, num_layers=2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, 3)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, label = batch
        y, _ = self.rnn(self.embed(words))
        return F.cross_entropy(self.head(self.norm(y).mean(1)), label)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


class Trainer:
    """A training loop with gradient clipping, mixed precision where `dtype` says so, and checkpoints."""

    def __init__(self, model: LitModel, dtype: torch.dtype | None) -> None:
        self.model, self.dtype, self.step = model.train(), dtype, 0
        self.optimizer, self.scheduler = model.configure_optimizers()

    def fit(self, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
        losses = []
        for batch in batches:
            torch.manual_seed(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.model.training_step(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1, error_if_nonfinite=True)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            losses.append(loss.item())
        return losses

    def checkpoint(self) -> bytes:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": self.step}, buffer)
        return buffer.getvalue()

    def resume(self, checkpoint: bytes) -> None:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]


BATCHES = [(sentences(10 + i, 3, [3] * B), torch.tensor([0, 1, i % 3])) for i in range(3)]


@pytest.mark.parametrize("saved_by", ["ours", "theirs"])
def test_training_goes_on_from_a_checkpoint(saved_by: str) -> None:
    """One of ours continues as torch.nn's would have, and the other way round, optimizer state included."""
    ours, theirs = twins(LitModel)
    fresh = {"ours": LitModel(), "theirs": lt.replace(LitModel())}[saved_by]
    trainers = {"ours": Trainer(ours, None), "theirs": Trainer(theirs, None)}
    losses = {name: trainer.fit(BATCHES[:2]) for name, trainer in trainers.items()}
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=TOLERANCE, abs=0)
    resumed = Trainer(fresh, None)
    resumed.resume(trainers[saved_by].checkpoint())
    assert resumed.fit(BATCHES[2:]) == pytest.approx(trainers["theirs"].fit(BATCHES[2:]), rel=1e-11, abs=0)
    for (name, found), wanted in zip(fresh.named_parameters(), theirs.parameters(), strict=True):
        assert_close(found, wanted, name, 1e-10)


def test_mixed_precision() -> None:
    """bf16 in the layers and float32 outside them: as near to float32 as bf16 allows."""
    torch.set_default_dtype(torch.float32)
    ours, exact = twins(LitModel)
    start = nn.utils.parameters_to_vector(exact.parameters()).detach()
    dtypes = set()
    ours.rnn.register_forward_hook(lambda module, args, output: dtypes.add(output[0].dtype))
    losses = Trainer(ours, torch.bfloat16).fit(BATCHES)
    assert dtypes == {torch.bfloat16}
    assert losses == pytest.approx(Trainer(exact, None).fit(BATCHES), rel=BF16, abs=0)
    found, wanted = (nn.utils.parameters_to_vector(model.parameters()) - start for model in (ours, exact))
    assert_close(found, wanted, "what training changed", BF16)


@pytest.mark.native
@pytest.mark.skipif(not ONEDNN_HAS_BFLOAT16, reason="torch.nn.LSTM fails under autocast: oneDNN, this CPU, bfloat16")
def test_mixed_precision_on_aten_is_just_torch_s() -> None:
    torch.set_default_dtype(torch.float32)
    ours, theirs = twins(LitModel)
    assert Trainer(ours, torch.bfloat16).fit(BATCHES) == Trainer(theirs, torch.bfloat16).fit(BATCHES)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
