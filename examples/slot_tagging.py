"""A network that tags the words of travel requests, and one that cannot, since it has no memory.

In "arrive Beijing on November 2nd" the word Beijing is a destination, in "leave Beijing on November 2nd" a departure.
The word is the same in both, and so are the words after it: what decides is the verb, which was read before. To tag
each word as it comes therefore takes something that lasts from the verb to the city, whatever lies between:

    recurrent   embedding -> one layer of lt.RNN, lt.GRU or lt.LSTM, in reading direction -> linear -> softmax.
                Its state h[t-1] is all that it knows of the words before. Training has to find out that "which verb
                came last" is worth keeping there through other words, and worth overwriting at the next verb.
    window      embeddings of the word and of the `--window` words on either side, side by side -> linear -> tanh ->
                linear -> softmax. As many hidden units, the same batches, loss and optimizer; and it sees next words.

Where the verb lies in the window, the second network is as right as the first. Where it does not, "arrive ... Beijing"
and "leave ... Beijing" are the same input to it; and since the grammar draws verbs independently of all else, no
training makes it better there than guessing. (Such tags by recurrent networks: Mesnil et al. 2013, Yao et al. 2013.)

Held out are not only sentences but what they combine: each city occurs with one of the two verbs of arriving, and with
one of the two of leaving, in held-out sentences only.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import lstm_triton as lt

TAGS = ("other", "destination", "departure", "date")
OTHER, DESTINATION, DEPARTURE, DATE = range(len(TAGS))
IGNORED = -100  # the tag of padding, which cross_entropy leaves out

ARRIVING, LEAVING = ("arrive", "land"), ("leave", "depart")
CITIES = (
    "Beijing", "Paris", "London", "Nairobi", "Lima", "Oslo", "Cairo", "Mumbai", "Sydney", "Toronto", "Berlin", "Madrid",
    "Rome", "Vienna", "Warsaw", "Athens", "Lisbon", "Dublin", "Prague", "Seoul", "Tokyo", "Manila", "Jakarta", "Hanoi",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = [f"{day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(day if day < 20 else day % 10, 'th') }" for day in range(1, 29)]
OPENINGS = ("", "please", "I would like to", "we have to", "could you help me to", "my friends and I want to")
FILLERS = (
    "some time in the early evening", "if at all possible", "with two small children", "as early as we can",
    "by train or by plane", "with no more than one change", "before it gets dark", "for a wedding",
)  # fmt: skip
BEFORE_CITY = ("", "", "at", "the city is", "and the place is")  # after either verb
PADDING = "<padding>"

#: Shown tagged: two sentences that differ in the verb alone. Neither of the verbs meets this city in training.
PAIRS = {
    which: [f"{verb} {between} Beijing on November 2nd".split() for verb in ("arrive", "leave")]
    for which, between in (("near", ""), ("far", "some time in the early evening at"))
}


@dataclass(frozen=True)
class Sentence:
    """Words and their tags; for each city, at its word's index, how many words before it the deciding verb stands."""

    words: list[str]
    tags: list[int]
    distances: dict[int, int]


def draw_sentence(rng: random.Random, held_out: bool) -> Sentence:
    """One request of one or two legs, all of whose pairs of verb and city are held out, or none."""
    words = rng.choice(OPENINGS).split()
    tags = [OTHER] * len(words)
    distances = {}
    for leg in range(rng.choice((1, 2))):
        arriving = rng.random() < 0.5
        city = rng.randrange(len(CITIES))
        unseen = city % 2 if arriving else city // 2 % 2  # which of the two verbs this city has when held out only
        verb = (ARRIVING if arriving else LEAVING)[unseen if held_out else 1 - unseen]
        date = ["on", rng.choice(MONTHS), rng.choice(DAYS)]
        fillers = [filler.split() for filler in rng.sample(FILLERS, rng.choice((0, 0, 1, 2)))]
        between, after = ([*fillers, date], []) if rng.random() < 0.3 else (fillers, [date])

        words += (["and", "then"] if leg else []) + [verb]
        start = len(words) - 1
        words += [word for phrase in between for word in phrase] + rng.choice(BEFORE_CITY).split() + [CITIES[city]]
        distances[len(words) - 1] = len(words) - 1 - start
        words += [word for phrase in after for word in phrase]
        tags += [DATE if word in MONTHS or word in DAYS else OTHER for word in words[len(tags) :]]
        tags[max(distances)] = DESTINATION if arriving else DEPARTURE
    return Sentence(words, tags, distances)


