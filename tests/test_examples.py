"""The examples in short form: each does what its page says, and what it calls a failure fails."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from numerics import relative_error


def options(**values: object) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


NAMES = ("char_lm", "slot_tagging", "swap_in")
FOLDER = Path(__file__).parent.parent / "examples"
CPU = ["--device", "cpu"]
SMALL_LM = [*CPU, "--no-compare", *options(hidden=16, layers=2, dropout=0.3, batch=4, seq=8, sample=0)]
SMALL_MODEL = [*CPU, *options(words=9, topics=2, embedding=3, hidden=4, batch=2, seq=4, rounds=1)]


def example(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The examples are programs, and set for their process what other tests want as it was."""
    threads, tf32 = torch.get_num_threads(), (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """char_lm on the first lines of its text."""
    char_lm = example("char_lm")
    topics = char_lm.topics
    monkeypatch.setattr(char_lm, "topics", {"first": topics[min(topics)][:400]})
    return char_lm


def test_no_example_is_left_out() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == list(NAMES)


@pytest.mark.native
@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option is told, with what it is for and its default."""
    with pytest.raises(SystemExit) as end:
        example(name).main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    for option in ("--device", "--seed", "--hidden"):
        assert option in told
    assert told.count("(default: ") >= 10


@pytest.fixture(scope="module")
def tagged() -> Any:
    return example("slot_tagging").main([*CPU, *options(steps=150, lr=0.01, held_out=500)])


@pytest.mark.native
def test_the_recurrent_network_tags_what_it_never_saw(tagged: Any) -> None:
    accuracy = tagged.recurrent
    assert min(accuracy.words, accuracy.slots, accuracy.near, accuracy.far) > 0.99
    slot_tagging = example("slot_tagging")
    for which, pair in slot_tagging.PAIRS.items():
        city = pair[0].index("Beijing")
        assert [tags[city] for tags in tagged.tags["recurrent"][which]] == [
            slot_tagging.DESTINATION,
            slot_tagging.DEPARTURE,
        ]


@pytest.mark.native
def test_the_window_fails_where_the_verb_is_out_of_it_and_only_there(tagged: Any) -> None:
    """Among some 300 cities a guess is right for 0.5 +- 0.03."""
    accuracy = tagged.window
    assert accuracy.near > 0.99
    assert 0.35 < accuracy.far < 0.65
    assert accuracy.slots < 0.95
    slot_tagging = example("slot_tagging")
    near, far = (tagged.tags["window"][which] for which in ("near", "far"))
    assert [tags[1] for tags in near] == [slot_tagging.DESTINATION, slot_tagging.DEPARTURE]
    city = slot_tagging.PAIRS["far"][0].index("Beijing")
    assert far[0][city] == far[1][city]


@pytest.mark.native
def test_a_window_is_all_the_words_in_it() -> None:
    """A word within reach changes the logits, one beyond does not, whatever else the sentence and the batch hold."""
    slot_tagging = example("slot_tagging")
    torch.manual_seed(0)
    model = slot_tagging.Window(2, 20, 4, 8)
    words = torch.randint(1, 20, (9, 3))
    before = model(words, torch.full((3,), 9))
    for t in range(9):
        changed = words.clone()
        changed[t, 1] = words[t, 1] % 19 + 1
        same = (model(changed, torch.full((3,), 9)) == before).all(-1)
        assert same[:, [0, 2]].all()
        assert same[:, 1].tolist() == [abs(other - t) > 2 for other in range(9)]


@pytest.mark.native
def test_sentences_are_tagged_by_their_last_verb_and_held_out_pairs_stay_held_out() -> None:
    slot_tagging = example("slot_tagging")
    pairs, cities = [], []
    for held_out in (False, True):
        seen = set()
        for sentence in slot_tagging.draw_sentences(1000, 0, held_out):
            verb = start = None
            for t, (word, tag) in enumerate(zip(sentence.words, sentence.tags, strict=True)):
                if word in slot_tagging.ARRIVING + slot_tagging.LEAVING:
                    verb, start = word, t
                if word in slot_tagging.CITIES:
                    seen.add((verb, word))
                    wanted = slot_tagging.DESTINATION if verb in slot_tagging.ARRIVING else slot_tagging.DEPARTURE
                    assert (tag, sentence.distances[t]) == (wanted, t - start)
                else:
                    date = word in slot_tagging.MONTHS or word[0].isdigit()
                    assert tag == (slot_tagging.DATE if date else slot_tagging.OTHER)
        pairs.append(seen)
        cities.append({city for _, city in seen})
    assert not pairs[0] & pairs[1]
    assert cities[0] == cities[1] == set(slot_tagging.CITIES)
    for verbs in (slot_tagging.ARRIVING, slot_tagging.LEAVING):  # so that a city says nothing of the verb's meaning
        assert all(sorted(city for verb, city in seen if verb in verbs) == sorted(cities[0]) for seen in pairs)
    for pair in slot_tagging.PAIRS.values():
        assert {(sentence[0], "Beijing") for sentence in pair} <= pairs[1]


@pytest.mark.native
def test_characters_of_ours_and_of_torch_nn(capsys: pytest.CaptureFixture[str]) -> None:
    char_lm = example("char_lm")
    result = char_lm.main([*CPU, *options(steps=120, hidden=48, batch=16, seq=32, lr=0.01, sample=40)])
    assert set(result.bits) == {"lstm_triton", "torch.nn"}
    assert abs(result.bits["lstm_triton"] - result.bits["torch.nn"]) < 1e-5
    assert result.bits["lstm_triton"] < result.unigram_bits - 1
    assert 4.4 < result.unigram_bits < 5  # of English with some markup
    assert len(result.sample) == len("The ") + 40
    told = capsys.readouterr().out
    assert all(f"{bits:.5f}" in told for bits in (result.unigram_bits, *result.bits.values()))
    assert "    The " in told


def test_characters_on_interpreted_kernels(short_text: ModuleType) -> None:
    """Two steps of training on the kernels, then the same bits as torch.nn's layer on ATen, also with fp16."""
    arguments = [*CPU, *options(steps=2, hidden=8, batch=4, seq=4, sample=1)]
    bits = short_text.main(arguments).bits
    assert abs(bits["lstm_triton"] - bits["torch.nn"]) < 1e-6
    half = short_text.main([*arguments, "--amp", "fp16", "--no-compare"]).bits
    assert abs(half["lstm_triton"] - bits["torch.nn"]) < 1e-2


@pytest.mark.native
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_resumed_run_is_the_run_that_never_stopped(cell: str, short_text: ModuleType, tmp_path: Path) -> None:
    """To the bit, dropout, optimizer, carried state and place in the text included, over the text's end and before."""
    arguments = [*SMALL_LM, "--cell", cell, "--checkpoint", str(tmp_path / "run.pt"), "--save-every", "5"]
    whole = short_text.main([*SMALL_LM, "--cell", cell, "--steps", "24"])
    for steps, resume in (("7", []), ("13", ["--resume"]), ("24", ["--resume"])):
        parts = short_text.main([*arguments, "--steps", steps, *resume])
    assert [path.name for path in tmp_path.iterdir()] == ["run-lstm_triton.pt"]
    assert parts.bits == whole.bits
    for found, wanted in zip(*(r.trainers["lstm_triton"].model.parameters() for r in (parts, whole)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.native
@pytest.mark.parametrize("left_out", ["model", "optimizer", "state", "place", "rng"])
def test_everything_in_a_checkpoint_counts(left_out: str, short_text: ModuleType, tmp_path: Path) -> None:
    """A resumed run whose checkpoint lacks one of the things that it holds comes to other numbers."""
    arguments = [*SMALL_LM, "--checkpoint", str(tmp_path / "run.pt")]
    short_text.main([*arguments, "--steps", "3"])
    path = tmp_path / "run-lstm_triton.pt"
    whole = short_text.main([*arguments, "--steps", "6", "--resume"])
    short_text.main([*arguments, "--steps", "3"])
    checkpoint = torch.load(path)
    fresh = short_text.Trainer("lstm_triton", short_text.parse(arguments))
    checkpoint[left_out] = {
        "model": fresh.model.state_dict(),
        "optimizer": fresh.optimizer.state_dict(),
        "state": None,
        "place": 0,
        "rng": torch.get_rng_state(),
    }[left_out]
    torch.save(checkpoint, path)
    assert short_text.main([*arguments, "--steps", "6", "--resume"]).bits != whole.bits


@pytest.mark.native
def test_a_checkpoint_is_never_half_written(
    short_text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL_LM, "--checkpoint", str(tmp_path / "run.pt")]
    short_text.main([*arguments, "--steps", "2"])
    path = tmp_path / "run-lstm_triton.pt"
    old = path.read_bytes()

    def stop(checkpoint: object, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", stop)
        short_text.main([*arguments, "--steps", "4"])
    assert path.read_bytes() == old
    short_text.main([*arguments, "--steps", "4", "--resume"])
    assert path.read_bytes() != old


@pytest.mark.native
def test_resuming_needs_a_checkpoint_of_the_same_run(short_text: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL_LM, "--checkpoint", str(tmp_path / "run.pt")]
    short_text.main([*arguments, "--steps", "2"])
    with pytest.raises(SystemExit, match=r"cannot be resumed: it is made with \{'cell': 'lstm'\}"):
        short_text.main([*arguments, "--steps", "4", "--resume", "--cell", "gru"])
    with pytest.raises(SystemExit, match="cannot be resumed: it is of step 2, beyond --steps 1"):
        short_text.main([*arguments, "--steps", "1", "--resume"])
    with pytest.raises(SystemExit, match="2"):
        short_text.main([*SMALL_LM, "--resume"])


@pytest.mark.native
def test_a_library_without_a_checkpoint_begins_at_the_beginning(
    short_text: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a run that stopped while its first model was trained can be resumed."""
    arguments = [*SMALL_LM, "--checkpoint", str(tmp_path / "run.pt")]
    short_text.main([*arguments, "--steps", "2"])
    resumed = short_text.main([*arguments, "--steps", "3", "--resume", "--compare"])
    assert "torch.nn begins at the beginning" in capsys.readouterr().out
    assert {trainer.step for trainer in resumed.trainers.values()} == {3}


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("char_lm", ["--batch", "0"], "argument --batch: must be at least 1, got 0"),
        ("char_lm", ["--batch", "20000"], "have at most --seq"),
        ("char_lm", ["--temperature", "0"], "--temperature must be above 0"),
        ("slot_tagging", ["--sentences", "8"], "takes more sentences than --sentences 8"),
        ("slot_tagging", ["--device", "abacus"], "argument --device: invalid choice"),
        ("swap_in", ["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_told(name: str, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        example(name).main(arguments)
    assert raised.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.native
def test_nothing_is_off_by_nothing() -> None:
    error = example("swap_in").relative_error
    assert error(torch.zeros(3), torch.zeros(3)) == 0
    assert error(torch.ones(3), torch.zeros(3)) == float("inf")


@pytest.mark.both
def test_a_model_of_torch_nn_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    """On ATen, and on interpreted kernels; the page says which of them the times are of."""
    assert example("swap_in").main(SMALL_MODEL) == 0
    told = capsys.readouterr().out
    interpreted = os.environ["TRITON_INTERPRET"] == "1"
    assert ("kernels were interpreted" in told) == interpreted
    assert ("both run PyTorch's CPU kernels" in told) != interpreted
    assert "d encoder.weight_hh_l1_reverse" in told and "too large" not in told


@pytest.mark.native
def test_a_wrong_weight_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("swap_in").main([*SMALL_MODEL, "--spoil"]) == 1
    told = capsys.readouterr().out
    assert "too large" in told and "forward and backward" not in told  # no time of wrong results


@pytest.mark.native
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_what_is_not_a_number_is_too_large_an_error(wrong: float) -> None:
    found, exact = torch.full((3,), wrong), torch.ones(3, dtype=torch.float64)
    assert not example("swap_in").relative_error(found, exact) <= 1e-5


@pytest.mark.gpu
def test_examples_on_a_gpu() -> None:
    tagged = example("slot_tagging").main(["--device", "cuda"])
    assert min(tagged.recurrent.slots, tagged.recurrent.far, tagged.window.near) > 0.99
    assert example("swap_in").main(["--device", "cuda"]) == 0
    for amp in ("off", "bf16", "fp16"):
        result = example("char_lm").main(["--device", "cuda", "--steps", "200", "--sample", "20", "--amp", amp])
        assert result.bits["lstm_triton"] < result.unigram_bits - 1.5
        assert abs(result.bits["lstm_triton"] - result.bits["torch.nn"]) < 0.05


@pytest.mark.gpu
def test_a_resumed_run_on_a_gpu(short_text: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL_LM, "--device", "cuda", "--amp", "fp16"]
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt")]
    whole = short_text.main([*arguments, "--steps", "12"])
    short_text.main([*arguments, *checkpoint, "--steps", "5"])
    parts = short_text.main([*arguments, *checkpoint, "--steps", "12", "--resume"])
    found, wanted = (
        torch.cat([p.flatten() for p in r.trainers["lstm_triton"].model.parameters()]) for r in (parts, whole)
    )
    assert relative_error(found, wanted) < 1e-6
