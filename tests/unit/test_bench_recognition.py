"""The recognition benchmark's own parts; nothing is timed here."""

from benchmarks import recognition as bench_recognition
from benchmarks.table import table


def test_the_stand_in_tokenizer_gives_the_originals_lengths():
    words = bench_recognition.Words()
    prompt = words.encode(f"<|image|>{bench_recognition.PROMPT}", bos=True)
    assert (
        len(prompt) == 8
        and prompt[:2] == [1, bench_recognition.IMAGE]
        and prompt[-1] == bench_recognition.KNOWN["are"]
    )
    label = words.encode("word3,")
    assert len(label) == 3 and label[-1] == bench_recognition.COMMA  # two tokens and the delimiter
    assert words.encode("a, b") == words.encode("a,b") and words.encode("", eos=True) == [2]


def test_captions_have_five_labels():
    for text in bench_recognition.captions(3):
        assert len(bench_recognition.labels_of(text)) == 5
    assert len(set(bench_recognition.captions(4))) == 4


def runs(seconds: float, **found) -> list[dict]:
    return [{"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": 2**30, **found}]


def test_rows_name_speed_and_agreement():
    results = {"ours": runs(0.5, tokens=[[[1], [2]]]), "original": runs(5.0, tokens=[[[1], [3]]])}
    bench_recognition.add_figures(results, count=2)
    step = {"ours": runs(2.0, loss=1.0), "original": runs(4.0, loss=1.5)}
    bench_recognition.add_figures(step, count=4)
    rows = {f"case 1: {side}": runs for side, runs in results.items()}
    rows |= {f"step: {side}": runs for side, runs in step.items()}
    lines = table(rows, bench_recognition.COLUMNS).splitlines()
    assert lines[2:] == [
        "| case 1: ours | 0.50 | 0.50 | 4.0 | 1.00 GiB |  |  |  |",
        "| case 1: original | 5.00 | 5.00 | 0.4 | 1.00 GiB | 10.0 x | 10.0 x | 1 of 2 labels alike |",
        "| step: ours | 2.00 | 2.00 | 2.0 | 1.00 GiB |  |  |  |",
        "| step: original | 4.00 | 4.00 | 1.0 | 1.00 GiB | 2.0 x | 2.0 x "
        "| first loss 1.000000 and 1.500000 |",
    ]
