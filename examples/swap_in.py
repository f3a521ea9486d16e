"""A model of torch.nn's layers made ours with one call, checked, timed beside the original, and made torch.nn's again.

The model is as people write them, and knows nothing of this package: an encoder reads token sequences of unequal
length, packed, through two bidirectional LSTM layers; a linear layer names the topic; a GRU decoder, started from what
the encoder remembers, predicts a reply word by word. Then

    ours = lt.replace(copy.deepcopy(model))     the copy's nn.LSTM and nn.GRU become lt.LSTM and lt.GRU, in place
    check                                       outputs and all gradients of both against the model in float64; exit
                                                status 1 where one of ours is further off than --tolerance
    time                                        forward and backward of both, in turns
    lt.to_torch(ours)                           torch.nn's layers again, on the same parameters

Without deepcopy, lt.replace changes the model itself: its parameters stay the same objects, and optimizers and
checkpoints go on working.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton as lt

PADDING = 0


class Batch(NamedTuple):
    tokens: Tensor  # [T, B] int64, PADDING past a row's length
    lengths: Tensor  # [B] int64, on the CPU, as packing wants them
    topic: Tensor  # [B] int64
    reply: Tensor  # [R, B] int64


class Assistant(nn.Module):
    """Names a request's topic and predicts the reply, whose words before the predicted one it is given."""

    def __init__(self, words: int, topics: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, embedding, padding_idx=PADDING)
        self.encoder = nn.LSTM(embedding, hidden, num_layers=2, bidirectional=True)
        self.topic = nn.Linear(2 * hidden, topics)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(embedding, hidden)
        self.word = nn.Linear(hidden, words)

    def forward(self, tokens: Tensor, lengths: Tensor, reply: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [T, B], lengths [B], reply [R, B] -> logits [B, topics] and [R, B, words]."""
        packed = pack_padded_sequence(self.embed(tokens), lengths, enforce_sorted=False)
        _, (h, _) = self.encoder(packed)  # h [layers * directions, B, H]
        read = torch.cat((h[-2], h[-1]), dim=1)  # the last layer's, where either direction ended
        begun = torch.tanh(self.bridge(read)).unsqueeze(0)
        before = F.pad(reply[:-1], (0, 0, 1, 0))  # PADDING begins a reply
        spoken, _ = self.decoder(self.embed(before), begun)
        return self.topic(read), self.word(spoken)


def draw_batch(args: argparse.Namespace) -> Batch:
    lengths = torch.randint(1, args.seq + 1, (args.batch,))
    lengths[0] = args.seq
    tokens = torch.randint(1, args.words, (args.seq, args.batch))
    tokens[torch.arange(args.seq)[:, None] >= lengths] = PADDING
    topic, reply = torch.randint(args.topics, (args.batch,)), torch.randint(1, args.words, (args.seq // 2, args.batch))
    return Batch(tokens.to(args.device), lengths, topic.to(args.device), reply.to(args.device))


def run(model: Assistant, batch: Batch) -> dict[str, Tensor]:
    """Forward and backward: outputs, and the gradients of a loss in every parameter, by name."""
    model.zero_grad(set_to_none=True)
    topic, words = model(batch.tokens, batch.lengths, batch.reply)
    loss = F.cross_entropy(topic, batch.topic) + F.cross_entropy(words.flatten(0, 1), batch.reply.flatten())
    loss.backward()
    outputs = {"topic": topic.detach(), "reply": words.detach()}
    return outputs | {f"d {name}": p.grad for name, p in model.named_parameters()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, 0 where both are 0; not a number where something in either is not."""
    error, size = (found.double() - exact).norm(), exact.norm()
    return 0.0 if error == size == 0 else float(error / size)


def check(ours: Assistant, theirs: Assistant, batch: Batch, tolerance: float) -> bool:
    """Print a table of errors relative to float64; whether all of ours are within tolerance."""
    exact = run(copy.deepcopy(theirs).double(), batch)
    found, other = run(ours, batch), run(theirs, batch)
    print(f"\n{'relative to float64':32}{'lstm_triton':>12}{'torch.nn':>12}")
    passed = True
    for name, wanted in exact.items():
        error = relative_error(found[name], wanted)
        within = error <= tolerance  # False for NaN
        passed &= within
        print(f"{name:32}{error:12.1e}{relative_error(other[name], wanted):12.1e}{'' if within else '   too large'}")
    print(f"all within {tolerance:.0e}" if passed else f"not all of lstm_triton's are within {tolerance:.0e}")
    return passed


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Of one call: between two events on a GPU, by the wall clock on the CPU."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_in_turns(steps: dict[str, Callable[[], object]], rounds: int, device: str) -> None:
    """In turns, so that whatever else the machine does meets all alike; the first round warms up and is dropped."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            taken[name].append(milliseconds(steps[name], device))
    where = torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {torch.get_num_threads()} thread(s)"
    print(f"\nforward and backward on {where}, ms, over {rounds} rounds:")
    print(f"{'':16}{'median':>10}{'20 %':>10}{'80 %':>10}")
    for name, samples in taken.items():
        low, median, high = torch.tensor(samples[1:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        print(f"{name:16}{median:10.2f}{low:10.2f}{high:10.2f}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("lstm_triton's kernels were interpreted: its times say nothing about how fast they are on a GPU.")
    elif device != "cuda":
        print("On the CPU both run PyTorch's CPU kernels: these times say nothing about the Triton kernels.")


def check_return(ours: Assistant, theirs: Assistant, batch: Batch, tolerance: float) -> bool:
    """Whether lt.to_torch gives torch.nn's layers, the same parameters, and the original's outputs."""
    back = lt.to_torch(ours)
    plain = type(back.encoder) is nn.LSTM and type(back.decoder) is nn.GRU
    shared = all(a is b for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    keys = list(back.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        pairs = zip(back(*batch[:2], batch.reply), theirs(*batch[:2], batch.reply), strict=True)
        error = max(relative_error(a, b.double()) for a, b in pairs)
    print(
        f"\nback again: layers of torch.nn: {plain}; parameters shared with ours: {shared}; keys of the state dict as "
        f"before: {keys}; outputs within {error:.1e} of the original's"
    )
    return plain and shared and keys and error <= tolerance


def at_least(low: int) -> Callable[[str], int]:
    """What argparse makes of a number: it has to be an integer, `low` or more."""

    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return int(text)

    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--words", type=at_least(2), default=500, help="size of the vocabulary")
    add("--topics", type=at_least(2), default=8, help="topics to choose from")
    add("--embedding", type=at_least(1), default=64, help="numbers that stand for a word")
    add("--hidden", type=at_least(1), default=128, help="hidden units of each layer and direction")
    add("--batch", type=at_least(1), default=16, help="sequences in the batch")
    add("--seq", type=at_least(4), default=32, help="words of the longest sequence; replies have half as many")
    add("--rounds", type=at_least(1), default=20, help="timed calls of either model")
    add("--tolerance", type=float, default=1e-5, help="of each output and gradient, relative to float64")
    add("--seed", type=int, default=0, help="of the weights and the batch")
    add("--threads", type=at_least(1), default=1, help="of the CPU; more are faster only where cores are idle")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    add("--device", choices=devices, default=devices[0], help="cuda runs the Triton kernels")
    add("--spoil", action="store_true", help="change one weight of the converted copy, to see the check fail")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    # float32 all through: TF32 keeps 10 bits, and the tolerance asks for more
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(args.seed)
    theirs = Assistant(args.words, args.topics, args.embedding, args.hidden).to(args.device)
    batch = draw_batch(args)

    ours = lt.replace(copy.deepcopy(theirs))
    print(f"encoder: {theirs.encoder}\n      -> lstm_triton.{ours.encoder}")
    print(f"decoder: {theirs.decoder}\n      -> lstm_triton.{ours.decoder}")
    if args.spoil:
        with torch.no_grad():
            ours.decoder.weight_hh_l0[0, 0] += 0.1

    passed = check(ours, theirs, batch, args.tolerance)
    if passed:  # a speed of wrong results is none
        time_in_turns(
            {"lstm_triton": lambda: run(ours, batch), "torch.nn": lambda: run(theirs, batch)}, args.rounds, args.device
        )
        passed = check_return(ours, theirs, batch, args.tolerance)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
