"""A character model of English: what comes next in the text of Python's own help pages (`pydoc_data.topics`).

    embedding -> lt.LSTM, lt.GRU or lt.RNN -> linear -> softmax over the next character

Trained by truncated back-propagation through time (Williams and Peng 1990): the text is cut into `--batch` streams that
are read side by side, `--seq` characters a step. The state at the end of a step is the initial state of the next: what
was read long ago still counts. Gradients stop at the step's first character, which bounds what has to be kept.

The measure is bits per character of the last tenth of the text, which is not trained on: the mean of -log2 of the next
character's probability. Beside it stand the bits of a model that knows only how frequent each character is, and those
of the same model with torch.nn's layer. The same seed gives both the same weights, batches and dropout; on the CPU,
where both run PyTorch's kernels, the bits come out equal but for rounding.

A checkpoint holds all that the next step depends on, so that a run that was stopped and resumed gives the numbers of
one that was not. The text is that of the Python that runs this: other versions have other help pages.
"""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lstm_triton as lt

LIBRARIES: dict[str, Any] = {"lstm_triton": lt, "torch.nn": nn}
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: What a run must have in common with the checkpoint that it resumes.
SETTINGS = ("cell", "hidden", "layers", "dropout", "batch", "seq", "lr", "seed", "amp", "device")

#: Between steps: None at a stream's beginning, h of RNN and GRU, (h, c) of LSTM.
State = Tensor | tuple[Tensor, Tensor] | None


def text_of_python() -> tuple[str, Tensor, Tensor]:
    """-> characters; the part to train on [N] and that held out [M], int64: each character's place among characters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = "".join(sorted(set(text)))
    places = {character: place for place, character in enumerate(characters)}
    encoded = torch.tensor([places[character] for character in text])
    return characters, *encoded.tensor_split([len(encoded) * 9 // 10])


def unigram_bits(training: Tensor, held_out: Tensor, characters: int) -> float:
    """Bits per held-out character of a model of the training part's frequencies, each count plus one."""
    counts = torch.bincount(training, minlength=characters) + 1.0
    return float(-(counts / counts.sum()).log2()[held_out].mean())


def streams_of(text: Tensor, count: int, device: str) -> Tensor:
    """[N] -> [N // count, count]: column b is the b-th piece of the text."""
    length = len(text) // count
    return text[: length * count].view(count, length).T.contiguous().to(device)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    if isinstance(state, tuple):
        return tuple(map(function, state))
    return None if state is None else function(state)


class CharModel(nn.Module):
    def __init__(self, library: str, characters: int, args: argparse.Namespace) -> None:
        super().__init__()
        layer = getattr(LIBRARIES[library], args.cell.upper())
        self.embed = nn.Embedding(characters, args.hidden)
        self.layer = layer(args.hidden, args.hidden, args.layers, dropout=args.dropout)
        self.predict = nn.Linear(args.hidden, characters)

    def forward(self, text: Tensor, state: State) -> tuple[Tensor, State]:
        """text [T, B] int64 -> logits [T, B, characters] of what follows each, and the state after the last."""
        h, state = self.layer(self.embed(text), state)
        return self.predict(h), state