def draw_sentences(count: int, seed: int, held_out: bool) -> list[Sentence]:
    rng = random.Random(2 * seed + held_out)
    return [draw_sentence(rng, held_out) for _ in range(count)]


def vocabulary() -> dict[str, int]:
    """Every word of the grammar; PADDING is 0."""
    phrases = [*OPENINGS, "and then", *ARRIVING, *LEAVING, *CITIES, "on", *MONTHS, *DAYS, *FILLERS, *BEFORE_CITY]
    words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
    return {word: number for number, word in enumerate([PADDING, *words])}


class Recurrent(nn.Module):
    """The tag of word t from words 0 to t, as far as the state remembers them."""

    def __init__(self, cell: str, words: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, embedding)
        self.layer = {"rnn": lt.RNN, "gru": lt.GRU, "lstm": lt.LSTM}[cell](embedding, hidden)
        self.classify = nn.Linear(hidden, len(TAGS))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """words [T, B], lengths [B], both int64 -> logits [T, B, tags]."""
        h, _ = self.layer(self.embed(words), lengths=lengths)  # [T, B, H], zero past a row's length
        return self.classify(h)


class Window(nn.Module):
    """The tag of word t from words t - reach to t + reach, each at its own place; PADDING beyond the ends."""

    def __init__(self, reach: int, words: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.reach = reach
        self.embed = nn.Embedding(words, embedding)
        self.hide = nn.Linear((2 * reach + 1) * embedding, hidden)
        self.classify = nn.Linear(hidden, len(TAGS))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """As Recurrent; lengths are not needed, since padding is a word to it."""
        padded = F.pad(words, (0, 0, self.reach, self.reach))
        windows = padded.unfold(0, 2 * self.reach + 1, 1)  # [T, B, 2 * reach + 1]
        return self.classify(torch.tanh(self.hide(self.embed(windows).flatten(2))))


def to_tensors(sentences: Sequence[list[str]], numbers: dict[str, int], device: str) -> tuple[Tensor, Tensor]:
    """-> words [T, B], padded to the longest, and lengths [B], int64."""
    words = pad_sequence([torch.tensor([numbers[word] for word in sentence]) for sentence in sentences])
    return words.to(device), torch.tensor([len(sentence) for sentence in sentences]).to(device)


def train(model: nn.Module, sentences: Sequence[Sentence], numbers: dict[str, int], args: argparse.Namespace) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    rng = random.Random(args.seed)  # the same batches for either network
    for _ in range(args.steps):
        batch = rng.sample(sentences, args.batch)
        tags = pad_sequence([torch.tensor(s.tags) for s in batch], padding_value=IGNORED).to(args.device)  # [T, B]
        logits = model(*to_tensors([s.words for s in batch], numbers, args.device))
        loss = F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=IGNORED)  # of their softmax
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def predict(model: nn.Module, sentences: Sequence[list[str]], numbers: dict[str, int], device: str) -> list[list[int]]:
    """The likeliest tag of each word."""
    tags = model(*to_tensors(sentences, numbers, device)).argmax(-1).T.tolist()
    return [row[: len(sentence)] for row, sentence in zip(tags, sentences, strict=True)]


@dataclass(frozen=True)
class Accuracy:
    """Shares tagged right: of all words, of those not `other`, of cities with the verb within reach and beyond."""

    words: float
    slots: float
    near: float
    far: float

    @classmethod
    def of(cls, predicted: list[list[int]], sentences: Sequence[Sentence], reach: int) -> Accuracy:
        right: dict[str, list[bool]] = {"words": [], "slots": [], "near": [], "far": []}
        for found, sentence in zip(predicted, sentences, strict=True):
            hits = [tag == wanted for tag, wanted in zip(found, sentence.tags, strict=True)]
            right["words"] += hits
            right["slots"] += [hit for hit, wanted in zip(hits, sentence.tags, strict=True) if wanted != OTHER]
            for t, distance in sentence.distances.items():
                right["near" if distance <= reach else "far"].append(hits[t])
        return cls(**{name: sum(hits) / len(hits) if hits else math.nan for name, hits in right.items()})