class Trainer:
    """A model with all else that changes from step to step: optimizer, loss scale, place in the text, carried state."""

    def __init__(self, library: str, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.characters, training, held_out = text_of_python()
        self.model = CharModel(library, len(self.characters), args).to(args.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        # fp16 gradients would underflow unscaled; bf16 has float32's range and needs none
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
        self.streams = streams_of(training, args.batch, args.device)
        self.held_out = streams_of(held_out, args.batch, args.device)
        self.step = self.place = 0
        self.state: State = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device, AMP_DTYPES.get(self.args.amp), enabled=self.args.amp != "off")

    def train_step(self) -> Tensor:
        """-> the loss, on the device: reading it would wait for the device."""
        self.model.train()
        if self.place + self.args.seq >= len(self.streams):
            self.place, self.state = 0, None
        piece = self.streams[self.place : self.place + self.args.seq + 1]
        with self.autocast():
            logits, state = self.model(piece[:-1], self.state)
            loss = F.cross_entropy(logits.flatten(0, 1), piece[1:].flatten())
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.place = self.step + 1, self.place + self.args.seq
        self.state = map_state(Tensor.detach, state)  # its values without their history: truncated here
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per character of the held-out part, read in streams with the state carried from piece to piece."""
        self.model.eval()
        state, total = None, 0.0
        for start in range(0, len(self.held_out) - 1, self.args.seq):
            piece = self.held_out[start : start + self.args.seq + 1]
            with self.autocast():
                logits, state = self.model(piece[:-1], state)
            total += float(F.cross_entropy(logits.float().flatten(0, 1), piece[1:].flatten(), reduction="sum"))
        return total / self.held_out[1:].numel() / math.log(2)

    @torch.no_grad()
    def sample(self, count: int, beginning: str = "The ") -> str:
        """`count` characters after `beginning`, each drawn from what the model expects after all before it."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.args.seed)
        text, fed, state = beginning, beginning, None
        for _ in range(count):
            numbers = torch.tensor([[self.characters.index(c)] for c in fed], device=self.args.device)  # [T, 1]
            with self.autocast():
                logits, state = self.model(numbers, state)
            expected = (logits[-1, 0].float() / self.args.temperature).softmax(-1)
            fed = self.characters[int(torch.multinomial(expected.cpu(), 1, generator=generator))]
            text += fed
        return text

    def save(self, path: Path) -> None:
        """Atomically: `path` holds the old checkpoint or the new one, whenever the machine stops."""
        checkpoint = {
            "settings": {name: getattr(self.args, name) for name in SETTINGS},
            **{name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")},
            "step": self.step, "place": self.place, "state": self.state, "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.args.device == "cuda" else None,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Raises SystemExit where the checkpoint is of other settings, or of a later step than this run's last."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        other = {name: value for name, value in checkpoint["settings"].items() if getattr(self.args, name) != value}
        if other or checkpoint["step"] > self.args.steps:
            told = f"made with {other}" if other else f"of step {checkpoint['step']}, beyond --steps {self.args.steps}"
            raise SystemExit(f"{path} cannot be resumed: it is {told}")
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(checkpoint[name])
        self.step, self.place = checkpoint["step"], checkpoint["place"]
        self.state = map_state(lambda s: s.to(self.args.device), checkpoint["state"])
        torch.set_rng_state(checkpoint["rng"])
        if self.args.device == "cuda":
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])


def train(library: str, args: argparse.Namespace) -> Trainer:
    """Up to step `args.steps`, from the beginning or from the checkpoint."""
    trainer = Trainer(library, args)
    path = args.checkpoint and args.checkpoint.with_name(f"{args.checkpoint.stem}-{library}{args.checkpoint.suffix}")
    if args.resume and path.exists():
        trainer.load(path)
    elif args.resume:
        print(f"no {path}: {library} begins at the beginning")
    bar = tqdm(range(trainer.step, args.steps), desc=library, unit="step", disable=None)
    for _ in bar:
        loss = trainer.train_step()
        if trainer.step % 20 == 0:
            bar.set_postfix_str(f"{float(loss) / math.log(2):.2f} bits")
        if path and (trainer.step % args.save_every == 0 or trainer.step == args.steps):
            trainer.save(path)
    return trainer


@dataclass(frozen=True)
class Result:
    """Bits per held-out character by library, and of the characters' frequencies; what was sampled."""

    bits: dict[str, float]
    unigram_bits: float
    sample: str
    trainers: dict[str, Trainer]


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
    add("--steps", type=at_least(0), default=1000, help="training steps; a resumed run goes on to this step")
    add("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="recurrent layer")
    add(
        "--hidden",
        type=at_least(1),
        default=128,
        help="hidden units of each layer, and numbers that stand for a character",
    )
    add("--layers", type=at_least(1), default=1, help="recurrent layers")
    add("--dropout", type=float, default=0.0, help="between the layers")
    add("--batch", type=at_least(1), default=32, help="streams of text read side by side")
    add("--seq", type=at_least(1), default=64, help="characters of each stream in a step: how far gradients reach back")
    add("--lr", type=float, default=5e-3, help="Adam's learning rate")
    add("--seed", type=int, default=0, help="of weights, dropout and samples")
    add("--threads", type=at_least(1), default=1, help="of the CPU; more are faster only where cores are idle")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    add("--device", choices=devices, default=devices[0], help="cuda runs the Triton kernels")
    add("--amp", choices=("off", *AMP_DTYPES), default="off", help="autocast to this type; fp16 with a scaled loss")
    add("--checkpoint", type=Path, metavar="PATH", help="file to save to; `-lstm_triton` or `-torch.nn` joins its name")
    add(
        "--save-every",
        type=at_least(1),
        default=100,
        metavar="N",
        help="steps between checkpoints, beside the last",
    )
    add("--resume", action="store_true", help="go on from --checkpoint")
    add("--sample", type=at_least(0), default=300, metavar="N", help="characters to draw from the trained model")
    add("--temperature", type=float, default=0.7, help="of the drawing: below 1, likely characters become likelier")
    add("--compare", action=argparse.BooleanOptionalAction, default=True, help="train torch.nn's layer too")
    args = parser.parse_args(argv)
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    if args.temperature <= 0:
        parser.error(f"--temperature must be above 0, got {args.temperature}")
    longest = len(text_of_python()[2]) // args.batch - 1
    if args.seq > longest:
        parser.error(f"--batch {args.batch} streams of the held-out text have at most --seq {longest}, got {args.seq}")
    return args


def main(argv: Sequence[str] | None = None) -> Result:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    characters, training, held_out = text_of_python()
    print(f"{len(training)} characters to train on, {len(held_out)} held out, {len(characters)} kinds of them")
    print(f"{args.cell}, {args.layers} x {args.hidden} units, on {args.device}")
    libraries = list(LIBRARIES) if args.compare else ["lstm_triton"]
    trainers = {library: train(library, args) for library in libraries}
    bits = {library: trainer.evaluate() for library, trainer in trainers.items()}
    sample = trainers["lstm_triton"].sample(args.sample) if args.sample else ""
    result = Result(bits, unigram_bits(training, held_out, len(characters)), sample, trainers)

    read = args.batch * args.seq * args.steps / len(training)
    print(f"\nbits per held-out character after {args.steps} steps, {read:.1f} times through the text:")
    for name, value in {"frequencies alone": result.unigram_bits, **bits}.items():
        print(f"    {name:20}{value:.5f}")
    if sample:
        print(f"\na sample, at temperature {args.temperature}:\n\n{textwrap.indent(sample, '    ')}")
    return result


if __name__ == "__main__":
    main()