@dataclass(frozen=True)
class Result:
    recurrent: Accuracy
    window: Accuracy
    #: By network, by pair ("near", "far"): the tags of the pair's two sentences.
    tags: dict[str, dict[str, list[list[int]]]]


def print_pair(cell: str, pair: list[list[str]], recurrent: list[list[int]], window: list[list[int]]) -> None:
    """The two sentences side by side, a word a line, each with its tags by both networks."""
    print("\n" + (f"{'word':10}{cell:13}{'window':17}" * 2).rstrip())
    for row in zip(*(zip(*columns, strict=True) for columns in zip(pair, recurrent, window, strict=True)), strict=True):
        print("".join(f"{word:10}{TAGS[tag]:13}{TAGS[by_window]:17}" for word, tag, by_window in row).rstrip())


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
    add("--cell", choices=("rnn", "gru", "lstm"), default="lstm", help="recurrent layer")
    add("--hidden", type=at_least(1), default=64, help="hidden units, of either network")
    add("--embedding", type=at_least(1), default=32, help="numbers that stand for a word, in either network")
    add("--window", type=at_least(1), default=2, help="words that the other network sees on either side of each word")
    add("--sentences", type=at_least(1), default=4000, help="sentences to train on")
    add("--held-out", type=at_least(1), default=1000, help="sentences to test on")
    add("--steps", type=at_least(0), default=300, help="training steps of each network")
    add("--batch", type=at_least(1), default=32, help="sentences in a step")
    add("--lr", type=float, default=5e-3, help="Adam's learning rate")
    add("--seed", type=int, default=0, help="of the sentences, the weights and the batches")
    add("--threads", type=at_least(1), default=1, help="of the CPU; tensors this small only make more of them wait")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    add("--device", choices=devices, default=devices[0], help="cuda runs the Triton kernels")
    args = parser.parse_args(argv)
    if args.batch > args.sentences:
        parser.error(f"--batch {args.batch} takes more sentences than --sentences {args.sentences}")
    return args


def main(argv: Sequence[str] | None = None) -> Result:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    numbers = vocabulary()
    training = draw_sentences(args.sentences, args.seed, held_out=False)
    held_out = draw_sentences(args.held_out, args.seed, held_out=True)
    sizes = (len(numbers), args.embedding, args.hidden)
    models = {"recurrent": Recurrent(args.cell, *sizes), "window": Window(args.window, *sizes)}
    labels = {"recurrent": f"{args.cell}, {args.hidden} units", "window": f"window of +-{args.window} words"}

    print(f"{len(training)} sentences to train on, for example:\n    {' '.join(training[0].words)}")
    others = [tag == OTHER for sentence in held_out for tag in sentence.tags]
    print(f"{len(held_out)} held out, in which {sum(others) / len(others):.1%} of the words are tagged `other`.\n")
    print(f"{'held-out accuracy on':21}{'all words':>15}{'slot words':>13}{'cities, verb':>15}{'cities, verb':>15}")
    print(f"{'':49}{f'<= {args.window} words off':>15}{'further off':>15}")
    accuracies, tags = {}, {}
    for name, model in models.items():
        train(model.to(args.device), training, numbers, args)
        found = predict(model, [s.words for s in held_out], numbers, args.device)
        accuracies[name] = a = Accuracy.of(found, held_out, args.window)
        print(f"{labels[name]:21}{a.words:15.2%}{a.slots:13.2%}{a.near:15.2%}{a.far:15.2%}")
        tags[name] = {which: predict(model, pair, numbers, args.device) for which, pair in PAIRS.items()}
    for which, pair in PAIRS.items():
        print_pair(args.cell, pair, tags["recurrent"][which], tags["window"][which])
    return Result(**accuracies, tags=tags)


if __name__ == "__main__":
    main()
